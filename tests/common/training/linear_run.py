"""A small regression trained by `fit`: tests import it, and run it as a script in processes that they kill.

python linear_run.py OUTPUT_DIR [key=value of FitConfig ...] [--resume]
Writes final.safetensors (trained values) and losses.json into OUTPUT_DIR when it finishes.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import PartialState
from torch import nn

from common.io import atomic_save_safetensors, atomic_write_text
from common.training.config import FitConfig
from common.training.loop import fit
from common.training.seeding import seeded_randn


@dataclass(frozen=True)
class LinearConfig:
    dropout: float = 0.0
    noise: float = 0.1


class LinearMethod:
    """Regression of y on x with noise per sample key; `before_loss(step)` lets a test interfere."""

    def __init__(self, config: LinearConfig | None = None, before_loss: Callable[[int], None] | None = None):
        self.config, self.before_loss = config or LinearConfig(), before_loss
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 24), nn.Tanh(), nn.Dropout(self.config.dropout), nn.Linear(24, 3))

    def parameters(self):
        return list(self.net.named_parameters())

    def training_loss(self, batch):
        if self.before_loss is not None:
            self.before_loss(batch["step"])
        noise = seeded_randn(batch["sample_keys"], (6,), seed=1)
        return F.mse_loss(self.net(batch["x"] + self.config.noise * noise), batch["y"])


class LinearData(torch.utils.data.Dataset):
    def __init__(self, length: int = 10):
        generator = torch.Generator().manual_seed(7)
        self.x = torch.randn(length, 6, generator=generator)
        self.y = self.x @ torch.randn(6, 3, generator=generator)

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return {"x": self.x[index], "y": self.y[index]}


def values(method: LinearMethod) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in method.parameters()}


def config(**settings) -> FitConfig:
    return FitConfig(**{"train_steps": 30, "learning_rate": 0.01, "log_every": 5} | settings)


def run(
    output_dir: Path, settings: dict, resume: bool = False, dropout: float = 0.3, environment: dict | None = None
) -> None:
    """One whole run, slowed to 5 ms per step so that it can be killed in the middle."""
    os.environ.update(environment or {})
    torch.set_num_threads(1)
    method = LinearMethod(LinearConfig(dropout=dropout), lambda step: time.sleep(0.005))
    result = fit(method, LinearData(), config(**settings), output_dir, resume=resume)
    print(f"one of {PartialState().num_processes} processes")
    if os.environ.get("RANK", "0") == "0":
        atomic_save_safetensors(values(method), output_dir / "final.safetensors")
        atomic_write_text(output_dir / "losses.json", json.dumps(result.losses))


def run_killed_at_rename(output_dir: Path, settings: dict, rename: int) -> None:
    """A resumed run that kills itself with SIGKILL when it is about to rename a file for the n-th time."""
    real_replace, count = os.replace, 0

    def replace(source, target):
        nonlocal count
        count += 1
        if count == rename:
            os.kill(os.getpid(), signal.SIGKILL)
        real_replace(source, target)

    os.replace = replace
    run(output_dir, settings, resume=True)


if __name__ == "__main__":
    pairs = [argument.split("=", 1) for argument in sys.argv[2:] if "=" in argument]
    run(Path(sys.argv[1]), {key: json.loads(value) for key, value in pairs}, "--resume" in sys.argv, dropout=0.0)
