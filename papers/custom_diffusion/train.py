"""Tune one concept, or several together, from folders of pictures: `python -m papers.custom_diffusion.train --help`."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import tyro

from common.backbones import Backbone, load_backbone
from common.data.image_folder import ImageFolder
from common.data.latent_cache import LatentCache
from common.data.subject_dataset import SubjectDataset, ZipDataset
from common.training.config import FitConfig
from common.training.loop import fit
from common.training.optimize import default_device, make_accelerator, on_main_process
from common.training.seeding import derive_seed

from .augmentation import ConceptDataset, PooledDataset
from .config import CustomDiffusionConfig
from .method import REGULARISATION_STREAM, CustomDiffusion
from .regularisation import generated_set


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """Tune the key and value projections of cross-attention and one new word per concept."""

    images: tuple[Path, ...]
    """One folder of 4-20 pictures for each concept, in the order of --class-nouns."""
    output: Path
    """Becomes the artifact. training/ in it is the run folder, regularisation/ the generated images."""
    backbone: str = "tiny-sd"
    """A preset (tiny-sd, sd14, sd15, sd21, sdxl), a hub id, or a diffusers folder. It decides the defaults below."""
    config: tyro.conf.OmitArgPrefixes[CustomDiffusionConfig] = field(default_factory=CustomDiffusionConfig.tiny)
    regularisation: tuple[Path, ...] = ()
    """One folder of real pictures of the class with captions for each concept. Default: the model generates them."""
    skip_bad_images: bool = False
    """Leave out files that cannot be used as pictures, with a warning."""
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    """Of the forward pass; what is trained stays float32."""
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


def fit_config(config: CustomDiffusionConfig, **options: object) -> FitConfig:
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


def concept_dataset(backbone: Backbone, options: TrainOptions) -> PooledDataset:
    """The pictures of all concepts."""
    config, parts = options.config, []
    for i, root in enumerate(options.images):
        folder = ImageFolder(root, resolution_px=backbone.resolution_px, skip_bad_images=options.skip_bad_images)
        parts.append(
            ConceptDataset(
                folder,
                config.instance_prompt(i),
                latent_size=backbone.latent_size,
                scale=config.scale_augmentation,
                flip=config.flip,
                seed=derive_seed(config.seed, "concept", i),
            )
        )
    return PooledDataset(parts)


def regularisation_dataset(backbone: Backbone, config: CustomDiffusionConfig, roots: Sequence[Path]) -> PooledDataset:
    """The regularisation images of all concepts, each with its own caption."""
    parts = []
    for i, root in enumerate(roots):
        folder = ImageFolder(root, resolution_px=backbone.resolution_px)
        seed = derive_seed(config.seed, REGULARISATION_STREAM, i)
        parts.append(SubjectDataset(LatentCache(folder, backbone), seed=seed))
    return PooledDataset(parts)


def train(options: TrainOptions) -> CustomDiffusion:
    """Everything in plain sight: backbone, data, method, loop, save."""
    config = options.config
    for name, folders in (("images", options.images), ("regularisation", options.regularisation)):
        if len(folders) != len(config.class_nouns) and (name == "images" or folders):
            raise ValueError(f"--{name} has {len(folders)} folders for class_nouns {list(config.class_nouns)}")
    backbone = load_backbone(options.backbone, device=default_device())
    accelerator = make_accelerator(backbone.device, options.mixed_precision)

    instance = concept_dataset(backbone, options)
    dataset = ZipDataset(instance=instance)
    if config.prior_loss_weight > 0:  # before anything is tuned
        roots = list(options.regularisation)
        if not roots:
            folders = [options.output / "regularisation" / str(i) for i in range(len(config.class_nouns))]
            for i, folder in enumerate(folders):
                on_main_process(accelerator, partial(generated_set, backbone, config, i, folder))
            roots = [folder / "images" for folder in folders]
        dataset = ZipDataset(instance=instance, class_=regularisation_dataset(backbone, config, roots))

    method = CustomDiffusion(backbone, config)
    if accelerator.is_main_process:
        trained = [pair for group in method.parameters() for pair in group["params"]]
        words = [config.words(i) for i in range(len(config.class_nouns))]
        print(f"training {words} on {len(instance)} pictures")
        print(f"training {len(trained)} tensors, {sum(p.numel() for _, p in trained):,} numbers")

    with torch.no_grad():  # of the first concept, at its own scale
        first = range(len(instance.parts[0]))
        plain = backbone.encode_images(torch.stack([instance[i]["pixel_values"] for i in first]))
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
        sample_grid=partial(method.generate, config.instance_prompt(), seeds=list(range(options.num_samples)))
        if options.num_samples
        else None,
        resume=options.resume,
    )
    on_main_process(accelerator, partial(method.save, options.output))
    if accelerator.is_main_process:
        print(f"wrote {options.output}; begin prompts like {config.instance_prompt()!r}")
    return method


@dataclass(frozen=True)
class _Backbone:
    backbone: str = "tiny-sd"


def main(argv: list[str] | None = None) -> None:
    """Defaults are those of the paper, or of tiny() for tiny-sd; every field is a flag."""
    chosen, _ = tyro.cli(_Backbone, args=argv, return_unknown_args=True, add_help=False)
    config = CustomDiffusionConfig.tiny() if chosen.backbone == "tiny-sd" else CustomDiffusionConfig()
    defaults = TrainOptions(images=tyro.MISSING, output=tyro.MISSING, config=config)
    train(tyro.cli(TrainOptions, args=argv, default=defaults))


if __name__ == "__main__":
    main()
