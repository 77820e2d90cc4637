"""What reproduce.py measures: every variant of the method on every toy subject, and ordinary words as baselines."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common.backbones import Backbone, load_backbone
from common.data.image_folder import ImageFolder
from common.data.latent_cache import LatentCache
from common.data.subject_dataset import SubjectDataset
from common.evaluation.study import PLAIN_PROMPT, Candidate, Scores, Study, folder_name, run_study
from common.sampling import sample_images
from common.toyworld.benchmark import Subject, held_out_views, subjects
from common.toyworld.captions import entity_phrase
from common.training.config import flat_config
from common.training.loop import fit
from common.training.optimize import default_device

from .config import TextualInversionConfig
from .method import TextualInversion
from .train import fit_config, prompt_loss
from .variants import PerImageTextualInversion, train_progressively

NUM_CAPTIONS = 8  # natural captions tried for each subject
PLACEHOLDER = "<{class}>"  # S* of the toy subjects: "<duck>"
ONE_VECTOR, INITIALIZER, CAPTION = "1 vector", "initializer", "best caption"  # the proposal and the baselines
EARLY = "early held-out loss"  # after a quarter of the steps


@dataclass(frozen=True)
class Plan:
    """How much is measured."""

    study: Study
    config: TextualInversionConfig
    num_styles: int

    @classmethod
    def full(cls) -> "Plan":
        return cls(Study(), TextualInversionConfig.tiny(), num_styles=2)

    @classmethod
    def quick(cls) -> "Plan":
        config = replace(TextualInversionConfig.tiny(), train_steps=8, num_inference_steps=2)
        return cls(Study.quick(), config, num_styles=1)


@dataclass(frozen=True)
class Variant:
    """One line of the comparison: changed fields of the config, a factor on the learning rate, and how it trains."""

    changes: Mapping[str, object] = field(default_factory=dict)
    learning_rate_times: float = 1.0
    training: str = "plain"  # or "progressive", "per-image"

    def config(self, base: TextualInversionConfig) -> TextualInversionConfig:
        return replace(base, learning_rate=base.learning_rate * self.learning_rate_times, **self.changes)


VARIANTS = {
    ONE_VECTOR: Variant(),
    "2 vectors": Variant({"num_vectors": 2}),
    "4 vectors": Variant({"num_vectors": 4}),
    "10x lr": Variant(learning_rate_times=10.0),
    "regularised": Variant({"regularisation_weight": 1e-3}),
    "progressive": Variant({"num_vectors": 3}, training="progressive"),
    "per-image": Variant(training="per-image"),
}


def measure(backbone_name: str, plan: Plan, runs: Path) -> Scores:
    """The study's scores of all variants and baselines, and EARLY of the plain variants."""
    candidates = {
        INITIALIZER: ordinary_words(backbone_name, plan, lambda subject: subject.class_noun),
        CAPTION: ordinary_words(backbone_name, plan, partial(best_caption, backbone_name, plan.study.held_out)),
    }
    for name, variant in VARIANTS.items():
        config = variant.config(plan.config)
        candidates[name] = Candidate(
            words=PLACEHOLDER,
            settings=flat_config(config=config, training=variant.training),
            train=partial(train_on_subject, backbone_name, plan, variant),
        )
    scores = run_study(backbone_name, candidates, plan.study, runs)
    names = [subject.name for subject in subjects(plan.study.num_subjects)]
    scores[EARLY] = {
        name: {subject: early_loss(training_folder(runs, name, subject)) for subject in names}
        for name, variant in VARIANTS.items()
        if variant.training == "plain"
    }
    return scores


def train_on_subject(
    backbone_name: str, plan: Plan, variant: Variant, subject: Subject, photos: Path, run: Path
) -> TextualInversion:
    """A variant on a toy subject: the class noun is the initializer, "<duck>" the placeholder."""
    backbone = load_backbone(backbone_name, device=default_device()).freeze()
    config = replace(plan.config, initializer_token=subject.class_noun)
    with torch.no_grad():
        held_out = backbone.encode_images(held_out_views(subject.entity, plan.study.held_out))
    return train_concept(backbone, config, variant, photos, held_out, run)


