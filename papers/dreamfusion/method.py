"""DreamFusion (Poole et al., ICLR 2023, arXiv 2209.14988).

Paper -> here:  theta -> field and background   x = g(theta) -> render   z -> latents of x (D1)
    omega -> guidance_scale - 1   SDS -> common.distillation   shading, regularisers -> common.three_d
Departures D1 to D7 are in the card.
"""

import json
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common.backbones import Backbone, Conditioning, load_backbone
from common.distillation import TimestepRange, ViewPrompts, distillation_loss, guided_predictor
from common.distillation.sds import NoisePredictor
from common.three_d.artifact import load_field, read_field, save_field
from common.three_d.background import LearnedBackground, SolidBackground
from common.three_d.cameras import CameraRange
from common.three_d.fields import make_field
from common.three_d.losses import opacity_loss, orientation_loss
from common.three_d.occupancy import Occupancy
from common.three_d.random_views import random_views
from common.three_d.render import Rendering
from common.three_d.shading import ShadingMode, sample_shading_mode
from common.three_d.views import side_views
from common.training.seeding import derive_seed, seeded_generator

from .config import DreamFusionConfig

SLUG = Path(__file__).parent.name
ARTIFACT = "field.safetensors"
OCCUPANCY_EVERY = 16  # steps


class DreamFusion:
    """An object from a prompt.

    Args: backbone: everything in it is frozen.   prompt: "a bear"; the views' names are added to it.
    """

    def __init__(self, backbone: Backbone, config: DreamFusionConfig, prompt: str) -> None:
        self.backbone, self.config, self.prompt = backbone.freeze(), config, prompt
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(config.seed, "field"))
            self.field = make_field(config.field, config.field_resolution).to(backbone.device)
            learned = config.background == "learned"
            self.background: nn.Module = LearnedBackground() if learned else SolidBackground()
        self.background.to(backbone.device)
        self.prompts = ViewPrompts(backbone, prompt, names=config.view_prompts)
        self.occupancy = Occupancy(self.field)
        self.losses: dict[str, float] = {}  # of the last step, by name

    def parameters(self) -> list[dict[str, Any]]:
        """The field and, if it is learned, the background; each with its learning rate."""
        groups = [(self.field, "field", self.config.learning_rate)]
        if self.config.background == "learned":
            groups.append((self.background, "background", self.config.background_learning_rate))
        return [
            {"params": [(f"{kind}.{name}", p) for name, p in module.named_parameters()], "lr": rate}
            for module, kind, rate in groups
        ]

    def training_loss(self, batch: dict[str, Any]) -> Tensor:
        """L_SDS, and the regularisers, for random cameras; there is no data.

        Args: batch: {"sample_keys": (B,), "step"}; B views.
        """
        step, config = batch["step"], self.config
        generator = seeded_generator(config.seed, "views", *batch["sample_keys"].tolist())
        if step % OCCUPANCY_EVERY == 0:
            self.occupancy.update(self.field)
        rendering, azimuths, elevations = self.random_views(len(batch["sample_keys"]), step, generator)
        sds = distillation_loss(
            self.backbone, rendering.images(), self.predictor(self.prompts.at(azimuths, elevations)),
            TimestepRange(config.lowest_timestep, config.highest_timestep, config.final_timestep), generator,
            weighting=config.weighting, progress=step / config.train_steps,
        )  # fmt: skip
        opacity, orientation = opacity_loss(rendering), orientation_loss(rendering)
        self.losses = {"sds": sds.item(), "opacity": opacity.item(), "orientation": orientation.item()}
        rising = min(1.0, 3 * step / config.train_steps)
        return sds + config.opacity_weight * opacity + config.orientation_weight * rising * orientation

    def random_views(self, count: int, step: int, generator: torch.Generator) -> tuple[Rendering, Tensor, Tensor]:
        """Renderings from random cameras under a random light, with the cameras' azimuths and elevations."""
        config = self.config
        ranges = CameraRange(
            elevation_deg=(config.elevation_low, config.elevation_high),
            distance=(config.distance_low, config.distance_high),
            fov_deg=(config.fov_low, config.fov_high),
        )
        shading = partial(
            sample_shading_mode, step, albedo_steps=round(config.albedo_share * config.train_steps),
            lit_probability=config.lit_probability, textureless_probability=config.textureless_probability,
        )  # fmt: skip
        return random_views(
            self.field, self.background, count, ranges, shading, generator, resolution=config.render_px,
            num_samples=config.num_samples, occupancy=self.occupancy,
        )  # fmt: skip

    def predictor(self, told: Conditioning) -> NoisePredictor:
        """(z_t, t) -> eps_hat with guidance."""
        return guided_predictor(self.backbone, told, self.prompts.empty(told.batch_size), self.config.guidance_scale)

    def views(self, count: int, *, light: ShadingMode = "albedo") -> Rendering:
        """The object from evenly spaced sides, the front first."""
        return side_views(
            self.field, self.background, count, light=light, resolution=self.config.render_px,
            num_samples=self.config.num_samples,
        )  # fmt: skip

    def generate(self, prompt: str, *, seeds: list[int]) -> Tensor:
        """Pictures of the object from len(seeds) sides, (B,3,H,W) in [-1,1]; seeds only count.

        Raises: ValueError for another prompt than the one it was made from: the field holds one object.
        """
        if prompt != self.prompt:
            raise ValueError(f"this field was made from the prompt {self.prompt!r}; another prompt needs a new run")
        return self.views(len(seeds)).images()

    def save(self, folder: Path) -> None:
        """Write field.safetensors: field and background."""
        header = {
            "slug": SLUG, "version": "1", "backbone": self.backbone.name, "prompt": self.prompt,
            "config": json.dumps(asdict(self.config)),
        }  # fmt: skip
        save_field(self.field, self.background, Path(folder) / ARTIFACT, header)

    def load(self, folder: Path) -> None:
        """Read what `save` wrote. Raises: ValueError naming the file if it does not fit."""
        load_field(self.field, self.background, Path(folder) / ARTIFACT, SLUG)


def load_method(
    artifact_path: str | Path, backbone_name: str | None = None, device: torch.device | str = "cpu"
) -> DreamFusion:
    """The method of an artifact, ready to be looked at.

    Args: artifact_path: the folder that `save` wrote, or a file in it.   backbone_name: None = that of training.
    """
    path = Path(artifact_path)
    folder = path.parent if path.is_file() else path
    _, header = read_field(folder / ARTIFACT, SLUG)
    backbone = load_backbone(backbone_name or header["backbone"], device=device)
    method = DreamFusion(backbone, DreamFusionConfig(**json.loads(header["config"])), header["prompt"])
    method.load(folder)
    return method
