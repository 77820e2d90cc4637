"""Backgrounds: a sky by ray direction and a ground by position; calm, low in frequency, each with its own hues."""

from collections.abc import Callable

import torch
from torch import Tensor

from common.toyworld.vocabulary import BACKGROUNDS


def _mix(first, second, weight: Tensor) -> Tensor:
    """Blend two colours (tuples or (..., 3)) by weight (...) in [0, 1]."""
    a = torch.as_tensor(first, dtype=weight.dtype, device=weight.device)
    b = torch.as_tensor(second, dtype=weight.dtype, device=weight.device)
    return a + (b - a) * weight.clamp(0, 1)[..., None]


def _step(x: Tensor, edge: Tensor | float, soft: float) -> Tensor:
    return ((x - edge) / soft + 0.5).clamp(0, 1)


def _hills(azimuth: Tensor, seed: Tensor, height: float) -> Tensor:
    """A smooth skyline: sine of elevation at each azimuth."""
    phase = seed * 6.283
    return height * (1 + 0.5 * torch.sin(2 * azimuth + phase) + 0.35 * torch.sin(5 * azimuth + 2.3 * phase))


def _patches(x: Tensor, z: Tensor, seed: Tensor, frequency: float) -> Tensor:
    phase = seed * 6.283
    waves = torch.sin(frequency * x + phase) * torch.cos(frequency * 1.3 * z + 2 * phase) + torch.sin(
        frequency * 0.6 * (x - z) - phase
    )
    return 0.5 + 0.25 * waves * _fade(x, z)


def _fade(x: Tensor, z: Tensor) -> Tensor:
    """Contrast of ground texture: 1 near the subject, 0 far away, where it would alias."""
    return torch.exp(-(x * x + z * z) / 14.0)


# each: (sine of elevation, azimuth, ground x, ground z, ground distance, seed) -> sky (..., 3), ground (..., 3)
def _meadow(up, az, x, z, far, seed):
    sky = _mix((0.78, 0.90, 1.0), (0.36, 0.62, 0.95), up * 2.0)
    sky = _mix(sky, (0.36, 0.62, 0.30), _step(_hills(az, seed, 0.05), up, 0.02))
    return sky, _mix((0.30, 0.60, 0.20), (0.48, 0.74, 0.28), _patches(x, z, seed, 2.2))


def _snow(up, az, x, z, far, seed):
    sky = _mix((0.86, 0.90, 0.95), (0.66, 0.76, 0.88), up * 2.0)
    sky = _mix(sky, (0.76, 0.83, 0.92), _step(_hills(az, seed, 0.09), up, 0.02))
    return sky, _mix((0.88, 0.92, 0.98), (0.99, 0.99, 1.0), _patches(x, z, seed, 1.6))


def _beach(up, az, x, z, far, seed):
    sky = _mix((0.75, 0.92, 0.98), (0.30, 0.68, 0.95), up * 2.0)
    sand = _mix((0.90, 0.80, 0.56), (0.97, 0.90, 0.70), _patches(x, z, seed, 1.8))
    shore = _mix(sand, (0.98, 0.99, 1.0), _step(far, 5.6, 0.8))
    return sky, _mix(shore, (0.12, 0.56, 0.74), _step(far, 6.4, 0.8))


def _city(up, az, x, z, far, seed):
    sky = _mix((0.82, 0.83, 0.86), (0.62, 0.70, 0.80), up * 2.0)
    block = torch.floor(az * 3.2 + seed * 40)
    height = 0.16 + 0.16 * (torch.sin(block * 12.9898 + 4.1) * 0.5 + 0.5)
    tower = _mix((0.36, 0.38, 0.46), (0.52, 0.50, 0.54), torch.sin(block * 7.3) * 0.5 + 0.5)
    sky = _mix(sky, tower, _step(height, up, 0.012))
    line = _step(0.10, (x + 0.9 * torch.sin(seed * 6.283)).abs(), 0.05)
    return sky, _mix((0.40, 0.41, 0.43), (0.93, 0.91, 0.80), line * 0.85)


def _room(up, az, x, z, far, seed):
    wall = _mix((0.93, 0.85, 0.70), (0.96, 0.90, 0.78), up * 2.0)
    wall = _mix(wall, (0.99, 0.98, 0.95), _step(0.045, up, 0.02))
    planks = 0.5 + 0.5 * torch.sin(7.0 * x + seed * 6.283) * _fade(x, 0.4 * z)
    return wall, _mix((0.52, 0.33, 0.18), (0.66, 0.44, 0.25), _step(planks, 0.35, 0.5))


