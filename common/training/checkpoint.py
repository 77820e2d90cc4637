"""Checkpoints: everything a run needs to go on, in one folder that appears whole or not at all.

    checkpoints/step-00000500/state.json                      step, learning-rate schedule, optimiser settings
                              {name}.parameters.safetensors   trained parameters, by name
                              {name}.optimizer.safetensors    "parameter/exp_avg" and the like
                              {name}.ema.safetensors          moving average, by name, if there is one

`name` tells several train states of one run apart; `fit` has one, "method". Random numbers need no state here: they are
functions of the step (see seeding.py).
"""

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from common.io import atomic_save_safetensors, atomic_write_text, load_safetensors, sync_folder
from common.training.optimize import TrainState


class CheckpointError(RuntimeError):
    """A checkpoint does not fit the method that is to be resumed."""


def checkpoint_folders(run_path: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    folders = [p for p in (run_path / "checkpoints").glob("step-*") if re.fullmatch(r"step-\d{8,}", p.name)]
    return sorted(folders, key=_step_of)


def save_checkpoint(
    run_path: Path, step: int, states: Mapping[str, TrainState], *, scaler: Any = None, keep: int = 2
) -> Path:
    """Write the checkpoint after `step` steps, then remove all but the newest `keep`.

    Args:
        states: name -> train state, for a loop with one optimiser {"method": state}.
        scaler: the accelerator's gradient scaler of fp16 training.
    Returns: its folder.
    Raises: OSError if the disk refuses; what was written of it is removed and earlier checkpoints stay.
    """
    folder = run_path / "checkpoints" / f"step-{step:08d}"
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        _write(temporary, step, states, scaler)
        if folder.exists():
            _remove(folder)
        os.replace(temporary, folder)
        sync_folder(folder.parent)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        kept = checkpoint_folders(run_path)
        raise OSError(
            error.errno,
            f"could not write the checkpoint of step {step} to {folder.parent} ({error.strerror}); "
            + (f"the last good one is {kept[-1].name}" if kept else "there is no earlier one")
            + ". Make room and resume",
        ) from error
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    for old in checkpoint_folders(run_path)[:-keep]:
        _remove(old)
    return folder


def load_latest_checkpoint(run_path: Path, states: Mapping[str, TrainState], *, scaler: Any = None) -> int:
    """Put the newest checkpoint of a run into the train states, in place.

    Returns: the number of steps done; 0, with nothing changed, if there is no checkpoint yet.
    Raises: CheckpointError or ValueError naming the file if it is damaged or was made for other parameters.
    """
    folders = checkpoint_folders(run_path)
    if not folders:
        return 0
    folder = folders[-1]
    try:
        record = json.loads((folder / "state.json").read_text("utf-8"))
        for name, state in states.items():
            _read_state(folder, name, record["states"][name], state)
        if scaler is not None and record["scaler"] is not None:
            scaler.load_state_dict(record["scaler"])
        return int(record["step"])
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"cannot read the checkpoint {folder}: {error!r}. Remove that folder to continue from the one before it"
        ) from error


def _write(folder: Path, step: int, states: Mapping[str, TrainState], scaler: Any) -> None:
    record: dict[str, Any] = {"step": step, "states": {}, "scaler": None if scaler is None else scaler.state_dict()}
    for name, state in states.items():
        atomic_save_safetensors(state.parameters, folder / f"{name}.parameters.safetensors")
        tensors, settings = _optimizer_state(state.optimizer, list(state.parameters))
        atomic_save_safetensors(tensors, folder / f"{name}.optimizer.safetensors")
        record["states"][name] = {"optimizer": settings, "lr_scheduler": state.lr_scheduler.state_dict()}
        if state.ema is not None:
            averages = dict(zip(state.parameters, state.ema.shadow_params, strict=True))
            atomic_save_safetensors(averages, folder / f"{name}.ema.safetensors")
            record["states"][name]["ema_steps"] = state.ema.optimization_step
    atomic_write_text(folder / "state.json", json.dumps(record, indent=1))


def _read_state(folder: Path, name: str, record: dict[str, Any], state: TrainState) -> None:
    parameters, _ = load_safetensors(folder / f"{name}.parameters.safetensors")
    _check_same_tensors(folder, parameters, state.parameters)
    averages = None
    if state.ema is not None:
        averages, _ = load_safetensors(folder / f"{name}.ema.safetensors")
        _check_same_tensors(folder, averages, state.parameters)
    optimizer_tensors, _ = load_safetensors(folder / f"{name}.optimizer.safetensors")
    with torch.no_grad():
        for key, parameter in state.parameters.items():
            parameter.copy_(parameters[key])
        if averages is not None:
            for key, average in zip(state.parameters, state.ema.shadow_params, strict=True):
                average.copy_(averages[key])
            state.ema.optimization_step = record["ema_steps"]
    _restore_optimizer(state.optimizer, list(state.parameters), optimizer_tensors, record["optimizer"])
    state.lr_scheduler.load_state_dict(record["lr_scheduler"])


def _optimizer_state(optimizer: Optimizer, names: list[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors by "parameter/key", everything else as JSON)."""
    full = optimizer.state_dict()
    tensors = {
        f"{names[i]}/{key}": value
        for i, entry in full["state"].items()
        for key, value in entry.items()
        if isinstance(value, Tensor)
    }
    numbers = {
        names[i]: {key: value for key, value in entry.items() if not isinstance(value, Tensor)}
        for i, entry in full["state"].items()
    }
    groups = [{k: v for k, v in g.items() if k not in ("params", "param_names")} for g in full["param_groups"]]
    return tensors, {"param_groups": groups, "state": numbers}


def _restore_optimizer(
    optimizer: Optimizer, names: list[str], tensors: dict[str, Tensor], settings: dict[str, Any]
) -> None:
    entries = {names.index(name): dict(numbers) for name, numbers in settings["state"].items()}
    for full_name, tensor in tensors.items():
        name, key = full_name.rsplit("/", 1)
        entries[names.index(name)][key] = tensor
    groups = optimizer.state_dict()["param_groups"]
    if len(groups) != len(settings["param_groups"]):
        raise ValueError(f"{len(settings['param_groups'])} parameter groups in the checkpoint, {len(groups)} now")
    groups = [
        now | {key: tuple(value) if isinstance(value, list) else value for key, value in saved.items()}  # JSON's lists
        for now, saved in zip(groups, settings["param_groups"], strict=True)
    ]
    optimizer.load_state_dict({"state": entries, "param_groups": groups})


def _check_same_tensors(folder: Path, saved: Mapping[str, Tensor], now: Mapping[str, Tensor]) -> None:
    shapes_saved = {name: tuple(tensor.shape) for name, tensor in saved.items()}
    shapes_now = {name: tuple(tensor.shape) for name, tensor in now.items()}
    if shapes_saved != shapes_now:
        absent = "absent"
        different = [
            f"{name}: {shapes_saved.get(name, absent)} -> {shapes_now.get(name, absent)}"
            for name in sorted(shapes_saved.keys() | shapes_now.keys())
            if shapes_saved.get(name) != shapes_now.get(name)
        ]
        raise CheckpointError(
            f"{folder} was made for other parameters (saved -> now): {'; '.join(different[:5])}"
            f"{f' and {len(different) - 5} more' if len(different) > 5 else ''}"
        )


def _remove(folder: Path) -> None:
    """Remove a checkpoint so that a kill in between never leaves half of one under its name."""
    doomed = folder.with_name(f".{folder.name}.removed.tmp")
    shutil.rmtree(doomed, ignore_errors=True)
    os.replace(folder, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))
