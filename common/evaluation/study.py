"""One study for all methods that learn an object: the same toy subjects, photos, prompts, seeds and scores.

Every method that is measured this way can stand beside every other in one figure.
"""

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from common.backbones import Backbone, load_backbone
from common.evaluation.benchmark import Generator, run_benchmark
from common.evaluation.bootstrap import bootstrap_mean
from common.evaluation.claims import BenchmarkRow
from common.evaluation.encoders import load_encoders
from common.evaluation.records import config_hash, read_records
from common.evaluation.scoring import judge_name
from common.evaluation.subjects import SUBJECT_GAP, BenchmarkSubject, from_toy_world
from common.fingerprint import weights_hash
from common.io import atomic_write_text
from common.sampling.images import save_png, to_pil
from common.toyworld.benchmark import Subject, held_out_views, subjects
from common.toyworld.judge import Judge

PLAIN_PROMPT = "a photo of a {}"

Scores = dict[str, dict[str, dict[str, float]]]  # score -> method -> subject -> value


class Learned(Protocol):
    """A method that has learned a subject."""

    backbone: Backbone

    def generate(self, prompt: str, *, seeds: list[int]) -> Tensor:
        """Pictures for a prompt, one per seed, (B,3,H,W) in [-1,1]."""
        ...

    def validation_loss(self, latents: Tensor) -> float:
        """`fixed_noise_validation` of latents (B,4,h,w) under the method's "a photo of a [subject]"."""
        ...

    def save(self, folder: Path) -> None:
        """Write the artifact."""
        ...


@dataclass(frozen=True)
class Candidate:
    """A method, an ablation or a baseline in the study.

    words: what stands for the subject in prompts: "sks {class}", "<subject>".
    settings: all that the result depends on besides subject, seeds and backbone: `flat_config(config=...)`.
    train: learns a subject from a folder with its photos, in a folder for the run; called again after an interruption.
    """

    words: str
    settings: Mapping[str, object]
    train: Callable[[Subject, Path, Path], Learned]


@dataclass(frozen=True)
class Study:
    """How much is measured."""

    num_subjects: int = 5
    num_prompts: int = 6  # per subject, besides the plain one
    seeds: tuple[int, ...] = (0, 1)  # one picture per prompt and seed
    held_out: int = 8  # photos of the subject that training does not see

    @classmethod
    def quick(cls) -> "Study":
        """Everything runs; the numbers say nothing."""
        return cls(num_subjects=1, num_prompts=1, seeds=(0,), held_out=2)

    def setting(self, backbone_name: str) -> str:
        """For the column "how measured"."""
        name, seeds = Path(backbone_name).name, ", ".join(map(str, self.seeds))
        return f"{name}, {self.num_subjects} subjects, {self.num_prompts} prompts, seeds {seeds}"


def run_study(backbone_name: str, candidates: Mapping[str, Candidate], study: Study, runs: Path) -> Scores:
    """Train and score every candidate on every subject; what is finished in `runs` is not done again.

    RUNS/METHOD holds images/, records.jsonl, settings.json, artifacts/SUBJECT/ and measured/SUBJECT.json.

    Returns: per candidate and subject
        identity, attributes: of the plain prompt: cosine of the judge's identity embedding with held-out photos; share
            of class, colour, pattern, material that are right.
        compliance: of the other prompts: share of what they ask for beyond the class that is right.
        product: max(0, identity) x compliance.
        clip_t: mean over all prompts.
        held-out loss: `Learned.validation_loss` of the held-out photos.
        seconds: of training, over all interruptions.   bytes: of the artifact.
    Raises: ValueError if RUNS/METHOD was begun with other settings, prompts, photos or weights.
    """
    encoders, judge, toy_subjects = load_encoders(), Judge.load(), subjects(study.num_subjects)
    by_name = {subject.name: subject for subject in toy_subjects}
    scored = [benchmark_subject(subject, study) for subject in toy_subjects]
    same_for_all = {
        "study": {"num_prompts": study.num_prompts, "held_out": study.held_out},
        "weights": _weights(load_backbone(backbone_name)),
    }
    scores: Scores = {}
    for name, candidate in candidates.items():
        folder, settings = runs / folder_name(name), {**candidate.settings, **same_for_all}
        _keep_settings(folder / "settings.json", settings)
        run_benchmark(
            partial(_learn, candidate, by_name, folder), scored, encoders, judge,
            method=name, subject_words=candidate.words, settings=settings,
            seeds=study.seeds, output_dir=folder,
        )  # fmt: skip
        for subject in scored:
            for score, value in _read_scores(folder, subject, candidate.words).items():
                scores.setdefault(score, {}).setdefault(name, {})[subject.name] = value
    return scores


