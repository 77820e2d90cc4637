"""From a field to a triangle mesh with vertex colours, and to GLB, OBJ or PLY files."""

from pathlib import Path

import torch
import trimesh
from skimage.measure import marching_cubes

from common.io import atomic_write_bytes
from common.three_d.fields import POINTS_AT_ONCE, PointField

SUFFIXES = (".glb", ".obj", ".ply")
THRESHOLD = 10.0  # density of the surface, per unit of length


@torch.no_grad()
def extract_mesh(field: PointField, *, resolution: int = 96, threshold: float = THRESHOLD) -> trimesh.Trimesh:
    """Marching cubes at a density, coloured with the albedo; world axes.

    Args: resolution: corners a side of the field's box.   threshold: of the surface.
    Raises: ValueError if the density nowhere, or everywhere, reaches the threshold.
    """
    density, (low, high) = field.density_grid(resolution), field.aabb
    steps = (high - low) / (resolution - 1)
    lowest, highest = density.min().item(), density.max().item()
    if not lowest < threshold < highest:
        raise ValueError(f"there is no surface at density {threshold:g}: the field has {lowest:.3g} to {highest:.3g}")
    vertices, faces, _, _ = marching_cubes(density.cpu().numpy(), threshold, spacing=steps.tolist())
    corners = torch.from_numpy(vertices.copy()).to(low) + low
    colors = (torch.cat([field.albedo_at(part) for part in corners.split(POINTS_AT_ONCE)]) * 255).round().byte()
    # marching_cubes takes high values as outside
    return trimesh.Trimesh(
        corners.cpu().numpy(), faces[:, ::-1], vertex_colors=colors.cpu().numpy(), process=False, validate=False
    )


def save_mesh(mesh: trimesh.Trimesh, path: str | Path) -> None:
    """Write .glb, .obj or .ply, whole or not at all. Raises: ValueError for another suffix."""
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path}: meshes are written as {', '.join(SUFFIXES)}")
    data = mesh.export(file_type=path.suffix[1:])
    atomic_write_bytes(path, data.encode() if isinstance(data, str) else data)
