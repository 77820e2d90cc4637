"""Styles: image-space filters on the photo, with the part map for clean lines. Pure and deterministic."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from common.toyworld.vocabulary import HELD_OUT_STYLES, STYLES

_LUMA = (0.299, 0.587, 0.114)


def _gray(image: Tensor) -> Tensor:
    return (image * image.new_tensor(_LUMA)[:, None, None]).sum(1, keepdim=True)


def _blur(image: Tensor, radius: int) -> Tensor:
    size = 2 * radius + 1
    return F.avg_pool2d(F.pad(image, (radius,) * 4, mode="replicate"), size, 1)


def outlines(parts: Tensor) -> Tensor:
    """Antialiased lines between parts, (B, 1, H, W) in [0, 1], from a part map twice as fine, (B, 2H, 2W)."""
    edge = torch.zeros_like(parts, dtype=torch.bool)
    edge[:, 1:] |= parts[:, 1:] != parts[:, :-1]
    edge[:, :, 1:] |= parts[:, :, 1:] != parts[:, :, :-1]
    return (1.5 * F.avg_pool2d(edge[:, None].float(), 2)).clamp(max=1)


def _paint(image: Tensor, color, where: Tensor) -> Tensor:
    return image + (image.new_tensor(color)[:, None, None] - image) * where


def _ramp(value: Tensor, colors: list[tuple[float, float, float]]) -> Tensor:
    """Map (B, 1, H, W) in [0, 1] through evenly spaced colours."""
    table = value.new_tensor(colors)
    x = value[:, 0].clamp(0, 1) * (len(colors) - 1)
    low = x.floor().long().clamp(max=len(colors) - 2)
    mixed = table[low] + (table[low + 1] - table[low]) * (x - low)[..., None]
    return mixed.permute(0, 3, 1, 2)


def _sketch(image, lines, masks):
    shade = 0.80 + 0.20 * _gray(image)
    paper = torch.where(masks[:, None] > 0, shade, torch.ones_like(shade)) * 0.97
    return _paint(paper.repeat(1, 3, 1, 1), (0.15, 0.15, 0.17), lines)


def _watercolor(image, lines, masks):
    soft = _blur(image, 1)
    pigment = (soft - _blur(image, 3)).abs().sum(1, keepdim=True)
    return (0.70 * soft + 0.30 - 0.22 * pigment).clamp(0, 1)


def _pixel_art(image, lines, masks):
    cells = image.shape[-1] // 3
    small = (F.interpolate(image, size=(cells, cells), mode="area") * 5).round() / 5
    blocks = F.interpolate(small, scale_factor=3, mode="nearest")
    missing = image.shape[-1] - 3 * cells
    return F.pad(blocks, (0, missing, 0, missing), mode="replicate")


def _neon(image, lines, masks):
    glow = (_blur(lines, 1) * 1.2).clamp(0, 1)
    canvas = torch.full_like(image, 0.0) + image.new_tensor((0.05, 0.02, 0.12))[:, None, None]
    return _paint(_paint(canvas, (0.75, 0.10, 0.85), 0.75 * glow), (0.35, 1.0, 0.95), lines)


def _cartoon(image, lines, masks):
    flat = ((_blur(image, 1) * 3).round() / 3 * 0.65 + 0.35 * image).clamp(0, 1)
    return _paint(flat, (0.03, 0.03, 0.04), (2 * _blur(lines, 1)).clamp(max=1))


def _monochrome(image, lines, masks):
    return ((_gray(image) - 0.5) * 1.15 + 0.5).clamp(0, 1).repeat(1, 3, 1, 1)


def _blueprint(image, lines, masks):
    height, width = image.shape[-2:]
    grid = torch.zeros(1, 1, height, width, device=image.device)
    grid[..., ::16, :] = 1
    grid[..., :, ::16] = 1
    canvas = torch.zeros_like(image) + image.new_tensor((0.08, 0.24, 0.58))[:, None, None]
    return _paint(_paint(canvas, (0.35, 0.52, 0.80), 0.35 * grid), (0.95, 0.97, 1.0), lines)


def _sepia(image, lines, masks):
    return _ramp(_gray(image), [(0.14, 0.07, 0.02), (0.62, 0.44, 0.24), (0.99, 0.93, 0.78)])


def _pop_art(image, lines, masks):
    return _ramp(
        (_gray(image) * 3.99).floor() / 3,
        [(0.10, 0.05, 0.45), (0.95, 0.10, 0.55), (1.0, 0.55, 0.10), (1.0, 0.95, 0.25)],
    )


def _thermal(image, lines, masks):
    heat = 0.35 * _gray(image) + 0.6 * _blur((masks[:, None] > 0).float(), 2)
    return _ramp(heat, [(0.0, 0.0, 0.25), (0.35, 0.0, 0.60), (0.90, 0.15, 0.25), (1.0, 0.70, 0.10), (1.0, 1.0, 0.85)])


def _negative(image, lines, masks):
    return 1 - image


def _halftone(image, lines, masks):
    bayer = image.new_tensor([[0, 8, 2, 10], [12, 4, 14, 6], [3, 11, 1, 9], [15, 7, 13, 5]])
    threshold = (bayer.repeat(image.shape[-2] // 4, image.shape[-1] // 4) + 0.5) / 16
    return (_gray(image) > threshold).float().repeat(1, 3, 1, 1)


def _woodcut(image, lines, masks):
    y = torch.arange(image.shape[-2], device=image.device)[:, None].float()
    x = torch.arange(image.shape[-1], device=image.device)[None].float()
    threshold = 0.42 + 0.10 * torch.sin(1.6 * (x + y))
    ink = (_blur(_gray(image), 1) < threshold[None, None]).float()
    return _ramp(1 - torch.maximum(ink, lines), [(0.12, 0.08, 0.06), (0.96, 0.92, 0.80)])


def _mosaic(image, lines, masks):
    tiles = F.interpolate(F.avg_pool2d(image, 8), scale_factor=8, mode="nearest")
    gap = torch.zeros(1, 1, *image.shape[-2:], device=image.device)
    gap[..., ::8, :] = 1
    gap[..., :, ::8] = 1
    return _paint(0.35 * tiles + 0.65 * image, (0.9, 0.9, 0.86), 0.7 * gap)


def _duotone(image, lines, masks):
    return _ramp(_gray(image), [(0.25, 0.0, 0.45), (1.0, 0.90, 0.10)])


def _night_vision(image, lines, masks):
    scan = 0.85 + 0.15 * (torch.arange(image.shape[-2], device=image.device) % 2 == 0).float()[:, None]
    return _ramp(_gray(image) * scan, [(0.0, 0.06, 0.0), (0.05, 0.55, 0.10), (0.65, 1.0, 0.55)])


def _glitch(image, lines, masks):
    return torch.cat([image[:, :1].roll(4, -1), image[:, 1:2], image[:, 2:].roll(-4, -1)], 1)


_FILTERS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "sketch": _sketch, "watercolor": _watercolor, "pixel art": _pixel_art, "neon": _neon, "cartoon": _cartoon,
    "monochrome": _monochrome, "blueprint": _blueprint, "sepia": _sepia, "pop art": _pop_art, "thermal": _thermal,
    "negative": _negative, "halftone": _halftone, "woodcut": _woodcut, "mosaic": _mosaic, "duotone": _duotone,
    "night vision": _night_vision, "glitch": _glitch,
}  # fmt: skip
assert {"photo", *_FILTERS} == {*STYLES, *HELD_OUT_STYLES}


def stylize(images: Tensor, names: list[str], *, lines: Tensor, masks: Tensor) -> Tensor:
    """Apply a style to each picture.

    Args: images (B, 3, H, W) in [0, 1]; names B styles ("photo" leaves the picture as it is); lines (B, 1, H, W), see
        outlines; masks (B, H, W).
    Raises: ValueError for an unknown style.
    """
    unknown = sorted(set(names) - {"photo", *_FILTERS})
    if unknown:
        raise ValueError(f"unknown style {unknown[0]!r}; choose from photo, {', '.join(_FILTERS)}")
    result = images.clone()
    for name in dict.fromkeys(names):
        if name != "photo":
            rows = torch.tensor([i for i, n in enumerate(names) if n == name], device=images.device)
            result[rows] = _FILTERS[name](images[rows], lines[rows], masks[rows])
    return result
