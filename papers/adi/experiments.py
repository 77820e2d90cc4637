"""What reproduce.py measures: ADI, its ablations and baselines in the study of actions, their losses, and the masks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import default_collate

from common.backbones import Backbone, load_backbone
from common.data.latent_cache import LatentCache
from common.evaluation.baselines import BaselineConfig, captioned_full_fine_tuning, captioned_token_inversion
from common.evaluation.exemplar_study import ExemplarStudy, run_exemplar_study
from common.evaluation.trials import Candidate, Scores, folder_name
from common.io import load_safetensors
from common.sampling.images import save_png, to_pil
from common.toyworld.exemplar_tasks import Task, action_tasks
from common.training.config import flat_config
from common.training.loop import fit
from common.training.optimize import default_device
from common.training.seeding import keys_of_step

from .config import ADIConfig
from .method import ADI, action_mask, context_mask, load_method
from .train import fit_config
from .triples import TripleDataset, load_folders
from .variants import LayerwiseInversion, RandomMasks

PROPOSAL, UNMASKED = "ADI", "layer-wise inversion"
LONGER = "layer-wise inversion, three times the steps"
RANDOM, CONTEXT, ACTION, INTERSECTION = "random masks", "context mask alone", "action mask alone", "intersection"
INVERSION, FINE_TUNING = "Textual Inversion", "DreamBooth"
FINE_TUNING_LEARNING_RATE = 2e-4  # suits tiny-sd
EXEMPLAR_LOSS = "exemplar loss"


@dataclass(frozen=True)
class Variant:
    """One line of the comparison: changed fields of the config, more steps, and the class."""

    changes: Mapping[str, Any] = field(default_factory=dict)
    method: type[ADI] = ADI
    times_steps: int = 1

    def configure(self, config: ADIConfig) -> ADIConfig:
        return replace(config, train_steps=self.times_steps * config.train_steps, **self.changes)


VARIANTS = {
    PROPOSAL: Variant(),
    UNMASKED: Variant(method=LayerwiseInversion),
    LONGER: Variant(method=LayerwiseInversion, times_steps=3),
    RANDOM: Variant(method=RandomMasks),
    CONTEXT: Variant({"merge": "context"}),
    ACTION: Variant({"merge": "action"}),
    INTERSECTION: Variant({"merge": "intersection"}),
}
ABLATIONS = tuple(name for name in VARIANTS if name not in (PROPOSAL, UNMASKED))


@dataclass(frozen=True)
class Plan:
    """How much is measured."""

    study: ExemplarStudy
    config: ADIConfig
    num_ablation_tasks: int  # the first ones of the study
    num_triples: int  # in which the masks are looked at, for each task

    @classmethod
    def full(cls) -> "Plan":
        return cls(ExemplarStudy(), ADIConfig.tiny(), num_ablation_tasks=3, num_triples=4)

    @classmethod
    def quick(cls) -> "Plan":
        config = replace(ADIConfig.tiny(), train_steps=2, num_inference_steps=2)
        return cls(ExemplarStudy.quick(), config, num_ablation_tasks=1, num_triples=1)

    @property
    def tasks(self) -> tuple[Task, ...]:
        return _tasks(self.study.num_tasks)


@lru_cache
def _tasks(count: int) -> tuple[Task, ...]:
    return tuple(action_tasks(count))  # rendered once


def measure(backbone_name: str, plan: Plan, runs: Path) -> Scores:
    """The study's scores of all candidates (ablations: of the first tasks), and EXEMPLAR_LOSS of some."""
    baseline = BaselineConfig(
        train_steps=plan.config.train_steps,
        batch_size=plan.config.batch_size,
        learning_rate=plan.config.learning_rate,
        num_inference_steps=plan.config.num_inference_steps,
        guidance_scale=plan.config.guidance_scale,
    )
    fine_tuning = replace(baseline, learning_rate=FINE_TUNING_LEARNING_RATE)
    compared = {
        **{name: candidate(backbone_name, plan.config, VARIANTS[name]) for name in (PROPOSAL, UNMASKED)},
        INVERSION: captioned_token_inversion(backbone_name, baseline, plan.config.initializer_token),
        FINE_TUNING: captioned_full_fine_tuning(backbone_name, fine_tuning),
    }
    ablations = {name: candidate(backbone_name, plan.config, VARIANTS[name]) for name in ABLATIONS}
    few = replace(plan.study, num_tasks=plan.num_ablation_tasks)
    scores = run_exemplar_study(backbone_name, compared, plan.tasks, plan.study, runs)
    for score, values in run_exemplar_study(backbone_name, ablations, plan.tasks[: few.num_tasks], few, runs).items():
        scores[score] |= values
    scores[EXEMPLAR_LOSS] = {
        name: {task.name: exemplar_loss(backbone_name, runs, name, task) for task in plan.tasks}
        for name in (PROPOSAL, UNMASKED, INVERSION)
    }
    return scores