def benchmark_subject(subject: Subject, study: Study) -> BenchmarkSubject:
    """The subject with "a photo of a [subject]" first, which shows fidelity; the other prompts show compliance.

    Compliance is what a prompt asks for beyond the class. The reference photos are views that training does not see,
    so copying the training photos earns nothing.
    """
    (spread,) = from_toy_world([subject], study.num_prompts)
    asked = [{name: label for name, label in wanted.items() if name != "class"} for wanted in spread.expected]
    return replace(
        spread,
        prompts=[PLAIN_PROMPT.format(SUBJECT_GAP), *spread.prompts],
        expected=[{}, *asked],
        pixel_values=held_out_views(subject.entity, study.held_out),
    )


def benchmark_row(method: str, scores: Scores, study: Study, backbone_name: str) -> BenchmarkRow:
    """The method's place in the comparison of all methods that ran the same study on the same backbone and judge."""
    scored = [benchmark_subject(subject, study) for subject in subjects(study.num_subjects)]
    asked = [[subject.name, subject.prompts, subject.expected] for subject in scored]
    origin = [asdict(study), asked, _weights(load_backbone(backbone_name)), judge_name(Judge.load())]

    def mean(score: str) -> float:
        values = scores[score][method].values()
        return sum(values) / len(values)

    return BenchmarkRow(
        study=config_hash(origin),
        setting=study.setting(backbone_name),
        identity=bootstrap_mean(list(scores["identity"][method].values())),
        compliance=bootstrap_mean(list(scores["compliance"][method].values())),
        artifact_bytes=round(mean("bytes")),
        training_seconds=mean("seconds"),
    )


def _learn(candidate: Candidate, by_name: Mapping[str, Subject], folder: Path, scored: BenchmarkSubject) -> Generator:
    subject, photos = by_name[scored.name], folder / "photos" / scored.name
    for i, image in enumerate(to_pil(subject.images)):
        save_png(image, photos / f"{i:02d}.png")
    path = folder / "measured" / f"{subject.name}.json"
    measured = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"seconds": 0.0}
    started = time.perf_counter()
    try:
        learned = candidate.train(subject, photos, folder / "training" / subject.name)
    finally:
        if "bytes" not in measured:  # else it had been trained, and only pictures are missing
            measured["seconds"] += time.perf_counter() - started
            atomic_write_text(path, json.dumps(measured))
    artifact = folder / "artifacts" / subject.name
    learned.save(artifact)
    with torch.no_grad():
        held_out = _at_resolution(scored.pixel_values, learned.backbone.resolution_px)
        loss = learned.validation_loss(learned.backbone.encode_images(held_out))
    size = sum(path.stat().st_size for path in artifact.rglob("*") if path.is_file())
    atomic_write_text(path, json.dumps(measured | {"held-out loss": loss, "bytes": size}))
    return learned


def _at_resolution(pixel_values: Tensor, resolution_px: int) -> Tensor:
    """Photos in the size that the backbone is trained in."""
    if pixel_values.shape[-1] == resolution_px:
        return pixel_values
    return F.interpolate(pixel_values, (resolution_px, resolution_px), mode="bicubic", antialias=True).clamp(-1, 1)


def _weights(backbone: Backbone) -> dict[str, object]:
    """Hashes of all that a result depends on."""
    text_encoders = [weights_hash(encoder) for encoder in backbone.text_encoders]
    return {"unet": weights_hash(backbone.unet), "vae": weights_hash(backbone.vae), "text_encoders": text_encoders}


def _keep_settings(path: Path, settings: Mapping[str, object]) -> None:
    """Write the settings of a folder down, so that no training run of other settings or weights is taken up there."""
    now = json.loads(json.dumps(settings))
    kept = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else now
    if differing := sorted(name for name in kept.keys() | now.keys() if kept.get(name) != now.get(name)):
        raise ValueError(
            f"{path.parent} was begun with other settings ({', '.join(differing)}); remove the folder or choose another"
        )
    atomic_write_text(path, json.dumps(now, indent=2) + "\n")


def _read_scores(folder: Path, subject: BenchmarkSubject, words: str) -> dict[str, float]:
    rows = [row for row in read_records(folder / "records.jsonl") if row.subject == subject.name]
    plain, *others = [subject.prompt(i, words) for i in range(len(subject.prompts))]

    def mean(metric: str, prompts: list[str]) -> float:
        values = [row.value for row in rows if row.metric == metric and row.prompt in prompts]
        return sum(values) / len(values)

    found = {
        "identity": mean("identity", [plain]),
        "attributes": mean("subject_attributes", [plain]),
        "compliance": mean("prompt_attributes", others),
        "clip_t": mean("clip_t", [plain, *others]),
    }
    found["product"] = max(0.0, found["identity"]) * found["compliance"]
    return found | json.loads((folder / "measured" / f"{subject.name}.json").read_text(encoding="utf-8"))


def folder_name(name: str) -> str:
    """A method's name as a folder: "10x lr" -> "10x_lr"."""
    return name.replace(" ", "_")
