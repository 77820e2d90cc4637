"""What reproduce.py measures: the method, its ablations and Textual Inversion on every toy subject."""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import Parameter

from common.backbones import Backbone, PlaceholderTokens, load_backbone
from common.data.image_folder import ImageFolder
from common.data.images import load_image, to_pixel_values
from common.data.latent_cache import LatentCache
from common.data.subject_dataset import SubjectDataset
from common.evaluation import metrics
from common.evaluation.benchmark import Generator, run_benchmark
from common.evaluation.encoders import Encoders, load_encoders
from common.evaluation.records import read_records
from common.evaluation.subjects import SUBJECT_GAP, BenchmarkSubject, from_toy_world
from common.fingerprint import weights_hash
from common.sampling import sample_images
from common.sampling.images import save_png, to_pil
from common.toyworld.benchmark import Subject, held_out_views
from common.toyworld.judge import Judge
from common.toyworld.render import render
from common.toyworld.sampling import compose, sample_object
from common.toyworld.scene import Placed
from common.toyworld.vocabulary import BACKGROUNDS
from common.training.config import FitConfig, flat_config
from common.training.loop import fit
from common.training.losses import denoising_loss, fixed_noise_validation
from common.training.noising import noise_batch
from common.training.optimize import default_device

from .config import DreamBoothConfig
from .method import DreamBooth, class_prompt, instance_prompt
from .train import TrainOptions, train

OTHER_NOUN = "vase"  # of no subject that is measured
INVERSION_TOKEN, INVERSION_LEARNING_RATE = "<subject>", 5e-3  # S* and the rate at which it learns best on tiny-sd
PROPOSAL, NO_PRIOR, WRONG_NOUN, NO_NOUN = "DreamBooth", "no prior loss", "wrong noun", "no noun"
INVERSION, UNTUNED = "Textual Inversion", "untuned"

# Without noun there are no class images, so the three nouns are compared without the prior loss.
ABLATIONS: dict[str, dict[str, Any]] = {
    PROPOSAL: {},
    NO_PRIOR: {"prior_loss_weight": 0.0},
    WRONG_NOUN: {"prior_loss_weight": 0.0, "class_noun": OTHER_NOUN},
    NO_NOUN: {"prior_loss_weight": 0.0, "class_noun": ""},
}

Scores = dict[str, dict[str, dict[str, float]]]  # score -> method -> subject -> value


@dataclass(frozen=True)
class Plan:
    """How much is measured."""

    config: DreamBoothConfig  # with any class noun
    num_subjects: int
    num_prompts: int  # per subject, besides "a photo of a [V] [class noun]"
    seeds: tuple[int, ...]  # one picture per prompt and seed
    subject_seeds: tuple[int, ...]  # pictures of "a photo of a [V] [class noun]" for the diversity
    class_seeds: tuple[int, ...]  # pictures of "a photo of a [class noun]"
    held_out: int  # pictures of the subject that training does not see
    class_renders: int  # pictures of the class from the world itself

    @classmethod
    def full(cls) -> "Plan":
        return cls(
            DreamBoothConfig.tiny("object"), num_subjects=5, num_prompts=6, seeds=(0, 1),
            subject_seeds=tuple(range(8)), class_seeds=tuple(range(16)), held_out=8, class_renders=64,
        )  # fmt: skip

    @classmethod
    def quick(cls) -> "Plan":
        config = replace(DreamBoothConfig.tiny("object"), train_steps=4, num_class_images=2, num_inference_steps=2)
        return cls(
            config, num_subjects=1, num_prompts=1, seeds=(0,),
            subject_seeds=(0, 1), class_seeds=(0, 1), held_out=2, class_renders=4,
        )  # fmt: skip

    def subject_config(self, subject: Subject, method: str) -> DreamBoothConfig:
        """The settings of a method or ablation on a subject."""
        return replace(self.config, **({"class_noun": subject.class_noun} | ABLATIONS.get(method, {})))


class Inversion:
    """The baseline: Textual Inversion (Gal et al., arXiv 2208.01618) with one vector, in its plainest form."""

    def __init__(self, backbone: Backbone, config: DreamBoothConfig) -> None:
        self.backbone, self.config, self.tokens = backbone.freeze(), config, PlaceholderTokens(backbone)
        self.tokens.add(INVERSION_TOKEN, initializer_token=config.class_noun)

    def parameters(self) -> list[Parameter]:
        return self.tokens.parameters()

    def training_loss(self, batch: dict[str, Any]) -> Tensor:
        noised = noise_batch(self.backbone, batch["latents"], batch["sample_keys"], seed=self.config.seed)
        return denoising_loss(self.backbone, noised, self.backbone.encode_prompt(list(batch["prompt"]))).mean()

    def generate(self, prompt: str, *, seeds: list[int]) -> Tensor:
        steps, scale = self.config.num_inference_steps, self.config.guidance_scale
        return sample_images(self.backbone, prompt, seeds=seeds, num_inference_steps=steps, guidance_scale=scale)


