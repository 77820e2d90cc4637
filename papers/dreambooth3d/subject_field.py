"""Both NeRF stages: score distillation from a tuned model, in the second with weak reconstruction of pseudo views."""

from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Parameter

from common.backbones import Backbone
from common.distillation import TimestepRange, ViewPrompts, distillation_loss, guided_predictor
from common.three_d.artifact import load_field, save_field
from common.three_d.background import SolidBackground
from common.three_d.cameras import CameraRange
from common.three_d.fields import make_field
from common.three_d.losses import distortion_loss, opacity_loss, orientation_loss
from common.three_d.occupancy import Occupancy
from common.three_d.random_views import random_views
from common.three_d.render import Rendering, render
from common.three_d.shading import ShadingMode, sample_shading_mode
from common.three_d.views import side_views
from common.training.seeding import derive_seed, seeded_generator

from .config import DreamBooth3DConfig
from .pseudo_views import PseudoViews
from .tuning import field_prompt

SLUG = Path(__file__).parent.name
ARTIFACT = "field.safetensors"
OCCUPANCY_EVERY = 16  # steps


class SubjectField:
    """A field of the subject on white.

    Args:
        backbone: tuned; everything in it is frozen.   steps: of the whole optimisation.
        views: pseudo views to reconstruct; None = score distillation alone.
        header: what the artifact says of its origin.
    """

    def __init__(
        self, backbone: Backbone, config: DreamBooth3DConfig, steps: int, *, views: PseudoViews | None = None,
        header: dict[str, str] | None = None,
    ) -> None:  # fmt: skip
        self.backbone, self.config, self.steps = backbone.freeze(), config, steps
        self.header = {"slug": SLUG, "version": "1", "prompt": field_prompt(config), **(header or {})}
        stage = "first field" if views is None else "final field"
        self.seed = derive_seed(config.seed, stage)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            self.field = make_field(config.field.kind, config.field.resolution).to(backbone.device)
        self.background = SolidBackground().to(backbone.device)
        self.prompts = ViewPrompts(backbone, field_prompt(config))
        self.occupancy = Occupancy(self.field)
        self.views = views
        if views is not None:
            self.cameras = views.cameras(config.field.render_px)
            pictures = (views.pictures + 1) / 2
            if pictures.shape[-1] != config.field.render_px:
                pictures = F.interpolate(pictures, config.field.render_px, mode="area")
            self.targets = pictures.permute(0, 2, 3, 1).to(backbone.device)  # (N,P,P,3) in [0,1]
        self.losses: dict[str, float] = {}  # of the last step, by name

    def parameters(self) -> list[tuple[str, Parameter]]:
        """The field's."""
        return list(self.field.named_parameters())

    def training_loss(self, batch: dict[str, Any]) -> Tensor:
        """L = L_SDS + lambda_recon L_recon + L_nerf; SDS sees random cameras, L_recon a pseudo view.

        Args: batch: {"sample_keys": (1,), "step"}.
        """
        step, config = batch["step"], self.config.field
        generator = seeded_generator(self.seed, "views", *batch["sample_keys"].tolist())
        if step % OCCUPANCY_EVERY == 0:
            self.occupancy.update(self.field)
        rendering, azimuths, elevations = self.random_views(len(batch["sample_keys"]), step, generator)
        told, empty = self.prompts.at(azimuths, elevations), self.prompts.empty(len(azimuths))
        sds = distillation_loss(
            self.backbone, rendering.images(), guided_predictor(self.backbone, told, empty, config.guidance_scale),
            TimestepRange(config.lowest_timestep, config.highest_timestep, config.final_timestep), generator,
            progress=step / self.steps,
        )  # fmt: skip
        rising = min(1.0, 3 * step / self.steps)
        parts = {
            "sds": sds,
            "opacity": config.opacity_weight * opacity_loss(rendering),
            "orientation": config.orientation_weight * rising * orientation_loss(rendering),
            "distortion": config.distortion_weight * distortion_loss(rendering),
        }
        if self.views is not None and self.config.recon_weight > 0:
            parts["recon"] = self.config.recon_weight * self.reconstruction_loss(generator)
        self.losses = {name: part.item() for name, part in parts.items()}
        return sum(parts.values())

    def random_views(self, count: int, step: int, generator: torch.Generator) -> tuple[Rendering, Tensor, Tensor]:
        """Renderings from random cameras under a random light, with the cameras' azimuths and elevations."""
        config = self.config.field
        ranges = CameraRange(
            elevation_deg=(config.elevation_low, config.elevation_high),
            distance=(config.distance_low, config.distance_high),
            fov_deg=(config.fov_low, config.fov_high),
        )
        shading = partial(
            sample_shading_mode, step, albedo_steps=round(config.albedo_share * self.steps),
            lit_probability=config.lit_probability, textureless_probability=config.textureless_probability,
        )  # fmt: skip
        return random_views(
            self.field, self.background, count, ranges, shading, generator, resolution=config.render_px,
            num_samples=config.num_samples, occupancy=self.occupancy,
        )  # fmt: skip

    def reconstruction_loss(self, generator: torch.Generator) -> Tensor:
        """Mean squared error of the albedo's rendering at one pseudo view's camera, drawn at random."""
        index = int(torch.randint(len(self.targets), (), generator=generator))
        made = render(
            self.field, self.cameras[index : index + 1].to(self.backbone.device), background=self.background,
            num_samples=self.config.field.num_samples, occupancy=self.occupancy, generator=generator,
        )  # fmt: skip
        return F.mse_loss(made.rgb[0], self.targets[index])

    def side_views(self, count: int, *, light: ShadingMode = "albedo") -> Rendering:
        """The subject from evenly spaced sides, the front first."""
        config = self.config.field
        return side_views(
            self.field, self.background, count, light=light, resolution=config.render_px,
            num_samples=config.num_samples,
        )  # fmt: skip

    def generate(self, prompt: str, *, seeds: list[int]) -> Tensor:
        """Pictures of the subject from len(seeds) sides, (B,3,H,W) in [-1,1]; seeds only count.

        Raises: ValueError for another prompt than the one it was made from: the field holds one object.
        """
        if prompt != field_prompt(self.config):
            raise ValueError(f"this field was made from {field_prompt(self.config)!r}; another prompt needs a new run")
        return self.side_views(len(seeds)).images()

    def save(self, folder: Path) -> None:
        """Write field.safetensors."""
        save_field(self.field, self.background, Path(folder) / ARTIFACT, self.header)

    def load(self, folder: Path) -> None:
        """Read what `save` wrote. Raises: ValueError naming the file if it does not fit."""
        load_field(self.field, self.background, Path(folder) / ARTIFACT, SLUG)
