"""What reproduce.py measures: every variant of the method on every toy subject, and ordinary words as baselines."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common.backbones import Backbone
from common.data.image_folder import ImageFolder
from common.data.latent_cache import LatentCache
from common.data.subject_dataset import SubjectDataset
from common.evaluation.benchmark import Generator, run_benchmark
from common.evaluation.encoders import load_encoders
from common.evaluation.records import read_records
from common.evaluation.subjects import SUBJECT_GAP, BenchmarkSubject, from_toy_world
from common.fingerprint import weights_hash
from common.sampling import sample_images
from common.sampling.images import save_png, to_pil
from common.toyworld.benchmark import Subject, held_out_views
from common.toyworld.captions import entity_phrase
from common.toyworld.judge import Judge
from common.training.config import flat_config
from common.training.loop import fit

from .config import TextualInversionConfig
from .method import TextualInversion
from .train import fit_config, prompt_loss
from .variants import PerImageTextualInversion, train_progressively

NUM_CAPTIONS = 8  # natural captions tried for each subject
PLACEHOLDER = "<{class}>"  # S* of the toy subjects: "<duck>"
ONE_VECTOR, INITIALIZER, CAPTION = "1 vector", "initializer", "best caption"  # the proposal and the baselines

Scores = dict[str, dict[str, float]]  # score or variant -> subject -> value


@dataclass(frozen=True)
class Plan:
    """How much is measured."""

    config: TextualInversionConfig
    num_subjects: int
    num_styles: int
    num_prompts: int  # per subject, besides "a photo of a S*"
    seeds: tuple[int, ...]
    held_out: int  # pictures per subject

    @classmethod
    def full(cls) -> "Plan":
        return cls(TextualInversionConfig.tiny(), num_subjects=5, num_styles=2, num_prompts=6, seeds=(0, 1), held_out=8)

    @classmethod
    def quick(cls) -> "Plan":
        config = replace(TextualInversionConfig.tiny(), train_steps=10, num_inference_steps=2)
        return cls(config, num_subjects=1, num_styles=1, num_prompts=2, seeds=(0,), held_out=2)


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


@dataclass(frozen=True)
class Measured:
    """What the claims rest on, by variant or baseline."""

    losses: Scores = field(default_factory=dict)  # held-out denoising loss at the end
    early_losses: Scores = field(default_factory=dict)  # after a quarter of the steps
    scores: dict[str, Scores] = field(default_factory=dict)  # see `read_scores`


def measure(backbone: Backbone, plan: Plan, subjects: list[Subject], runs: Path) -> Measured:
    """Score the baselines, then train and score every variant; what is finished in `runs` is not done again."""
    measured, by_name = Measured(), {subject.name: subject for subject in subjects}
    held_out = {subject.name: held_out_latents(backbone, subject, plan.held_out) for subject in subjects}
    scored = [benchmark_subject(subject, plan.num_prompts) for subject in subjects]
    encoders, judge = load_encoders(), Judge.load()
    unet = weights_hash(backbone.unet)

    def score(name: str, make: object, settings: dict[str, object]) -> None:
        folder = runs / "scores" / folder_name(name)
        settings = settings | {"unet": unet}
        run_benchmark(
            make, scored, encoders, judge,
            method=name, subject_words=PLACEHOLDER, settings=settings, seeds=plan.seeds, output_dir=folder,
        )  # fmt: skip
        measured.scores[name] = read_scores(folder / "records.jsonl", scored)

    captions = {name: best_caption(backbone, subject, held_out[name]) for name, subject in by_name.items()}
    nouns = {name: f"a {subject.class_noun}" for name, subject in by_name.items()}
    for baseline, phrases in ((INITIALIZER, nouns), (CAPTION, captions)):
        measured.losses[baseline] = {
            name: prompt_loss(backbone, held_out[name], f"a photo of {phrase}") for name, phrase in phrases.items()
        }
        make = partial(ordinary_words, backbone, plan.config, phrases)
        score(baseline, make, flat_config(config=plan.config, phrases=phrases))

    for name, variant in VARIANTS.items():
        make = partial(train_on_subject, backbone, plan.config, name, held_out, runs)
        score(name, make, flat_config(config=variant.config(plan.config), training=variant.training))
        if variant.training == "plain":
            curves = {subject: logged(run_folder(runs, subject, name), "validation_loss") for subject in by_name}
            measured.losses[name] = {subject: curve[max(curve)] for subject, curve in curves.items()}
            measured.early_losses[name] = {subject: curve[min(curve)] for subject, curve in curves.items()}
    if backbone.placeholders is not None:
        backbone.placeholders.remove()
    return measured


def benchmark_subject(subject: Subject, num_prompts: int) -> BenchmarkSubject:
    """The subject with "a photo of a S*" first, which shows fidelity, and then prompts that show compliance.

    Compliance is what a prompt asks for beyond the class: background, style, colour, relation, accessory.
    """
    (spread,) = from_toy_world([subject], num_prompts)
    asked = [{name: label for name, label in wanted.items() if name != "class"} for wanted in spread.expected]
    return replace(spread, prompts=[f"a photo of a {SUBJECT_GAP}", *spread.prompts], expected=[{}, *asked])


@torch.no_grad()
def held_out_latents(backbone: Backbone, subject: Subject, count: int) -> Tensor:
    """Latents (count,4,h,w) of pictures of the subject that training does not see."""
    return backbone.encode_images(held_out_views(subject.entity, count))


def train_on_subject(
    backbone: Backbone,
    config: TextualInversionConfig,
    variant_name: str,
    held_out: Mapping[str, Tensor],
    runs: Path,
    subject: BenchmarkSubject,
) -> TextualInversion:
    """A variant on a toy subject: the class noun is the initializer, "<duck>" the placeholder."""
    config = replace(config, initializer_token=subject.class_noun)
    run = run_folder(runs, subject.name, variant_name)
    return train_concept(backbone, config, VARIANTS[variant_name], subject.pixel_values, held_out[subject.name], run)


def train_concept(
    backbone: Backbone,
    config: TextualInversionConfig,
    variant: Variant,
    pixel_values: Tensor,
    held_out: Tensor,
    run: Path,
) -> TextualInversion:
    """Train one variant on one concept, or take up the run that is there; other pseudo-words are removed first.

    Args:
        config: of this concept, without the variant's changes.
        pixel_values: training pictures (N,3,H,W) in [-1,1]; written beside the run folder as PNG files, as users have.
        held_out: latents (M,4,h,w) of pictures that training does not see, for the validation loss in the log.
    """
    if backbone.placeholders is not None:
        backbone.placeholders.remove()
    config = variant.config(config)
    for i, image in enumerate(to_pil(pixel_values)):
        save_png(image, run.parent / "pictures" / f"{i:02d}.png")
    pictures = ImageFolder(run.parent / "pictures", resolution_px=backbone.resolution_px, flip=config.flip)
    latents = LatentCache(pictures, backbone, cache_dir=run.parent / "latents")

    def dataset(config: TextualInversionConfig) -> SubjectDataset:
        return SubjectDataset(latents, config.training_prompts(), seed=config.seed)

    if variant.training == "progressive":
        unlock_every = max(1, config.train_steps * 2 // 5)  # 2000 of the paper's 5000
        method = train_progressively(backbone, dataset, config, run, unlock_every=unlock_every)
    else:
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
    method.save(run)
    return method


@dataclass(frozen=True)
class OrdinaryWords:
    """The backbone alone with natural words in the place of S*: what a user can do without training."""

    backbone: Backbone
    config: TextualInversionConfig
    words: str  # without article

    def generate(self, prompt: str, *, seeds: list[int]) -> Tensor:
        """Pictures, one per seed, (B,3,H,W) in [-1,1]."""
        return sample_images(
            self.backbone,
            prompt.replace(self.config.placeholder, self.words),
            seeds=seeds,
            num_inference_steps=self.config.num_inference_steps,
            guidance_scale=self.config.guidance_scale,
        )


def ordinary_words(
    backbone: Backbone, config: TextualInversionConfig, phrases: Mapping[str, str], subject: BenchmarkSubject
) -> Generator:
    """A baseline for a subject.   phrases: subject name -> noun phrase with its article."""
    config = replace(config, initializer_token=subject.class_noun)
    return OrdinaryWords(backbone, config, phrases[subject.name].split(" ", 1)[1])


def best_caption(backbone: Backbone, subject: Subject, held_out: Tensor) -> str:
    """The noun phrase of the world's grammar, with its article, under which the held-out pictures have the lowest loss.

    Choosing on the held-out pictures favours this baseline.
    """
    generators = [np.random.default_rng([7, k]) for k in range(NUM_CAPTIONS)]
    phrases = {entity_phrase(rng, subject.entity, "photo", keep=0.9)[0] for rng in generators}
    return min(sorted(phrases), key=lambda phrase: prompt_loss(backbone, held_out, f"a photo of {phrase}"))


def read_scores(records: Path, subjects: list[BenchmarkSubject]) -> Scores:
    """Score -> subject -> mean over seeds and prompts.

    attributes, identity: of "a photo of a S*".   compliance: of the other prompts.   product: identity x compliance.
    """
    rows = read_records(records)

    def mean(subject: BenchmarkSubject, metric: str, prompts: list[str]) -> float:
        kept = [r.value for r in rows if (r.subject, r.metric) == (subject.name, metric) and r.prompt in prompts]
        return sum(kept) / len(kept)

    found: Scores = {"attributes": {}, "identity": {}, "compliance": {}, "product": {}}
    for subject in subjects:
        plain, *others = [subject.prompt(i, PLACEHOLDER) for i in range(len(subject.prompts))]
        found["attributes"][subject.name] = mean(subject, "subject_attributes", [plain])
        found["identity"][subject.name] = identity = mean(subject, "identity", [plain])
        found["compliance"][subject.name] = compliance = mean(subject, "prompt_attributes", others)
        found["product"][subject.name] = max(0.0, identity) * compliance
    return found


def logged(run: Path, name: str) -> dict[int, float]:
    """A number of a run's log by steps done."""
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    return {row["step"]: row[name] for row in rows if name in row}


def run_folder(runs: Path, concept: str, variant_name: str) -> Path:
    """Where a variant trains on a concept."""
    return runs / folder_name(concept) / folder_name(variant_name)


def folder_name(name: str) -> str:
    """A name as a folder: "10x lr" -> "10x_lr"."""
    return name.replace(" ", "_")
