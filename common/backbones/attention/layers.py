"""Which attention layers a UNet has, in the order in which its forward pass calls them."""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple
from weakref import WeakKeyDictionary

from diffusers.models.attention_processor import Attention
from torch import nn


@dataclass(frozen=True)
class LayerInfo:
    """Where an attention layer stands; bound when hooks are installed, so no counter can drift.

    kind: "cross" (text to image), "self" (spatial), "temporal" (over frames, cross or self).
    index: place in call order among the layers of this kind. Cross-attention of SD 1.x: 0-5 down, 6 mid, 7-15 up.
    place: "down", "mid" or "up".
    resolution: (height, width) of the token grid, in tokens.
    name: module path inside the UNet, such as "mid_block.attentions.0.transformer_blocks.0.attn2".
    """

    kind: str
    index: int
    place: str
    resolution: tuple[int, int]
    name: str


class AttentionLayer(NamedTuple):
    module: Attention
    transformer: nn.Module  # the Transformer2DModel (or temporal one) that holds it
    info: LayerInfo


_LAYERS: WeakKeyDictionary[nn.Module, dict[tuple[int, int], tuple[AttentionLayer, ...]]] = WeakKeyDictionary()


def attention_layers(unet: nn.Module, latent_size: int | tuple[int, int] | None = None) -> tuple[AttentionLayer, ...]:
    """List the attention layers inside the transformer blocks of a diffusers UNet, in call order.

    The list is kept per UNet and latent size: replacing whole attention modules afterwards is not seen. Adapters
    that wrap the projections inside a layer (PEFT) are fine.

    Args:
        unet: UNet2DConditionModel, UNet3DConditionModel or UNetMotionModel.
        latent_size: latent height and width that the UNet will get; default its config's `sample_size`.
    Raises: TypeError if this is no such UNet; ValueError if the latent size is unknown.
    """
    height_width = _height_width(unet, latent_size)
    per_size = _LAYERS.setdefault(unet, {})
    if height_width not in per_size:
        per_size[height_width] = tuple(_walk(unet, height_width))
    return per_size[height_width]


def _height_width(unet: nn.Module, latent_size: int | tuple[int, int] | None) -> tuple[int, int]:
    if not all(hasattr(unet, name) for name in ("config", "down_blocks", "mid_block", "up_blocks")):
        raise TypeError(f"expected a diffusers UNet with down, mid and up blocks, got {type(unet).__name__}")
    size = unet.config.sample_size if latent_size is None else latent_size
    if size is None:
        raise ValueError("the UNet's config has no sample_size: pass latent_size")
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def _walk(unet: nn.Module, latent_size: tuple[int, int]) -> Iterator[AttentionLayer]:
    names = {module: name for name, module in unet.named_modules()}
    counts: Counter[str] = Counter()
    for place, transformer, resolution in _transformers(unet, latent_size):
        for attention in transformer.modules():
            if not isinstance(attention, Attention) or attention is transformer:
                continue
            _check_formula(attention, names[attention])
            kind = _kind(attention, names[attention])
            yield AttentionLayer(
                attention, transformer, LayerInfo(kind, counts[kind], place, resolution, names[attention])
            )
            counts[kind] += 1


def _transformers(unet: nn.Module, latent_size: tuple[int, int]) -> Iterator[tuple[str, nn.Module, tuple[int, int]]]:
    if hasattr(unet, "transformer_in"):
        yield "down", unet.transformer_in, latent_size
    sizes, size = [], latent_size
    for block in unet.down_blocks:
        sizes.append(size)
        yield from (("down", transformer, size) for transformer in _transformers_of(block))
        if block.downsamplers is not None:
            size = (math.ceil(size[0] / 2), math.ceil(size[1] / 2))
    if unet.mid_block is not None:
        yield from (("mid", transformer, size) for transformer in _transformers_of(unet.mid_block))
    for block, size in zip(unet.up_blocks, reversed(sizes), strict=True):
        yield from (("up", transformer, size) for transformer in _transformers_of(block))


def _transformers_of(block: nn.Module) -> Iterator[nn.Module]:
    """Call order inside one block: for every layer the spatial transformer, then the temporal one."""
    columns = [list(getattr(block, name, [])) for name in ("attentions", "temp_attentions", "motion_modules")]
    for row in range(max(len(column) for column in columns)):
        yield from (column[row] for column in columns if row < len(column))


def _kind(attention: Attention, name: str) -> str:
    if any(part in name for part in ("temp_attentions", "temporal_", "motion_modules", "transformer_in")):
        return "temporal"
    return "cross" if attention.is_cross_attention else "self"


def _check_formula(attention: Attention, name: str) -> None:
    """The processor here computes softmax(q k / sqrt(d)) v and no more; layers with extra norms are refused."""
    extras = ("group_norm", "spatial_norm", "norm_q", "norm_k", "norm_cross", "added_kv_proj_dim")
    found = [extra for extra in extras if getattr(attention, extra, None) is not None]
    if found or attention.residual_connection:
        raise TypeError(f"hooks cannot run in {name}: it uses {found or 'a residual connection'}")
