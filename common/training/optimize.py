"""The small calls a training loop is made of: accelerator, optimiser state, one optimiser step.

They serve `fit` and every method with a loop of its own, on one process or several.
"""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import broadcast, broadcast_object_list
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from common.training.config import FitConfig
from common.training.ema import make_ema
from common.training.method import Parameters

Result = TypeVar("Result")


class TrainingDiverged(FloatingPointError):
    """The loss or the gradient is no longer a finite number."""


@dataclass
class TrainState:
    """What training changes, under the names it has in checkpoints."""

    parameters: dict[str, Parameter]
    optimizer: Optimizer
    lr_scheduler: LRScheduler
    ema: EMAModel | None = None


def default_device() -> torch.device:
    """Where this process should put its backbone: its own GPU if there is one (LOCAL_RANK under a launcher), or CPU."""
    if not torch.cuda.is_available() or os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true"):
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


def make_accelerator(device: torch.device, mixed_precision: str = "no") -> Accelerator:
    """An Accelerator for parameters on `device`. It knows the other processes when started by `accelerate launch`.

    Raises: ValueError if the device is not the one accelerate gives this process, or cannot do the mixed precision.
    """
    if mixed_precision == "fp16" and device.type == "cpu":
        raise ValueError('mixed_precision="fp16" needs a GPU; on the CPU use "no" or "bf16"')
    if PartialState._shared_state and PartialState().num_processes == 1:  # another run in this Python process
        AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(mixed_precision=mixed_precision, cpu=device.type == "cpu")
    if accelerator.device.type != device.type or (accelerator.device.index or 0) != (device.index or 0):
        raise ValueError(
            f"the parameters are on {device}, but this process trains on {accelerator.device}; "
            "load the backbone on default_device()"
        )
    return accelerator


def make_train_state(parameters: Parameters, config: FitConfig) -> TrainState:
    """AdamW, learning-rate schedule and moving average for what a method trains.

    Args:
        parameters: as `Method.parameters()` returns them; unnamed ones are called by their number.
    Raises: ValueError if there are none, one is frozen, shares its name, or is not float32: in half precision a small
        learning rate rounds most updates to nothing.
    """
    parameters = list(parameters)
    if not parameters:
        raise ValueError("the method has no trainable parameters: parameters() is empty")
    optimizer = torch.optim.AdamW(
        parameters, lr=config.learning_rate, betas=config.adam_betas, weight_decay=config.weight_decay, fused=True
    )
    named = named_parameters(optimizer)
    for name, parameter in named.items():
        if parameter.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"trainable parameter {name} is {parameter.dtype}; it must be float32, or small updates are lost. "
                'Keep it in float32 and set mixed_precision="bf16" or "fp16" instead'
            )
        if not parameter.requires_grad:
            raise ValueError(f"trainable parameter {name} has requires_grad=False, so it would never change")
    lr_scheduler = get_scheduler(
        config.lr_schedule,
        optimizer,
        num_warmup_steps=config.lr_warmup_steps,
        num_training_steps=config.train_steps,
    )
    ema = None if config.ema_decay is None else make_ema(named.values(), config.ema_decay)
    return TrainState(named, optimizer, lr_scheduler, ema)


