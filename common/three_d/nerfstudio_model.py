"""A field as a nerfstudio `Model`: what its viewer and `ns-render` show. Needs nerfstudio without its trainer.

nerfstudio's world here: z up, the object's front along +x (as threestudio's), the origin in the middle of the field's
box. Rays come from there, and are moved into the field's own world.
"""

from dataclasses import dataclass, field

import torch
from nerfstudio.cameras.cameras import Cameras
from nerfstudio.cameras.rays import RayBundle
from nerfstudio.data.scene_box import SceneBox
from nerfstudio.field_components.field_heads import FieldHeadNames
from nerfstudio.model_components.ray_samplers import UniformSampler
from nerfstudio.model_components.renderers import AccumulationRenderer, DepthRenderer, RGBRenderer
from nerfstudio.model_components.scene_colliders import AABBBoxCollider
from nerfstudio.models.base_model import Model, ModelConfig
from torch import Tensor, nn

from common.three_d.cameras import from_threestudio, orbit_cameras, to_threestudio
from common.three_d.fields import PointField
from common.three_d.views import SIDE_DISTANCE, SIDE_ELEVATION


@dataclass
class FieldModelConfig(ModelConfig):
    """How the viewer renders; training does not look at it."""

    _target: type = field(default_factory=lambda: FieldModel)
    enable_collider: bool = False
    """Near and far planes of nerfstudio's own; rays are cut by the field's box in any case."""
    num_samples: int = 64
    """Of each ray, within the field's box."""


class FieldModel(Model):
    """A field and what is behind it, rendered by nerfstudio's sampler and renderers.

    Its state is that of both, so a nerfstudio checkpoint holds the object. Training goes through the pipeline.

    Args: background: unit directions (R,3) -> colours (R,3).
    """

    def __init__(self, config: FieldModelConfig, *, field: PointField, background: nn.Module) -> None:
        box = SceneBox(field.aabb - field.aabb.mean(0))
        super().__init__(config, scene_box=box, num_train_data=0)
        self.field, self.background = field, background
        self.collider = AABBBoxCollider(box)
        self.sampler = UniformSampler(config.num_samples)
        self.renderer_rgb = RGBRenderer(background_color="white")  # each call has the background's own
        self.renderer_accumulation = AccumulationRenderer()
        self.renderer_depth = DepthRenderer(method="expected")

    def get_outputs(self, ray_bundle: RayBundle) -> dict[str, Tensor]:
        """Colours "rgb" (R,3) and "accumulation" (R,1) in [0,1], and "depth" (R,1), of rays (R,) with near and far."""
        rays = self.to_own_world(ray_bundle)
        samples = self.sampler(rays)
        found = self.field(samples)
        weights = samples.get_weights(found[FieldHeadNames.DENSITY])
        behind = self.background(rays.directions)
        return {
            "rgb": self.renderer_rgb(found[FieldHeadNames.RGB], weights, background_color=behind),
            "accumulation": self.renderer_accumulation(weights),
            "depth": self.renderer_depth(weights, samples),
        }

    def to_own_world(self, rays: RayBundle) -> RayBundle:
        """nerfstudio's rays (R,) in the field's world; lengths stay as they are."""
        columns = from_threestudio(torch.stack([rays.directions, rays.origins], -1))  # as those of a camera's matrix
        return RayBundle(
            origins=columns[..., 1] + self.field.aabb.mean(0), directions=columns[..., 0], pixel_area=rays.pixel_area,
            camera_indices=rays.camera_indices, nears=rays.nears, fars=rays.fars,
        )  # fmt: skip


def nerfstudio_orbit(count: int, resolution: int) -> Cameras:
    """Cameras in nerfstudio's world, evenly spaced around the object, the front first."""
    azimuths = torch.arange(count) * 360 / count
    cameras = orbit_cameras(azimuths, SIDE_ELEVATION, SIDE_DISTANCE, resolution=resolution, target=(0.0, 0.0, 0.0))
    cameras.camera_to_worlds = to_threestudio(cameras.camera_to_worlds)[:, :3]
    return cameras
