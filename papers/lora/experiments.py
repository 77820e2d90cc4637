"""What reproduce.py measures: LoRA at several ranks, scales and merges, and its baselines, on every toy subject."""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from common.backbones import load_backbone
from common.evaluation import metrics
from common.evaluation.baselines import BaselineConfig, full_fine_tuning, token_inversion
from common.evaluation.class_samples import read_samples, sample_untuned, with_class_samples
from common.evaluation.encoders import load_encoders
from common.evaluation.study import Candidate, Learned, Scores, Study, folder_name, run_study
from common.toyworld.benchmark import Subject, held_out_views, subjects
from common.training.config import flat_config
from common.training.optimize import default_device

from .config import LoRAConfig
from .formats import Factors
from .merging import average_of_factors, sum_of_deltas
from .method import LoRA, load_method
from .train import TrainOptions, train

PROPOSAL, FULL, INVERSION, UNTUNED = "LoRA", "full fine-tuning", "Textual Inversion", "untuned"
SUM, AVERAGE, FACTOR_SUM = "sum of deltas", "average of factors", "sum of factors"
FULL_LEARNING_RATE, INVERSION_LEARNING_RATE = 2e-4, 5e-3  # at which the baselines learn best on tiny-sd

Adapters = Sequence[dict[str, Factors]]
MERGES: dict[str, Callable[[Adapters], dict[str, Factors]]] = {
    SUM: lambda adapters: sum_of_deltas(adapters, (1.0, 1.0)),
    AVERAGE: lambda adapters: average_of_factors(adapters, (0.5, 0.5)),
    FACTOR_SUM: lambda adapters: average_of_factors(adapters, (1.0, 1.0)),
}


@dataclass(frozen=True)
class Plan:
    """How much is measured."""

    study: Study
    scale_study: Study  # for each strength
    merge_study: Study  # for each way to merge a subject's pairs with those of the next subject
    config: LoRAConfig  # with any class noun
    ranks: tuple[int, ...]  # besides the proposal's
    strengths: tuple[float, ...]
    class_seeds: tuple[int, ...]  # pictures of "a photo of a [class noun]"

    @classmethod
    def full(cls) -> "Plan":
        return cls(
            Study(), Study(num_prompts=4, seeds=(0,)), Study(num_prompts=1), LoRAConfig.tiny("object"),
            ranks=(1, 16), strengths=(0.0, 0.5, 0.75, 1.0, 1.25), class_seeds=tuple(range(8)),
        )  # fmt: skip

    @classmethod
    def quick(cls) -> "Plan":
        config = replace(LoRAConfig.tiny("object"), train_steps=4, num_inference_steps=2)
        return cls(
            Study.quick(), Study.quick(), Study.quick(), config, ranks=(1,), strengths=(0.0, 1.0), class_seeds=(0, 1)
        )


def rank_name(rank: int, plan: Plan) -> str:
    """The proposal is the LoRA of its config's rank."""
    return PROPOSAL if rank == plan.config.rank else f"rank {rank}"


def scale_name(strength: float) -> str:
    return f"scale {strength:g}"


def artifact_folder(runs: Path, method: str, subject: str) -> Path:
    """Where the study keeps what a method learned."""
    return runs / folder_name(method) / "artifacts" / subject


def measure(backbone_name: str, plan: Plan, runs: Path) -> Scores:
    """The study's scores, "class drift", "PRES" and "gap" (see `numerical_gaps`); the scores of
    scales and merges, which have studies of their own, as "scale identity", "merge identity", ..."""
    config = plan.config
    candidates = {rank_name(rank, plan): adapted(backbone_name, plan, rank) for rank in (config.rank, *plan.ranks)}
    candidates |= {
        FULL: full_fine_tuning(backbone_name, BaselineConfig.like(config, FULL_LEARNING_RATE)),
        INVERSION: token_inversion(backbone_name, BaselineConfig.like(config, INVERSION_LEARNING_RATE)),
    }
    for name in (PROPOSAL, FULL):
        candidates[name] = with_class_samples(candidates[name], plan.class_seeds, runs / folder_name(name) / "class")
    scores = run_study(backbone_name, candidates, plan.study, runs)

    scaled = {scale_name(strength): at_strength(plan, runs, strength) for strength in plan.strengths}
    merged = {name: merged_with_next(plan, runs, name) for name in MERGES}
    studies = {"scale": (scaled, plan.scale_study), "merge": (merged, plan.merge_study)}
    for kind, (variants, study) in studies.items():
        for score, values in run_study(backbone_name, variants, study, runs / kind).items():
            scores[f"{kind} {score}"] = values

    for subject in subjects(plan.study.num_subjects):
        method = load_method(artifact_folder(runs, PROPOSAL, subject.name), device=default_device())
        sample_untuned(
            backbone_name, subject.class_noun, plan.class_seeds, runs / UNTUNED / "class" / subject.name,
            num_inference_steps=config.num_inference_steps, guidance_scale=config.guidance_scale,
        )  # fmt: skip
        found = class_scores(runs, subject) | numerical_gaps(backbone_name, method, subject)
        for score, values in found.items():
            for name, value in values.items():
                scores.setdefault(score, {}).setdefault(name, {})[subject.name] = value
    return scores


