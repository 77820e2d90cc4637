"""Renderings that score distillation looks at: random cameras and lights (DreamFusion, arXiv 2209.14988, Sec. 3.2)."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from common.three_d.cameras import CENTER, CameraRange, angles_of, random_cameras
from common.three_d.fields import PointField
from common.three_d.occupancy import Occupancy
from common.three_d.render import Rendering, render
from common.three_d.shading import Light, ShadingMode, sample_light_positions


def random_views(
    field: PointField, background: nn.Module, count: int, ranges: CameraRange,
    shading: Callable[[torch.Generator], ShadingMode], generator: torch.Generator, *, resolution: int = 64,
    num_samples: int = 48, occupancy: Occupancy | None = None,
) -> tuple[Rendering, Tensor, Tensor]:  # fmt: skip
    """Renderings with normals; all of a call have one kind of light.

    Args: shading: draws the kind of light.   generator: of cameras, shading, lights and jitter, in this order.
    Returns: the renderings; azimuths and elevations of their cameras in degrees, (B,) each.
    """
    cameras = random_cameras(count, ranges, generator, resolution=resolution)
    azimuths, elevations, _ = angles_of(cameras)
    mode = shading(generator)
    cameras = cameras.to(field.aabb.device)
    target = torch.tensor(CENTER, device=field.aabb.device)
    lights = sample_light_positions(cameras.camera_to_worlds[..., 3], target, generator)
    rendering = render(
        field, cameras, background=background, num_samples=num_samples, light=Light(lights, mode), with_normals=True,
        occupancy=occupancy, generator=generator,
    )  # fmt: skip
    return rendering, azimuths, elevations