def _night(up, az, x, z, far, seed):
    sky = _mix((0.16, 0.17, 0.36), (0.04, 0.05, 0.16), up * 2.5)
    moon = (((az - 2.2 * (seed - 0.5)) ** 2) + (up - 0.30) ** 2).sqrt()
    sky = _mix(sky, (0.97, 0.95, 0.80), _step(0.075, moon, 0.03))
    return sky, _mix((0.06, 0.09, 0.16), (0.12, 0.15, 0.25), _patches(x, z, seed, 1.5))


def _lake(up, az, x, z, far, seed):
    sky = _mix((0.90, 0.93, 0.90), (0.62, 0.83, 0.93), up * 2.0)
    sky = _mix(sky, (0.42, 0.50, 0.62), _step(_hills(az, seed, 0.13), up, 0.02))
    waves = 0.5 + 0.5 * torch.sin(4.5 * z + 1.2 * torch.sin(1.7 * x + seed * 6.283) + seed * 20) * _fade(x, z)
    return sky, _mix((0.10, 0.36, 0.66), (0.26, 0.54, 0.82), waves)


def _forest(up, az, x, z, far, seed):
    sky = _mix((0.30, 0.42, 0.24), (0.14, 0.30, 0.16), up * 2.0)
    trunk = 0.5 + 0.5 * torch.sin(11.0 * az + seed * 6.283 + torch.sin(3 * az))
    sky = _mix(sky, (0.26, 0.17, 0.10), _step(trunk, 0.78, 0.15) * _step(0.55, up, 0.3))
    return sky, _mix((0.20, 0.26, 0.11), (0.34, 0.30, 0.14), _patches(x, z, seed, 2.6))


def _desert(up, az, x, z, far, seed):
    sky = _mix((0.99, 0.84, 0.62), (0.95, 0.66, 0.42), up * 2.0)
    sky = _mix(sky, (0.74, 0.36, 0.18), _step(_hills(az, seed, 0.07), up, 0.015))
    return sky, _mix((0.82, 0.48, 0.22), (0.92, 0.62, 0.32), _patches(x, z, seed, 1.4))


def _stage(up, az, x, z, far, seed):
    folds = 0.5 + 0.5 * torch.sin(9.0 * az + seed * 6.283)
    curtain = _mix((0.38, 0.03, 0.08), (0.66, 0.08, 0.13), folds)
    spot = _step(1.5, (x * x + z * z).sqrt(), 1.2)
    return curtain, _mix((0.24, 0.10, 0.12), (0.62, 0.46, 0.42), spot)


_PAINTERS: dict[str, Callable] = {
    "meadow": _meadow, "snow": _snow, "beach": _beach, "city": _city, "room": _room, "night": _night, "lake": _lake,
    "forest": _forest, "desert": _desert, "stage": _stage,
}  # fmt: skip
assert tuple(_PAINTERS) == BACKGROUNDS


def paint(names: list[str], origins: Tensor, directions: Tensor, seeds: Tensor) -> tuple[Tensor, Tensor]:
    """Colours behind everything.

    Args:
        names: background of each picture, B of them. origins: camera positions, (B, 3).
        directions: unit rays, (B, R, 3). seeds: stretch of scenery, (B,), in [0, 1).
    Returns: colours (B, R, 3) in [0, 1], and the ray parameter of the ground (B, R), 1e9 above the horizon.
    """
    colors = torch.empty_like(directions)
    up = directions[..., 1]
    depth = torch.where(up < -1e-4, -origins[:, None, 1] / up.clamp(max=-1e-4), torch.full_like(up, 1e9))
    point = origins[:, None] + depth.clamp(max=60.0)[..., None] * directions
    azimuth = torch.atan2(directions[..., 0], -directions[..., 2])
    horizon = _step(up, 0.0, 0.012)[..., None]
    for name in dict.fromkeys(names):
        rows = torch.tensor([i for i, n in enumerate(names) if n == name], device=directions.device)
        p, seed = point[rows], seeds[rows, None]
        sky, ground = _PAINTERS[name](up[rows], azimuth[rows], p[..., 0], p[..., 2], p[..., [0, 2]].norm(dim=-1), seed)
        colors[rows] = ground + (sky - ground) * horizon[rows]
    return colors.clamp(0, 1), depth
