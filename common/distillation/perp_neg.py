"""Perp-Neg (Armandpour et al., arXiv 2304.04968): negative prompts that cannot take back what the positive one says."""

import torch
from torch import Tensor


def perpendicular(vectors: Tensor, to: Tensor) -> Tensor:
    """Each vector less its part along the other, (B,...)."""
    flat, other = vectors.flatten(1), to.flatten(1)
    along = (flat * other).sum(1, keepdim=True) / other.square().sum(1, keepdim=True).clamp(min=1e-12)
    return (flat - along * other).view_as(vectors)


def perp_neg_guidance(
    unconditional: Tensor, positive: Tensor, negatives: Tensor, weights: Tensor, guidance_scale: float
) -> Tensor:
    """eps_u + s (d + sum_k w_k perpendicular(d_k, d)), where d = eps_pos - eps_u and d_k = eps_neg_k - eps_u.

    Args:
        unconditional, positive: (B,4,h,w).   negatives: (K,B,4,h,w).
        weights: w_k, (K,B), <= 0.   guidance_scale: s; 1 = off.
    """
    towards = positive - unconditional
    away = torch.stack([perpendicular(negative - unconditional, towards) for negative in negatives])
    return unconditional + guidance_scale * (towards + (weights[..., None, None, None] * away).sum(0))


def view_negatives(azimuths_deg: Tensor) -> tuple[Tensor, Tensor]:
    """Prompts for azimuths: shares of the positive ones, and weights of the negative ones.

    Between the front and a side the positive prompt is a mix of both, and between a side and the back likewise. Front
    and side are negative prompts too: w = -(a exp(-b r) + c), with the constants of threestudio
    (threestudio-project/threestudio at 28d9d80, PromptProcessorOutput).

    Args: azimuths_deg: (B,), 0 = front.
    Returns: shares (B,3) of front, side and back; weights (B,2) of the negative prompts front and side.
    """
    turned = ((azimuths_deg + 180) % 360 - 180).abs() / 90  # 0 front, 1 side, 2 back
    r = torch.where(turned < 1, 1 - turned, 2 - turned)  # 1 at the end nearer to the front
    zero = torch.zeros_like(r)
    ahead, behind = torch.stack([r, 1 - r, zero], -1), torch.stack([zero, r, 1 - r], -1)
    in_front = (turned < 1)[:, None]
    front_side = torch.stack([_decay(4.0, 0.5, -2.426, r), _decay(4.0, 0.5, -2.426, 1 - r)], -1)
    side_back = torch.stack([_decay(1.0, 0.5, 0.967, r), _decay(1.0, 0.5, -0.606, r)], -1)
    return torch.where(in_front, ahead, behind), -torch.where(in_front, front_side, side_back)


def _decay(a: float, b: float, c: float, r: Tensor) -> Tensor:
    return a * torch.exp(-b * r) + c