def measure(backbone_name: str, plan: Plan, subjects: list[Subject], runs: Path) -> Scores:
    """Train and score every method on every subject; what is finished in `runs` is not done again."""
    encoders, judge, by_name = load_encoders(), Judge.load(), {subject.name: subject for subject in subjects}
    scored = [benchmark_subject(subject, plan) for subject in subjects]
    untuned = load_backbone(backbone_name, device=default_device())
    unet, scores = weights_hash(untuned.unet), Scores()
    for name in (*ABLATIONS, INVERSION):
        noun = ABLATIONS.get(name, {}).get("class_noun", "{class}")
        words = INVERSION_TOKEN if name == INVERSION else f"{plan.config.identifier} {noun}".strip()
        folder = runs / folder_name(name)
        run_benchmark(
            partial(_train_and_sample, backbone_name, plan, name, by_name, runs), scored, encoders, judge,
            method=name, subject_words=words, settings=flat_config(plan=plan, ablation=ABLATIONS.get(name), unet=unet),
            seeds=plan.seeds, output_dir=folder,
        )  # fmt: skip
        for subject in scored:
            found = benchmark_scores(folder, subject, words) | sample_scores(folder, subject.name, encoders)
            for score, value in found.items():
                scores.setdefault(score, {}).setdefault(name, {})[subject.name] = value
    for subject in subjects:
        prompt = class_prompt(plan.subject_config(subject, UNTUNED))
        settings = {
            "num_inference_steps": plan.config.num_inference_steps,
            "guidance_scale": plan.config.guidance_scale,
        }
        images = sample_images(untuned, prompt, seeds=plan.class_seeds, **settings)
        save_samples(images, samples_folder(runs, UNTUNED, subject.name), "class", plan.class_seeds)
        renders = class_renders(subject.class_noun, plan.class_renders)
        for name in (PROPOSAL, NO_PRIOR, UNTUNED):
            found = class_scores(samples_folder(runs, name, subject.name), subject, renders, encoders, judge)
            for score, value in found.items():
                scores.setdefault(score, {}).setdefault(name, {})[subject.name] = value
    return scores


def benchmark_subject(subject: Subject, plan: Plan) -> BenchmarkSubject:
    """The subject with "a photo of a [V] [class noun]" first, which shows fidelity; the other prompts show compliance.

    Compliance is what a prompt asks for beyond the class. The reference photos are views that training does not see,
    so copying the training pictures earns nothing.
    """
    (spread,) = from_toy_world([subject], plan.num_prompts)
    asked = [{name: label for name, label in wanted.items() if name != "class"} for wanted in spread.expected]
    return replace(
        spread,
        prompts=[plan.config.prompt_template.format(SUBJECT_GAP), *spread.prompts],
        expected=[{}, *asked],
        pixel_values=held_out_views(subject.entity, plan.held_out),
    )


def _train_and_sample(
    backbone_name: str, plan: Plan, name: str, subjects: Mapping[str, Subject], runs: Path, scored: BenchmarkSubject
) -> Generator:
    """A method trained on a subject, after its samples and its held-out loss are written."""
    subject, folder, work = subjects[scored.name], samples_folder(runs, name, scored.name), runs / "training"
    config = plan.subject_config(subject, name)
    shutil.rmtree(work, ignore_errors=True)  # of a run that was stopped: a step takes less time than a checkpoint
    photos = runs / "photos" / subject.name
    for i, image in enumerate(to_pil(subject.images)):
        save_png(image, photos / f"{i:02d}.png")
    if name == INVERSION:
        method, prompt = (
            train_inversion(backbone_name, config, photos, work),
            config.prompt_template.format(INVERSION_TOKEN),
        )
    else:
        method, prompt = _train_dreambooth(backbone_name, config, photos, work, runs), instance_prompt(config)
    with torch.no_grad():
        latents = method.backbone.encode_images(scored.pixel_values)
        loss = fixed_noise_validation(method.backbone, latents, method.backbone.encode_prompt(prompt))
    save_samples(method.generate(prompt, seeds=list(plan.subject_seeds)), folder, "subject", plan.subject_seeds)
    if name in (PROPOSAL, NO_PRIOR):
        images = method.generate(class_prompt(config), seeds=list(plan.class_seeds))
        save_samples(images, folder, "class", plan.class_seeds)
    (folder / "held_out.json").write_text(json.dumps({"loss": loss}))
    shutil.rmtree(work)
    return method


