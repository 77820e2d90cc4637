"""The training loop: one plain function over the small calls of this package."""

import math
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from common.training.checkpoint import checkpoint_folders, load_latest_checkpoint, save_checkpoint
from common.training.config import FitConfig, flat_config
from common.training.data_order import StepSampler, micro_batches
from common.training.ema import averaged_weights
from common.training.interrupt import RunInterrupted, StopRequest
from common.training.log import RunLog
from common.training.method import Method
from common.training.optimize import (
    TrainingDiverged,
    TrainState,
    agree,
    make_accelerator,
    make_train_state,
    on_main_process,
    optimizer_step,
    same_start,
)
from common.training.run_folder import open_run_folder
from common.training.seeding import seed_global_generators


@dataclass
class FitResult:
    """What a finished run reports."""

    output_dir: Path
    steps: int  # done in all, over every resumption
    first_step: int  # where this call began; > 0 if it resumed
    losses: list[float]  # of each step of this call, mean over the global batch
    validation: dict[int, float]  # steps done -> validation loss, of this call
    seconds: float  # of this call


def fit(
    method: Method,
    dataset: Dataset,
    config: FitConfig,
    output_dir: str | Path,
    *,
    validate: Callable[[], float] | None = None,
    sample_grid: Callable[[], Tensor | Image.Image] | None = None,
    scalars: Callable[[], Mapping[str, float]] | None = None,
    resume: bool = False,
) -> FitResult:
    """Train a method and leave the trained values (their average, with `ema_decay`) in its parameters.

    What is computed is a function of the method, the dataset and the config alone: a run that was killed and resumed
    gives the same bits on a CPU, one shared by several processes (`accelerate launch`) the same values up to rounding.

    Args:
        method: its parameters must be on the device of this process, `optimize.default_device()`.
        dataset: items are dictionaries; see `data_order` for datasets that draw at random.
        output_dir: the run's folder, on a disk that all processes see; see `run_folder`.
        validate: returns a loss, for example `losses.fixed_noise_validation`; called with the averaged weights, in the
            main process.
        sample_grid: returns pixel_values (B, 3, H, W) in [-1, 1] or a picture; called likewise.
        scalars: returns more numbers to log every `log_every` steps, such as the norm of what is trained.
        resume: continue the run in `output_dir`.
    Raises: RunFolderError (folder in use, not empty, other settings), TrainingDiverged (loss or gradient not finite),
        OSError (full disk), RunInterrupted (after SIGTERM or Ctrl-C). The last good checkpoint is kept in every case.
    """
    started, output_dir = time.perf_counter(), Path(output_dir)
    if len(dataset) == 0:
        raise ValueError("the dataset is empty")
    if config.gradient_checkpointing:
        _checkpoint_gradients(method)
    state = make_train_state(method.parameters(), config)
    parameters = list(state.parameters.values())
    accelerator = make_accelerator(parameters[0].device, config.mixed_precision)
    is_main = accelerator.is_main_process
    settings = flat_config(fit=config, method=getattr(method, "config", {}), dataset={"length": len(dataset)})
    open_folder = partial(open_run_folder, output_dir, resume=resume, config=settings)
    with ExitStack() as stack:
        run = on_main_process(accelerator, open_folder)
        if run is not None:
            stack.enter_context(run)
        first_step = load_latest_checkpoint(output_dir, {"method": state}, scaler=accelerator.scaler)
        same_start(accelerator, state)
        batches = iter(_loader(dataset, config, first_step, accelerator))
        log = RunLog(output_dir, first_step=first_step, total_steps=config.train_steps, enabled=is_main)
        stack.enter_context(log)
        request = stack.enter_context(StopRequest())
        save = partial(save_checkpoint, output_dir, states={"method": state}, scaler=accelerator.scaler)
        result = FitResult(output_dir, first_step, first_step, [], {}, 0.0)
        for step in range(first_step, config.train_steps):
            seed_global_generators(config.seed, step, accelerator.process_index)
            loss = torch.zeros((), device=accelerator.device)
            for _ in range(config.gradient_accumulation_steps):
                batch = _to_device(next(batches), accelerator.device)
                with accelerator.autocast():
                    micro_loss = method.training_loss({**batch, "step": step})
                if micro_loss.ndim:
                    raise ValueError(f"training_loss must return a scalar, got shape {tuple(micro_loss.shape)}")
                accelerator.backward(micro_loss / config.gradient_accumulation_steps)
                loss += micro_loss.detach() / config.gradient_accumulation_steps
            loss_value, stop = agree(accelerator, loss, request.signal_number)
            grad_norm = _checked_step(accelerator, state, config, loss_value, step, output_dir)
            done = result.steps = step + 1
            last = done == config.train_steps
            result.losses.append(loss_value)
            log.step(loss_value)
            if done % config.log_every == 0 or last:
                rates = state.lr_scheduler.get_last_lr()
                more = {} if scalars is None or not is_main else scalars()
                log.scalars(done, log.since_last(config.batch_size) | {"grad_norm": grad_norm, "lr": rates[0], **more})
            if is_main and validate is not None and _due(done, config.validate_every, last):
                with averaged_weights(state.ema, parameters):
                    result.validation[done] = float(validate())
                log.scalars(done, {"validation_loss": result.validation[done]})
            if is_main and sample_grid is not None and _due(done, config.sample_every, last):
                with averaged_weights(state.ema, parameters):
                    log.image(done, sample_grid())
            if _due(done, config.checkpoint_every, last) or stop:
                on_main_process(accelerator, partial(save, step=done, keep=config.keep_checkpoints))
            if stop and not last:
                _stop(is_main, stop, done, output_dir)
    if state.ema is not None:
        state.ema.copy_to(parameters)
    result.seconds = time.perf_counter() - started
    return result