def candidate(backbone_name: str, config: ADIConfig, variant: Variant) -> Candidate:
    """A variant as a candidate of the study."""
    config = variant.configure(config)

    def learn(task: Task, photos: Path, run: Path) -> ADI:
        method = variant.method(load_backbone(backbone_name, device=default_device()), config)
        fit(method, triples(method, task, photos), fit_config(config, keep_checkpoints=1), run, resume=True)
        return method

    settings = flat_config(config=config, method=variant.method)
    return Candidate(words=config.placeholder, settings=settings, train=learn)


def triples(method: ADI, task: Task, photos: Path) -> TripleDataset:
    """Exemplars with captions from a folder of the study; those in other poses are written beside it."""
    others = photos.parent.parent / "other_actions" / photos.name
    for i, image in enumerate(to_pil(task.others)):
        save_png(image, others / f"{i:02d}.png")
    folders = load_folders(photos, others, method.backbone.resolution_px)
    latents = [LatentCache(folder, method.backbone) for folder in folders]
    return TripleDataset(*latents, method.config.placeholder, seed=method.config.seed)


def exemplar_loss(backbone_name: str, runs: Path, name: str, task: Task) -> float:
    """Denoising loss of the pictures that were learned from, under their captions, noise fixed.

    Textual Inversion's word is read as 16 identifiers that are all the same, which is the same.
    """
    method = load_learned(backbone_name, runs, name if name in VARIANTS else PROPOSAL, task)
    if name not in VARIANTS:
        artifact = runs / folder_name(name) / "artifacts" / folder_name(task.name)
        (word,) = load_safetensors(artifact / "learned_embeds.safetensors")[0].values()
        method.set_identifiers(word)
    captions = [caption.format(method.config.placeholder) for caption in task.captions]
    with torch.no_grad():
        latents = method.backbone.encode_images(at_resolution(task.images, method.backbone))
    return method.validation_loss(latents, captions)


def load_learned(backbone_name: str, runs: Path, name: str, task: Task) -> ADI:
    """What a variant learned of a task."""
    return load_method(runs / folder_name(name) / "artifacts" / folder_name(task.name), backbone_name, default_device())


def at_resolution(images: Tensor, backbone: Backbone) -> Tensor:
    """Pictures (N,3,H,W) in the size of the backbone."""
    side = backbone.resolution_px
    return torch.nn.functional.interpolate(images, (side, side), mode="bicubic", antialias=True).clamp(-1, 1)


def mask_overlap(backbone_name: str, plan: Plan, runs: Path, task: Task) -> Tensor:
    """Share of each layer's channels that both masks keep, (L,), for the learned identifiers; chance: kept_share^2."""
    method = load_learned(backbone_name, runs, PROPOSAL, task)
    dataset = triples(method, task, runs / folder_name(PROPOSAL) / "photos" / folder_name(task.name))
    keys = keys_of_step(0, plan.num_triples)
    items = [dataset.sample(int(key) % len(dataset), int(key)) for key in keys]
    _, gradients = method.sample_gradients({**default_collate(items), "sample_keys": keys})
    anchor, other_context, other_action = gradients
    share = method.config.kept_share
    both = context_mask(anchor, other_context, share) & action_mask(anchor, other_action, share)
    return both.float().mean((0, 2)).cpu()


def of_tasks(scores: Scores, score: str, tasks: Sequence[Task]) -> dict[str, dict[str, float]]:
    """One score of the candidates that were measured on all of these tasks: candidate -> task -> value."""
    names = [task.name for task in tasks]
    return {
        candidate: {name: values[name] for name in names}
        for candidate, values in scores[score].items()
        if all(name in values for name in names)
    }
