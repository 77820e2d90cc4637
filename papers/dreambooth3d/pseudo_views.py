"""Stage 2: renderings of the first field, made subject-like by the fully tuned model, with their cameras."""

from dataclasses import dataclass
from pathlib import Path

import torch
from nerfstudio.cameras.cameras import Cameras
from torch import Tensor

from common.backbones import Backbone
from common.distillation import ViewPrompts, picture_latents
from common.io import atomic_save_safetensors, load_safetensors
from common.sampling.images import save_png, to_pil
from common.sampling.sampler import img2img
from common.three_d.background import SolidBackground
from common.three_d.cameras import angles_of, make_cameras, orbit_cameras
from common.three_d.fields import PointField
from common.three_d.render import render
from common.training.seeding import derive_seed

from .config import DreamBooth3DConfig
from .tuning import instance_prompt

VIEWS = "pseudo_views.safetensors"
MAX_GAIN = 1.25  # a model of white photos draws them a little grey, which a field would fill with fog
GOLDEN_DEG = 137.50776  # golden angle: points on a spiral cover a sphere evenly


@dataclass(frozen=True)
class PseudoViews:
    """N pictures with the cameras that they were rendered from."""

    renderings: Tensor  # (N,3,P,P) in [-1,1], of the first field
    pictures: Tensor  # (N,3,H,W) in [-1,1], after img2img
    camera_to_worlds: Tensor  # (N,3,4)
    fovs_deg: Tensor  # (N,)

    def cameras(self, resolution: int) -> Cameras:
        """For pictures of this size."""
        return make_cameras(self.camera_to_worlds, self.fovs_deg, resolution)

    def save(self, folder: Path) -> None:
        """Write pseudo_views.safetensors, and the pictures as PNG files to look at."""
        for index, picture in enumerate(to_pil(self.pictures)):
            save_png(picture, Path(folder) / "pseudo_views" / f"{index:02d}.png")
        atomic_save_safetensors({name: value.contiguous() for name, value in vars(self).items()}, Path(folder) / VIEWS)


def read_pseudo_views(folder: Path) -> PseudoViews:
    """What `PseudoViews.save` wrote."""
    return PseudoViews(**load_safetensors(Path(folder) / VIEWS)[0])


def sphere_cameras(config: DreamBooth3DConfig) -> tuple[Cameras, Tensor]:
    """Cameras at one distance, evenly over the part of the sphere that random cameras see (D4); and their fovs."""
    count, ranges = config.num_pseudo_views, config.field
    sines = torch.tensor([ranges.elevation_low, ranges.elevation_high]).deg2rad().sin()
    elevations = (sines[0] + (sines[1] - sines[0]) * (torch.arange(count) + 0.5) / count).asin().rad2deg()
    azimuths = torch.arange(count) * GOLDEN_DEG % 360
    distance = (ranges.distance_low + ranges.distance_high) / 2
    fovs = torch.full((count,), (ranges.fov_low + ranges.fov_high) / 2)
    return orbit_cameras(azimuths, elevations, distance, fovs, resolution=ranges.render_px), fovs


@torch.no_grad()
def make_pseudo_views(backbone: Backbone, field: PointField, config: DreamBooth3DConfig) -> PseudoViews:
    """Render, noise up to t_pseudo, and denoise each view alone, told its side (D5).   backbone: tuned fully."""
    cameras, fovs = sphere_cameras(config)
    azimuths, elevations, _ = angles_of(cameras)
    background = SolidBackground().to(backbone.device)
    prompts = ViewPrompts(backbone, instance_prompt(config))
    renderings, pictures = [], []
    for index in range(len(cameras)):
        camera = cameras[index : index + 1].to(backbone.device)
        rendering = render(field, camera, background=background, num_samples=config.field.num_samples).images()
        told = prompts.at(azimuths[index : index + 1], elevations[index : index + 1])
        latents = img2img(
            backbone, picture_latents(backbone, rendering), told, seeds=[derive_seed(config.seed, "pseudo", index)],
            strength=config.strength, num_inference_steps=config.num_inference_steps,
            guidance_scale=config.guidance_scale,
        )  # fmt: skip
        renderings.append(rendering.cpu())
        pictures.append(white_balanced(backbone.decode_latents(latents).cpu()))
    return PseudoViews(torch.cat(renderings), torch.cat(pictures), cameras.camera_to_worlds, fovs)


def white_balanced(pictures: Tensor) -> Tensor:
    """Pictures (B,3,H,W) in [-1,1] brightened, at most by MAX_GAIN a channel, so that their border is white (D5)."""
    positive = (pictures + 1) / 2
    border = torch.cat([positive[:, :, 0], positive[:, :, -1], positive[:, :, :, 0], positive[:, :, :, -1]], -1)
    gain = (1 / border.median(-1).values.clamp(min=1e-3)).clamp(1.0, MAX_GAIN)
    return (positive * gain[..., None, None]).clamp(max=1.0) * 2 - 1
