"""What reproduce.py measures: XTI and Textual Inversion, layer roles, mixing, and how like words the words are."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from scipy.stats import gaussian_kde
from torch import Tensor

from common.backbones import PlaceholderTokens, load_backbone
from common.data.image_folder import ImageFolder
from common.data.latent_cache import LatentCache
from common.data.subject_dataset import SubjectDataset
from common.evaluation.baselines import BaselineConfig, token_inversion
from common.evaluation.study import PLAIN_PROMPT, Candidate, Scores, Study, folder_name, run_study
from common.io import load_safetensors
from common.sampling import sample_images
from common.toyworld.benchmark import Subject, held_out_views, subjects
from common.toyworld.judge import Judge
from common.training.config import flat_config
from common.training.loop import fit
from common.training.optimize import default_device

from .bands import fill_layers, inner_band, layer_grids, outermost, random_layers
from .config import PPlusConfig
from .method import PPlus, load_method, read_artifact
from .train import fit_config

PLACEHOLDER = "<{class}>"  # S* of the toy subjects: "<duck>"
PROPOSAL, INVERSION = "XTI", "Textual Inversion"
TIED, AVERAGE = "tied", "average of two words"
EARLY = "after a tenth of the steps"
INNER, OUTER, RANDOM = "inner", "outer", "random"  # where the donor's words stand
SHAPE, COLOUR = "shape", "colour"
COMPONENTS = 8  # principal components in which the density of words is estimated


@dataclass(frozen=True)
class Plan:
    """How much is measured."""

    study: Study
    config: PPlusConfig  # with any initializer
    mixing_seeds: tuple[int, ...]  # pictures of each choice of layers, an even number

    @classmethod
    def full(cls) -> "Plan":
        return cls(Study(), PPlusConfig.tiny(), tuple(range(8)))

    @classmethod
    def quick(cls) -> "Plan":
        config = replace(PPlusConfig.tiny(), train_steps=2, num_inference_steps=2)
        return cls(Study.quick(), config, (0, 1))

    @property
    def early_step(self) -> int:
        """A tenth of the steps."""
        return max(1, self.config.train_steps // 10)


def measure(backbone_name: str, plan: Plan, runs: Path) -> Scores:
    """The study's scores; EARLY and TIED under "held-out loss"; "density"; SHAPE, COLOUR and "mix" of two concepts."""
    config = plan.config
    baseline = BaselineConfig.like(config, config.learning_rate)

    def learn(subject: Subject, photos: Path, run: Path) -> PPlus:
        return train_on_subject(backbone_name, plan, subject, photos, run)

    proposal = Candidate(words=PLACEHOLDER, settings=flat_config(config=config), train=learn)
    candidates = {PROPOSAL: proposal, INVERSION: token_inversion(backbone_name, baseline)}
    scores = run_study(backbone_name, candidates, plan.study, runs)
    every, judge = subjects(plan.study.num_subjects), Judge.load(device=default_device())

    def keep(score: str, values: Mapping[str, float], subject: Subject) -> None:
        for name, value in values.items():
            scores.setdefault(score, {}).setdefault(name, {})[subject.name] = value

    for subject in every:
        loss = validation_losses(training_folder(runs, subject.name))[plan.early_step]
        keep("held-out loss", {EARLY: loss, TIED: tied_loss(backbone_name, plan, runs, subject)}, subject)
        keep("density", densities(runs, backbone_name, subject), subject)
        donor = donor_of(subject, every)
        for score, values in takeovers(backbone_name, plan, runs, judge, subject, donor).items():
            keep(score, values, subject)
        keep("mix", mixes(backbone_name, plan, runs, judge, subject, donor), subject)
    return scores


def train_on_subject(backbone_name: str, plan: Plan, subject: Subject, photos: Path, run: Path) -> PPlus:
    """Learn a toy subject, whose class is the initializer, or take up the run that is there."""
    config = replace(plan.config, initializer_token=subject.class_noun)
    method = PPlus(load_backbone(backbone_name, device=default_device()), config)
    backbone = method.backbone
    latents = LatentCache(ImageFolder(photos, resolution_px=backbone.resolution_px, flip=config.flip), backbone)
    with torch.no_grad():
        held_out = backbone.encode_images(held_out_views(subject.entity, plan.study.held_out))
    fit(
        method,
        SubjectDataset(latents, config.training_prompts(), seed=config.seed),
        fit_config(config, keep_checkpoints=1, validate_every=plan.early_step),
        run,
        validate=lambda: method.validation_loss(held_out),
        resume=True,
    )
    return method


def validation_losses(run: Path) -> dict[int, float]:
    """Held-out loss by steps done, from a run's log."""
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    return {row["step"]: row["validation_loss"] for row in rows if "validation_loss" in row}


@torch.no_grad()
def tied_loss(backbone_name: str, plan: Plan, runs: Path, subject: Subject) -> float:
    """Held-out loss of P+ with the one word of Textual Inversion in all layers."""
    method = load_method(artifact_folder(runs, PROPOSAL, subject), backbone_name, default_device())
    method.set_layer_words(inverted_word(runs, subject))
    return method.validation_loss(method.backbone.encode_images(held_out_views(subject.entity, plan.study.held_out)))


