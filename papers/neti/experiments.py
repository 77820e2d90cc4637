"""What reproduce.py measures: NeTI, its ablations, XTI and Textual Inversion, and truncations of trained mappers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import spearmanr
from torch import Tensor

from common.backbones import Backbone, load_backbone
from common.data.image_folder import ImageFolder
from common.data.latent_cache import LatentCache
from common.data.subject_dataset import SubjectDataset
from common.evaluation.baselines import BaselineConfig, token_inversion
from common.evaluation.study import Candidate, Scores, Study, folder_name, run_study
from common.toyworld.benchmark import Subject
from common.training.config import flat_config
from common.training.loop import fit
from common.training.optimize import default_device

from .config import NeTIConfig
from .mapper import HIDDEN
from .method import NeTI
from .train import fit_config
from .variants import ExtendedTextualInversion, LayerAlone, TimeAlone

PLACEHOLDER = "<{class}>"  # S* of the toy subjects: "<duck>"
INVERSION_LEARNING_RATE = 5e-3  # of free words: Textual Inversion and XTI, at which they learn best on tiny-sd
PROPOSAL, XTI, INVERSION = "NeTI", "XTI", "Textual Inversion"
NO_BYPASS, TIME, LAYER, NO_DROPOUT = "no bypass", "time alone", "layer alone", "no dropout"


@dataclass(frozen=True)
class Variant:
    """One line of the comparison: changed fields of the config, and the class."""

    changes: Mapping[str, Any] = field(default_factory=dict)
    method: type[NeTI] = NeTI


VARIANTS = {
    PROPOSAL: Variant(),
    NO_BYPASS: Variant({"bypass": False}),
    TIME: Variant(method=TimeAlone),
    LAYER: Variant(method=LayerAlone),
    NO_DROPOUT: Variant({"nested_dropout": 0.0}),
    XTI: Variant({"learning_rate": INVERSION_LEARNING_RATE, "weight_decay": 0.0}, ExtendedTextualInversion),
}


@dataclass(frozen=True)
class Plan:
    """How much is measured."""

    study: Study  # of NeTI and Textual Inversion
    config: NeTIConfig  # with any super-category
    truncation_study: Study  # of truncated mappers
    truncation_steps: int  # DDIM steps of its pictures
    keeps: Mapping[str, tuple[int, ...]]  # variant -> hidden units that stay, falling

    @classmethod
    def full(cls) -> "Plan":
        keeps = {PROPOSAL: (HIDDEN, 48, 16, 4, 0), NO_DROPOUT: (HIDDEN, 16, 4)}
        return cls(Study(), NeTIConfig.tiny(), Study(num_prompts=3), 12, keeps)

    @classmethod
    def quick(cls) -> "Plan":
        config = replace(NeTIConfig.tiny(), train_steps=2, num_inference_steps=2)
        return cls(Study.quick(), config, Study.quick(), 2, {PROPOSAL: (HIDDEN, 16, 0), NO_DROPOUT: (HIDDEN, 16)})


def measure(backbone_name: str, plan: Plan, runs: Path) -> Scores:
    """The study's scores of NeTI and Textual Inversion; "held-out loss" of all variants; the truncations' scores.

    The truncations are methods too, named by `truncated`, in "truncation identity", "truncation attributes" and so on.
    """
    config = plan.config
    baseline = BaselineConfig.like(config, INVERSION_LEARNING_RATE)
    proposal = candidate(backbone_name, config, PROPOSAL, runs)
    scores = run_study(
        backbone_name, {PROPOSAL: proposal, INVERSION: token_inversion(backbone_name, baseline)}, plan.study, runs
    )

    # Of the ablations only the loss counts, so their pictures are few and coarse.
    ablations = {name: candidate(backbone_name, config, name, runs, steps=1) for name in VARIANTS if name != PROPOSAL}
    losses = run_study(backbone_name, ablations, replace(plan.study, num_prompts=1, seeds=(0,)), runs / "losses")
    scores["held-out loss"] |= losses["held-out loss"]

    truncations = {
        truncated(name, keep): candidate(backbone_name, config, name, runs, keep=keep, steps=plan.truncation_steps)
        for name, keeps in plan.keeps.items()
        for keep in keeps
    }
    found = run_study(backbone_name, truncations, plan.truncation_study, runs / "truncation")
    return scores | {f"truncation {score}": values for score, values in found.items()}


@dataclass(frozen=True)
class Truncated:
    """A trained method whose pictures keep the first hidden units of its mapper."""

    method: NeTI
    keep: int
    steps: int  # DDIM steps of its pictures

    @property
    def backbone(self) -> Backbone:
        return self.method.backbone

    def generate(self, prompt: str, *, seeds: list[int]) -> Tensor:
        return self.method.generate(prompt, seeds=seeds, keep=self.keep, num_inference_steps=self.steps)

    def validation_loss(self, latents: Tensor) -> float:
        return self.method.validation_loss(latents, keep=self.keep)

    def save(self, folder: Path) -> None:
        """The artifact is that of the method: truncation is chosen when pictures are made."""
        self.method.save(folder)


def candidate(
    backbone_name: str, config: NeTIConfig, name: str, runs: Path, *, keep: int = HIDDEN, steps: int | None = None
) -> Candidate:
    """A variant as a candidate of the study. All candidates of a variant share one training of each subject."""
    config, kind = replace(config, **VARIANTS[name].changes), VARIANTS[name].method
    steps = config.num_inference_steps if steps is None else steps

    def learn(subject: Subject, photos: Path, run: Path) -> Truncated:
        folder = training_folder(runs, name, subject.name)  # not `run`, which each candidate has for itself
        return Truncated(train_on_subject(backbone_name, config, kind, subject, photos, folder), keep, steps)

    settings = flat_config(config=config, variant=name, keep=keep, steps=steps)
    return Candidate(words=PLACEHOLDER, settings=settings, train=learn)


def train_on_subject(
    backbone_name: str, config: NeTIConfig, kind: type[NeTI], subject: Subject, photos: Path, run: Path
) -> NeTI:
    """Learn a toy subject, whose class is the super-category, or take up the run that is there."""
    backbone = load_backbone(backbone_name, device=default_device())
    config = replace(config, super_category_token=subject.class_noun)
    latents = LatentCache(ImageFolder(photos, resolution_px=backbone.resolution_px, flip=config.flip), backbone)
    dataset = SubjectDataset(latents, config.training_prompts(), seed=config.seed)
    method = kind(backbone, config)
    fit(method, dataset, fit_config(config, keep_checkpoints=1), run, resume=True)
    return method


def truncated(name: str, keep: int) -> str:
    """How a truncation is called: "NeTI, 16 of 128"."""
    return f"{name}, {keep} of {HIDDEN}"


def rank_correlation(values: Sequence[float]) -> float:
    """Spearman's rho of values, in the order of growing truncation, with the truncation's strength; 0 if all equal."""
    if len(set(values)) == 1:
        return 0.0
    return float(spearmanr(np.arange(len(values)), values).statistic)


def compliance_at_equal_identity(
    first: Sequence[tuple[float, float]], second: Sequence[tuple[float, float]]
) -> tuple[float, float]:
    """Mean compliance of two curves of (identity, compliance) over the identities that both reach.

    Between the points, curves are straight; where they have no identity in common, the nearest ends are compared.
    """
    curves = [np.array(sorted(curve), dtype=np.float64) for curve in (first, second)]
    low, high = max(curve[0, 0] for curve in curves), min(curve[-1, 0] for curve in curves)
    grid = np.linspace(low, max(low, high), 101)
    one, two = (float(np.interp(grid, curve[:, 0], curve[:, 1]).mean()) for curve in curves)
    return one, two


def truncation_scores(scores: Scores, plan: Plan) -> Scores:
    """Per subject: "rank correlation" of attributes and compliance of NeTI with the strength; "equal identity"."""
    subjects = list(scores["truncation identity"][truncated(PROPOSAL, HIDDEN)])

    def curve(score: str, name: str, subject: str) -> list[float]:
        return [scores[f"truncation {score}"][truncated(name, keep)][subject] for keep in plan.keeps[name]]

    correlations = {
        score: {s: rank_correlation(curve(score, PROPOSAL, s)) for s in subjects}
        for score in ("attributes", "compliance")
    }
    equal: dict[str, dict[str, float]] = {PROPOSAL: {}, NO_DROPOUT: {}}
    for s in subjects:
        curves = [list(zip(curve("identity", name, s), curve("compliance", name, s), strict=True)) for name in equal]
        equal[PROPOSAL][s], equal[NO_DROPOUT][s] = compliance_at_equal_identity(*curves)
    return {"rank correlation": correlations, "equal identity": equal}


def training_folder(runs: Path, name: str, subject: str) -> Path:
    """Where a variant is trained on a subject."""
    return runs / "trained" / folder_name(name) / subject