def _train_dreambooth(backbone_name: str, config: DreamBoothConfig, photos: Path, work: Path, runs: Path) -> DreamBooth:
    class_images = runs / "class_images" / config.class_noun
    return train(
        TrainOptions(
            images=photos, output=work, backbone=backbone_name, config=config, class_images=class_images, num_samples=0
        )
    )


def train_inversion(backbone_name: str, config: DreamBoothConfig, photos: Path, work: Path) -> Inversion:
    """The baseline with the same pictures, template, steps and batch size; only the learning rate is its own."""
    method = Inversion(load_backbone(backbone_name, device=default_device()), config)
    latents = LatentCache(ImageFolder(photos, resolution_px=method.backbone.resolution_px), method.backbone)
    dataset = SubjectDataset(latents, [config.prompt_template.format(INVERSION_TOKEN)], seed=config.seed)
    settings = FitConfig(
        train_steps=config.train_steps,
        learning_rate=INVERSION_LEARNING_RATE,
        batch_size=config.batch_size,
        max_grad_norm=None,
        seed=config.seed,
    )
    fit(method, dataset, settings, work)
    return method


def benchmark_scores(folder: Path, subject: BenchmarkSubject, words: str) -> dict[str, float]:
    """Of the benchmark's pictures: subject errors on "a photo of a [V] [class noun]", compliance on the others."""
    rows = [row for row in read_records(folder / "records.jsonl") if row.subject == subject.name]
    plain, *others = [subject.prompt(i, words) for i in range(len(subject.prompts))]

    def mean(metric: str, prompts: list[str]) -> float:
        values = [row.value for row in rows if row.metric == metric and row.prompt in prompts]
        return sum(values) / len(values)

    return {
        "identity error": 1 - mean("identity", [plain]),
        "attribute error": 1 - mean("subject_attributes", [plain]),
        "compliance": mean("prompt_attributes", others),
    }


def sample_scores(folder: Path, subject: str, encoders: Encoders) -> dict[str, float]:
    """Of the samples of a trained method: diversity of one prompt (DIV, Table 3), and the held-out denoising loss."""
    samples = folder / "samples" / subject
    features = encoders.dino.embed_images(read_samples(samples, "subject"))
    return {
        "diversity": metrics.diversity(features, metrics.cosine_distance),
        "held-out loss": json.loads((samples / "held_out.json").read_text())["loss"],
    }


@torch.no_grad()
def class_scores(
    samples: Path, subject: Subject, renders: Tensor, encoders: Encoders, judge: Judge
) -> dict[str, float]:
    """Of "a photo of a [class noun]": distance to the class in the world; PRES (Table 3), likeness to the subject."""
    images = read_samples(samples, "class")
    ours, truth = (metrics.feature_gaussian(judge.features(pictures)) for pictures in (images, renders))
    dino, reference = (encoders.dino.embed_images(pictures) for pictures in (images, subject.images))
    return {
        "class distance": metrics.frechet_distance(*ours, *truth),
        "PRES": metrics.prior_preservation(dino, reference),
    }


def class_renders(class_noun: str, count: int) -> Tensor:
    """Photos of random members of a class, as the world makes them: (count,3,64,64) in [-1,1]."""
    rng = np.random.default_rng(93)
    scenes = [
        compose(rng, (Placed(sample_object(rng, class_noun)),), background=BACKGROUNDS[k % len(BACKGROUNDS)])
        for k in range(count)
    ]
    return render(scenes).images * 2 - 1


def save_samples(images: Tensor, folder: Path, kind: str, seeds: Sequence[int]) -> None:
    """Write pictures (N,3,H,W) as KIND-SEED.png."""
    for seed, image in zip(seeds, to_pil(images), strict=True):
        save_png(image, folder / f"{kind}-{seed:03d}.png", {"seed": seed})


def read_samples(folder: Path, kind: str) -> Tensor:
    """What `save_samples` wrote, in the order of the seeds, (N,3,H,W) in [-1,1]."""
    return torch.stack([to_pixel_values(load_image(path)) for path in sorted(folder.glob(f"{kind}-*.png"))])


def samples_folder(runs: Path, method: str, subject: str) -> Path:
    """Where the samples of a method trained on a subject are."""
    return runs / folder_name(method) / "samples" / subject


def folder_name(name: str) -> str:
    """A name as a folder: "no noun" -> "no_noun"."""
    return name.replace(" ", "_")
