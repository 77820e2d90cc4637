"""What reproduce.py measures on single subjects: shifts, full fine-tuning, sums of both; also pairs.py, editing.py."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from common.backbones import load_backbone
from common.evaluation import metrics
from common.evaluation.baselines import BaselineConfig, FullFineTuning, full_fine_tuning
from common.evaluation.class_samples import read_samples, sample_untuned, with_class_samples
from common.evaluation.encoders import load_encoders
from common.evaluation.study import Candidate, Learned, Scores, Study, folder_name, run_study
from common.io import load_safetensors
from common.toyworld.benchmark import Subject, subjects
from common.training.config import flat_config
from common.training.optimize import default_device

from .config import SVDiffConfig
from .method import ARTIFACT, SVDiff, add_shifts, load_method
from .train import TrainOptions, train

PROPOSAL, FULL, UNTUNED = "SVDiff", "full fine-tuning", "untuned"
SUM, FULL_SUM = "sum of shifts", "sum of weight deltas"
FULL_LEARNING_RATE = 2e-4  # at which full fine-tuning learns best on tiny-sd

rendered_subjects = cache(subjects)


@dataclass(frozen=True)
class Plan:
    """How much is measured."""

    study: Study
    sum_study: Study  # of sums with the next subject's shifts or deltas
    config: SVDiffConfig  # without subject
    class_seeds: tuple[int, ...]  # pictures of "a photo of a [class noun]"
    pair_steps: int  # optimiser steps of two subjects together
    pair_seeds: tuple[int, ...]  # pictures of the two in one image
    edit_steps: int  # at most, of the one picture
    edit_error: float  # the reconstruction error at which training on it stops, of the untuned model's

    @classmethod
    def full(cls) -> "Plan":
        return cls(
            Study(), Study(num_prompts=1), SVDiffConfig.tiny(), class_seeds=tuple(range(8)),
            pair_steps=120, pair_seeds=tuple(range(6)), edit_steps=150, edit_error=0.7,
        )  # fmt: skip

    @classmethod
    def quick(cls) -> "Plan":
        config = SVDiffConfig.tiny(train_steps=4, num_class_images=2, num_inference_steps=2)
        study = replace(Study.quick(), num_subjects=2)
        return cls(
            study, study, config, class_seeds=(0, 1), pair_steps=4, pair_seeds=(0, 1),
            edit_steps=4, edit_error=0.7,
        )  # fmt: skip

    def subjects(self) -> list[Subject]:
        return rendered_subjects(self.study.num_subjects)

    def next_to(self, subject: Subject) -> Subject:
        """With whom a subject is paired: the next one, which for the last of the study is the first."""
        others = self.subjects()
        names = [other.name for other in others]
        return others[(names.index(subject.name) + 1) % len(names)]

    def baseline(self, **changes: object) -> BaselineConfig:
        """Full fine-tuning with the same steps, batch and sampling."""
        return replace(BaselineConfig.like(self.config, FULL_LEARNING_RATE), **changes)


def measure(backbone_name: str, plan: Plan, runs: Path) -> Scores:
    """The study's scores, "class drift", "numbers" that are trained, and what a sum costs:
    "identity loss", "held-out rise"."""
    candidates = {
        PROPOSAL: shifted(backbone_name, plan),
        FULL: full_fine_tuning(backbone_name, plan.baseline()),
    }
    for name in candidates:
        candidates[name] = with_class_samples(candidates[name], plan.class_seeds, runs / folder_name(name) / "class")
    scores = run_study(backbone_name, candidates, plan.study, runs)

    sums = {SUM: sum_of_shifts(plan, runs), FULL_SUM: sum_of_weights(backbone_name, plan, runs)}
    summed = run_study(backbone_name, sums, plan.sum_study, runs / "sums")
    for name, score, sign in (("identity loss", "identity", -1), ("held-out rise", "held-out loss", 1)):
        scores[name] = {
            total: {s: sign * (value - scores[score][alone][s]) for s, value in summed[score][total].items()}
            for total, alone in ((SUM, PROPOSAL), (FULL_SUM, FULL))
        }
    return scores | class_drift(backbone_name, plan, runs) | trained_numbers(backbone_name, plan, runs)


def artifact_folder(runs: Path, method: str, subject: Subject) -> Path:
    """Where the study keeps what a method learned."""
    return runs / folder_name(method) / "artifacts" / subject.name


def candidate(plan: Plan, train: Callable[[Subject, Path, Path], Learned], **settings: object) -> Candidate:
    words = f"{plan.config.identifiers[0]} {{class}}"
    return Candidate(words=words, settings=flat_config(config=plan.config, **settings), train=train)


def shifted(backbone_name: str, plan: Plan) -> Candidate:
    """The method."""

    def learn(subject: Subject, photos: Path, run: Path) -> SVDiff:
        shutil.rmtree(run, ignore_errors=True)  # of a run that was stopped
        config = replace(plan.config, class_nouns=(subject.class_noun,))
        return train(TrainOptions(images=(photos,), output=run, backbone=backbone_name, config=config, num_samples=0))

    return candidate(plan, learn)


def sum_of_shifts(plan: Plan, runs: Path) -> Candidate:
    """Eq. 4: the subject's shifts plus those of the next one."""

    def learn(subject: Subject, photos: Path, run: Path) -> SVDiff:
        method = load_method(artifact_folder(runs, PROPOSAL, subject), device=default_device())
        method.load_shifts(add_shifts(method.shifts(), read_shifts(runs, plan.next_to(subject))))
        return method

    return candidate(plan, learn, sum="shifts")