def named_parameters(optimizer: Optimizer) -> dict[str, Parameter]:
    """The optimiser's parameters in its order, by name if it was given names, or by number."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    names = [n for group in optimizer.param_groups for n in group.get("param_names", [None] * len(group["params"]))]
    named = {f"{i:04d}" if name is None else name: p for i, (name, p) in enumerate(zip(names, parameters, strict=True))}
    if len(named) < len(parameters):
        raise ValueError(f"two trainable parameters share a name: {sorted(n for n in names if names.count(n) > 1)[:2]}")
    return named


def optimizer_step(accelerator: Accelerator, state: TrainState, *, max_grad_norm: float | None = None) -> float:
    """Use the gradients that `accelerator.backward` left: average over processes, clip, step, schedule, average, clear.

    Returns: total gradient norm before clipping; infinite if a fp16 step was skipped because it overflowed.
    Raises: TrainingDiverged, before anything changes, if the norm is not finite (fp16 skips the step instead).
    """
    _average_gradients(accelerator, state.parameters.values())
    scaler = accelerator.scaler
    if scaler is not None:
        scaler.unscale_(state.optimizer)
    gradients = [p.grad for p in state.parameters.values() if p.grad is not None]
    if not gradients:
        raise RuntimeError("no trainable parameter received a gradient; the loss does not depend on any of them")
    grad_norm = torch.nn.utils.get_total_norm(gradients).item()
    if max_grad_norm is not None and grad_norm > max_grad_norm:
        torch._foreach_mul_(gradients, max_grad_norm / (grad_norm + 1e-6))
    if scaler is not None:
        scaler.step(state.optimizer)
        scaler.update()
    elif math.isfinite(grad_norm):
        state.optimizer.step()
    else:
        bad = [name for name, p in state.parameters.items() if p.grad is not None and not p.grad.isfinite().all()]
        raise TrainingDiverged(f"the gradient norm is {grad_norm} (not finite in {', '.join(bad[:3]) or 'the sum'})")
    state.optimizer.zero_grad(set_to_none=True)
    if math.isfinite(grad_norm):
        state.lr_scheduler.step()
        if state.ema is not None:
            state.ema.step(state.parameters.values())
    return grad_norm


def same_start(accelerator: Accelerator, state: TrainState) -> None:
    """Give all processes the main process's parameters (and average)."""
    if accelerator.num_processes > 1:
        averages = [] if state.ema is None else state.ema.shadow_params
        for tensor in [p.data for p in state.parameters.values()] + averages:
            tensor.copy_(broadcast(tensor.contiguous()))


def agree(accelerator: Accelerator, loss: Tensor, stop: int) -> tuple[float, int]:
    """One exchange per step: (mean of the processes' losses, highest of their stop signals)."""
    if accelerator.num_processes == 1:
        return loss.item(), stop
    rows = accelerator.gather(torch.stack([loss.double(), loss.new_tensor(stop, dtype=torch.float64)])[None])
    return rows[:, 0].mean().item(), int(rows[:, 1].max())


def on_main_process(accelerator: Accelerator, action: Callable[[], Result]) -> Result | None:
    """Run `action` in the main process while the others wait; if it raises, all processes stop. None in the others."""
    result, error = None, None
    if accelerator.is_main_process:
        try:
            result = action()
        except Exception as caught:
            error = caught
    if accelerator.num_processes > 1:
        failure: list[Any] = broadcast_object_list([None if error is None else f"{type(error).__name__}: {error}"])
        if failure[0] is not None and error is None:
            raise RuntimeError(f"the main process stopped: {failure[0]}")
    if error is not None:
        raise error
    return result


def _average_gradients(accelerator: Accelerator, parameters: Any) -> None:
    """Mean over processes, in buckets. No gradient counts as zero, unless no process has one: then it stays None."""
    if accelerator.num_processes == 1:
        return
    parameters = list(parameters)
    has_grad = torch.tensor([p.grad is not None for p in parameters], dtype=torch.float32, device=accelerator.device)
    used = [p for p, n in zip(parameters, accelerator.reduce(has_grad, "sum").tolist(), strict=True) if n > 0]
    for parameter in used:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    for bucket in _buckets([parameter.grad for parameter in used]):
        flat = accelerator.reduce(torch.cat([gradient.flatten() for gradient in bucket]), "mean")
        for gradient, mean in zip(bucket, flat.split([gradient.numel() for gradient in bucket]), strict=True):
            gradient.copy_(mean.view_as(gradient))


def _buckets(tensors: list[Tensor], max_elements: int = 2**24) -> list[list[Tensor]]:
    """Consecutive tensors of one dtype, up to 64 MB of float32 together."""
    buckets: list[list[Tensor]] = []
    elements = 0
    for tensor in tensors:
        if not buckets or elements + tensor.numel() > max_elements or buckets[-1][0].dtype != tensor.dtype:
            buckets.append([])
            elements = 0
        buckets[-1].append(tensor)
        elements += tensor.numel()
    return buckets
