"""JSON lines that say how each number was made. Never a number without encoder, preprocessing, seeds and versions."""

import hashlib
import importlib.metadata
import json
import os
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path

from common.evaluation.bootstrap import Interval, bootstrap_mean
from common.io import atomic_write_text
from common.papers_index import REPOSITORY

_PACKAGES = ("torch", "diffusers", "transformers", "numpy", "pillow")


@dataclass(frozen=True, kw_only=True)
class Record:
    """One metric of one method on one prompt of one subject."""

    metric: str
    value: float  # mean over the images
    values: list[float]  # one per seed; empty if the metric has no value for a single image
    method: str
    subject: str
    prompt: str  # as it was given to the method; "" if the metric belongs to no prompt
    seeds: list[int]
    n_images: int
    backbone: str  # name of the encoder or judge
    preprocessing: str
    config_hash: str  # of the settings the images were made with
    git_commit: str
    versions: dict[str, str]  # package -> version


def config_hash(settings: object) -> str:
    """12 hex digits of a JSON-like value; equal values give equal digits whatever the order of their keys."""
    text = json.dumps(settings, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


@cache
def package_versions() -> dict[str, str]:
    """Installed versions of the packages that numbers depend on."""
    return {name: importlib.metadata.version(name) for name in _PACKAGES}


@cache
def git_commit() -> str:
    """The repository's commit, with "+changes" if tracked files differ from it; "unknown" outside a git checkout."""
    try:
        command = [
            "git",
            "-C",
            str(REPOSITORY),
            "describe",
            "--always",
            "--abbrev=40",
            "--exclude=*",
            "--dirty=+changes",
        ]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def describe_machine(device: str = "cpu") -> str:
    """Processor cores that this process may use and, for a GPU, its name: "2 CPU cores"."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    text = f"{cores} CPU core{'s' if cores != 1 else ''}"
    if device.startswith("cuda"):
        import torch

        text = f"{torch.cuda.get_device_name(device)}, {text}"
    return text


def append_records(path: str | Path, records: Iterable[Record]) -> None:
    """Add records to a file of JSON lines; the file is rewritten as a whole, so all of them are there or none."""
    path = Path(path)
    old = path.read_text(encoding="utf-8") if path.is_file() else ""
    lines = [json.dumps(asdict(record), ensure_ascii=False, allow_nan=False) + "\n" for record in records]
    atomic_write_text(path, old + "".join(lines))


def read_records(path: str | Path) -> list[Record]:
    """All records of a file. Raises: ValueError naming file and line of one that is not a record."""
    names = {field.name for field in fields(Record)}
    records = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}, is not JSON ({error}); remove the line and run again") from error
        if not isinstance(row, dict) or row.keys() != names:
            wrong = sorted(names ^ row.keys()) if isinstance(row, dict) else type(row).__name__
            raise ValueError(f"{path}, line {number}, is not a record (missing or unknown: {wrong}); remove the line")
        records.append(Record(**row))
    return records


def subject_means(records: Iterable[Record]) -> dict[str, dict[str, float]]:
    """Metric -> subject -> mean over the prompts, each prompt with the same weight."""
    values: dict[str, dict[str, list[float]]] = {}
    for record in records:
        values.setdefault(record.metric, {}).setdefault(record.subject, []).append(record.value)
    return {
        metric: {subject: sum(prompts) / len(prompts) for subject, prompts in subjects.items()}
        for metric, subjects in values.items()
    }


def aggregate(means: Mapping[str, Mapping[str, float]]) -> dict[str, Interval]:
    """Metric -> mean over subjects with its interval, of what `subject_means` returns."""
    return {metric: bootstrap_mean(list(subjects.values())) for metric, subjects in means.items()}
