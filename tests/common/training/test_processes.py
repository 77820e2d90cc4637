"""Runs in real processes: killed at any moment, sharing the work, competing for a folder."""

import json
import multiprocessing
import os
import random
import signal
import socket
import time
from pathlib import Path

import linear_run
import pytest
import torch

from common.io import load_safetensors
from common.training.run_folder import RunFolderError, open_run_folder

SETTINGS = {"train_steps": 40, "lr_schedule": "cosine", "ema_decay": 0.9, "checkpoint_every": 3}


@pytest.fixture(scope="module")
def processes(script_environment):
    """A context whose processes start with everything imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["linear_run", "torch.utils.tensorboard"])
    before = dict(os.environ)
    os.environ.update(script_environment)
    yield context
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> dict[str, torch.Tensor]:
    folder = tmp_path_factory.mktemp("runs") / "uninterrupted"
    linear_run.run(folder, SETTINGS)
    return load_safetensors(folder / "final.safetensors")[0]


def _last_checkpoint(folder: Path) -> int:
    return max([0, *(int(path.name.removeprefix("step-")) for path in folder.glob("checkpoints/step-*"))])


def test_killed_at_random_moments_and_resumed_is_bit_equal(tmp_path, processes, uninterrupted):
    folder, moments, kills = tmp_path / "run", random.Random(0), 0
    for wait_for_step in (0, 0, 3, 9, 15, 21, 27):
        process = processes.Process(target=linear_run.run, args=(folder, SETTINGS, True))
        process.start()
        while process.is_alive() and _last_checkpoint(folder) < wait_for_step:
            time.sleep(0.002)
        process.join(0.06 * moments.random())  # seconds; a step takes about 0.007, every third writes a checkpoint
        kills += process.is_alive()
        process.kill()
        process.join()
    assert kills >= 5
    linear_run.run(folder, SETTINGS, resume=True)
    torch.testing.assert_close(load_safetensors(folder / "final.safetensors")[0], uninterrupted, rtol=0, atol=0)


def test_killed_before_each_rename_and_resumed_is_bit_equal(tmp_path, processes, uninterrupted):
    """A checkpoint is six renames or so; dying before any of them leaves the earlier checkpoint in charge."""
    for rename in range(1, 16):
        process = processes.Process(target=linear_run.run_killed_at_rename, args=(tmp_path / "run", SETTINGS, rename))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    linear_run.run(tmp_path / "run", SETTINGS, resume=True)
    assert not list((tmp_path / "run").rglob("*.tmp"))
    torch.testing.assert_close(load_safetensors(tmp_path / "run/final.safetensors")[0], uninterrupted, rtol=0, atol=0)
    steps = [json.loads(line)["step"] for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert steps == [5, 10, 15, 20, 25, 30, 35, 40]  # each once, though some were written by two processes


def _run_two(processes, folder: Path, settings: dict, resume: bool = False) -> list[int]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"}
    workers = [
        processes.Process(
            target=linear_run.run,
            args=(folder, settings, resume, 0.0, {**shared, "RANK": rank, "LOCAL_RANK": rank}),
        )
        for rank in "01"
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    exit_codes = [worker.exitcode for worker in workers]
    for worker in workers:
        worker.kill()
    return exit_codes


def _outcome(folder: Path) -> tuple[list[float], dict[str, torch.Tensor]]:
    return json.loads((folder / "losses.json").read_text()), load_safetensors(folder / "final.safetensors")[0]


@pytest.mark.parametrize("accumulation", [1, 2])
def test_two_processes_equal_one_at_the_same_global_batch(tmp_path, processes, accumulation):
    settings = {"batch_size": 8, "ema_decay": 0.9, "gradient_accumulation_steps": accumulation}
    linear_run.run(tmp_path / "one", {**settings, "gradient_accumulation_steps": 1}, dropout=0.0)
    assert _run_two(processes, tmp_path / "two", settings) == [0, 0]
    (losses_one, values_one), (losses_two, values_two) = _outcome(tmp_path / "one"), _outcome(tmp_path / "two")
    assert losses_two == pytest.approx(losses_one, rel=1e-5)
    torch.testing.assert_close(values_two, values_one, rtol=1e-5, atol=1e-5)


def test_two_processes_finish_what_one_began_and_refuse_together(tmp_path, processes):
    linear_run.run(tmp_path / "one", {"batch_size": 8, "train_steps": 30}, dropout=0.0)
    linear_run.run(tmp_path / "run", {"batch_size": 8, "train_steps": 12}, dropout=0.0)
    assert _run_two(processes, tmp_path / "run", {"batch_size": 8}, resume=True) == [0, 0]
    losses, values = _outcome(tmp_path / "run")
    torch.testing.assert_close(values, _outcome(tmp_path / "one")[1], rtol=1e-5, atol=1e-5)
    assert len(losses) == 18
    assert _run_two(processes, tmp_path / "run", {"batch_size": 8}) == [1, 1]  # not empty: both stop, none waits


def test_a_second_process_cannot_use_the_folder_and_a_dead_one_does_not_keep_it(tmp_path, processes):
    process = processes.Process(target=linear_run.run, args=(tmp_path / "run", {"train_steps": 10_000}))
    process.start()
    deadline = time.monotonic() + 120
    while not (tmp_path / "run/log.jsonl").exists():
        assert process.is_alive() and time.monotonic() < deadline
        time.sleep(0.02)
    with pytest.raises(RunFolderError, match=f"{tmp_path / 'run'} is in use.*pid {process.pid} "):
        open_run_folder(tmp_path / "run", resume=True, config={})
    process.kill()
    process.join()
    settings = json.loads((tmp_path / "run/run.json").read_text())["config"]
    open_run_folder(tmp_path / "run", resume=True, config=settings).close()
