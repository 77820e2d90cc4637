"""Cameras: the one place that knows whose axes point where.

World of this repository (and of the toy world): y up, an object's front looks along +z, units of an object's height.
Camera: OpenGL, as nerfstudio's: x right, y up, looks along -z; pixel centres at (column + 0.5, row + 0.5).
Azimuth 0 sees the front, 90 stands on the +x side; elevation 90 looks down from above. threestudio's world is z up with
the front along +x and the same azimuths; `to_threestudio` and `from_threestudio` change over.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from nerfstudio.cameras.cameras import Cameras
from torch import Tensor

from common.toyworld.scene import Camera

UP = (0.0, 1.0, 0.0)
CENTER = (0.0, 0.5, 0.0)  # of an object that stands on the ground
_TO_THREESTUDIO = torch.tensor([[0.0, 0.0, 1.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])  # (x, y, z) -> (z, x, y)


def look_at(positions: Tensor, targets: Tensor, ups: Tensor) -> Tensor:
    """Camera-to-world matrices (N,3,4), columns right, up, back and position.   All arguments: (N,3)."""
    back = F.normalize(positions - targets, dim=-1)
    right = F.normalize(torch.linalg.cross(ups, back), dim=-1)
    return torch.stack([right, torch.linalg.cross(back, right), back, positions], -1)


def directions_to_camera(azimuths_deg: Tensor, elevations_deg: Tensor) -> Tensor:
    """Unit vectors from the target towards the camera, (N,3)."""
    azimuths, elevations = azimuths_deg.deg2rad(), elevations_deg.deg2rad()
    flat = elevations.cos()
    return torch.stack([azimuths.sin() * flat, elevations.sin(), azimuths.cos() * flat], -1)


def make_cameras(camera_to_worlds: Tensor, fovs_deg: Tensor, resolution: int) -> Cameras:
    """Square pinhole cameras.   camera_to_worlds: (N,3,4).   fovs_deg: (N,), of height and width."""
    focal = resolution / 2 / (fovs_deg.deg2rad() / 2).tan()
    middle = resolution / 2
    return Cameras(camera_to_worlds, focal[:, None], focal[:, None], middle, middle, resolution, resolution)


def orbit_cameras(
    azimuths_deg: Tensor | Sequence[float], elevations_deg: Tensor | Sequence[float] | float,
    distances: Tensor | Sequence[float] | float, fovs_deg: Tensor | Sequence[float] | float = 36.0, *,
    resolution: int = 64, target: Sequence[float] | Tensor = CENTER,
) -> Cameras:  # fmt: skip
    """Cameras around a target, upright.

    Args:
        azimuths_deg: N values; the others may be one number for all.   distances: to the target, > 0.
        elevations_deg: in (-90, 90).   fovs_deg: of the whole picture.
        resolution: pixels a side.   target: (3,) or (N,3).
    """
    azimuths = torch.as_tensor(azimuths_deg, dtype=torch.float32)
    elevations, distances, fovs = (
        torch.as_tensor(values, dtype=torch.float32).expand(len(azimuths))
        for values in (elevations_deg, distances, fovs_deg)
    )
    targets = torch.as_tensor(target, dtype=torch.float32).expand(len(azimuths), 3)
    positions = targets + distances[:, None] * directions_to_camera(azimuths, elevations)
    ups = torch.tensor(UP).expand(len(azimuths), 3)
    return make_cameras(look_at(positions, targets, ups), fovs, resolution)


def angles_of(cameras: Cameras, target: Sequence[float] | Tensor = CENTER) -> tuple[Tensor, Tensor, Tensor]:
    """Azimuths in [0, 360) and elevations, degrees, and distances of the cameras' positions, (N,) each."""
    away = cameras.camera_to_worlds[..., 3] - torch.as_tensor(target, dtype=torch.float32)
    distances = away.norm(dim=-1)
    azimuths = torch.atan2(away[..., 0], away[..., 2]).rad2deg() % 360
    return azimuths, (away[..., 1] / distances).clamp(-1, 1).asin().rad2deg(), distances


def from_toyworld(cameras: Sequence[Camera], resolution: int = 64) -> Cameras:
    """The toy world's cameras, each with its own target."""
    columns = ("azimuth_deg", "elevation_deg", "distance", "fov_deg")
    angles = torch.tensor([[getattr(camera, name) for name in columns] for camera in cameras]).T
    targets = torch.tensor([tuple(map(float, camera.target)) for camera in cameras])
    return orbit_cameras(*angles, resolution=resolution, target=targets)


def to_toyworld(cameras: Cameras, target: Sequence[float] = CENTER) -> list[Camera]:
    """Upright cameras that look at the target, for the toy world's renderer."""
    fovs = (cameras.height.flatten() / 2 / cameras.fy.flatten()).atan().rad2deg() * 2
    values = zip(*(part.tolist() for part in (*angles_of(cameras, target), fovs)), strict=True)
    return [Camera(tuple(target), *of) for of in values]


def to_threestudio(camera_to_worlds: Tensor) -> Tensor:
    """threestudio's c2w of ours: (N,3,4) -> (N,4,4)."""
    moved = _TO_THREESTUDIO.to(camera_to_worlds) @ camera_to_worlds
    last = torch.tensor([0.0, 0.0, 0.0, 1.0]).to(moved).expand(len(moved), 1, 4)
    return torch.cat([moved, last], 1)


def from_threestudio(c2w: Tensor) -> Tensor:
    """Ours of threestudio's c2w: (N,4,4) -> (N,3,4)."""
    return _TO_THREESTUDIO.to(c2w).T @ c2w[:, :3]


@dataclass(frozen=True)
class CameraRange:
    """What random cameras are drawn from; DreamFusion's distribution (App. A.2), in units of an object's height.

    Half of the elevations are uniform in angle, half uniform in area. The noises are DreamFusion's, made smaller: its
    sphere has radius 1.4, ours holds an object of height 1.
    """

    elevation_deg: tuple[float, float] = (-10.0, 60.0)
    distance: tuple[float, float] = (2.6, 3.2)
    fov_deg: tuple[float, float] = (32.0, 40.0)
    jitter: float = 0.05  # of the position, uniform in each coordinate
    target_std: float = 0.03
    up_std: float = 0.02


def random_cameras(
    count: int, ranges: CameraRange, generator: torch.Generator, *, resolution: int = 64,
    target: Sequence[float] = CENTER,
) -> Cameras:  # fmt: skip
    """Cameras all around."""

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, generator=generator)

    def normal(std: float) -> Tensor:
        return std * torch.randn(count, 3, generator=generator)

    azimuths = uniform(0.0, 360.0)
    low, high = ranges.elevation_deg
    by_angle = uniform(low, high)
    sines = torch.tensor([low, high]).deg2rad().sin().tolist()
    by_area = uniform(*sines).asin().rad2deg()
    elevations = torch.where(uniform(0, 1) < 0.5, by_angle, by_area)
    away = uniform(*ranges.distance)[:, None] * directions_to_camera(azimuths, elevations)
    jitter = ranges.jitter * (2 * torch.rand(count, 3, generator=generator) - 1)
    targets = torch.as_tensor(target) + normal(ranges.target_std)
    positions = torch.as_tensor(target) + away + jitter
    ups = torch.tensor(UP) + normal(ranges.up_std)
    return make_cameras(look_at(positions, targets, ups), uniform(*ranges.fov_deg), resolution)
