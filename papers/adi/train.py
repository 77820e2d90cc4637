"""Learn one action from a folder of pictures: `python -m papers.adi.train --help`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
import tyro
from accelerate import PartialState

from common.backbones import load_backbone
from common.data.latent_cache import LatentCache
from common.training.config import FitConfig
from common.training.loop import fit
from common.training.optimize import default_device

from .config import ADIConfig
from .method import ADI, ARTIFACT
from .triples import TripleDataset, load_folders

SAMPLE_SEEDS = [0, 1, 2, 3]


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """Learn one action from pictures of it."""

    images: Path
    """Folder of about ten pictures of one action by different people, each with its caption beside it: for dance.jpg,
    dance.txt with "a photo of a woman <A>"."""
    other_action_images: Path
    """Folder with a picture for each of them, of the same name: the same person and place in another action."""
    output: Path
    """Run folder; the artifact identifiers.safetensors is written into it."""
    backbone: str = "tiny-sd"
    """A preset (tiny-sd, sd15, sd21), a hub id (stabilityai/stable-diffusion-2-1-base), or a diffusers folder. It
    decides the defaults below."""
    config: tyro.conf.OmitArgPrefixes[ADIConfig] = field(default_factory=ADIConfig.tiny)
    skip_bad_images: bool = False
    """Leave out files that cannot be used as pictures, with a warning."""
    latent_cache: Path | None = None
    """Folder that keeps encoded pictures between runs."""
    mixed_precision: Literal["no", "bf16"] = "no"
    """Of the forward pass; the identifiers stay float32. fp16 is not offered: the gradients that decide the masks are
    taken before the loss could be scaled."""
    gradient_accumulation_steps: int = 1
    """Parts of a batch that are computed one after another, to save memory; the result is the same."""
    gradient_checkpointing: bool = False
    """Less memory, about 30% slower."""
    checkpoint_every: int = 250
    """Steps."""
    validate_every: int = 100
    """Steps between fixed-noise losses on the exemplars; 0 = only at the end."""
    sample_every: int = 0
    """Steps between sample grids; 0 = only at the end."""
    resume: bool = False
    """Continue the run in the output folder."""


def fit_config(config: ADIConfig, **options: object) -> FitConfig:
    """Settings of the loop. Gradients are not clipped; no weight decay, which would move masked channels.

    options: more fields of FitConfig.
    """
    return FitConfig(
        train_steps=config.train_steps,
        learning_rate=config.learning_rate,
        batch_size=config.batch_size,
        weight_decay=0.0,
        max_grad_norm=None,
        seed=config.seed,
        **options,
    )


def train(options: TrainOptions) -> ADI:
    """Everything in plain sight: backbone, data, method, loop, save."""
    config = options.config
    backbone = load_backbone(options.backbone, device=default_device())

    folders = load_folders(
        options.images, options.other_action_images, backbone.resolution_px, skip_bad_images=options.skip_bad_images
    )
    exemplars, others = (LatentCache(folder, backbone, cache_dir=options.latent_cache) for folder in folders)
    dataset = TripleDataset(exemplars, others, config.placeholder, seed=config.seed)
    captions = list(exemplars.folder.captions)
    plain = torch.stack([dataset[i]["anchor"] for i in range(len(dataset))]).to(backbone.device)

    method = ADI(backbone, config)
    is_main = PartialState(cpu=backbone.device.type == "cpu").is_main_process
    if is_main:
        print(f"training {method.num_layers} identifiers, {method.identifiers.numel():,} numbers")

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
        validate=lambda: method.validation_loss(plain, captions),
        sample_grid=lambda: method.generate(captions[0], seeds=SAMPLE_SEEDS),
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
    """Defaults are those of ADIConfig, or of tiny() for tiny-sd; every field is a flag."""
    chosen, _ = tyro.cli(_Backbone, args=argv, return_unknown_args=True, add_help=False)
    preset = ADIConfig.tiny if chosen.backbone == "tiny-sd" else ADIConfig
    defaults = TrainOptions(images=tyro.MISSING, other_action_images=tyro.MISSING, output=tyro.MISSING, config=preset())
    train(tyro.cli(TrainOptions, args=argv, default=defaults))


if __name__ == "__main__":
    main()
