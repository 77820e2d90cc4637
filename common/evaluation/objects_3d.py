"""Measures of objects in 3D against their ground truth, and without."""

import torch
import torch.nn.functional as F
from torch import Tensor

from common.toyworld.judge import Judge

FRAME = 1.15  # side of a framed picture in sizes of the object
HISTOGRAM_BINS = 4  # a channel
BEHIND_DEG = 20.0  # the judge knows sides, and guesses between them


def frame_views(pictures: Tensor, masks: Tensor, side: int = 48) -> Tensor:
    """Views of one object cut out at the size and place that it has over all of them together.

    What has another size, or stands elsewhere, is compared by its looks. A mask of nothing leaves the pictures whole.

    Args: pictures: (N,C,H,W), evenly spaced around the object.   masks: (N,H,W) bool.
    Returns: (N,C,side,side).
    """
    seen = masks.any(0)
    if not seen.any():
        return F.interpolate(pictures, (side, side), mode="bilinear", align_corners=False)
    rows, columns = (seen.any(1 - axis).nonzero()[:, 0] for axis in (0, 1))
    height, width = masks.shape[-2:]
    top, bottom = rows.min().item() / height * 2 - 1, (rows.max().item() + 1) / height * 2 - 1
    left, right = columns.min().item() / width * 2 - 1, (columns.max().item() + 1) / width * 2 - 1
    half = FRAME * max(bottom - top, right - left) / 2
    theta = torch.tensor([[half, 0.0, (left + right) / 2], [0.0, half, (top + bottom) / 2]]).to(pictures)
    size = (len(pictures), pictures.shape[1], side, side)
    grid = F.affine_grid(theta.expand(len(pictures), 2, 3), list(size), align_corners=False)
    return F.grid_sample(pictures, grid, padding_mode="border", align_corners=False)


def psnr(found: Tensor, truth: Tensor) -> float:
    """Of pictures (N,3,H,W) in [-1,1], the mean over pictures, in dB."""
    errors = ((found - truth) / 2).square().flatten(1).mean(1).clamp(min=1e-10)
    return (-10 * errors.log10()).mean().item()


def depth_error(found: Tensor, found_masks: Tensor, truth: Tensor, truth_masks: Tensor) -> float:
    """Mean distance of depths where both see the object, less the median of each view, whose camera is its own.

    Args: all (N,H,W); depths in object heights.
    """
    errors = []
    for own, of_own, other, of_other in zip(found, found_masks, truth, truth_masks, strict=True):
        both = of_own & of_other
        if both.any():
            apart = own[both] - other[both]
            errors.append((apart - apart.median()).abs().mean())
    if not errors:
        raise ValueError("in no view both objects are seen at the same place")
    return torch.stack(errors).mean().item()


def saturation(rgb: Tensor, masks: Tensor) -> float:
    """Mean of (max - min) / max over the channels, of what is seen.   rgb: (N,H,W,3) in [0,1].   masks: (N,H,W)."""
    highest, lowest = rgb.max(-1).values, rgb.min(-1).values
    values = (highest - lowest) / highest.clamp(min=1e-6)
    return values[masks].mean().item() if masks.any() else 0.0


def color_histogram(rgb: Tensor, masks: Tensor) -> Tensor:
    """Shares of what is seen in HISTOGRAM_BINS^3 cells of colour; zeros if nothing is.   As `saturation`."""
    cells = (rgb[masks].clamp(0, 1 - 1e-6) * HISTOGRAM_BINS).long()
    flat = (cells[:, 0] * HISTOGRAM_BINS + cells[:, 1]) * HISTOGRAM_BINS + cells[:, 2]
    return torch.bincount(flat, minlength=HISTOGRAM_BINS**3).double() / max(1, len(flat))


def histogram_distance(a: Tensor, b: Tensor) -> float:
    """Half of the sum of absolute differences: 0 the same, 1 nothing in common."""
    return (a - b).abs().sum().item() / 2


@torch.no_grad()
def janus_rate(judge: Judge, pictures: Tensor) -> float:
    """Share of the views within BEHIND_DEG of behind that the judge calls front.

    Args: pictures: (N,3,H,W), evenly spaced around the object, the front first.
    """
    count = len(pictures)
    behind = [k for k in range(count) if abs(k * 360 / count - 180) <= BEHIND_DEG]
    front = judge.labels["view"].index("front")
    return (judge.read(pictures[behind])["view"].argmax(-1) == front).double().mean().item()


@torch.no_grad()
def view_entropy(judge: Judge, pictures: Tensor) -> float:
    """Entropy in bits of the views that the judge names in samples (N,3,H,W): 0 = always the same side."""
    named = judge.read(pictures)["view"].argmax(-1)
    shares = torch.bincount(named, minlength=len(judge.labels["view"])).double() / len(named)
    return torch.special.entr(shares).sum().item() / torch.log(torch.tensor(2.0)).item()
