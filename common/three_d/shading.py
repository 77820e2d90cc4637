"""DreamFusion's light (Poole et al., arXiv 2209.14988, Sec. 3.1): a point light and ambient light, diffuse surfaces."""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

ShadingMode = Literal["albedo", "lit", "textureless"]


@dataclass(frozen=True)
class Light:
    """A point light for each camera, and how surfaces answer."""

    positions: Tensor  # (B,3)
    mode: ShadingMode
    ambient: float = 0.1  # l_a; the point light has 1 - l_a


def shade(albedo: Tensor, normals: Tensor, points: Tensor, light_positions: Tensor, mode: ShadingMode,
          ambient: float = 0.1) -> Tensor:  # fmt: skip
    """c = rho (l_rho max(0, n . (l - mu) / |l - mu|) + l_a), with l_rho = 1 - l_a.

    Args: all (N,3), normals of length 1.   mode: "albedo" has l_a = 1; "textureless" has rho = 1.
    Returns: colours (N,3).
    """
    if mode == "albedo":
        return albedo
    facing = (normals * F.normalize(light_positions - points, dim=-1)).sum(-1, keepdim=True)
    brightness = (1 - ambient) * facing.clamp(min=0) + ambient
    return brightness.expand_as(albedo) if mode == "textureless" else albedo * brightness


def sample_light_positions(
    camera_positions: Tensor, target: Tensor, generator: torch.Generator, *, distance: tuple[float, float] = (0.8, 1.5)
) -> Tensor:
    """Directions from N(camera position, 1), at a distance from the target in `distance`, (B,3)."""
    noise = torch.randn(camera_positions.shape, generator=generator).to(camera_positions)
    towards = F.normalize(camera_positions - target + noise, dim=-1)
    low, high = distance
    lengths = low + (high - low) * torch.rand(len(towards), 1, generator=generator).to(towards)
    return target + lengths * towards


def sample_shading_mode(
    step: int, generator: torch.Generator, *, albedo_steps: int, lit_probability: float = 0.75,
    textureless_probability: float = 0.5,
) -> ShadingMode:  # fmt: skip
    """Albedo alone for the first steps; afterwards lit with a probability, and of these some without texture."""
    lit, bare = torch.rand(2, generator=generator).tolist()
    if step < albedo_steps or lit >= lit_probability:
        return "albedo"
    return "textureless" if bare < textureless_probability else "lit"
