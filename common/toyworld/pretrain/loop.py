"""The one training loop of the recipes: plain, for CPU or GPU, bounded by steps or by minutes, safe to kill.

A run folder holds checkpoint.safetensors (weights, optimiser, average; replaced as a whole), log.jsonl, tensorboard/
and samples/. Every random draw depends on (seed, step) only, so a resumed run continues as if it had not stopped.
"""

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from diffusers.training_utils import EMAModel
from PIL import Image
from torch import Tensor, nn
from torch.optim import Optimizer

from common.io import atomic_save_safetensors, load_safetensors
from common.training.data_order import dataset_index
from common.training.ema import averaged_weights, make_ema
from common.training.interrupt import RunInterrupted, StopRequest
from common.training.log import RunLog
from common.training.optimize import TrainingDiverged, default_device
from common.training.run_folder import open_run_folder
from common.training.seeding import seeded_generator

STATE = "optimizer."  # before the names of the optimiser's tensors in a checkpoint


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """Settings of one training run; the recipes set their own defaults."""

    data: Path  # folder of shards, see common.toyworld.shards
    output: Path  # run folder
    minutes: float | None = None  # time budget of the whole run, resumed parts included; the schedule ends with it
    steps: int | None = None  # optimiser steps of the whole run; whichever of the two ends first
    batch_schedule: str = "0:32"  # from:batch size, from in steps or minutes; e.g. "0:16,20000:32" or "0m:16,90m:32"
    learning_rate: float = 1e-3
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: of matrices, at AdamW's root mean square; AdamW of the rest
    lr_schedule: Literal["cosine", "constant"] = "cosine"  # constant: held, then linearly to zero in the last fifth
    lr_warmup_steps: int = 200
    weight_decay: float = 0.0
    ema_decay: float = 0.999  # highest decay of the weights' average; it grows to it
    checkpoint_minutes: float = 10.0
    validate_minutes: float = 10.0  # validation loss and sample grid, on the average
    log_every: int = 50  # steps
    max_images: int | None = None  # of the shards; all by default
    threads: int | None = None  # torch threads
    bf16: bool | None = None  # bfloat16 autocast (weights stay float32); None = where the hardware has it
    seed: int = 0
    resume: bool = False

    def __post_init__(self) -> None:
        if self.minutes is None and self.steps is None:
            raise ValueError("give the run an end: --minutes, --steps, or both")
        parse_batch_schedule(self.batch_schedule)


@dataclass(frozen=True)
class Recipe:
    """What a recipe gives to the loop.

    loss(indices, generator) -> {"loss": scalar, other scalars to log}: indices (B,) int64 on the CPU, of num_examples.
    validate() -> scalars to log; sample_grid() -> a picture. Both run without gradients, on the averaged weights.
    """

    name: str
    model: nn.Module
    num_examples: int
    loss: Callable[[Tensor, torch.Generator], dict[str, Tensor]]
    validate: Callable[[], dict[str, float]]
    sample_grid: Callable[[], Image.Image] | None = None
    tables: frozenset[str] = frozenset()  # parameters whose rows are vectors of words: Muon leaves them to AdamW


@dataclass
class Progress:
    """Where a run stands."""

    step: int = 0
    samples: int = 0
    seconds: float = 0.0

    def fraction(self, config: LoopConfig) -> float:
        """Share of the budget that is used, 1 = the end."""
        by_steps = 0.0 if config.steps is None else self.step / config.steps
        by_time = 0.0 if config.minutes is None else self.seconds / (60 * config.minutes)
        return max(by_steps, by_time)


