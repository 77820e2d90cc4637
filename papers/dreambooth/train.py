"""Bind an identifier to the subject of a folder of pictures: `python -m papers.dreambooth.train --help`."""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import tyro

from common.backbones import load_backbone
from common.data.image_folder import ImageFolder
from common.data.latent_cache import LatentCache
from common.data.subject_dataset import SubjectDataset, ZipDataset
from common.training.config import FitConfig
from common.training.loop import fit
from common.training.optimize import default_device, make_accelerator, on_main_process
from common.training.seeding import derive_seed, seeded_generator

from .class_images import class_image_latents
from .config import DreamBoothConfig
from .method import CLASS_STREAM, DreamBooth, class_prompt, instance_prompt, rare_token_identifier


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """Bind an identifier and a class noun to the subject of a folder of pictures."""

    images: Path
    """Folder of 3-5 pictures of one subject."""
    output: Path
    """Becomes a diffusers pipeline folder. training/ in it is the run folder, class_images/ the class images."""
    backbone: str = "tiny-sd"
    """A preset (tiny-sd, sd14, sd15, sd21, sdxl), a hub id, or a diffusers folder. It decides the defaults below."""
    config: tyro.conf.OmitArgPrefixes[DreamBoothConfig]
    class_images: Path | None = None
    """Folder of the class images, to share it between runs; made if it is not there. Default: in the output folder."""
    skip_bad_images: bool = False
    """Leave out files that cannot be used as pictures, with a warning."""
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    """Of the forward pass; the trained weights stay float32."""
    gradient_accumulation_steps: int = 1
    """Parts of a batch that are computed one after another, to save memory; the result is the same."""
    gradient_checkpointing: bool = False
    """Less memory, about 30% slower."""
    checkpoint_every: int = 500
    """Steps. Only the newest checkpoint is kept: that of a Stable Diffusion has 10 GB."""
    sample_every: int = 0
    """Steps between sample grids; 0 = only at the end."""
    num_samples: int = 4
    """Pictures in a sample grid; 0 = no grid."""
    resume: bool = False
    """Continue the run in the output folder."""


def fit_config(config: DreamBoothConfig, **options: object) -> FitConfig:
    """Settings of the loop; gradients are clipped to norm 1 (code).   options: more fields of FitConfig."""
    return FitConfig(
        train_steps=config.train_steps,
        learning_rate=config.learning_rate,
        batch_size=config.batch_size,
        weight_decay=config.weight_decay,
        seed=config.seed,
        keep_checkpoints=1,
        **options,
    )


def train(options: TrainOptions) -> DreamBooth:
    """Everything in plain sight: backbone, data, method, loop, save."""
    config = options.config
    backbone = load_backbone(options.backbone, device=default_device())
    accelerator = make_accelerator(backbone.device, options.mixed_precision)
    if config.identifier is None:
        generator = seeded_generator(config.seed, "identifier")
        config = replace(config, identifier=rare_token_identifier(backbone.tokenizer, generator=generator))

    folder = ImageFolder(options.images, resolution_px=backbone.resolution_px, skip_bad_images=options.skip_bad_images)
    instance = SubjectDataset(LatentCache(folder, backbone), [instance_prompt(config)], seed=config.seed)
    dataset = ZipDataset(instance=instance)
    if config.prior_loss_weight > 0:  # before anything is tuned
        class_folder = options.class_images or options.output / "class_images"
        latents = class_image_latents(backbone, config, class_folder, accelerator)
        of_class = SubjectDataset(latents, [class_prompt(config)], seed=derive_seed(config.seed, CLASS_STREAM))
        dataset = ZipDataset(instance=instance, class_=of_class)
    plain = torch.stack([instance[i]["latents"] for i in range(len(instance))]).to(backbone.device)

    method = DreamBooth(backbone, config)
    if accelerator.is_main_process:
        print(f"training {instance_prompt(config)!r} on {len(instance)} pictures")
        for name, module in method.trained_modules().items():
            print(f"training {name}: {sum(p.numel() for p in module.parameters()):,} numbers")

    fit(
        method,
        dataset,
        fit_config(
            config,
            mixed_precision=options.mixed_precision,
            gradient_accumulation_steps=options.gradient_accumulation_steps,
            gradient_checkpointing=options.gradient_checkpointing,
            checkpoint_every=options.checkpoint_every,
            sample_every=options.sample_every,
        ),
        options.output / "training",
        validate=lambda: method.validation_loss(plain),
        sample_grid=partial(method.generate, seeds=list(range(options.num_samples))) if options.num_samples else None,
        resume=options.resume,
    )
    on_main_process(accelerator, partial(method.save, options.output))
    if accelerator.is_main_process:
        print(f"wrote {options.output}; begin prompts like {instance_prompt(config)!r}")
    return method


@dataclass(frozen=True)
class _Backbone:
    backbone: str = "tiny-sd"


def main(argv: list[str] | None = None) -> None:
    """Defaults are those of the paper, or of tiny() for tiny-sd; every field is a flag."""
    chosen, _ = tyro.cli(_Backbone, args=argv, return_unknown_args=True, add_help=False)
    tiny = chosen.backbone == "tiny-sd"
    config = DreamBoothConfig.tiny(tyro.MISSING) if tiny else DreamBoothConfig(class_noun=tyro.MISSING)
    defaults = TrainOptions(images=tyro.MISSING, output=tyro.MISSING, config=config)
    train(tyro.cli(TrainOptions, args=argv, default=defaults))


if __name__ == "__main__":
    main()