def train_concept(
    backbone: Backbone, config: TextualInversionConfig, variant: Variant, photos: Path, held_out: Tensor, run: Path
) -> TextualInversion:
    """Train one variant on a folder of pictures, or take up the run that is there.

    Args:
        config: of this concept, without the variant's changes.
        held_out: latents (M,4,h,w) of pictures that training does not see, for the validation loss in the log.
    """
    config = variant.config(config)
    latents = LatentCache(ImageFolder(photos, resolution_px=backbone.resolution_px, flip=config.flip), backbone)

    def dataset(config: TextualInversionConfig) -> SubjectDataset:
        return SubjectDataset(latents, config.training_prompts(), seed=config.seed)

    if variant.training == "progressive":
        unlock_every = max(1, config.train_steps * 2 // 5)  # 2000 of the paper's 5000
        return train_progressively(backbone, dataset, config, run, unlock_every=unlock_every)
    if variant.training == "per-image":
        method = PerImageTextualInversion(backbone, config, len(latents))
    else:
        method = TextualInversion(backbone, config)
    fit(
        method,
        dataset(config),
        fit_config(config, validate_every=max(1, config.train_steps // 4)),
        run,
        validate=lambda: prompt_loss(backbone, held_out, config.plain_prompt()),
        scalars=method.norms,
        resume=True,
    )
    return method


@dataclass(frozen=True)
class OrdinaryWords:
    """The backbone alone with natural words in the place of S*: what a user can do without training."""

    backbone: Backbone
    config: TextualInversionConfig
    placeholder: str
    words: str  # without article

    def generate(self, prompt: str, *, seeds: list[int]) -> Tensor:
        return sample_images(
            self.backbone,
            prompt.replace(self.placeholder, self.words),
            seeds=seeds,
            num_inference_steps=self.config.num_inference_steps,
            guidance_scale=self.config.guidance_scale,
        )

    def validation_loss(self, latents: Tensor) -> float:
        return prompt_loss(self.backbone, latents, PLAIN_PROMPT.format(self.words))

    def save(self, folder: Path) -> None:
        """The artifact is the words."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "words.txt").write_text(self.words, encoding="utf-8")


def ordinary_words(backbone_name: str, plan: Plan, choose: Callable[[Subject], str]) -> Candidate:
    """A baseline.   choose: the words for a subject."""

    def prepare(subject: Subject, photos: Path, run: Path) -> OrdinaryWords:
        backbone = load_backbone(backbone_name, device=default_device()).freeze()
        return OrdinaryWords(backbone, plan.config, PLACEHOLDER.replace("{class}", subject.class_noun), choose(subject))

    return Candidate(words=PLACEHOLDER, settings=flat_config(config=plan.config), train=prepare)


def best_caption(backbone_name: str, held_out: int, subject: Subject) -> str:
    """The noun phrase of the world's grammar under which the held-out pictures have the lowest loss, without article.

    Choosing on the held-out pictures favours this baseline.
    """
    backbone = load_backbone(backbone_name, device=default_device()).freeze()
    with torch.no_grad():
        latents = backbone.encode_images(held_out_views(subject.entity, held_out))
    generators = [np.random.default_rng([7, k]) for k in range(NUM_CAPTIONS)]
    phrases = {entity_phrase(rng, subject.entity, "photo", keep=0.9)[0] for rng in generators}
    best = min(sorted(phrases), key=lambda phrase: prompt_loss(backbone, latents, f"a photo of {phrase}"))
    return best.split(" ", 1)[1]


def early_loss(run: Path) -> float:
    """The first validation loss in a run's log."""
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    losses = {row["step"]: row["validation_loss"] for row in rows if "validation_loss" in row}
    return losses[min(losses)]


def training_folder(runs: Path, variant_name: str, subject: str) -> Path:
    """Where the study has a variant train on a subject."""
    return runs / folder_name(variant_name) / "training" / subject


def artifact_folder(runs: Path, variant_name: str, subject: str) -> Path:
    """Where the study keeps what a variant learned of a subject."""
    return runs / folder_name(variant_name) / "artifacts" / subject
