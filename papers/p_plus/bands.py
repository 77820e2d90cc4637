"""Bands of cross-attention layers, and which words stand in them (Sec. 5, layer roles and mixing).

Layers are counted in the order of the forward pass, so the coarse ones are a band in the MIDDLE of the range.
"""

import numpy as np
from torch.nn import Module

from common.backbones.attention import attention_layers


def layer_grids(unet: Module) -> list[int]:
    """Tokens along one side of each cross-attention layer's grid: 64 64 32 32 16 16 8 16 .. 64 in SD 1.x."""
    return [layer.info.resolution[0] for layer in attention_layers(unet) if layer.info.kind == "cross"]


def inner_band(grids: list[int]) -> tuple[int, int]:
    """The half-open band (k, K) of layers whose grid is a quarter of the finest or less: (4, 10) in SD 1.x.

    Raises: ValueError if these layers are not one band, or are all layers.
    """
    coarse = [i for i, grid in enumerate(grids) if 4 * grid <= max(grids)]
    if not coarse or coarse != list(range(coarse[0], coarse[-1] + 1)):
        raise ValueError(f"no single band of coarse layers in the grids {grids}")
    return coarse[0], coarse[-1] + 1


def widened(band: tuple[int, int], by: int, num_layers: int) -> list[int]:
    """The layers of a band that is `by` layers longer at each end (shorter, if negative), within the range."""
    return list(range(max(0, band[0] - by), min(num_layers, band[1] + by)))


def outermost(num_layers: int, size: int) -> list[int]:
    """So many layers at both ends of the range, the odd one at its end, where the picture is finished."""
    first = size // 2
    return [*range(first), *range(num_layers - (size - first), num_layers)]


def random_layers(num_layers: int, size: int, seed: int) -> list[int]:
    """So many layers, drawn by the seed."""
    return sorted(np.random.default_rng([303, seed]).choice(num_layers, size, replace=False).tolist())


def fill_layers(inside: str, layers: list[int], outside: str, num_layers: int) -> list[str]:
    """`inside` in the given layers, `outside` in all others. Raises: ValueError for a layer that does not exist."""
    if wrong := [i for i in layers if not 0 <= i < num_layers]:
        raise ValueError(f"layers must be in 0..{num_layers - 1}, got {wrong}")
    return [inside if i in layers else outside for i in range(num_layers)]
