"""Null-text inversion (Mokady et al., CVPR 2023, arXiv 2211.09794): reconstruct exactly under guidance.

Guided sampling from DDIM-inverted noise drifts off the inversion trajectory. The embedding of the empty prompt is
optimised, separately at each step, so that the guided step lands on the trajectory again (Alg. 1).
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from common.backbones.conditioning import Conditioning
from common.sampling.guidance import classifier_free
from common.sampling.inversion import ddim_levels, ddim_step
from common.sampling.sampler import guided_noise, network_conditionings

if TYPE_CHECKING:
    from common.backbones import Backbone


def optimise_null_text(
    backbone: Backbone,
    trajectory: Tensor,
    conditioning: Conditioning,
    *,
    guidance_scale: float = 7.5,
    inner_steps: int = 10,
    learning_rate: float = 1e-2,
    early_stop: float = 1e-5,
) -> list[Conditioning]:
    """Alg. 1: one unconditional embedding per sampling step and image, each started from the one of the step before.

    Sample with `ddim_reconstruct(backbone, trajectory[-1], conditioning, <the result>, ...)` at
    the same guidance_scale. No parameter of the backbone receives a gradient.

    Args:
        trajectory: `ddim_trajectory` of the images with guidance 1, (n + 1, B, 4, h, w).
        conditioning: of the images' prompt, for B images or one.
        inner_steps: Adam steps per sampling step, N; 10 (Sec. 4).
        learning_rate: of Adam, falling linearly to half over the n steps, as in the authors' notebook; 1e-2.
        early_stop: mean squared error of the latents at which a step is good enough, for the worst image of the batch;
            the authors' notebook adds 2e-5 per step. 1e-5; 0 = always all inner steps.
    Returns: n conditionings for B images, in the order of sampling (noisy to clean).
    Raises: ValueError if guidance is off, or if the empty prompt's conditioning has no single context.
    """
    if guidance_scale == 1:
        raise ValueError("null-text inversion needs guidance: guidance_scale is 1, which has no unconditional pass")
    num_steps, batch = len(trajectory) - 1, trajectory.shape[1]
    timesteps, levels = ddim_levels(backbone, num_steps)
    with torch.no_grad():
        null = backbone.encode_prompt("").repeat(batch)
    if not null.is_plain:
        raise ValueError("null-text inversion needs one (B,L,D) context; this backbone's empty prompt has several")
    conditioned = network_conditionings(
        backbone, conditioning, None, batch=batch, num_inference_steps=num_steps, guidance_scale=1.0
    )
    embeds, latents, found = null.prompt_embeds, trajectory[-1], []
    for step in range(num_steps):
        target, level = trajectory[-2 - step], (timesteps[step], levels[step], levels[step + 1])
        with torch.no_grad():
            noise_cond = guided_noise(backbone, latents, timesteps[step], conditioned[step], 1.0)
        embeds = embeds.detach().float().clone().requires_grad_(True)
        optimizer = torch.optim.Adam([embeds], lr=learning_rate * (1 - step / (2 * num_steps)))
        for _ in range(inner_steps):
            uncond = replace(null, prompt_embeds=embeds.to(backbone.dtype))
            reached = _guided_ddim_step(backbone, latents, noise_cond, uncond, guidance_scale, *level)
            losses = (reached - target).square().flatten(1).mean(1)  # (B,), summed: images do not mix
            (embeds.grad,) = torch.autograd.grad(losses.sum(), [embeds])
            optimizer.step()
            if early_stop and losses.max() < early_stop + 2e-5 * step:
                break
        found.append(replace(null, prompt_embeds=embeds.detach().to(backbone.dtype)))
        with torch.no_grad():
            latents = _guided_ddim_step(backbone, latents, noise_cond, found[-1], guidance_scale, *level)
    return found


def _guided_ddim_step(
    backbone: Backbone,
    latents: Tensor,
    noise_cond: Tensor,
    uncond: Conditioning,
    guidance_scale: float,
    timestep: int,
    alpha_from: float,
    alpha_to: float,
) -> Tensor:
    """z_{t-1}(z_t, phi_t, C) of Eq. 3: one guided DDIM step whose conditional prediction is known already."""
    noise_uncond = guided_noise(backbone, latents, timestep, uncond, 1.0)
    noise_pred = classifier_free(noise_uncond, noise_cond, timestep, guidance_scale)
    return ddim_step(latents, noise_pred, alpha_from, alpha_to)
