"""`accelerate launch` with two CPU processes; most of its time is three times importing torch."""

import json
import subprocess
import sys
from pathlib import Path

import linear_run
import pytest
import torch

from common.io import load_safetensors


def _outcome(folder: Path) -> tuple[list[float], dict[str, torch.Tensor]]:
    return json.loads((folder / "losses.json").read_text()), load_safetensors(folder / "final.safetensors")[0]


def test_accelerate_launch_with_two_processes(tmp_path, script_environment):
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
        "--num_machines", "1", "--main_process_port", "0", "--mixed_precision", "no", "--dynamo_backend", "no",
        linear_run.__file__, str(tmp_path / "two"), "batch_size=8", "train_steps=6",
    ]  # fmt: skip
    # --cpu would start one process only; --multi_gpu starts them, and this keeps each of them on the CPU
    environment = {**script_environment, "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("one of 2 processes") == 2
    linear_run.run(tmp_path / "one", {"batch_size": 8, "train_steps": 6}, dropout=0.0)
    (losses_one, values_one), (losses_two, values_two) = _outcome(tmp_path / "one"), _outcome(tmp_path / "two")
    assert losses_two == pytest.approx(losses_one, rel=1e-5)
    torch.testing.assert_close(values_two, values_one, rtol=1e-5, atol=1e-5)
