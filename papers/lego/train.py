"""Learn one concept from two folders of pictures: `python -m papers.lego.train --help`."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
import tyro
from accelerate import PartialState

from common.backbones import load_backbone
from common.data.image_folder import ImageFolder
from common.data.latent_cache import LatentCache
from common.data.subject_dataset import SubjectDataset, ZipDataset
from common.training.config import FitConfig
from common.training.loop import fit
from common.training.optimize import default_device
from common.training.seeding import derive_seed

from .config import LegoConfig
from .method import ARTIFACT, SUBJECT_STREAM, Lego
from .words import phrase_of, read_concept

SAMPLE_SEEDS = [0, 1, 2, 3]


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """Learn one concept, an adjective or a verb, from pictures of one subject with and without it."""

    concept_images: Path
    """Folder of 3-6 pictures of one subject with the concept (set C)."""
    subject_images: Path
    """Folder of 3-6 pictures of the same subject as it is (set S), before other backgrounds than those of set C."""
    concept_words: Path
    """JSON file with the words of the concept's phrase, each with words that mean the same and the opposite:
    [{"word": "frozen", "positives": ["cold", "solid"], "negatives": ["warm", "liquid"]}, ...], a vector for each."""
    output: Path
    """Run folder; the artifact learned_embeds.safetensors is written into it."""
    backbone: str = "tiny-sd"
    """A preset (tiny-sd, sd14, sd15, sd21), a hub id, or a diffusers folder. It decides the defaults below."""
    config: tyro.conf.OmitArgPrefixes[LegoConfig] = field(default_factory=LegoConfig.tiny)
    skip_bad_images: bool = False
    """Leave out files that cannot be used as pictures, with a warning."""
    latent_cache: Path | None = None
    """Folder that keeps encoded pictures between runs."""
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    """Of the forward pass; the vectors stay float32."""
    gradient_accumulation_steps: int = 1
    """Parts of a batch that are computed one after another, to save memory; the result is the same."""
    gradient_checkpointing: bool = False
    """Less memory, about 30% slower."""
    checkpoint_every: int = 500
    """Steps."""
    validate_every: int = 100
    """Steps between fixed-noise losses on set C; 0 = only at the end."""
    sample_every: int = 0
    """Steps between sample grids; 0 = only at the end."""
    resume: bool = False
    """Continue the run in the output folder."""


def fit_config(config: LegoConfig, **options: object) -> FitConfig:
    """Settings of the loop: a pair of samples, one of each set, is one item. Gradients are not clipped.

    options: more fields of FitConfig.
    """
    return FitConfig(
        train_steps=config.train_steps,
        learning_rate=config.learning_rate,
        batch_size=config.batch_size // 2,
        weight_decay=0.0,
        max_grad_norm=None,
        seed=config.seed,
        **options,
    )


def pair_dataset(
    subject: LatentCache, concept: LatentCache, prompts: tuple[Sequence[str], Sequence[str]], *, seed: int
) -> ZipDataset:
    """Pairs of one sample of S and one of C, so that both sets are seen as often.   prompts: for S, for C."""
    return ZipDataset(
        subject=SubjectDataset(subject, prompts[0], seed=derive_seed(seed, SUBJECT_STREAM)),
        concept=SubjectDataset(concept, prompts[1], seed=seed),
    )


def train(options: TrainOptions) -> Lego:
    """Everything in plain sight: backbone, data, method, loop, save."""
    config = replace(options.config, concept=read_concept(options.concept_words))
    backbone = load_backbone(options.backbone, device=default_device())
    method = Lego(backbone, config)

    subject, concept = (
        LatentCache(
            ImageFolder(root, resolution_px=backbone.resolution_px, skip_bad_images=options.skip_bad_images),
            backbone,
            cache_dir=options.latent_cache,
        )
        for root in (options.subject_images, options.concept_images)
    )
    prompts = (config.subject_prompts(), config.concept_prompts())
    dataset = pair_dataset(subject, concept, prompts, seed=config.seed)
    plain = torch.stack([concept.latents(i) for i in range(len(concept))]).to(backbone.device)

    is_main = PartialState(cpu=backbone.device.type == "cpu").is_main_process
    if is_main:
        print(f"training {phrase_of(config.concept)!r} on {len(concept)} pictures, {len(subject)} without it")
        for name, parameter in method.parameters():
            print(f"training {name}: {tuple(parameter.shape)}, {parameter.numel():,} numbers")

    fit(
        method,
        dataset,
        fit_config(
            config,
            mixed_precision=options.mixed_precision,
            gradient_accumulation_steps=options.gradient_accumulation_steps,
            gradient_checkpointing=options.gradient_checkpointing,
            checkpoint_every=options.checkpoint_every,
            validate_every=options.validate_every,
            sample_every=options.sample_every,
        ),
        options.output,
        validate=lambda: method.validation_loss(plain, prompts[1][:1] * len(plain)),
        sample_grid=lambda: method.generate(prompts[1][0], seeds=SAMPLE_SEEDS),
        scalars=method.cosines,
        resume=options.resume,
    )
    if is_main:
        method.save(options.output)
        print(f"wrote {options.output / ARTIFACT}; use {config.placeholder} in prompts: a photo of a cat "
              f"{config.placeholder}")  # fmt: skip
    return method


@dataclass(frozen=True)
class _Backbone:
    backbone: str = "tiny-sd"


def main(argv: list[str] | None = None) -> None:
    """Defaults are those of LegoConfig, or of tiny() for tiny-sd; every field is a flag."""
    chosen, _ = tyro.cli(_Backbone, args=argv, return_unknown_args=True, add_help=False)
    preset = LegoConfig.tiny if chosen.backbone == "tiny-sd" else LegoConfig
    paths = ("concept_images", "subject_images", "concept_words", "output")
    defaults = TrainOptions(**dict.fromkeys(paths, tyro.MISSING), config=preset())
    train(tyro.cli(TrainOptions, args=argv, default=defaults))


if __name__ == "__main__":
    main()