def train(recipe: Recipe, config: LoopConfig) -> None:
    """Train recipe.model; on return it holds the averaged weights. Raises RunInterrupted after SIGTERM or SIGINT."""
    device = default_device()
    bf16 = has_bf16(device) if config.bf16 is None else config.bf16
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    model = recipe.model.to(device)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizers = make_optimizers(parameters, config, recipe.tables)
    ema = make_ema(parameters.values(), config.ema_decay)
    progress, schedule = Progress(), parse_batch_schedule(config.batch_schedule)
    size = sum(p.numel() for p in parameters.values())
    print(f"{recipe.name}: {size:,} parameters, {recipe.num_examples:,} examples, {device}", flush=True)

    with (
        open_run_folder(config.output, resume=config.resume, config={"recipe": recipe.name}),
        StopRequest() as stop,
    ):
        checkpoint = config.output / "checkpoint.safetensors"
        if config.resume and checkpoint.exists():
            progress = load_checkpoint(checkpoint, parameters, optimizers, ema)
            print(f"resumed after step {progress.step}, {progress.seconds / 60:.1f} minutes")
        log = RunLog(config.output, first_step=progress.step, total_steps=config.steps)
        saved_at = validated_at = logged_at = progress.seconds
        last_time, seen = time.perf_counter(), progress.samples
        model.train()
        with log:
            while progress.fraction(config) < 1:
                batch_size = batch_size_at(schedule, progress)
                keys = range(progress.samples, progress.samples + batch_size)
                indices = torch.tensor([dataset_index(key, recipe.num_examples, seed=config.seed) for key in keys])
                generator = seeded_generator(config.seed, recipe.name, progress.step)
                rate = config.learning_rate * lr_factor(config, progress)
                for optimizer in optimizers:
                    optimizer.param_groups[0]["lr"] = rate
                with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                    losses = recipe.loss(indices, generator)
                losses["loss"].backward()
                norm = torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
                loss = losses["loss"].item()
                if not (math.isfinite(loss) and math.isfinite(norm.item())):
                    raise TrainingDiverged(
                        f"step {progress.step}: loss {loss}, gradient norm {norm.item()}; the last good state is "
                        f"{checkpoint}; resume it with a lower --learning-rate"
                    )
                for optimizer in optimizers:
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)
                ema.step(parameters.values())
                progress.step += 1
                progress.samples += batch_size
                now = time.perf_counter()
                progress.seconds, last_time = progress.seconds + now - last_time, now
                log.step(loss)
                if progress.step % config.log_every == 0:
                    values = log.since_last(batch_size) | {k: v.item() for k, v in losses.items() if k != "loss"}
                    values["samples_per_second"] = (progress.samples - seen) / (progress.seconds - logged_at)
                    seen, logged_at = progress.samples, progress.seconds
                    log.scalars(progress.step, values | {"learning_rate": rate, "gradient_norm": norm.item()})
                    print(status_line(recipe.name, progress, config, values), flush=True)
                ended = progress.fraction(config) >= 1 or stop.signal_number != 0
                if progress.seconds - saved_at > 60 * config.checkpoint_minutes or ended:
                    save_checkpoint(checkpoint, progress, parameters, optimizers, ema)
                    saved_at = progress.seconds
                if stop.signal_number:
                    raise RunInterrupted(128 + stop.signal_number)
                if progress.seconds - validated_at > 60 * config.validate_minutes or ended:
                    with averaged_weights(ema, parameters.values()):
                        report(recipe, log, progress)
                    validated_at = progress.seconds
    ema.copy_to(parameters.values())
    model.eval()


def make_optimizers(
    parameters: dict[str, nn.Parameter], config: LoopConfig, tables: frozenset[str] = frozenset()
) -> list[Optimizer]:
    """AdamW; or Muon (Jordan et al. 2024) for the matrices among the parameters, and AdamW for the others."""

    def is_matrix(name: str) -> bool:
        return config.optimizer == "muon" and parameters[name].ndim == 2 and name not in tables

    matrices = [p for name, p in parameters.items() if is_matrix(name)]
    others = [p for name, p in parameters.items() if not is_matrix(name)]
    settings = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
    optimizers: list[Optimizer] = []
    if matrices:
        optimizers.append(torch.optim.Muon(matrices, **settings, adjust_lr_fn="match_rms_adamw"))
    if others:
        optimizers.append(torch.optim.AdamW(others, **settings, betas=(0.9, 0.99), fused=True))
    return optimizers


def has_bf16(device: torch.device) -> bool:
    """Whether bfloat16 is faster than float32 here: 1.4 to 1.6 times on GPUs' and CPUs' own instructions for it."""
    return device.type == "cuda" or torch.cpu._is_avx512_bf16_supported()


@torch.no_grad()
def report(recipe: Recipe, log: RunLog, progress: Progress) -> None:
    """Log validation numbers and a sample grid."""
    recipe.model.eval()
    values = recipe.validate()
    log.scalars(progress.step, {f"validation/{name}": value for name, value in values.items()})
    print(f"  step {progress.step}: " + "  ".join(f"{name} {value:.4f}" for name, value in values.items()), flush=True)
    if recipe.sample_grid is not None:
        log.image(progress.step, recipe.sample_grid())
    recipe.model.train()


