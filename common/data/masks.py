"""Subject masks: files with the same name stems as the pictures, 1 = subject."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from common.data.images import BadImage, Variant, crop_square, load_image, open_upright


def load_mask(path: str | Path, image_size_px: tuple[int, int]) -> Image.Image:
    """Read a mask for a picture of that size (width, height), as mode L with 0 and 255.

    The subject is where a cut-out's alpha, or otherwise the grey level, is at least half. A mask of the same shape but
    another size is resized with nearest neighbour.

    Raises: BadImage if the file cannot be read, its aspect ratio differs from the picture's, or nothing is subject.
    """
    stored = open_upright(path)
    may_have_alpha = stored.mode in {"LA", "PA", "RGBA", "P"} and stored.has_transparency_data
    alpha = stored.convert("RGBA").getchannel("A") if may_have_alpha else None
    is_cut_out = alpha is not None and alpha.getextrema()[0] < 255
    grey = alpha if is_cut_out else load_image(path).convert("L")
    (width, height), (mask_width, mask_height) = image_size_px, grey.size
    # Equal up to the rounding of a resized mask: within one mask pixel.
    if abs(mask_width * height - mask_height * width) > max(width, height):
        raise BadImage(
            path, f"the mask has {mask_width} x {mask_height} px but its picture {width} x {height}; save both alike"
        )
    mask = Image.fromarray(((np.array(grey) >= 128) * 255).astype(np.uint8))
    if mask.getbbox() is None:
        raise BadImage(path, "no pixel of the mask is subject (grey level or alpha >= 128); paint the subject white")
    return mask if mask.size == image_size_px else mask.resize(image_size_px, Image.Resampling.NEAREST)


def crop_mask(mask: Image.Image, resolution_px: int, variant: Variant) -> Tensor:
    """The same square as `crop_square` cuts from the picture, nearest neighbour: (1,H,W) float32, 0 or 1."""
    square = crop_square(mask, resolution_px, variant, Image.Resampling.NEAREST)
    return torch.from_numpy(np.array(square) >= 128).float()[None]
