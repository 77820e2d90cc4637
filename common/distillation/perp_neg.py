"""Perp-Neg (Armandpour et al., arXiv 2304.04968): negative prompts that cannot take back what the positive one says."""

from collections.abc import Sequence

import torch
from torch import Tensor

from common.backbones import Backbone, Conditioning


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


def perp_neg_noise(
    backbone: Backbone, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning,
    negatives: Sequence[Conditioning], unconditional: Conditioning, weights: Tensor, guidance_scale: float,
) -> Tensor:  # fmt: skip
    """`perp_neg_guidance` from one batch of all prompts, (B,4,h,w): stands where `guided_predictor`'s noise does.

    Args: conditionings: of B prompts each; K negatives.   weights: (K,B), <= 0.   guidance_scale: s; 1 = off.
    """
    told = Conditioning.cat([unconditional, conditioning, *negatives])
    count = 2 + len(negatives)
    predicted = backbone.predict_noise(noisy_latents.repeat(count, 1, 1, 1), timesteps.repeat(count), told)
    without, positive, *against = predicted.chunk(count)
    return perp_neg_guidance(without, positive, torch.stack(against), weights.to(predicted), guidance_scale)