def inverted_word(runs: Path, subject: Subject) -> Tensor:
    """What Textual Inversion learned, (1,D)."""
    (word,) = load_safetensors(artifact_folder(runs, INVERSION, subject) / "learned_embeds.safetensors")[0].values()
    return word


def densities(runs: Path, backbone_name: str, subject: Subject) -> dict[str, float]:
    """Mean log-density of the learned words among those of the vocabulary."""
    table = load_backbone(backbone_name).text_encoder.get_input_embeddings().weight.detach()
    learned = {PROPOSAL: read_artifact(artifact_folder(runs, PROPOSAL, subject))[0]}
    learned[INVERSION] = inverted_word(runs, subject)
    return {name: log_density(words, table) for name, words in learned.items()}


def log_density(words: Tensor, vocabulary: Tensor, components: int = COMPONENTS) -> float:
    """Mean log-density of words (R,D): Gaussian kernels (Scott's width) on the vocabulary's (V,D) first components."""
    table, rows = vocabulary.double().numpy(), words.double().numpy()
    mean = table.mean(0)
    axes = np.linalg.svd(table - mean, full_matrices=False)[2][:components]
    return float(gaussian_kde(axes @ (table - mean).T).logpdf(axes @ (rows - mean).T).mean())


def donor_of(subject: Subject, every: list[Subject]) -> Subject:
    """The next subject of another class and another main colour; the next at all where there is none."""
    place = [other.name for other in every].index(subject.name)
    following = [*every[place + 1 :], *every[:place]] or [subject]
    different = [s for s in following if all(s.attributes[n] != subject.attributes[n] for n in ("class", "color"))]
    return (different or following)[0]


def load_pair(backbone_name: str, runs: Path, subject: Subject, donor: Subject) -> tuple[PPlus, str]:
    """A method that knows both concepts, the subject's as its own, and the donor's placeholder."""
    method = load_method(artifact_folder(runs, PROPOSAL, subject), backbone_name, default_device())
    if donor.name == subject.name:
        return method, method.config.placeholder
    return method, method.add_concept(artifact_folder(runs, PROPOSAL, donor))


def takeovers(
    backbone_name: str, plan: Plan, runs: Path, judge: Judge, subject: Subject, donor: Subject
) -> dict[str, dict[str, float]]:
    """The judge's mean probability of the donor's class (SHAPE) and COLOUR, where the donor's words stand in a band."""
    method, given = load_pair(backbone_name, runs, subject, donor)
    own, seeds, grids = method.config.placeholder, list(plan.mixing_seeds), layer_grids(method.backbone.unet)
    first, end = inner_band(grids)
    size, half = end - first, len(seeds) // 2
    bands = {INNER: [list(range(first, end))], OUTER: [outermost(len(grids), size)]}
    bands[RANDOM] = [random_layers(len(grids), size, draw) for draw in range(half)]
    found: dict[str, dict[str, float]] = {SHAPE: {}, COLOUR: {}}
    for name, choices in bands.items():
        share = len(seeds) // len(choices)  # pictures of each choice
        pictures = [
            method.generate(
                method.config.plain_prompt(),
                seeds=seeds[k * share : (k + 1) * share],
                fills=fill_layers(given, layers, own, len(grids)),
            )
            for k, layers in enumerate(choices)
        ]
        for score, attribute in ((SHAPE, "class"), (COLOUR, "color")):
            found[score][name] = probability(judge, torch.cat(pictures), attribute, donor.attributes[attribute])
    return found


def mixes(
    backbone_name: str, plan: Plan, runs: Path, judge: Judge, subject: Subject, donor: Subject
) -> dict[str, float]:
    """Subject in the inner band, donor elsewhere: mean probability of the subject's class and the donor's colour."""
    method, given = load_pair(backbone_name, runs, subject, donor)
    grids, config, seeds = layer_grids(method.backbone.unet), method.config, list(plan.mixing_seeds)
    layers = list(range(*inner_band(grids)))
    mixed = method.generate(
        config.plain_prompt(), seeds=seeds, fills=fill_layers(config.placeholder, layers, given, len(grids))
    )
    backbone = load_backbone(backbone_name, device=default_device()).freeze()
    words = (inverted_word(runs, subject) + inverted_word(runs, donor)) / 2
    PlaceholderTokens(backbone).add("<average>", initial_vectors=words)
    averaged = sample_images(
        backbone, PLAIN_PROMPT.format("<average>"), seeds=seeds,
        num_inference_steps=config.num_inference_steps, guidance_scale=config.guidance_scale,
    )  # fmt: skip
    wanted = (("class", subject), ("color", donor))
    return {
        name: sum(probability(judge, pictures, a, s.attributes[a]) for a, s in wanted) / 2
        for name, pictures in ((PROPOSAL, mixed), (AVERAGE, averaged))
    }


@torch.no_grad()
def probability(judge: Judge, pictures: Tensor, attribute: str, label: str) -> float:
    """The judge's mean probability of a label."""
    return judge.read(pictures)[attribute][:, judge.labels[attribute].index(label)].mean().item()


def artifact_folder(runs: Path, name: str, subject: Subject) -> Path:
    """Where the study keeps what a method learned of a subject."""
    return runs / folder_name(name) / "artifacts" / subject.name


def training_folder(runs: Path, subject: str) -> Path:
    """Where the study has the proposal train on a subject."""
    return runs / folder_name(PROPOSAL) / "training" / subject
