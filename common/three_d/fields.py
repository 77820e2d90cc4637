"""Density and albedo as functions of position: voxels and planes for a CPU, nerfstudio's hash grid for a GPU.

All are nerfstudio `Field`s, so they run in its models; our renderer asks them for points directly. Densities are per
unit of length. Normals carry gradients, which nerfstudio's own do not.
"""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from nerfstudio.cameras.rays import RaySamples
from nerfstudio.data.scene_box import SceneBox
from nerfstudio.field_components.encodings import HashEncoding
from nerfstudio.field_components.field_heads import FieldHeadNames
from nerfstudio.fields.base_field import Field
from torch import Tensor, nn

from common.three_d.cameras import CENTER

HALF_SIZE = 0.85  # of the default scene box, for objects of height 1
DENSITY_SCALE = 25.0  # density = DENSITY_SCALE * softplus(raw)
BLOB_RADIUS, BLOB_DENSITY = 0.4, 5.0  # of a new field: raw = BLOB_DENSITY * (1 - |x| / BLOB_RADIUS), as in Magic3D
NORMAL_STEP = 0.02  # of central differences where there is no grid
POINTS_AT_ONCE = 2**17  # where there is no batch to keep within
FieldKind = Literal["voxels", "triplane", "hash"]


def scene_box(center: Sequence[float] = CENTER, half_size: float = HALF_SIZE) -> SceneBox:
    """A cube."""
    middle = torch.tensor(center)
    return SceneBox(torch.stack([middle - half_size, middle + half_size]))


class PointField(Field):
    """What our fields share. Subclasses give `raw_at`; a field is zero outside of its box.

    Args: box: a cube.
    """

    aabb: Tensor

    def __init__(self, box: SceneBox | None = None) -> None:
        super().__init__()
        self.register_buffer("aabb", (box or scene_box()).aabb.clone().float())

    def raw_at(self, points: Tensor) -> Tensor:
        """(N,3) in [-1,1] within the box -> (N,4): density and albedo before activation."""
        raise TypeError(f"{type(self).__name__} has no raw_at")

    def unit(self, points: Tensor) -> Tensor:
        """World points as [-1,1] within the box."""
        low, high = self.aabb
        return (points - low) / (high - low) * 2 - 1

    def density_and_albedo(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """(N,3) -> densities (N,), >= 0, and albedos (N,3) in (0,1)."""
        units = self.unit(points)
        raw, inside = self.raw_at(units), (units.abs() <= 1).all(-1)
        return DENSITY_SCALE * F.softplus(raw[:, 0]) * inside, raw[:, 1:].sigmoid()

    def density_at(self, points: Tensor) -> Tensor:
        """(N,3) -> (N,)."""
        return self.density_and_albedo(points)[0]

    def albedo_at(self, points: Tensor) -> Tensor:
        """(N,3) -> (N,3)."""
        return self.density_and_albedo(points)[1]

    @torch.no_grad()
    def density_grid(self, resolution: int) -> Tensor:
        """Densities at evenly spaced points of the box, its faces included, (R,R,R) for x, y, z."""
        low, high = self.aabb
        axes = [torch.linspace(float(a), float(b), resolution) for a, b in zip(low, high, strict=True)]
        points = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).view(-1, 3).to(low)
        density = torch.cat([self.density_at(part) for part in points.split(POINTS_AT_ONCE)])
        return density.view(resolution, resolution, resolution)

    def normals_at(self, points: Tensor) -> Tensor:
        """Unit vectors out of the object, (N,3), by central differences; they carry gradients to the parameters."""
        low, high = self.aabb
        step = NORMAL_STEP * (high - low)[0] / 2
        offsets = step * torch.eye(3).to(points)
        around = torch.cat([points + offset for offset in (*offsets, *-offsets)])
        ahead, behind = self.raw_at(self.unit(around))[:, 0].unflatten(0, (2, 3, -1))
        return -F.normalize((ahead - behind).T, dim=-1)

    def get_density(self, ray_samples: RaySamples) -> tuple[Tensor, Tensor]:
        """nerfstudio's: densities (*,1), and the albedos as embedding."""
        positions = ray_samples.frustums.get_positions()
        density, albedo = self.density_and_albedo(positions.reshape(-1, 3))
        return density.view(*positions.shape[:-1], 1), albedo.view(positions.shape)

    def get_outputs(self, ray_samples: RaySamples, density_embedding: Tensor | None = None) -> dict:
        """nerfstudio's: the colour under even light."""
        if density_embedding is None:
            density_embedding = self.get_density(ray_samples)[1]
        return {FieldHeadNames.RGB: density_embedding}