def parse_batch_schedule(text: str) -> list[tuple[float, bool, int]]:
    """ "0:16,20000:32" -> [(0, False, 16), (20000, False, 32)]; True where the start is in minutes ("90m:32")."""
    entries = []
    for entry in text.split(","):
        start, _, size = entry.strip().partition(":")
        in_minutes = start.endswith("m")
        try:
            entries.append((float(start.removesuffix("m")), in_minutes, int(size)))
        except ValueError:
            raise ValueError(f'batch schedule entry {entry!r} is not FROM:SIZE, as in "0:16,20000:32"') from None
        if entries[-1][2] < 1:
            raise ValueError(f"batch schedule entry {entry!r}: the batch size must be >= 1")
    if entries[0][0] != 0:
        raise ValueError(f"the batch schedule {text!r} must start at 0")
    return entries


def batch_size_at(schedule: list[tuple[float, bool, int]], progress: Progress) -> int:
    """Batch size of the last entry that has begun."""
    minutes = progress.seconds / 60
    return [size for start, in_minutes, size in schedule if start <= (minutes if in_minutes else progress.step)][-1]


def lr_factor(config: LoopConfig, progress: Progress) -> float:
    """Factor on the learning rate: linear warm-up times cosine, or constant with a linear end."""
    warmup = min(1.0, (progress.step + 1) / max(1, config.lr_warmup_steps))
    fraction = min(1.0, progress.fraction(config))
    if config.lr_schedule == "cosine":
        return warmup * (0.5 + 0.5 * math.cos(math.pi * fraction))
    return warmup * min(1.0, (1 - fraction) / 0.2)


def status_line(name: str, progress: Progress, config: LoopConfig, values: dict[str, float]) -> str:
    """One line a log file can be followed by."""
    fraction = max(progress.fraction(config), 1e-9)
    left = progress.seconds * (1 - fraction) / fraction / 60
    shown = (f"{key} {value:.4f}" for key, value in values.items() if key not in ("seconds", "samples_per_second"))
    speed = f"{values['samples_per_second']:.1f} samples/s"
    return f"{name} step {progress.step}  {'  '.join(shown)}  {speed}  {progress.seconds / 60:.1f} min, {left:.0f} left"


def save_checkpoint(
    path: Path, progress: Progress, parameters: dict[str, nn.Parameter], optimizers: list[Optimizer], ema: EMAModel
) -> None:
    """Write the whole state of a run to one file, atomically."""
    tensors, state = {}, {p: values for optimizer in optimizers for p, values in optimizer.state.items()}
    for (name, parameter), average in zip(parameters.items(), ema.shadow_params, strict=True):
        tensors |= {f"model.{name}": parameter.detach(), f"ema.{name}": average}
        tensors |= {f"{STATE}{key}.{name}": value for key, value in state[parameter].items()}
    atomic_save_safetensors(tensors, path, {"progress": json.dumps(vars(progress))})


def load_checkpoint(
    path: Path, parameters: dict[str, nn.Parameter], optimizers: list[Optimizer], ema: EMAModel
) -> Progress:
    """Restore what save_checkpoint wrote."""
    tensors, header = load_safetensors(path)
    missing = {f"model.{name}" for name in parameters} ^ {key for key in tensors if key.startswith("model.")}
    if missing:
        raise ValueError(f"{path} is of another architecture ({sorted(missing)[:3]} differ); start in another folder")
    state: dict[str, dict[str, Tensor]] = {}
    for key in (key for key in tensors if key.startswith(STATE)):
        what, _, name = key.removeprefix(STATE).partition(".")
        state.setdefault(name, {})[what] = tensors[key].to(parameters[name].device)
    owner = {p: optimizer for optimizer in optimizers for p in optimizer.param_groups[0]["params"]}
    with torch.no_grad():
        for (name, parameter), average in zip(parameters.items(), ema.shadow_params, strict=True):
            own = "momentum_buffer" if isinstance(owner[parameter], torch.optim.Muon) else "exp_avg"
            if own not in state[name]:
                raise ValueError(f"{path} was made by another --optimizer; resume with that one")
            parameter.copy_(tensors[f"model.{name}"])
            average.copy_(tensors[f"ema.{name}"])
            owner[parameter].state[parameter] = state[name]
    progress = Progress(**json.loads(header["progress"]))
    ema.optimization_step = progress.step
    return progress


def load_average(model: nn.Module, run: Path) -> nn.Module:
    """Put the averaged weights of a run folder's checkpoint into a model of the same architecture."""
    path = run / "checkpoint.safetensors"
    tensors, _ = load_safetensors(path)
    average = {key.removeprefix("ema."): value for key, value in tensors.items() if key.startswith("ema.")}
    differing = average.keys() ^ {name for name, p in model.named_parameters() if p.requires_grad}
    if differing:
        raise ValueError(f"{path} does not fit {type(model).__name__}: it differs in {sorted(differing)[:3]}")
    model.load_state_dict(average, strict=False)
    return model.eval()
