"""What reproduce.py measures: the method, its ablations and Textual Inversion on every toy subject."""

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.evaluation import metrics
from common.evaluation.baselines import BaselineConfig, token_inversion
from common.evaluation.class_samples import class_renders, read_samples, sample_untuned, save_samples
from common.evaluation.encoders import Encoders, load_encoders
from common.evaluation.study import Candidate, Scores, Study, folder_name, run_study
from common.toyworld.benchmark import Subject, subjects
from common.toyworld.judge import Judge
from common.training.config import flat_config

from .config import DreamBoothConfig
from .method import DreamBooth, class_prompt, instance_prompt
from .train import TrainOptions, train

OTHER_NOUN = "vase"  # of no subject that is measured
INVERSION_LEARNING_RATE = 5e-3  # at which Textual Inversion learns best on tiny-sd
PROPOSAL, NO_PRIOR, WRONG_NOUN, NO_NOUN = "DreamBooth", "no prior loss", "wrong noun", "no noun"
INVERSION, UNTUNED = "Textual Inversion", "untuned"

# Without noun there are no class images, so the three nouns are compared without the prior loss.
ABLATIONS: dict[str, dict[str, Any]] = {
    PROPOSAL: {},
    NO_PRIOR: {"prior_loss_weight": 0.0},
    WRONG_NOUN: {"prior_loss_weight": 0.0, "class_noun": OTHER_NOUN},
    NO_NOUN: {"prior_loss_weight": 0.0, "class_noun": ""},
}


@dataclass(frozen=True)
class Plan:
    """How much is measured."""

    study: Study
    config: DreamBoothConfig  # with any class noun
    subject_seeds: tuple[int, ...]  # pictures of "a photo of a [V] [class noun]" for the diversity
    class_seeds: tuple[int, ...]  # pictures of "a photo of a [class noun]"
    class_renders: int  # pictures of the class from the world itself

    @classmethod
    def full(cls) -> "Plan":
        return cls(Study(), DreamBoothConfig.tiny("object"), tuple(range(8)), tuple(range(16)), class_renders=64)

    @classmethod
    def quick(cls) -> "Plan":
        config = replace(DreamBoothConfig.tiny("object"), train_steps=4, num_class_images=2, num_inference_steps=2)
        return cls(Study.quick(), config, (0, 1), (0, 1), class_renders=4)

    def subject_config(self, subject: Subject, method: str) -> DreamBoothConfig:
        """The settings of a method or ablation on a subject."""
        return replace(self.config, **({"class_noun": subject.class_noun} | ABLATIONS.get(method, {})))


def measure(backbone_name: str, plan: Plan, runs: Path) -> Scores:
    """The study's scores; "diversity" of one prompt (DIV, Table 3); "class distance" and "PRES" of the class alone."""
    encoders, judge, config = load_encoders(), Judge.load(), plan.config
    candidates = {name: dreambooth(backbone_name, plan, name, runs) for name in ABLATIONS}
    candidates[INVERSION] = token_inversion(backbone_name, BaselineConfig.like(config, INVERSION_LEARNING_RATE))
    scores = run_study(backbone_name, candidates, plan.study, runs)
    for subject in subjects(plan.study.num_subjects):
        sample_untuned(
            backbone_name, subject.class_noun, plan.class_seeds,
            samples_folder(runs, UNTUNED, subject.name) / "class",
            num_inference_steps=config.num_inference_steps, guidance_scale=config.guidance_scale,
        )  # fmt: skip
        for name in (PROPOSAL, NO_PRIOR):
            features = encoders.dino.embed_images(read_samples(samples_folder(runs, name, subject.name) / "subject"))
            diversity = metrics.diversity(features, metrics.cosine_distance)
            scores.setdefault("diversity", {}).setdefault(name, {})[subject.name] = diversity
        renders = class_renders(subject.class_noun, plan.class_renders)
        for name in (PROPOSAL, NO_PRIOR, UNTUNED):
            found = class_scores(samples_folder(runs, name, subject.name), subject, renders, encoders, judge)
            for score, value in found.items():
                scores.setdefault(score, {}).setdefault(name, {})[subject.name] = value
    return scores


def dreambooth(backbone_name: str, plan: Plan, name: str, runs: Path) -> Candidate:
    """The method or an ablation as a candidate of the study; training ends with the samples that the claims need."""

    def learn(subject: Subject, photos: Path, run: Path) -> DreamBooth:
        config = plan.subject_config(subject, name)
        shutil.rmtree(run, ignore_errors=True)  # of a run that was stopped: a step takes less time than a checkpoint
        options = TrainOptions(
            images=photos, output=run, backbone=backbone_name, config=config, num_samples=0,
            class_images=runs / "class_images" / config.class_noun,
        )  # fmt: skip
        method = train(options)
        shutil.rmtree(run)
        if name in (PROPOSAL, NO_PRIOR):
            for kind, prompt, seeds in (
                ("subject", instance_prompt(config), plan.subject_seeds),
                ("class", class_prompt(config), plan.class_seeds),
            ):
                pictures = method.generate(prompt, seeds=list(seeds))
                save_samples(pictures, samples_folder(runs, name, subject.name) / kind)
        return method

    noun = ABLATIONS[name].get("class_noun", "{class}")
    settings = flat_config(config=plan.config, ablation=ABLATIONS[name])
    return Candidate(words=f"{plan.config.identifier} {noun}".strip(), settings=settings, train=learn)


@torch.no_grad()
def class_scores(
    samples: Path, subject: Subject, renders: Tensor, encoders: Encoders, judge: Judge
) -> dict[str, float]:
    """Of "a photo of a [class noun]": distance to the class in the world; PRES (Table 3), likeness to the subject."""
    images = read_samples(samples / "class")
    ours, truth = (metrics.feature_gaussian(judge.features(pictures)) for pictures in (images, renders))
    dino, reference = (encoders.dino.embed_images(pictures) for pictures in (images, subject.images))
    return {
        "class distance": metrics.frechet_distance(*ours, *truth),
        "PRES": metrics.prior_preservation(dino, reference),
    }


def samples_folder(runs: Path, method: str, subject: str) -> Path:
    """Where the samples of a method trained on a subject are, in "subject" and "class"."""
    return runs / folder_name(method) / "samples" / subject
