"""Tests here share linear_run.py, which is also a script that other processes run."""

import os
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
REPOSITORY = HERE.parents[2]


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def script_environment() -> dict[str, str]:
    """Environment in which linear_run.py runs as a script or in a fork server."""
    path = os.pathsep.join([str(REPOSITORY), str(HERE)])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
