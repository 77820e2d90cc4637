"""What reproduce.py measures: ReVersion, its ablations and two baselines on held-out relations."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from common.backbones import load_backbone
from common.evaluation.baselines import BaselineConfig, captioned_full_fine_tuning, captioned_token_inversion
from common.evaluation.exemplar_study import ExemplarStudy, run_exemplar_study
from common.evaluation.trials import Candidate, Scores, folder_name
from common.io import atomic_write_text
from common.toyworld.exemplar_tasks import Task, entity_nouns, relation_tasks
from common.training.config import flat_config
from common.training.loop import fit
from common.training.optimize import default_device

from .config import ReVersionConfig
from .exemplars import TEMPLATES, RelationDataset
from .method import ReVersion, load_method
from .train import fit_config

PROPOSAL, NO_STEERING, UNIFORM = "ReVersion", "no steering", "uniform timesteps"
INVERSION, FINE_TUNING = "Textual Inversion", "DreamBooth"
ABLATIONS: dict[str, dict[str, Any]] = {
    PROPOSAL: {},
    NO_STEERING: {"steering_weight": 0.0},
    UNIFORM: {"focal_skew": 0.0},
}
FINE_TUNING_LEARNING_RATE = 2e-4  # suits tiny-sd
STEERING, LOW_NOISE, HIGH_NOISE = "steering", "low-noise loss", "high-noise loss"
LOW, HIGH = tuple(range(25, 250, 50)), tuple(range(775, 1000, 50))  # timesteps


@dataclass(frozen=True)
class Plan:
    """How much is measured."""

    study: ExemplarStudy
    config: ReVersionConfig

    @classmethod
    def full(cls) -> "Plan":
        return cls(ExemplarStudy(), ReVersionConfig.tiny())

    @classmethod
    def quick(cls) -> "Plan":
        return cls(ExemplarStudy.quick(), replace(ReVersionConfig.tiny(), train_steps=2, num_inference_steps=2))

    @property
    def tasks(self) -> list[Task]:
        return relation_tasks(self.study.num_tasks)


def measure(backbone_name: str, plan: Plan, runs: Path) -> Scores:
    """The study's scores; of ReVersion and its ablations also STEERING, LOW_NOISE and HIGH_NOISE."""
    config, tasks = plan.config, plan.tasks
    candidates = {name: candidate(backbone_name, config, changes) for name, changes in ABLATIONS.items()}
    candidates[INVERSION] = captioned_token_inversion(
        backbone_name, BaselineConfig.like(config, config.learning_rate), config.initializer_token
    )
    candidates[FINE_TUNING] = captioned_full_fine_tuning(
        backbone_name, BaselineConfig.like(config, FINE_TUNING_LEARNING_RATE)
    )
    scores = run_exemplar_study(backbone_name, candidates, tasks, plan.study, runs)
    for name in ABLATIONS:
        for task in tasks:
            for score, value in looked_into(load_learned(backbone_name, runs, name, task), task).items():
                scores.setdefault(score, {}).setdefault(name, {})[task.name] = value
    return scores


def candidate(backbone_name: str, config: ReVersionConfig, changes: Mapping[str, Any]) -> Candidate:
    """The method, or an ablation, as a candidate of the study."""
    config = replace(config, **changes)

    def learn(task: Task, photos: Path, run: Path) -> ReVersion:
        table = {f"{i:02d}.png": [caption] for i, caption in enumerate(task.captions)}
        atomic_write_text(photos / TEMPLATES, json.dumps(table, indent=2) + "\n")
        method = ReVersion(load_backbone(backbone_name, device=default_device()), config)
        dataset = RelationDataset(photos, method.backbone, config.placeholder_token, seed=config.seed)
        fit(method, dataset, fit_config(config, keep_checkpoints=1), run, resume=True)
        return method

    return Candidate(words=config.placeholder_token, settings=flat_config(config=config), train=learn)


def load_learned(backbone_name: str, runs: Path, name: str, task: Task) -> ReVersion:
    """What the method or an ablation learned of a task."""
    return load_method(runs / folder_name(name) / "artifacts" / folder_name(task.name), backbone_name, default_device())


@torch.no_grad()
def looked_into(method: ReVersion, task: Task) -> dict[str, float]:
    """How much more <R> is like a preposition than like the captions' nouns; losses of fresh exemplars by noise."""
    nouns = sorted({noun for scene in task.scenes for noun in entity_nouns(scene)})
    cosines = method.cosines(nouns)
    side = method.backbone.resolution_px
    images = torch.nn.functional.interpolate(task.held_out, (side, side), mode="bicubic", antialias=True).clamp(-1, 1)
    latents = method.backbone.encode_images(images)
    prompts = [caption.format(method.config.placeholder_token) for caption in task.held_out_captions]
    return {
        STEERING: cosines["prepositions"] - cosines["nouns"],
        LOW_NOISE: method.validation_loss(latents, prompts, LOW),
        HIGH_NOISE: method.validation_loss(latents, prompts, HIGH),
    }
