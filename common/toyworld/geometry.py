"""Primitives of the toy world and their closed-form ray intersections, batched over (ray, primitive) pairs.

Every primitive lives in a local frame: an oriented centre, and half sizes along its axes.
    ELLIPSOID  semi-axes ``size``
    BOX        half edges ``size``
    FRUSTUM    y in [-size_y, size_y]; radii size_x, size_z at the bottom, times ``taper`` at the top
               (1 = cylinder, 0 = cone)
    CAPSULE    segment of half length size_y along y, radius size_x
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

ELLIPSOID, BOX, FRUSTUM, CAPSULE = range(4)
FAR = 1e9


@dataclass(frozen=True)
class Part:
    """One primitive of an entity, in entity coordinates: y up, standing on y = 0, facing +z, about one unit high."""

    kind: int
    center: tuple[float, float, float] | np.ndarray
    size: tuple[float, float, float] | np.ndarray
    slot: str = "main"  # colour slot: main, second, accent, or a fixed one
    name: str = "body"  # for the part segmentation
    rotation: np.ndarray | None = None  # (3, 3) entity-from-local, None = identity
    taper: float = 1.0
    patterned: bool = False

    def moved(self, offset=(0.0, 0.0, 0.0), scale: float = 1.0, rotation: np.ndarray | None = None) -> "Part":
        """Scale, then rotate about the origin, then shift."""
        turn = np.eye(3) if rotation is None else rotation
        own = np.eye(3) if self.rotation is None else self.rotation
        center = turn @ (np.asarray(self.center) * scale) + np.asarray(offset)
        return replace(self, center=center, size=np.asarray(self.size) * scale, rotation=turn @ own)


def rotation_matrix(x_deg: float = 0.0, y_deg: float = 0.0, z_deg: float = 0.0) -> np.ndarray:
    """Rotation about x, then z, then y (degrees), (3, 3); right-handed."""
    x, y, z = np.radians([x_deg, y_deg, z_deg])
    rx = np.array([[1, 0, 0], [0, np.cos(x), -np.sin(x)], [0, np.sin(x), np.cos(x)]])
    ry = np.array([[np.cos(y), 0, np.sin(y)], [0, 1, 0], [-np.sin(y), 0, np.cos(y)]])
    rz = np.array([[np.cos(z), -np.sin(z), 0], [np.sin(z), np.cos(z), 0], [0, 0, 1]])
    return ry @ rz @ rx


def rod(start, end, radius: float, slot: str, name: str, patterned: bool = False) -> Part:
    """A capsule from ``start`` to ``end`` (entity coordinates)."""
    start, end = np.asarray(start, float), np.asarray(end, float)
    axis = end - start
    length = float(np.linalg.norm(axis))
    y = axis / length if length > 1e-9 else np.array([0.0, 1.0, 0.0])
    helper = np.array([0.0, 0.0, 1.0]) if abs(y[2]) < 0.9 else np.array([1.0, 0.0, 0.0])
    x = np.cross(y, helper)
    x /= np.linalg.norm(x)
    frame = np.stack([x, y, np.cross(x, y)], axis=1)
    return Part(CAPSULE, (start + end) / 2, (radius, length / 2, radius), slot, name, frame, 1.0, patterned)


def half_extent(part: Part) -> np.ndarray:
    """Half edges of the part's bounding box in its local frame, (3,)."""
    size = np.asarray(part.size, float)
    if part.kind == CAPSULE:
        return np.array([size[0], size[1] + size[0], size[0]])
    if part.kind == FRUSTUM:
        wide = max(1.0, part.taper)
        return size * np.array([wide, 1.0, wide])
    return size


def bounds(parts: list[Part]) -> tuple[np.ndarray, np.ndarray]:
    """Lowest and highest corner of the axis-aligned box around all parts (tight for ellipsoids), two (3,)."""
    low, high = np.full(3, np.inf), np.full(3, -np.inf)
    for part in parts:
        turn = np.eye(3) if part.rotation is None else part.rotation
        half = half_extent(part)
        reach = np.sqrt((turn**2) @ half**2) if part.kind == ELLIPSOID else np.abs(turn) @ half
        if part.kind == CAPSULE:
            reach = np.abs(turn[:, 1]) * part.size[1] + part.size[0]
        low, high = np.minimum(low, part.center - reach), np.maximum(high, part.center + reach)
    return low, high


