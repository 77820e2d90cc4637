"""Learn shifts for the subjects of folders of pictures: `python -m papers.svdiff.train --help`."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import tyro
from torch import Tensor

from common.backbones import Backbone, load_backbone
from common.data.image_folder import ImageFolder
from common.sampling import sample_images
from common.sampling.images import save_png, to_pil
from common.training.config import FitConfig
from common.training.loop import fit
from common.training.optimize import default_device, make_accelerator, on_main_process
from common.training.seeding import derive_seed

from .config import SVDiffConfig
from .cutmix import CutMixDataset, encode_pictures
from .method import ARTIFACT, SVDiff


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """Learn spectral shifts for one subject, for several together, or for one picture to edit."""

    images: tuple[Path, ...]
    """For each class noun a folder of 3-5 pictures of its subject; with --description, a folder with one picture."""
    output: Path
    """Gets the artifact spectral_shifts.safetensors; training/ in it is the run folder."""
    backbone: str = "tiny-sd"
    """A preset (tiny-sd, sd14, sd15, sd21, sdxl), a hub id, or a diffusers folder. It decides the defaults below."""
    config: tyro.conf.OmitArgPrefixes[SVDiffConfig]
    class_images: Path | None = None
    """Folder with a sub-folder of class pictures for each class noun, to share them between runs; the untuned model
    makes what is missing. Default: class_images/ in the output folder."""
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    """Of the forward pass; the shifts stay float32."""
    gradient_accumulation_steps: int = 1
    """Parts of a batch that are computed one after another, to save memory; the result is the same."""
    gradient_checkpointing: bool = False
    """Less memory, about 30% slower."""
    checkpoint_every: int = 500
    """Steps."""
    num_samples: int = 4
    """Pictures in the sample grid at the end; 0 = no grid."""
    resume: bool = False
    """Continue the run in the output folder."""


def read_pictures(folder: Path, resolution_px: int) -> Tensor:
    """All pictures of a folder, (n,3,H,W) in [-1,1]."""
    return torch.stack([item["pixel_values"] for item in ImageFolder(folder, resolution_px=resolution_px)])


def make_class_images(backbone: Backbone, config: SVDiffConfig, prompt: str, folder: Path) -> None:
    """z_pr of Eq. 3: a class by the backbone before it is tuned; pictures that are there already are kept."""
    missing = [i for i in range(config.num_class_images) if not (folder / f"{i:05d}.png").is_file()]
    for start in range(0, len(missing), 8):
        numbers = missing[start : start + 8]
        seeds = [derive_seed(config.seed, "class images", i) for i in numbers]
        settings = {"num_inference_steps": config.num_inference_steps, "guidance_scale": config.guidance_scale}
        pictures = sample_images(backbone, prompt, seeds=seeds, **settings)
        for i, picture in zip(numbers, to_pil(pictures), strict=True):
            save_png(picture, folder / f"{i:05d}.png")


def make_dataset(options: TrainOptions, backbone: Backbone) -> CutMixDataset:
    """Pictures of the subjects and, for the prior loss, of their classes, which one process makes first."""
    config, size = options.config, backbone.resolution_px
    if len(options.images) != len(config.instance_prompts()):
        raise ValueError(
            f"{len(options.images)} folders of images for the prompts {config.instance_prompts()}: name the subject of "
            "each with --class-nouns, or describe the one picture to edit with --description"
        )
    subjects = [encode_pictures(backbone, read_pictures(folder, size)) for folder in options.images]
    if config.prior_loss_weight == 0:
        return CutMixDataset(subjects, None, config)
    accelerator, root = make_accelerator(backbone.device), options.class_images or options.output / "class_images"
    folders = [root / noun for noun in config.class_nouns]
    for prompt, folder in zip(config.class_prompts(), folders, strict=True):
        on_main_process(accelerator, partial(make_class_images, backbone, config, prompt, folder))
    classes = [encode_pictures(backbone, read_pictures(folder, size)) for folder in folders]
    return CutMixDataset(subjects, classes, config)


def fit_config(config: SVDiffConfig, **options: object) -> FitConfig:
    """Settings of the loop; gradients are clipped to norm 1 (mkshing).   options: more fields of FitConfig."""
    return FitConfig(
        train_steps=config.train_steps,
        learning_rate=config.learning_rate,
        batch_size=config.batch_size,
        weight_decay=config.weight_decay,
        seed=config.seed,
        **options,
    )


def train(options: TrainOptions) -> SVDiff:
    """Everything in plain sight: backbone, data, shifts, loop, save."""
    config = options.config
    backbone = load_backbone(options.backbone, device=default_device()).freeze()
    accelerator = make_accelerator(backbone.device, options.mixed_precision)
    dataset = make_dataset(options, backbone)  # before anything is tuned
    plain = dataset.subjects[0].whole.to(backbone.device)

    method = SVDiff(backbone, config)
    if accelerator.is_main_process:
        print(f"training {config.instance_prompts()} on {', '.join(map(str, options.images))}")
        for group in method.parameters():
            numbers = sum(parameter.numel() for _, parameter in group["params"])
            print(f"training {len(group['params'])} weights at {group['lr']:g}: {numbers:,} numbers")
    fit(
        method,
        dataset,
        fit_config(
            config,
            mixed_precision=options.mixed_precision,
            gradient_accumulation_steps=options.gradient_accumulation_steps,
            gradient_checkpointing=options.gradient_checkpointing,
            checkpoint_every=options.checkpoint_every,
        ),
        options.output / "training",
        validate=lambda: method.validation_loss(plain),
        sample_grid=partial(method.generate, seeds=list(range(options.num_samples))) if options.num_samples else None,
        resume=options.resume,
    )
    on_main_process(accelerator, partial(method.save, options.output))
    if accelerator.is_main_process:
        print(f"wrote {options.output / ARTIFACT}; begin prompts like {config.instance_prompts()[0]!r}")
    return method


@dataclass(frozen=True)
class _Backbone:
    backbone: str = "tiny-sd"


def main(argv: list[str] | None = None) -> None:
    """Defaults are those of the paper, or of tiny() for tiny-sd; every field is a flag."""
    chosen, _ = tyro.cli(_Backbone, args=argv, return_unknown_args=True, add_help=False)
    config = SVDiffConfig.tiny() if chosen.backbone == "tiny-sd" else SVDiffConfig()
    defaults = TrainOptions(images=tyro.MISSING, output=tyro.MISSING, config=config)
    train(tyro.cli(TrainOptions, args=argv, default=defaults))


if __name__ == "__main__":
    main()
