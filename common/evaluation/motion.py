"""Metrics of motion as pure reductions: paths in pixels and features of frames in, one number for each clip out."""

import torch
import torch.nn.functional as F
from torch import Tensor

MIN_STEP_PX = 1.0  # shorter steps of the reference have no direction


def trajectory_error(paths: Tensor, reference: Tensor) -> Tensor:
    """Mean distance of two paths in pixels, (B,), after each is moved to its own mean: where it happens does not count.

    Args: paths: (B,F,2).   reference: the true path, (F,2).
    """
    _check(paths, reference)
    centred = paths - paths.mean(1, keepdim=True)
    return (centred - (reference - reference.mean(0))).norm(dim=-1).mean(1)


def direction_cosine(paths: Tensor, reference: Tensor) -> Tensor:
    """Mean cosine between the steps from frame to frame, (B,), in [-1, 1], over the steps in which the reference moves.

    A step of length 0 counts as 0. Arguments as in `trajectory_error`.
    Raises: ValueError if the reference never moves by MIN_STEP_PX.
    """
    _check(paths, reference)
    steps, true_steps = paths.diff(dim=1), reference.diff(dim=0)
    moving = true_steps.norm(dim=-1) >= MIN_STEP_PX
    if not moving.any():
        raise ValueError(f"the reference moves by less than {MIN_STEP_PX} px in every step: it has no direction")
    return F.cosine_similarity(steps, true_steps.expand_as(steps), dim=-1)[:, moving].mean(1)


def speed_ratio(paths: Tensor, reference: Tensor) -> Tensor:
    """Length of the path over that of the reference, (B,); 1 = as fast. Arguments as in `trajectory_error`."""
    _check(paths, reference)
    return paths.diff(dim=1).norm(dim=-1).sum(1) / reference.diff(dim=0).norm(dim=-1).sum()


def neighbour_consistency(features: Tensor) -> Tensor:
    """Mean cosine of features of neighbouring frames, (B,).   features: (B,F,D), F >= 2."""
    if features.ndim != 3 or features.shape[1] < 2:
        raise ValueError(f"features must be (B,F,D) with F >= 2, got {tuple(features.shape)}")
    return F.cosine_similarity(features[:, 1:], features[:, :-1], dim=-1).mean(1)


def pairwise_consistency(features: Tensor) -> Tensor:
    """Mean cosine of all pairs of frames, (B,), the frame consistency of VMC.   features: (B,F,D), F >= 2."""
    unit = F.normalize(features, dim=-1)
    num_frames = features.shape[1]
    above = torch.triu(torch.ones(num_frames, num_frames, dtype=torch.bool, device=features.device), diagonal=1)
    return (unit @ unit.transpose(1, 2))[:, above].mean(1)


def _check(paths: Tensor, reference: Tensor) -> None:
    if paths.ndim != 3 or paths.shape[1:] != reference.shape or paths.shape[-1] != 2 or len(reference) < 2:
        raise ValueError(
            f"paths must be (B,F,2) and the reference (F,2) with F >= 2, got {tuple(paths.shape)}, "
            f"{tuple(reference.shape)}"
        )
