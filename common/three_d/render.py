"""Volume rendering with gradients: nerfstudio's rays, samples and weights; empty points are not asked for."""

import warnings
from dataclasses import dataclass

import torch
from nerfstudio.cameras.cameras import Cameras
from nerfstudio.cameras.rays import RayBundle, RaySamples
from nerfstudio.model_components.ray_samplers import UniformSampler
from nerfstudio.utils.math import intersect_aabb
from torch import Tensor, nn

from common.three_d.fields import PointField
from common.three_d.occupancy import Occupancy
from common.three_d.shading import Light, shade

NEAR = 0.05  # of the camera, where the box begins behind it


@dataclass(frozen=True)
class Rendering:
    """B pictures."""

    rgb: Tensor  # (B,H,W,3) in [0,1]
    opacity: Tensor  # (B,H,W,1) in [0,1]
    depth: Tensor  # (B,H,W,1) expected distance along the ray of what is seen; 0 where nothing is
    normals: Tensor | None  # (B,H,W,3) weighted mean, world axes, length <= 1; None if they were not asked for
    orientation: Tensor | None  # (B,H,W) sum_i w_i max(0, n_i . v)^2, weights without gradient; likewise
    weights: Tensor  # (B H W, S, 1)
    samples: RaySamples  # (B H W, S)

    def images(self) -> Tensor:
        """(B,3,H,W) in [-1,1]."""
        return self.rgb.permute(0, 3, 1, 2) * 2 - 1


def camera_rays(cameras: Cameras) -> RayBundle:
    """One ray for each pixel of all cameras, (B H W), row by row."""
    with warnings.catch_warnings():  # nerfstudio 1.1.5 indexes as torch 2.9 and later warn about
        warnings.filterwarnings("ignore", "Using a non-tuple sequence", UserWarning)
        bundles = [cameras.generate_rays(index, keep_shape=True).flatten() for index in range(len(cameras))]
    joined = {
        name: torch.cat([getattr(bundle, name) for bundle in bundles])
        for name in ("origins", "directions", "pixel_area", "camera_indices")
    }
    return RayBundle(**joined)


def sample_rays(rays: RayBundle, aabb: Tensor, num_samples: int, generator: torch.Generator | None) -> RaySamples:
    """Equal steps through the box, jittered if there is a generator. Rays that miss the box have steps of length 0."""
    nears, fars = intersect_aabb(rays.origins, rays.directions, aabb.flatten())
    hit = fars > nears
    rays.nears = torch.where(hit, nears, 0.0).clamp(min=NEAR)[:, None]
    rays.fars = torch.where(hit, fars, 0.0).clamp(min=NEAR)[:, None]
    if generator is None:
        return UniformSampler(num_samples, train_stratified=False)(rays)
    with torch.random.fork_rng(devices=[]):  # the sampler draws from torch's own generator
        torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
        return UniformSampler(num_samples, train_stratified=True, single_jitter=True)(rays)


def render(
    field: PointField, cameras: Cameras, *, background: nn.Module, num_samples: int = 48,
    light: Light | None = None, with_normals: bool = False, occupancy: Occupancy | None = None,
    generator: torch.Generator | None = None,
) -> Rendering:  # fmt: skip
    """Render square pictures.

    Args:
        cameras: B, of one size.   background: unit directions (R,3) -> colours (R,3).
        num_samples: S, of each ray between the faces of the field's box.
        light: None = the colours as they are.   with_normals: also when no light needs them.
        occupancy: leaves out what it knows to be empty.   generator: jitters the samples.
    """
    rays = camera_rays(cameras)
    samples = sample_rays(rays, field.aabb, num_samples, generator)
    points = samples.frustums.get_positions()
    needs_normals = with_normals or (light is not None and light.mode != "albedo")
    asked = _worth_asking(field, points, samples.deltas, occupancy)
    density, values = _evaluate(field, points, rays.directions, asked, light, needs_normals)
    weights = samples.get_weights(density)
    composed = (weights * values).sum(1)  # (R, 3 + 1 or 7)
    opacity = weights.sum(1)
    rgb = composed[:, :3] + (1 - opacity) * background(rays.directions)
    distances = (samples.frustums.starts + samples.frustums.ends) / 2
    depth = (weights * distances).sum(1) / opacity.clamp(min=1e-6)

    size = (len(cameras), int(cameras.height[0]), int(cameras.width[0]))
    orientation = None
    if needs_normals:
        orientation = (weights.detach() * values[..., 6:]).sum((1, 2)).view(size)
    return Rendering(
        rgb=rgb.view(*size, 3),
        opacity=opacity.view(*size, 1),
        depth=depth.view(*size, 1),
        normals=composed[:, 3:6].view(*size, 3) if needs_normals else None,
        orientation=orientation,
        weights=weights,
        samples=samples,
    )


def _worth_asking(field: PointField, points: Tensor, deltas: Tensor, occupancy: Occupancy | None) -> Tensor:
    """Indices of the samples, of all R S, that can be seen."""
    seen = deltas.flatten() > 0
    if occupancy is not None:
        seen &= occupancy(field.unit(points.reshape(-1, 3)))
    return seen.nonzero()[:, 0]


def _evaluate(
    field: PointField, points: Tensor, directions: Tensor, asked: Tensor, light: Light | None, with_normals: bool
) -> tuple[Tensor, Tensor]:
    """Densities (R,S,1), and (R,S,3) colours or (R,S,7) colours, normals and max(0, n . v)^2; 0 where not asked."""
    rays, count = points.shape[:2]
    chosen = points.reshape(-1, 3)[asked]
    ray = asked // count
    density, colors = field.density_and_albedo(chosen)
    parts = [colors]
    if with_normals:
        normals = field.normals_at(chosen)
        if light is not None:
            of_ray = light.positions.repeat_interleave(rays // len(light.positions), 0)[ray]
            parts = [shade(colors, normals, chosen, of_ray, light.mode, light.ambient)]
        backwards = (normals * directions[ray]).sum(-1, keepdim=True).clamp(min=0).square()
        parts += [normals, backwards]
    values = torch.cat(parts, -1)
    all_density = density.new_zeros(rays * count).index_put((asked,), density)
    all_values = values.new_zeros(rays * count, values.shape[-1]).index_put((asked,), values)
    return all_density.view(rays, count, 1), all_values.view(rays, count, -1)
