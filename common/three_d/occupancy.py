"""Which cells of the scene's box hold anything: points in the others are not asked for."""

import torch
import torch.nn.functional as F
from torch import Tensor

from common.three_d.fields import PointField


class Occupancy:
    """A grid of flags over a field's box; all set until the first update.

    Args: resolution: cells a side.   threshold: a density; a cell counts if it or a neighbour has more.
    """

    def __init__(self, field: PointField, *, resolution: int = 32, threshold: float = 0.5) -> None:
        self.threshold = threshold
        self.cells = torch.ones((resolution,) * 3, dtype=torch.bool, device=field.aabb.device)

    @torch.no_grad()
    def update(self, field: PointField) -> None:
        """Look at the field again, at the middle and the corners of each cell; neighbours of what is full stay open."""
        density = field.density_grid(2 * len(self.cells) + 1)
        cells = F.max_pool3d(density[None, None], 3, stride=2)
        self.cells = F.max_pool3d(cells, 3, stride=1, padding=1)[0, 0] > self.threshold

    def __call__(self, unit_points: Tensor) -> Tensor:
        """Points in [-1,1], (N,3) -> flags (N,); outside of the box nothing is."""
        side = len(self.cells)
        x, y, z = ((unit_points + 1) / 2 * side).long().clamp(0, side - 1).unbind(-1)
        return self.cells[x, y, z] & (unit_points.abs() <= 1).all(-1)