def read_shifts(runs: Path, subject: Subject) -> dict[str, Tensor]:
    """What the method learned of a subject."""
    return load_safetensors(artifact_folder(runs, PROPOSAL, subject) / ARTIFACT)[0]


def sum_of_weights(backbone_name: str, plan: Plan, runs: Path) -> Candidate:
    """W + Delta W_1 + Delta W_2 of the fully tuned U-Nets of the same two."""

    def learn(subject: Subject, photos: Path, run: Path) -> FullFineTuning:
        backbone = load_backbone(backbone_name, device=default_device())
        method = FullFineTuning(backbone, subject.class_noun, plan.baseline())
        folders = [artifact_folder(runs, FULL, each) for each in (subject, plan.next_to(subject))]
        tuned = [load_file(folder / "unet.safetensors") for folder in folders]
        base = method.backbone.unet.state_dict()
        total = {name: weight + sum(each[name].to(weight) - weight for each in tuned) for name, weight in base.items()}
        method.backbone.unet.load_state_dict(total)
        return method

    return candidate(plan, learn, sum="weights")


@torch.no_grad()
def class_drift(backbone_name: str, plan: Plan, runs: Path) -> Scores:
    """Mean distance of class samples to those of the untuned model at the same seeds, in the judge's features."""
    dino, drift = load_encoders().dino, {}
    settings = {
        "num_inference_steps": plan.config.num_inference_steps, "guidance_scale": plan.config.guidance_scale
    }  # fmt: skip
    for subject in plan.subjects():
        folder = runs / UNTUNED / "class" / subject.name
        before = dino.embed_images(
            sample_untuned(backbone_name, subject.class_noun, plan.class_seeds, folder, **settings)
        )
        for name in (PROPOSAL, FULL):
            after = dino.embed_images(read_samples(runs / folder_name(name) / "class" / subject.name))
            distance = metrics.cosine_distance(before, after).mean().item()
            drift.setdefault(name, {})[subject.name] = distance
    return {"class drift": drift}


def trained_numbers(backbone_name: str, plan: Plan, runs: Path) -> Scores:
    """How many numbers each method trains."""
    unet = sum(parameter.numel() for parameter in load_backbone(backbone_name).unet.parameters())
    counts = {s.name: sum(shift.numel() for shift in read_shifts(runs, s).values()) for s in plan.subjects()}
    return {"numbers": {PROPOSAL: counts, FULL: dict.fromkeys(counts, unet)}}