def blob(points: Tensor) -> Tensor:
    """Raw density of a new field at points in [-1,1], (N,3) -> (N,)."""
    return BLOB_DENSITY * (1 - points.norm(dim=-1) / BLOB_RADIUS)


class VoxelField(PointField):
    """Density and albedo on a grid, trilinear between its corners; the field for a CPU.

    Args: resolution: corners a side.
    """

    def __init__(self, resolution: int = 48, box: SceneBox | None = None) -> None:
        super().__init__(box)
        axis = torch.linspace(-1, 1, resolution)
        z, y, x = torch.meshgrid(axis, axis, axis, indexing="ij")
        raw = blob(torch.stack([x, y, z], -1).view(-1, 3)).view(1, 1, resolution, resolution, resolution)
        self.grid = nn.Parameter(torch.cat([raw, torch.zeros(1, 3, *raw.shape[2:])], 1))

    def raw_at(self, points: Tensor) -> Tensor:
        return _trilinear(self.grid, points)

    def normals_at(self, points: Tensor) -> Tensor:
        """As above, from the grid's central differences, trilinear between the corners: smooth, and cheap."""
        density = F.pad(self.grid[:, :1], (1, 1, 1, 1, 1, 1), mode="replicate")[0, 0]
        along_z = density[2:, 1:-1, 1:-1] - density[:-2, 1:-1, 1:-1]
        along_y = density[1:-1, 2:, 1:-1] - density[1:-1, :-2, 1:-1]
        along_x = density[1:-1, 1:-1, 2:] - density[1:-1, 1:-1, :-2]
        slopes = torch.stack([along_x, along_y, along_z])[None]
        return -F.normalize(_trilinear(slopes, self.unit(points)), dim=-1)

    @torch.no_grad()
    def upsample(self, resolution: int) -> None:
        """A finer grid of the same values, in place; the parameter is a new one, so make a new optimiser."""
        finer = F.interpolate(self.grid, (resolution,) * 3, mode="trilinear", align_corners=True)
        self.grid = nn.Parameter(finer)


def _trilinear(grid: Tensor, points: Tensor) -> Tensor:
    """(1,C,D,H,W) at points (N,3) in [-1,1], x along W -> (N,C)."""
    found = F.grid_sample(grid, points.view(1, -1, 1, 1, 3), align_corners=True, padding_mode="border")
    return found[0, :, :, 0, 0].T


class TriplaneField(PointField):
    """Features on three planes, added up, and a small network; smoother than voxels, with less memory.

    Args: resolution: corners a side of each plane.   features: of each corner.   width: of the network.
    """

    def __init__(self, resolution: int = 64, features: int = 12, width: int = 32, box: SceneBox | None = None) -> None:
        super().__init__(box)
        self.planes = nn.Parameter(0.1 * torch.randn(3, features, resolution, resolution))
        self.network = nn.Sequential(nn.Linear(features, width), nn.SiLU(), nn.Linear(width, 4))

    def raw_at(self, points: Tensor) -> Tensor:
        pairs = torch.stack([points[:, [0, 1]], points[:, [0, 2]], points[:, [1, 2]]])[:, :, None]
        found = F.grid_sample(self.planes, pairs, align_corners=True, padding_mode="border")[..., 0]
        raw = self.network(found.sum(0).T)
        return torch.cat([raw[:, :1] + blob(points)[:, None], raw[:, 1:]], -1)


class HashField(PointField):
    """nerfstudio's hash grid and a small network, as threestudio's default geometry; for a GPU.

    Args: levels, log2_size, max_resolution: of the hash grid.   width: of the network.
        implementation: "tcnn" on a GPU with tiny-cuda-nn, else "torch".
    """

    def __init__(
        self, levels: int = 16, log2_size: int = 19, max_resolution: int = 2048, width: int = 64,
        implementation: str = "torch", box: SceneBox | None = None,
    ) -> None:  # fmt: skip
        super().__init__(box)
        self.encoding = HashEncoding(
            num_levels=levels, log2_hashmap_size=log2_size, max_res=max_resolution, implementation=implementation
        )
        self.network = nn.Sequential(nn.Linear(2 * levels, width), nn.ReLU(), nn.Linear(width, 4))

    def raw_at(self, points: Tensor) -> Tensor:
        raw = self.network(self.encoding((points + 1) / 2).float())
        return torch.cat([raw[:, :1] + blob(points)[:, None], raw[:, 1:]], -1)


def make_field(kind: FieldKind, resolution: int) -> PointField:
    """A new field: a soft blob in the middle.   resolution: corners a side, finest level of the hash grid."""
    if kind == "voxels":
        return VoxelField(resolution)
    if kind == "triplane":
        return TriplaneField(resolution)
    return HashField(max_resolution=resolution)