def _loader(dataset: Dataset, config: FitConfig, first_step: int, accelerator: Accelerator) -> DataLoader:
    sampler = StepSampler(
        len(dataset),
        seed=config.seed,
        first_step=first_step,
        last_step=config.train_steps,
        batch_size=config.batch_size,
        micro_batch_size=config.micro_batch_size(accelerator.num_processes),
        process_index=accelerator.process_index,
        num_processes=accelerator.num_processes,
    )
    return micro_batches(dataset, sampler, num_workers=config.num_workers)


def _to_device(batch: dict, device: torch.device) -> dict:
    """Everything to the device, except the sample keys: random numbers are drawn on the CPU."""
    return {**send_to_device(batch, device), "sample_keys": batch["sample_keys"]}


def _checked_step(
    accelerator: Accelerator, state: TrainState, config: FitConfig, loss: float, step: int, output_dir: Path
) -> float:
    """`optimizer_step`, unless loss or gradient are not finite: then nothing is changed and the run stops."""
    try:
        if not math.isfinite(loss):
            raise TrainingDiverged(f"the loss is {loss}")
        return optimizer_step(accelerator, state, max_grad_norm=config.max_grad_norm)
    except TrainingDiverged as error:
        kept = checkpoint_folders(output_dir)
        raise TrainingDiverged(
            f"stopped in step {step + 1}: {error}. "
            + (f"The last good checkpoint is {kept[-1]}. " if kept else "There is no checkpoint yet. ")
            + "Look at the data of this step, lower learning_rate or max_grad_norm, or use bf16 instead of fp16"
        ) from error


def _checkpoint_gradients(method: Method) -> None:
    if not hasattr(method, "backbone"):
        raise ValueError("gradient_checkpointing=True needs a method with a `backbone`; this one has none")
    from common.backbones.attention import enable_gradient_checkpointing  # most runs do without the backbones' imports

    enable_gradient_checkpointing(method.backbone.unet)


def _due(done: int, every: int, last: bool) -> bool:
    return last or (every > 0 and done % every == 0)


def _stop(is_main: bool, signal_number: int, done: int, output_dir: Path) -> None:
    if is_main:
        print(
            f"stopped after step {done}; checkpoint written. To continue: the same command with --resume "
            f"(resume=True) and output folder {output_dir}",
            file=sys.stderr,
            flush=True,
        )
    raise RunInterrupted(128 + signal_number)
