"""What reproduce.py trains: the method, with and without regularisation, and two baselines on every toy subject."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from common.evaluation import metrics
from common.evaluation.baselines import BaselineConfig, full_fine_tuning, token_inversion
from common.evaluation.class_samples import class_renders, read_samples, sample_untuned, with_class_samples
from common.evaluation.study import Candidate, Scores, Study, folder_name, run_study
from common.toyworld.benchmark import Subject, subjects
from common.toyworld.judge import Judge
from common.training.config import flat_config

from .config import CustomDiffusionConfig
from .method import CustomDiffusion
from .train import TrainOptions, train
from .world import retrieved_set

PROPOSAL, NO_REGULARISATION = "Custom Diffusion", "no regularisation"
INVERSION, FINE_TUNING, UNTUNED = "Textual Inversion", "DreamBooth without prior loss", "untuned"
INVERSION_LEARNING_RATE, FINE_TUNING_LEARNING_RATE = 5e-3, 2e-4  # at which they learn best on tiny-sd


@dataclass(frozen=True)
class Plan:
    """How much is measured."""

    study: Study
    config: CustomDiffusionConfig  # with any class noun
    class_seeds: tuple[int, ...]  # pictures of "a photo of a [class noun]"
    class_renders: int  # pictures of the class from the world itself
    num_captions: int  # C_reg of merging, as many as in the official code; a quarter more are held out

    @classmethod
    def full(cls) -> "Plan":
        return cls(Study(), CustomDiffusionConfig.tiny("object"), tuple(range(16)), class_renders=64, num_captions=200)

    @classmethod
    def quick(cls) -> "Plan":
        config = CustomDiffusionConfig.tiny("object")
        config = replace(config, train_steps=4, num_regularisation_images=4, num_inference_steps=2)
        return cls(Study.quick(), config, (0, 1), class_renders=4, num_captions=60)

    def pairs(self) -> list[tuple[Subject, Subject]]:
        """Each subject with the next one, in a ring."""
        chosen = subjects(self.study.num_subjects)
        return list(zip(chosen, [*chosen[1:], chosen[0]], strict=True))


def measure(backbone_name: str, plan: Plan, runs: Path) -> Scores:
    """The study's scores and "class distance"."""
    config = plan.config
    candidates = {
        PROPOSAL: custom_diffusion(backbone_name, config, runs),
        NO_REGULARISATION: custom_diffusion(backbone_name, replace(config, prior_loss_weight=0.0), runs),
        FINE_TUNING: full_fine_tuning(backbone_name, BaselineConfig.like(config, FINE_TUNING_LEARNING_RATE)),
        INVERSION: token_inversion(backbone_name, BaselineConfig.like(config, INVERSION_LEARNING_RATE)),
    }
    drifting = [name for name in candidates if name != INVERSION]  # which leaves the class as it was
    candidates |= {
        name: with_class_samples(candidates[name], plan.class_seeds, class_folder(runs, name)) for name in drifting
    }
    scores = run_study(backbone_name, candidates, plan.study, runs)
    scores["class distance"] = class_distances(backbone_name, plan, [*drifting, UNTUNED], runs)
    return scores


def custom_diffusion(backbone_name: str, config: CustomDiffusionConfig, runs: Path) -> Candidate:
    """The method as a candidate; the regularisation images of a class are found by caption, once for all candidates."""

    def learn(subject: Subject, photos: Path, run: Path) -> CustomDiffusion:
        return train_concepts(backbone_name, replace(config, class_nouns=(subject.class_noun,)), [photos], run, runs)

    words = replace(config, class_nouns=("{class}",)).words()
    return Candidate(words=words, settings=flat_config(config=config), train=learn)


def train_concepts(
    backbone_name: str, config: CustomDiffusionConfig, photos: Sequence[Path], run: Path, runs: Path
) -> CustomDiffusion:
    """Train the concepts of a config together; what is left in `run` by a run that was stopped is removed."""
    shutil.rmtree(run, ignore_errors=True)  # little is lost: a run takes seconds
    count, regularisation = config.num_regularisation_images, ()
    if config.prior_loss_weight > 0:
        folders = [runs / "regularisation" / noun for noun in config.class_nouns]
        prompts = [config.class_prompt(i) for i in range(len(folders))]
        regularisation = tuple(
            retrieved_set(prompt, folder, count=count) for prompt, folder in zip(prompts, folders, strict=True)
        )
    options = TrainOptions(
        images=tuple(photos), output=run, backbone=backbone_name, config=config, regularisation=regularisation,
        num_samples=0,
    )  # fmt: skip
    method = train(options)
    shutil.rmtree(run)
    return method


def class_folder(runs: Path, name: str) -> Path:
    """Where the class samples of a method are, by subject."""
    return runs / folder_name(name) / "class_samples"


def artifact_folder(runs: Path, name: str, subject: Subject) -> Path:
    """Where the study keeps what a method learned of a subject."""
    return runs / folder_name(name) / "artifacts" / subject.name


@torch.no_grad()
def class_distances(backbone_name: str, plan: Plan, names: Sequence[str], runs: Path) -> dict[str, dict[str, float]]:
    """Frechet distance of the judge's features between class samples and renders: method -> subject -> distance."""
    judge, config = Judge.load(), plan.config
    found: dict[str, dict[str, float]] = {name: {} for name in names}
    for subject in subjects(plan.study.num_subjects):
        sample_untuned(
            backbone_name, subject.class_noun, plan.class_seeds, class_folder(runs, UNTUNED) / subject.name,
            num_inference_steps=config.num_inference_steps, guidance_scale=config.guidance_scale, eta=config.eta,
        )  # fmt: skip
        truth = metrics.feature_gaussian(judge.features(class_renders(subject.class_noun, plan.class_renders)))
        for name in names:
            samples = read_samples(class_folder(runs, name) / subject.name)
            found[name][subject.name] = metrics.frechet_distance(
                *metrics.feature_gaussian(judge.features(samples)), *truth
            )
    return found
