"""The folder of one run: locked while it is in use, marked with its settings, never mixed with another run.

run.json  settings and versions          checkpoints/step-00000500/  see checkpoint.py
log.jsonl, tensorboard/, samples/        see log.py
"""

import fcntl
import importlib.metadata
import json
import os
import platform
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.io import atomic_write_text
from common.training.config import config_differences

_LOCK_NAME = ".lock"
_held_locks: set[int] = set()


class RunFolderError(RuntimeError):
    """A run folder cannot be used as asked; the message says why and what to do."""


@dataclass
class RunFolder:
    """An open, locked run folder. Close it, or use it as a context manager, to release the lock."""

    path: Path
    lock: int  # file descriptor

    def close(self) -> None:
        if self.lock in _held_locks:
            _held_locks.remove(self.lock)
            os.close(self.lock)

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_run_folder(output_dir: str | Path, *, resume: bool = False, config: Mapping[str, Any]) -> RunFolder:
    """Create or reopen the folder of a run and lock it.

    Args:
        output_dir: the folder; created with its parents.
        resume: continue the run that is there. An empty folder then simply starts a run, so that a run that was killed
            before it wrote anything can be resumed as well.
        config: the settings of the run as `flat_config` makes them; recorded in run.json.
    Raises: RunFolderError if the folder is in use by another process, holds files and `resume` is False, holds files
        that are no run, or belongs to a run with other settings (all differing fields are named).
    """
    path = Path(output_dir)
    if path.exists() and not path.is_dir():
        raise RunFolderError(f"{path} is a file; choose a folder for the run")
    path.mkdir(parents=True, exist_ok=True)
    run = RunFolder(path, _lock(path))
    try:
        _remove_leftovers(path)
        record = path / "run.json"
        contents = sorted(entry.name for entry in path.iterdir() if entry.name != _LOCK_NAME)
        if contents and not resume:
            raise RunFolderError(
                f"{path} is not empty (it holds {', '.join(contents[:4])}{', ...' if len(contents) > 4 else ''}); "
                "resume the run that is there (resume=True, --resume) or choose another folder"
            )
        if contents and not record.exists():
            raise RunFolderError(f"cannot resume: {path} holds files, but no run (no run.json); choose another folder")
        if contents:
            _check_config(record, config)
        atomic_write_text(record, json.dumps({"config": dict(config), "versions": _versions()}, indent=2) + "\n")
    except BaseException:
        run.close()
        raise
    return run


def _check_config(record: Path, config: Mapping[str, Any]) -> None:
    try:
        saved = json.loads(record.read_text("utf-8"))["config"]
    except (ValueError, KeyError, TypeError) as error:
        raise RunFolderError(f"cannot resume: {record} is damaged ({error}); start in another folder") from error
    differences = config_differences(saved, json.loads(json.dumps(dict(config))))
    if differences:
        raise RunFolderError(
            f"cannot resume {record.parent}: the settings differ from those it was started with (saved -> now):\n  "
            + "\n  ".join(differences)
            + "\nUse the saved settings, or start a new run in another folder."
        )


def _lock(path: Path) -> int:
    """Take the folder's lock. The kernel releases it when the process dies, however it dies."""
    descriptor = os.open(path / _LOCK_NAME, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        owner = os.pread(descriptor, 200, 0).decode("utf-8", "replace").strip() or "unknown process"
        os.close(descriptor)
        raise RunFolderError(
            f"{path} is in use by another run ({owner}); wait for it, stop it, or choose another folder"
        ) from error
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"pid {os.getpid()} on {platform.node()}\n".encode(), 0)
    _held_locks.add(descriptor)
    return descriptor


def _close_inherited_locks() -> None:
    """A forked data worker that outlives its run must not keep the folder locked."""
    for descriptor in _held_locks:
        os.close(descriptor)
    _held_locks.clear()


os.register_at_fork(after_in_child=_close_inherited_locks)


def _remove_leftovers(path: Path) -> None:
    """Remove what a killed run left half written; names are those of common.io and checkpoint.py."""
    for leftover in [*path.glob(".*.tmp"), *path.glob("checkpoints/.*.tmp"), *path.glob("samples/.*.tmp")]:
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()


def _versions() -> dict[str, str]:
    packages = ("torch", "diffusers", "transformers", "accelerate", "peft")
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in packages}
