"""Learn one concept from a folder of pictures: `python -m papers.p_plus.train --help`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
import tyro
from accelerate import PartialState

from common.backbones import load_backbone
from common.data.image_folder import ImageFolder
from common.data.latent_cache import LatentCache
from common.data.subject_dataset import SubjectDataset
from common.training.config import FitConfig
from common.training.loop import fit
from common.training.optimize import default_device

from .config import PPlusConfig
from .method import ARTIFACT, PPlus

SAMPLE_SEEDS = [0, 1, 2, 3]


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """Learn one concept from a folder of pictures."""

    images: Path
    """Folder of 3-6 pictures of one object, or in one style."""
    output: Path
    """Run folder; the artifact layer_words.safetensors is written into it."""
    backbone: str = "tiny-sd"
    """A preset (tiny-sd, sd14, sd15, sd21), a hub id, or a diffusers folder. It decides the defaults below."""
    config: tyro.conf.OmitArgPrefixes[PPlusConfig] = field(default_factory=PPlusConfig.tiny)
    skip_bad_images: bool = False
    """Leave out files that cannot be used as pictures, with a warning."""
    latent_cache: Path | None = None
    """Folder that keeps encoded pictures between runs."""
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    """Of the forward pass; the words stay float32."""
    gradient_accumulation_steps: int = 1
    """Parts of a batch that are computed one after another, to save memory; the result is the same."""
    gradient_checkpointing: bool = False
    """Less memory, about 30% slower."""
    checkpoint_every: int = 250
    """Steps."""
    validate_every: int = 100
    """Steps between fixed-noise losses on the training pictures; 0 = only at the end."""
    sample_every: int = 0
    """Steps between sample grids; 0 = only at the end."""
    resume: bool = False
    """Continue the run in the output folder."""


def fit_config(config: PPlusConfig, **options: object) -> FitConfig:
    """Settings of the loop. Gradients are not clipped.   options: more fields of FitConfig."""
    return FitConfig(
        train_steps=config.train_steps,
        learning_rate=config.learning_rate,
        batch_size=config.batch_size,
        weight_decay=config.weight_decay,
        max_grad_norm=None,
        seed=config.seed,
        **options,
    )


def train(options: TrainOptions) -> PPlus:
    """Everything in plain sight: backbone, data, method, loop, save."""
    config = options.config
    backbone = load_backbone(options.backbone, device=default_device())

    folder = ImageFolder(
        options.images,
        resolution_px=backbone.resolution_px,
        flip=config.flip,
        skip_bad_images=options.skip_bad_images,
    )
    latents = LatentCache(folder, backbone, cache_dir=options.latent_cache)
    dataset = SubjectDataset(latents, config.training_prompts(), seed=config.seed)
    plain = torch.stack([dataset[i]["latents"] for i in range(len(dataset))]).to(backbone.device)

    method = PPlus(backbone, config)
    is_main = PartialState(cpu=backbone.device.type == "cpu").is_main_process
    if is_main:
        size = sum(parameter.numel() for _, parameter in method.parameters())
        print(f"training {method.num_layers} words, {size:,} numbers")

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
        validate=lambda: method.validation_loss(plain),
        sample_grid=lambda: method.generate(config.plain_prompt(), seeds=SAMPLE_SEEDS),
        resume=options.resume,
    )
    if is_main:
        method.save(options.output)
        print(f"wrote {options.output / ARTIFACT}; use {config.placeholder} in prompts")
    return method


@dataclass(frozen=True)
class _Backbone:
    backbone: str = "tiny-sd"


def main(argv: list[str] | None = None) -> None:
    """Defaults are the paper's, or those of tiny() for tiny-sd; every field is a flag."""
    chosen, _ = tyro.cli(_Backbone, args=argv, return_unknown_args=True, add_help=False)
    preset = PPlusConfig.tiny if chosen.backbone == "tiny-sd" else PPlusConfig
    defaults = TrainOptions(images=tyro.MISSING, output=tyro.MISSING, config=preset())
    train(tyro.cli(TrainOptions, args=argv, default=defaults))


if __name__ == "__main__":
    main()
