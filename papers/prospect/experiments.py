"""What reproduce.py measures: ProSpect, Textual Inversion and DreamBooth, stage by stage, and the spectrum."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from torch import Tensor

from common.backbones import Backbone, Conditioning, PlaceholderTokens, load_backbone
from common.data.image_folder import ImageFolder
from common.data.images import load_image
from common.data.latent_cache import LatentCache
from common.data.subject_dataset import SubjectDataset
from common.evaluation.baselines import BaselineConfig, full_fine_tuning, token_inversion
from common.evaluation.study import Candidate, Scores, Study, folder_name, run_study
from common.sampling import sample_images
from common.sampling.images import save_png
from common.toyworld.benchmark import Subject, held_out_views, subjects
from common.toyworld.judge import Judge
from common.training.config import flat_config
from common.training.loop import fit
from common.training.losses import fixed_noise_validation
from common.training.optimize import default_device

from .config import ProSpectConfig
from .method import ProSpect, load_method
from .spectrum import frequency_of_stages, growth_of_detail, predicted_pictures
from .stages import first_timesteps, stage_fills
from .train import fit_config

PLACEHOLDER = "<{class}>"  # S* of the toy subjects: "<duck>"
PROPOSAL, INVERSION, FINE_TUNING = "ProSpect", "Textual Inversion", "DreamBooth"
EARLY, LATE = "early", "late"
STAGES = {EARLY: tuple(range(5, 10)), LATE: tuple(range(5))}  # halves of generation, see D7 in the card
LAYOUT, COLOUR = "layout", "colour and texture"
SINGLE = "single photo"  # folder of the study with one training photo, and prefix of its scores
PHOTO, VIEW = 2, "side"  # which of a subject's photos that is: the one from the side, a layout that words do not imply


@dataclass(frozen=True)
class Plan:
    """How much is measured."""

    study: Study
    config: ProSpectConfig  # with any initializer
    single_study: Study  # of methods that see one photo
    single_steps: int  # their optimiser steps
    swap_seeds: tuple[int, ...] = (0, 1, 2, 3)  # pictures of each choice of stages

    @classmethod
    def full(cls) -> "Plan":
        return cls(Study(), ProSpectConfig.tiny(), Study(num_prompts=3), single_steps=150)

    @classmethod
    def quick(cls) -> "Plan":
        config = replace(ProSpectConfig.tiny(), train_steps=2, num_inference_steps=5)
        return cls(Study.quick(), config, Study.quick(), single_steps=2, swap_seeds=(0,))


def measure(backbone_name: str, plan: Plan, runs: Path) -> Scores:
    """The scores of both studies, the second with the prefix SINGLE, and what is measured stage by stage.

    "loss of stage I"; "match" and "transfer" of S* in some stages; "growth of detail", "order of frequencies" and
    "frequency of stage I" of the spectrum.
    """
    single = replace(plan.config, train_steps=plan.single_steps)
    scores = run_study(backbone_name, candidates(backbone_name, plan.config, (PROPOSAL, INVERSION)), plan.study, runs)
    found = run_study(
        backbone_name,
        {name: single_photo(c) for name, c in candidates(backbone_name, single).items()},
        plan.single_study,
        runs / SINGLE,
    )
    scores |= {f"{SINGLE} {score}": values for score, values in found.items()}
    for subject in subjects(plan.study.num_subjects):
        for name in (PROPOSAL, INVERSION):
            learned = load_learned(backbone_name, plan, runs, name, subject)
            for stage, loss in enumerate(stage_losses(learned, plan, subject)):
                scores.setdefault(f"loss of stage {stage}", {}).setdefault(name, {})[subject.name] = loss
            learned = load_learned(backbone_name, plan, runs / SINGLE, name, subject)
            for key, value in matches(learned, plan, subject).items():
                scores.setdefault("match", {}).setdefault(f"{name} {key}", {})[subject.name] = value
        for key, value in spectrum(load_learned(backbone_name, plan, runs, PROPOSAL, subject), plan).items():
            scores.setdefault(key, {}).setdefault(PROPOSAL, {})[subject.name] = value
    return scores | {"transfer": transfers(scores["match"])}


def candidates(
    backbone_name: str, config: ProSpectConfig, names: Sequence[str] = (PROPOSAL, INVERSION, FINE_TUNING)
) -> dict[str, Candidate]:
    """The methods at equal steps and data; the baselines at the rates that suit tiny-sd."""

    def learn(subject: Subject, photos: Path, run: Path) -> ProSpect:
        return train_on_subject(backbone_name, config, subject, photos, run)

    every = {
        PROPOSAL: Candidate(words=PLACEHOLDER, settings=flat_config(config=config), train=learn),
        INVERSION: token_inversion(backbone_name, BaselineConfig.like(config, 5e-3)),
        FINE_TUNING: full_fine_tuning(backbone_name, BaselineConfig.like(config, 2e-4)),
    }
    return {name: every[name] for name in names}


def train_on_subject(backbone_name: str, config: ProSpectConfig, subject: Subject, photos: Path, run: Path) -> ProSpect:
    """Learn a toy subject, whose class is the initializer, or take up the run that is there."""
    method = ProSpect(
        load_backbone(backbone_name, device=default_device()), replace(config, initializer_token=subject.class_noun)
    )
    folder = ImageFolder(photos, resolution_px=method.backbone.resolution_px, flip=config.flip)
    dataset = SubjectDataset(LatentCache(folder, method.backbone), [method.config.plain_prompt()], seed=config.seed)
    fit(method, dataset, fit_config(config, keep_checkpoints=1), run, resume=True)
    return method


def single_photo(candidate: Candidate) -> Candidate:
    """The same candidate, trained on the photo PHOTO alone."""

    def train(subject: Subject, photos: Path, run: Path):
        photo, alone = sorted(photos.glob("*.png"))[PHOTO], photos.with_name(f"{photos.name}-alone")
        save_png(load_image(photo), alone / photo.name)
        return candidate.train(subject, alone, run)

    return replace(candidate, settings={**candidate.settings, "photos": 1}, train=train)


@dataclass(frozen=True)
class Learned:
    """A concept that a study has learned, and what the network is told where S* stands in some stages only."""

    backbone: Backbone
    placeholder: str
    conditioning: Callable[[list[str]], Conditioning]  # of fills, one per stage


def load_learned(backbone_name: str, plan: Plan, runs: Path, name: str, subject: Subject) -> Learned:
    """From the artifact that a study left in `runs`."""
    artifact = artifact_folder(runs, name, subject)
    if name == PROPOSAL:
        method = load_method(artifact, backbone_name, default_device())
        plain = method.config.plain_prompt()
        return Learned(method.backbone, method.config.placeholder, lambda fills: method.conditioning(plain, fills))
    backbone = load_backbone(backbone_name, device=default_device()).freeze()
    placeholder = PlaceholderTokens(backbone).load_learned_embeds(artifact / "learned_embeds.safetensors")
    starts = first_timesteps(plan.config.num_stages)

    @torch.no_grad()
    def conditioning(fills: list[str]) -> Conditioning:
        prompts = [plan.config.training_prompt.format(fill) for fill in fills]
        return Conditioning.staged({t: backbone.encode_prompt(p) for t, p in zip(starts, prompts, strict=True)})

    return Learned(backbone, placeholder, conditioning)


@torch.no_grad()
def stage_losses(learned: Learned, plan: Plan, subject: Subject) -> list[float]:
    """Denoising loss of held-out photos in each stage, at two timesteps of it."""
    num_stages = plan.config.num_stages
    latents = learned.backbone.encode_images(held_out_views(subject.entity, plan.study.held_out))
    conditioning, width = learned.conditioning([learned.placeholder] * num_stages), 1000 // num_stages
    return [
        fixed_noise_validation(learned.backbone, latents, conditioning, timesteps=(t + width // 4, t + 3 * width // 4))
        for t in first_timesteps(num_stages)
    ]


def matches(learned: Learned, plan: Plan, subject: Subject) -> dict[str, float]:
    """How well pictures match the training photo where S* stands early, late, or nowhere, else the class noun."""
    judge, found = Judge.load(), {}
    for where, stages in {"nowhere": (), **STAGES}.items():
        fills = stage_fills({learned.placeholder: stages}, subject.class_noun, plan.config.num_stages)
        images = sample_images(
            learned.backbone,
            learned.conditioning(fills),
            seeds=plan.swap_seeds,
            num_inference_steps=plan.config.num_inference_steps,
            guidance_scale=plan.config.guidance_scale,
        )
        found[f"{where} {LAYOUT}"] = layout_match(judge, images, subject.masks[PHOTO], VIEW)
        found[f"{where} {COLOUR}"] = colour_match(judge, images, subject.attributes)
    return found


@torch.no_grad()
def layout_match(judge: Judge, images: Tensor, mask: Tensor, view: str) -> float:
    """Position and pose: mean of the soft IoU of 8x8 cells with the photo's true mask, and of the view's probability.

    Args:
        images: (B,3,64,64).   mask: (64,64) bool.   view: from which the photo shows the object.
    """
    true = F.adaptive_avg_pool2d(mask.float()[None], 8)  # (1,8,8), covered share of each cell
    seen = 1 - judge.features_and_entities(images)[1].softmax(1)[:, 0]  # (B,8,8), not background
    overlap, union = torch.minimum(seen, true).sum((1, 2)), torch.maximum(seen, true).sum((1, 2))
    pose = judge.read(images)["view"][:, judge.labels["view"].index(view)]
    return ((overlap / union + pose) / 2).mean().item()


@torch.no_grad()
def colour_match(judge: Judge, images: Tensor, attributes: Mapping[str, str]) -> float:
    """The judge's mean probability of the subject's own colour, pattern and material."""
    probabilities = judge.read(images)
    names = ("color", "pattern", "material")
    own = [probabilities[name][:, judge.labels[name].index(attributes[name])] for name in names]
    return torch.stack(own).mean().item()


def transfers(match: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Share of the way from the class noun's pictures to a perfect match that S* goes, and SEPARATION of a method.

    (match with S* in some stages - match without) / (1 - mean match without).
    Returns: "METHOD early layout", ... -> subject -> transfer; "METHOD" -> subject -> separation, the layout's lead
        early plus the colour's lead late.
    """
    found: dict[str, dict[str, float]] = {}
    for name in (PROPOSAL, INVERSION):
        for attribute in (LAYOUT, COLOUR):
            base = match[f"{name} nowhere {attribute}"]
            gap = 1 - sum(base.values()) / len(base)
            for where in STAGES:
                inserted = match[f"{name} {where} {attribute}"]
                found[f"{name} {where} {attribute}"] = {s: (inserted[s] - base[s]) / gap for s in base}
        parts = [found[f"{name} {key}"] for key in ("early layout", f"early {COLOUR}", f"late {COLOUR}", "late layout")]
        found[name] = {s: parts[0][s] - parts[1][s] + parts[2][s] - parts[3][s] for s in parts[0]}
    return found


def spectrum(learned: Learned, plan: Plan) -> dict[str, float]:
    """Of "a photo of a S*": rank correlations of detail with the step, and of what a stage adds with its order."""
    timesteps, pictures = predicted_pictures(
        learned.backbone,
        learned.conditioning([learned.placeholder] * plan.config.num_stages),
        seeds=list(plan.study.seeds),
        num_inference_steps=plan.config.num_inference_steps,
        guidance_scale=plan.config.guidance_scale,
    )
    frequencies = frequency_of_stages(timesteps, pictures, first_timesteps(plan.config.num_stages))
    found = {
        "growth of detail": rank_correlation(growth_of_detail(pictures)),
        "order of frequencies": rank_correlation(list(frequencies.values())),
    }
    return found | {f"frequency of stage {stage}": value for stage, value in frequencies.items()}


def rank_correlation(values: Sequence[float]) -> float:
    """Spearman's rho of values with their order."""
    return float(spearmanr(range(len(values)), values).statistic)


def artifact_folder(runs: Path, name: str, subject: Subject) -> Path:
    """Where a study keeps what a method learned of a subject."""
    return runs / folder_name(name) / "artifacts" / subject.name
