import os
import signal
from concurrent.futures.process import BrokenProcessPool

import pytest
import torch

from common.toyworld.workers import in_processes


def threads_and_product(a: int, b: int) -> tuple[int, int]:
    return torch.get_num_threads(), a * b


def killed(_: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_every_job_is_done_by_one_thread():
    found = sorted(in_processes(threads_and_product, [(1, 2), (3, 4), (5, 6)], workers=2))
    assert found == [(1, 2), (1, 12), (1, 30)]


def test_a_killed_worker_is_an_error_and_not_waited_for():
    with pytest.raises(BrokenProcessPool):
        list(in_processes(killed, [(0,), (1,)], workers=1))


def test_an_error_in_a_worker_is_raised_here():
    with pytest.raises(ValueError, match="invalid literal"):
        list(in_processes(int, [("nine",)], workers=1))