def intersect(kind: int, origin: Tensor, direction: Tensor, size: Tensor, taper: Tensor) -> tuple[Tensor, Tensor]:
    """Nearest hit of M (ray, primitive) pairs of one kind.

    Args:
        origin, direction: rays in the primitive's local frame, (M, 3); the direction need not be unit length.
        size: half sizes, (M, 3). taper: (M,), frustums only.
    Returns: ray parameter t (M,), FAR where the ray misses, and the outward normal in the local frame, unit, (M, 3).
    """
    if kind == CAPSULE:
        t, normal = _capsule(origin, direction, size)
    else:
        unit_hit = {ELLIPSOID: _unit_sphere, BOX: _unit_box}.get(kind)
        o, d = origin / size, direction / size
        t, normal = unit_hit(o, d) if unit_hit else _unit_frustum(o, d, taper)
        normal = normal / size
    return t, torch.nn.functional.normalize(normal, dim=-1)


def _first_root(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Smaller root of a t^2 + 2 b t + c = 0 for a > 0; FAR without a real root in front."""
    disc = b * b - a * c
    t = (-b - disc.clamp(min=0).sqrt()) / a.clamp(min=1e-12)
    return torch.where((disc > 0) & (t > 0), t, FAR)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1)


def _unit_sphere(o: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    t = _first_root(_dot(d, d), _dot(o, d), _dot(o, o) - 1)
    return t, o + t.clamp(max=1e4)[:, None] * d


def _unit_box(o: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    safe = torch.where(d.abs() < 1e-9, torch.full_like(d, 1e-9), d)
    t1, t2 = (-1 - o) / safe, (1 - o) / safe
    near, axis = torch.minimum(t1, t2).max(-1)
    far = torch.maximum(t1, t2).amin(-1)
    normal = torch.zeros_like(d).scatter_(1, axis[:, None], -safe.gather(1, axis[:, None]).sign())
    return torch.where((near < far) & (near > 0), near, FAR), normal


def _unit_frustum(o: Tensor, d: Tensor, taper: Tensor) -> tuple[Tensor, Tensor]:
    m, k = (1 + taper) / 2, (taper - 1) / 2  # radius at height y: m + k y
    (ox, oy, oz), (dx, dy, dz) = o.unbind(-1), d.unbind(-1)
    a = dx * dx + dz * dz - (k * dy) ** 2
    b = ox * dx + oz * dz - k * dy * (m + k * oy)
    c = ox * ox + oz * oz - (m + k * oy) ** 2
    disc = b * b - a * c
    root = disc.clamp(min=0).sqrt()
    safe_a = torch.where(a.abs() < 1e-9, torch.full_like(a, 1e-9), a)
    best = torch.full_like(a, FAR)
    for sign in (-1, 1):
        t = (-b + sign * root) / safe_a
        y = oy + t * dy
        ok = (disc > 0) & (t > 0) & (y.abs() <= 1) & (m + k * y >= 0)
        best = torch.where(ok & (t < best), t, best)
    hit_y = oy + best.clamp(max=1e4) * dy
    point = o + best.clamp(max=1e4)[:, None] * d
    normal = torch.stack([point[:, 0], -k * (m + k * hit_y), point[:, 2]], -1)
    safe_dy = torch.where(dy.abs() < 1e-9, torch.full_like(dy, 1e-9), dy)
    for side, radius in ((-1.0, torch.ones_like(taper)), (1.0, taper)):
        t = (side - oy) / safe_dy
        inside = (ox + t * dx) ** 2 + (oz + t * dz) ** 2 <= radius**2
        ok = inside & (t > 0) & (t < best)
        best = torch.where(ok, t, best)
        cap = torch.tensor([0.0, side, 0.0], device=o.device, dtype=o.dtype)
        normal = torch.where(ok[:, None], cap, normal)
    return best, normal


def _capsule(o: Tensor, d: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
    radius, half = size[:, 0], size[:, 1]
    (ox, oy, oz), (dx, dy, dz) = o.unbind(-1), d.unbind(-1)
    t = _first_root(dx * dx + dz * dz, ox * dx + oz * dz, ox * ox + oz * oz - radius**2)
    best = torch.where((oy + t.clamp(max=1e4) * dy).abs() <= half, t, FAR)
    for side in (-1, 1):
        ball = torch.stack([ox, oy - side * half, oz], -1)
        t = _first_root(_dot(d, d), _dot(ball, d), _dot(ball, ball) - radius**2)
        best = torch.minimum(best, t)
    point = o + best.clamp(max=1e4)[:, None] * d
    on_axis = point[:, 1].clamp(-half, half)
    return best, torch.stack([point[:, 0], point[:, 1] - on_axis, point[:, 2]], -1)
