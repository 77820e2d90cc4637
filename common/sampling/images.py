"""Pictures: tensors to PIL, labelled grids, PNG files that say how they were made."""

import json
from collections.abc import Mapping, Sequence
from io import BytesIO
from math import ceil
from pathlib import Path

import matplotlib
import torch
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from common.io import atomic_write_bytes

FONT = Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf")  # Pillow's own font lacks accented letters


def to_pil(pixel_values: Tensor) -> list[Image.Image]:
    """RGB images of pixel_values, (B,3,H,W) in [-1,1]; values beyond are clamped.

    Raises: ValueError for another shape or for NaN.
    """
    if pixel_values.ndim != 4 or pixel_values.shape[1] != 3:
        raise ValueError(f"pixel_values must be (B,3,H,W), got {tuple(pixel_values.shape)}; unsqueeze a single image")
    if torch.isnan(pixel_values).any():
        raise ValueError("pixel_values contain NaN: the sampler or the decoder overflowed (try float32)")
    levels = ((pixel_values.detach().float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return [Image.fromarray(image) for image in levels.permute(0, 2, 3, 1).cpu().numpy()]


def image_grid(
    images: Tensor | Sequence[Image.Image],
    columns: int,
    labels: Sequence[str] | None = None,
    *,
    upscale: int = 1,
    font_px: int = 12,
    padding_px: int = 4,
) -> Image.Image:
    """Lay images out row by row on white, each with its label above it, wrapped to the image's width.

    Args:
        images: (B,3,H,W) in [-1,1], or RGB images of any sizes; each cell is as large as the largest.
        columns: cells per row, at least 1.
        labels: one text per image; "" leaves the place empty.
        upscale: whole factor, nearest neighbour; 4 shows 64 px images without blurring their pixels.
    """
    images = to_pil(images) if isinstance(images, Tensor) else list(images)
    if not images:
        raise ValueError("image_grid got no images")
    if columns < 1 or upscale < 1:
        raise ValueError(f"columns and upscale must be at least 1, got {columns} and {upscale}")
    if labels is not None and len(labels) != len(images):
        raise ValueError(f"{len(labels)} labels for {len(images)} images: give one each")
    images = [image.resize((image.width * upscale, image.height * upscale), Image.NEAREST) for image in images]
    width, height = max(image.width for image in images), max(image.height for image in images)
    font = ImageFont.truetype(FONT, font_px)
    wrapped = [_wrap(label, width, font) for label in labels] if labels is not None else [[]] * len(images)
    line_px = ceil(font_px * 1.25)
    columns = min(columns, len(images))
    rows = [range(first, min(first + columns, len(images))) for first in range(0, len(images), columns)]
    label_px = [line_px * max(len(wrapped[i]) for i in row) for row in rows]
    total = sum(label_px) + len(rows) * (height + padding_px) + padding_px
    grid = Image.new("RGB", (columns * (width + padding_px) + padding_px, total), "white")
    draw, top = ImageDraw.Draw(grid), padding_px
    for row, row_label_px in zip(rows, label_px, strict=True):
        for column, i in enumerate(row):
            left = padding_px + column * (width + padding_px)
            for line, text in enumerate(wrapped[i]):
                draw.text((left, top + line * line_px), text, fill="black", font=font)
            grid.paste(images[i], (left, top + row_label_px))
        top += row_label_px + height + padding_px
    return grid


def _wrap(text: str, width_px: int, font: ImageFont.FreeTypeFont) -> list[str]:
    """Break a text into lines that fit the width; a single word that does not fit is broken between letters."""
    lines, line = [], ""
    for word in text.split():
        joined = f"{line} {word}" if line else word
        if font.getlength(joined) <= width_px:
            line = joined
            continue
        if line:
            lines.append(line)
        line = ""
        for letter in word:
            if line and font.getlength(line + letter) > width_px:
                lines.append(line)
                line = ""
            line += letter
    return [*lines, line] if line else lines


def save_png(image: Image.Image, path: str | Path, metadata: Mapping[str, object] | None = None) -> None:
    """Write a PNG whole or not at all, with text entries that say how it was made.

    Args:
        metadata: e.g. {"prompt": ..., "seed": 3, "settings": {...}}; what is not a text is written as JSON.
            `PIL.Image.open(path).text` reads it back.
    """
    info = PngInfo()
    for key, value in (metadata or {}).items():
        info.add_text(key, value if isinstance(value, str) else json.dumps(value))
    buffer = BytesIO()
    image.save(buffer, format="PNG", pnginfo=info)
    atomic_write_bytes(Path(path), buffer.getvalue())
