"""A subject in 3D from a few photos: `python -m papers.dreambooth3d.train --help`."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from torch import Tensor

from common.backbones import load_backbone
from common.data.image_folder import ImageFolder
from common.three_d.views import save_object
from common.training.optimize import default_device
from common.training.run_folder import RunFolderError

from .config import DreamBooth3DConfig
from .method import DreamBooth3D
from .subject_field import OCCUPANCY_EVERY, SubjectField
from .tuning import field_prompt


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """Make a subject in 3D from a few photos."""

    images: Path
    """Folder of 3-6 photos of one subject; cameras are not needed."""
    output: Path
    """Gets a folder for each stage; final_field/ has field.safetensors, turntable.mp4, *.gif, mesh.glb, viewer.html."""
    masks: Path | None = None
    """Folder of masks named as the photos, white = subject: the rest becomes white, as renderings are. Default: the
    photos are on a white background already."""
    backbone: str = "tiny-sd"
    """A preset (tiny-sd, sd14, sd15, sd21), hub id, or folder. It decides the defaults below."""
    config: Annotated[DreamBooth3DConfig, tyro.conf.arg(name="")]
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    """Of the forward pass; what is trained stays float32."""
    checkpoint_every: int = 160
    """Steps."""
    resume: bool = False
    """Continue the run in the output folder: finished stages are read, the others go on."""


def read_photos(images: Path, masks: Path | None, resolution_px: int) -> Tensor:
    """Photos (K,3,H,W) in [-1,1], white outside of their masks."""
    items = list(ImageFolder(images, masks=masks, resolution_px=resolution_px))
    photos = torch.stack([item["pixel_values"] for item in items])
    if masks is None:
        return photos
    return torch.where(torch.stack([item["mask"] for item in items]) > 0.5, photos, 1.0)


def train(options: TrainOptions) -> SubjectField:
    """Everything in plain sight: photos, stages, outputs."""
    if options.output.is_dir() and any(options.output.iterdir()) and not options.resume:
        raise RunFolderError(f"{options.output} is not empty: continue its run with --resume, or choose another folder")
    make_backbone = partial(load_backbone, options.backbone, device=default_device())
    photos = read_photos(options.images, options.masks, make_backbone().resolution_px)
    method = DreamBooth3D(
        make_backbone, options.config, photos, options.output, mixed_precision=options.mixed_precision,
        checkpoint_every=options.checkpoint_every - options.checkpoint_every % OCCUPANCY_EVERY,
    )  # fmt: skip
    print(f"making {field_prompt(options.config)!r} from {len(photos)} photos, in three stages")
    final = method.run()
    save_object(final.field, final.background, options.output / "final_field")
    print(f"wrote {options.output / 'final_field'}; open viewer.html there")
    return final


@dataclass(frozen=True)
class _Backbone:
    backbone: str = "tiny-sd"


def main(argv: list[str] | None = None) -> None:
    """Defaults are the paper's, or those of tiny() for tiny-sd; every field is a flag."""
    chosen, _ = tyro.cli(_Backbone, args=argv, return_unknown_args=True, add_help=False)
    tiny = chosen.backbone == "tiny-sd"
    config = DreamBooth3DConfig.tiny(tyro.MISSING) if tiny else DreamBooth3DConfig(class_noun=tyro.MISSING)
    defaults = TrainOptions(images=tyro.MISSING, output=tyro.MISSING, config=config)
    train(tyro.cli(TrainOptions, args=argv, default=defaults))


if __name__ == "__main__":
    main()