def subject_config(plan: Plan, subject: Subject, rank: int) -> LoRAConfig:
    """Each subject has its own seed, the number in its name, so that no two A's start alike when they are merged."""
    seed = int(subject.name.rpartition("_")[2])
    return replace(plan.config, class_noun=subject.class_noun, rank=rank, seed=seed)


def candidate(plan: Plan, train: Callable[[Subject, Path, Path], Learned], **settings: object) -> Candidate:
    return Candidate(
        words=f"{plan.config.identifier} {{class}}", settings=flat_config(config=plan.config, **settings), train=train
    )


def adapted(backbone_name: str, plan: Plan, rank: int) -> Candidate:
    """LoRA of a rank, trained."""

    def learn(subject: Subject, photos: Path, run: Path) -> LoRA:
        config = subject_config(plan, subject, rank)
        shutil.rmtree(run, ignore_errors=True)  # of a run that was stopped
        options = TrainOptions(images=photos, output=run, backbone=backbone_name, config=config, num_samples=0)
        return train(options)

    return candidate(plan, learn, rank=rank)


def at_strength(plan: Plan, runs: Path, strength: float) -> Candidate:
    """The proposal's pairs at another strength."""

    def learn(subject: Subject, photos: Path, run: Path) -> LoRA:
        method = load_method(artifact_folder(runs, PROPOSAL, subject.name), device=default_device())
        method.set_strength(strength)
        return method

    return candidate(plan, learn, strength=strength)


def merged_with_next(plan: Plan, runs: Path, name: str) -> Candidate:
    """The proposal's pairs of the subject and of the next one (of the last: the first) in one adapter."""

    def learn(subject: Subject, photos: Path, run: Path) -> LoRA:
        names = [other.name for other in subjects(plan.study.num_subjects)]
        second = names[(names.index(subject.name) + 1) % len(names)]
        loaded = [load_method(artifact_folder(runs, PROPOSAL, each)) for each in (subject.name, second)]
        pairs = MERGES[name]([method.factors() for method in loaded])
        rank = len(next(iter(pairs.values())).down)
        backbone = load_backbone(loaded[0].backbone.name, device=default_device())
        method = LoRA(backbone, replace(loaded[0].config, rank=rank))
        method.load_factors(pairs)
        return method

    return candidate(plan, learn, merge=name)


@torch.no_grad()
def class_scores(runs: Path, subject: Subject) -> dict[str, dict[str, float]]:
    """Of "a photo of a [class noun]": "class drift", the distance of each sample to that of the untuned model at the
    same seed; "PRES", likeness to the subject's photos."""
    dino, found = load_encoders().dino, {"class drift": {}, "PRES": {}}
    untuned = dino.embed_images(read_samples(runs / UNTUNED / "class" / subject.name))
    photos = dino.embed_images(subject.images)
    for name in (PROPOSAL, FULL):
        samples = dino.embed_images(read_samples(runs / folder_name(name) / "class" / subject.name))
        found["class drift"][name] = metrics.cosine_distance(samples, untuned).mean().item()
        found["PRES"][name] = metrics.prior_preservation(samples, photos)
    found["PRES"][UNTUNED] = metrics.prior_preservation(untuned, photos)
    return found


@torch.no_grad()
def numerical_gaps(backbone_name: str, method: LoRA, subject: Subject) -> dict[str, dict[str, float]]:
    """Largest differences of the predicted noise on held-out photos: merged against adapter, strength 0 against base,
    unmerged against adapter; relative to the largest prediction."""
    base = load_backbone(backbone_name, device=default_device()).freeze()
    latents = base.encode_images(held_out_views(subject.entity, 2))
    timesteps, conditioning = torch.tensor([200, 800], device=latents.device), method.encode(["a photo of a sks"] * 2)

    def predict(backbone: object) -> Tensor:
        return backbone.predict_noise(latents, timesteps, conditioning)

    adapter = predict(method.backbone)
    method.merge()
    merged = predict(method.backbone)
    method.unmerge()
    unmerged = predict(method.backbone)
    method.set_strength(0.0)
    silent, plain = predict(method.backbone), predict(base)
    size = adapter.abs().max()
    gaps = {"merged": merged - adapter, "unmerged": unmerged - adapter, "strength 0": silent - plain}
    return {"gap": {name: (gap.abs().max() / size).item() for name, gap in gaps.items()}}
