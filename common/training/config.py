"""Settings of the training loop, and the rule which of them may change when a run is resumed."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

LrSchedule = Literal["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"]

# How a run is watched and stored, not what it computes: free to differ when it is resumed.
_FREE_ON_RESUME = {
    f"fit.{name}"
    for name in ("checkpoint_every", "keep_checkpoints", "log_every", "validate_every", "sample_every", "num_workers")
}


@dataclass(frozen=True)
class FitConfig:
    """What `fit` needs to know besides the method and the data. Steps are optimiser steps."""

    # fmt: off
    train_steps: int                          # steps, >= 1
    learning_rate: float                      # for parameter groups that name no lr of their own
    batch_size: int = 4                       # samples per step, over all processes and accumulated micro-batches
    lr_schedule: LrSchedule = "constant"      # diffusers.optimization.get_scheduler
    lr_warmup_steps: int = 0                  # steps
    weight_decay: float = 0.0                 # AdamW; for parameter groups that name none of their own
    adam_betas: tuple[float, float] = (0.9, 0.999)
    max_grad_norm: float | None = 1.0         # total gradient norm is clipped to this; None = not clipped
    gradient_accumulation_steps: int = 1      # micro-batches per step and process; saves memory, same result
    gradient_checkpointing: bool = False      # recompute the backbone's activations: less memory, about 30% slower
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"  # of the forward pass; trained parameters stay float32
    ema_decay: float | None = None            # in [0, 1); None = no averaging; the average is what `fit` leaves behind
    seed: int = 0                             # data order, noise, timesteps, dropout
    checkpoint_every: int = 500               # steps; 0 = only at the end and when interrupted
    keep_checkpoints: int = 2                 # newest ones kept, >= 1
    log_every: int = 10                       # steps
    validate_every: int = 0                   # steps; 0 = only at the end, if `fit` is given a validation
    sample_every: int = 0                     # steps; 0 = only at the end, if `fit` is given a sample grid
    num_workers: int = 0                      # data loading processes; changes the speed, not the result
    # fmt: on

    def __post_init__(self) -> None:
        for name in ("train_steps", "batch_size", "gradient_accumulation_steps", "keep_checkpoints", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        for name in ("checkpoint_every", "validate_every", "sample_every", "num_workers", "lr_warmup_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be >= 0, got {getattr(self, name)}")
        if not 0 < self.learning_rate < float("inf"):
            raise ValueError(f"learning_rate must be positive and finite, got {self.learning_rate}")
        if self.weight_decay < 0:
            raise ValueError(f"weight_decay must be >= 0, got {self.weight_decay}")
        if self.ema_decay is not None and not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay must be in [0, 1) or None, got {self.ema_decay}")
        if self.max_grad_norm is not None and not self.max_grad_norm > 0:
            raise ValueError(f"max_grad_norm must be > 0 or None, got {self.max_grad_norm}")

    def micro_batch_size(self, num_processes: int) -> int:
        """Samples per forward pass. Raises ValueError if batch_size does not divide evenly."""
        parts = num_processes * self.gradient_accumulation_steps
        if self.batch_size % parts:
            raise ValueError(
                f"batch_size={self.batch_size} counts the samples of all processes and micro-batches, so it must be a "
                f"multiple of {num_processes} processes x {self.gradient_accumulation_steps} accumulation steps"
            )
        return self.batch_size // parts


def flat_config(**sections: Any) -> dict[str, Any]:
    """Settings as one flat JSON-able dictionary, {"section.field": value}, for the record of a run.

    Args:
        sections: name -> dataclass, mapping or plain value. Functions and classes become their qualified names.
    """
    flat: dict[str, Any] = {}
    for name, value in sections.items():
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        if isinstance(value, Mapping):
            nested = flat_config(**{str(key): item for key, item in value.items()})
            flat |= {f"{name}.{key}": item for key, item in nested.items()}
        else:
            flat[name] = _plain(value)
    return flat


def config_differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Fields that keep a run from being resumed, each as "name: saved -> now"; empty if it may be.

    Settings of watching and storing may differ, and a run whose learning rate does not depend on its length may be
    given more steps.
    """
    free = set(_FREE_ON_RESUME)
    if str(now.get("fit.lr_schedule")).startswith("constant"):
        free.add("fit.train_steps")
    names = sorted((saved.keys() | now.keys()) - free)
    missing = "(absent)"
    return [
        f"{name}: {saved.get(name, missing)!r} -> {now.get(name, missing)!r}"
        for name in names
        if saved.get(name, missing) != now.get(name, missing)
    ]


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple | set | frozenset):
        items = [_plain(item) for item in value]
        return sorted(items, key=repr) if isinstance(value, set | frozenset) else items
    if isinstance(value, Path):
        return str(value)
    if callable(value) and hasattr(value, "__qualname__"):
        return f"{value.__module__}.{value.__qualname__}"
    if dataclasses.is_dataclass(value):
        return flat_config(**{f.name: getattr(value, f.name) for f in dataclasses.fields(value)})
    return repr(value)
