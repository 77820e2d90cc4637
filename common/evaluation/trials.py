"""Trials: candidates learn things, make pictures of them, and are scored; what is finished is not done again.

`study.py` makes trials of objects, `exemplar_study.py` of relations, actions and states.
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from common.backbones import Backbone
from common.evaluation.benchmark import RECORDS_FILE, Generator, run_benchmark
from common.evaluation.encoders import load_encoders
from common.evaluation.records import Record, read_records
from common.evaluation.subjects import BenchmarkSubject
from common.fingerprint import weights_hash
from common.io import atomic_write_text
from common.sampling.images import save_png, to_pil
from common.toyworld.judge import Judge

Scores = dict[str, dict[str, dict[str, float]]]  # score -> candidate -> thing -> value


class Learned(Protocol):
    """A method that has learned something."""

    backbone: Backbone

    def generate(self, prompt: str, *, seeds: list[int]) -> Tensor:
        """Pictures for a prompt, one per seed, (B,3,H,W) in [-1,1]."""
        ...

    def save(self, folder: Path) -> None:
        """Write the artifact."""
        ...


@dataclass(frozen=True)
class Candidate:
    """A method, an ablation or a baseline.

    words: what stands for the learned thing in prompts: "sks {class}", "<subject>", "<R>".
    settings: all that the result depends on besides thing, seeds and backbone: `flat_config(config=...)`.
    train: learns a thing from a folder with its photos, in a folder for the run; called again after an interruption.
    """

    words: str
    settings: Mapping[str, object]
    train: Callable[[Any, Path, Path], Learned]


@dataclass(frozen=True)
class Trial:
    """One thing to learn, and how what was learned is examined.

    thing: what `Candidate.train` gets.   photos: to learn from, (N,3,64,64) in [-1,1].
    scored: prompts, references and expected attributes.
    held_out_loss: of (what was learned, `scored.pixel_values` as latents (M,4,h,w), the candidate's words).
    captions: of the photos, with {} where the candidate's words go; none for objects.
    """

    thing: Any
    photos: Tensor
    scored: BenchmarkSubject
    held_out_loss: Callable[[Any, Tensor, str], float]
    captions: tuple[str, ...] = ()


def run_trials(
    name: str, candidate: Candidate, trials: Sequence[Trial], judge: Judge, settings: Mapping[str, object],
    seeds: Sequence[int], folder: Path,
) -> None:  # fmt: skip
    """Train, sample and score one candidate.

    FOLDER gets photos/THING/, images/THING/, records.jsonl, settings.json, artifacts/THING/ and measured/THING.json.

    Args: settings: of the candidate and all that is the same for all candidates.
    Raises: ValueError if FOLDER was begun with other settings, prompts, photos or weights.
    """
    keep_settings(folder / "settings.json", settings)
    by_name = {trial.scored.name: trial for trial in trials}

    def learn(scored: BenchmarkSubject) -> Generator:
        return _learn(candidate, by_name[scored.name], folder)

    run_benchmark(
        learn, [trial.scored for trial in trials], load_encoders(), judge,
        method=name, subject_words=candidate.words, settings=settings, seeds=seeds, output_dir=folder,
    )  # fmt: skip


def _learn(candidate: Candidate, trial: Trial, folder: Path) -> Generator:
    name = trial.scored.name
    photos = folder / "photos" / name
    for i, image in enumerate(to_pil(trial.photos)):
        save_png(image, photos / f"{i:02d}.png")
    for i, caption in enumerate(trial.captions):
        atomic_write_text(photos / f"{i:02d}.txt", caption.format(candidate.words) + "\n")
    path = folder / "measured" / f"{name}.json"
    measured = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"seconds": 0.0}
    started = time.perf_counter()
    try:
        learned = candidate.train(trial.thing, photos, folder / "training" / name)
    finally:
        if "bytes" not in measured:  # else it had been trained, and only pictures are missing
            measured["seconds"] += time.perf_counter() - started
            atomic_write_text(path, json.dumps(measured))
    artifact = folder / "artifacts" / name
    learned.save(artifact)
    with torch.no_grad():
        held_out = _at_resolution(trial.scored.pixel_values, learned.backbone.resolution_px)
        loss = trial.held_out_loss(learned, learned.backbone.encode_images(held_out), candidate.words)
    size = sum(path.stat().st_size for path in artifact.rglob("*") if path.is_file())
    atomic_write_text(path, json.dumps(measured | {"held-out loss": loss, "bytes": size}))
    return learned


def _at_resolution(pixel_values: Tensor, resolution_px: int) -> Tensor:
    """Photos in the size that the backbone is trained in."""
    if pixel_values.shape[-1] == resolution_px:
        return pixel_values
    return F.interpolate(pixel_values, (resolution_px, resolution_px), mode="bicubic", antialias=True).clamp(-1, 1)


def backbone_hashes(backbone: Backbone) -> dict[str, object]:
    """Hashes of all that a result depends on."""
    text_encoders = [weights_hash(encoder) for encoder in backbone.text_encoders]
    return {"unet": weights_hash(backbone.unet), "vae": weights_hash(backbone.vae), "text_encoders": text_encoders}


def keep_settings(path: Path, settings: Mapping[str, object]) -> None:
    """Write the settings of a folder down, so that no training run of other settings or weights is taken up there."""
    now = json.loads(json.dumps(settings))
    kept = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else now
    if differing := sorted(name for name in kept.keys() | now.keys() if kept.get(name) != now.get(name)):
        raise ValueError(
            f"{path.parent} was begun with other settings ({', '.join(differing)}); remove the folder or choose another"
        )
    atomic_write_text(path, json.dumps(now, indent=2) + "\n")


def records_of(folder: Path, name: str) -> list[Record]:
    """All records of one thing."""
    return [row for row in read_records(folder / RECORDS_FILE) if row.subject == name]


def measured_of(folder: Path, name: str) -> dict[str, float]:
    """seconds of training over all interruptions, bytes of the artifact, held-out loss."""
    return json.loads((folder / "measured" / f"{name}.json").read_text(encoding="utf-8"))


def folder_name(name: str) -> str:
    """A candidate's name as a folder: "10x lr" -> "10x_lr"."""
    return name.replace(" ", "_")
