"""Learn pairs for the subject of a folder of pictures: `python -m papers.lora.train --help`."""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import tyro
from accelerate import Accelerator

from common.backbones import Backbone, load_backbone
from common.data.image_folder import ImageFolder
from common.data.latent_cache import LatentCache
from common.data.subject_dataset import SubjectDataset, ZipDataset
from common.sampling import sample_images
from common.sampling.images import save_png, to_pil
from common.training.config import FitConfig
from common.training.loop import fit
from common.training.optimize import default_device, make_accelerator, on_main_process
from common.training.seeding import derive_seed

from .config import LoRAConfig
from .formats import write_kohya
from .method import ARTIFACT, LoRA
from .pivotal import PivotalInversion


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """Learn low-rank pairs for the subject of a folder of pictures."""

    images: Path
    """Folder of 3-20 pictures of one subject."""
    output: Path
    """Gets the artifact pytorch_lora_weights.safetensors; training/ in it is the run folder."""
    backbone: str = "tiny-sd"
    """A preset (tiny-sd, sd14, sd15, sd21, sdxl), a hub id, or a diffusers folder. It decides the defaults below."""
    config: tyro.conf.OmitArgPrefixes[LoRAConfig]
    masks: Path | None = None
    """Folder of masks named as the pictures, 1 = subject: the loss is then weighted by them."""
    class_images: Path | None = None
    """Folder of class pictures for the prior loss. Default: the untuned model makes them, in the output folder."""
    skip_bad_images: bool = False
    """Leave out files that cannot be used as pictures, with a warning."""
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    """Of the forward pass; the pairs stay float32."""
    gradient_accumulation_steps: int = 1
    """Parts of a batch that are computed one after another, to save memory; the result is the same."""
    gradient_checkpointing: bool = False
    """Less memory, about 30% slower."""
    checkpoint_every: int = 500
    """Steps."""
    num_samples: int = 4
    """Pictures in the sample grid at the end; 0 = no grid."""
    kohya: bool = False
    """Write kohya.safetensors too, in the layout of sd-scripts."""
    resume: bool = False
    """Continue the run in the output folder."""


def make_class_images(backbone: Backbone, config: LoRAConfig, folder: Path) -> None:
    """ "a photo of a [class noun]" by the backbone as it is; pictures that are there already are kept."""
    missing = [i for i in range(config.num_class_images) if not (folder / f"{i:05d}.png").is_file()]
    for start in range(0, len(missing), 8):
        numbers = missing[start : start + 8]
        seeds = [derive_seed(config.seed, "class images", i) for i in numbers]
        settings = {"num_inference_steps": config.num_inference_steps, "guidance_scale": config.guidance_scale}
        pictures = sample_images(backbone, config.class_prompt(), seeds=seeds, **settings)
        for i, picture in zip(numbers, to_pil(pictures), strict=True):
            save_png(picture, folder / f"{i:05d}.png")


def make_datasets(options: TrainOptions, backbone: Backbone, accelerator: Accelerator) -> dict[str, SubjectDataset]:
    """Pictures of the subject with its prompt and, for the prior loss, of the class with theirs."""
    config, size = options.config, backbone.resolution_px
    folder = ImageFolder(
        options.images, resolution_px=size, masks=options.masks, skip_bad_images=options.skip_bad_images
    )
    parts = {"instance": SubjectDataset(LatentCache(folder, backbone), [config.instance_prompt()], seed=config.seed)}
    if config.prior_loss_weight > 0:
        class_folder = options.class_images or options.output / "class_images"
        if options.class_images is None:
            on_main_process(accelerator, partial(make_class_images, backbone, config, class_folder))
        of_class = LatentCache(ImageFolder(class_folder, resolution_px=size), backbone)
        parts["class_"] = SubjectDataset(of_class, [config.class_prompt()], seed=derive_seed(config.seed, "class"))
    return parts


def train(options: TrainOptions) -> LoRA:
    """Everything in plain sight: backbone, data, token, pairs, loop, save."""
    config = options.config
    backbone = load_backbone(options.backbone, device=default_device()).freeze()
    accelerator = make_accelerator(backbone.device, options.mixed_precision)
    parts = make_datasets(options, backbone, accelerator)
    dataset, instance = ZipDataset(**parts), parts["instance"]
    plain = torch.stack([instance[i]["latents"] for i in range(len(instance))]).to(backbone.device)
    settings = FitConfig(
        train_steps=config.train_steps,
        learning_rate=config.learning_rate,
        batch_size=config.batch_size,
        weight_decay=config.weight_decay,
        seed=config.seed,
        mixed_precision=options.mixed_precision,
        gradient_accumulation_steps=options.gradient_accumulation_steps,
        gradient_checkpointing=options.gradient_checkpointing,
        checkpoint_every=options.checkpoint_every,
    )
    if config.inversion_steps:  # no weight decay: it would pull the token to the origin
        inversion = PivotalInversion(backbone, config)
        changes = {"train_steps": config.inversion_steps, "learning_rate": config.inversion_learning_rate}
        stage = replace(settings, **changes, weight_decay=0.0)
        fit(inversion, dataset, stage, options.output / "inversion", resume=options.resume)
        inversion.control_norm()

    method = LoRA(backbone, config)
    if accelerator.is_main_process:
        print(f"training {config.instance_prompt()!r} on {options.images}")
        for group in method.parameters():
            numbers = sum(parameter.numel() for _, parameter in group["params"])
            print(f"training {len(group['params']) // 2} pairs of rank {config.rank}: {numbers:,} numbers")
    fit(
        method,
        dataset,
        settings,
        options.output / "training",
        validate=lambda: method.validation_loss(plain),
        sample_grid=partial(method.generate, seeds=list(range(options.num_samples))) if options.num_samples else None,
        resume=options.resume,
    )
    on_main_process(accelerator, partial(method.save, options.output))
    if options.kohya:
        kohya_file = options.output / "kohya.safetensors"
        on_main_process(accelerator, partial(write_kohya, method.factors(), kohya_file))
    if accelerator.is_main_process:
        print(f"wrote {options.output / ARTIFACT}; begin prompts like {config.instance_prompt()!r}")
    return method


@dataclass(frozen=True)
class _Backbone:
    backbone: str = "tiny-sd"


def main(argv: list[str] | None = None) -> None:
    """Defaults are those of the diffusers recipe, or of tiny() for tiny-sd; every field is a flag."""
    chosen, _ = tyro.cli(_Backbone, args=argv, return_unknown_args=True, add_help=False)
    tiny = chosen.backbone == "tiny-sd"
    config = LoRAConfig.tiny(tyro.MISSING) if tiny else LoRAConfig(class_noun=tyro.MISSING)
    defaults = TrainOptions(images=tyro.MISSING, output=tyro.MISSING, config=config)
    train(tyro.cli(TrainOptions, args=argv, default=defaults))


if __name__ == "__main__":
    main()
