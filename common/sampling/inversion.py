"""DDIM inversion: the noise from which DDIM makes a given image (Song et al., arXiv 2010.02502; Dhariwal and Nichol).

A DDIM step from noise level a to level b keeps the predicted clean latents and the predicted noise and mixes them anew
(Eq. 12 with sigma = 0). Sampling steps from noisy to clean; inversion takes the same steps backwards, with the noise
predicted at the latents at hand in place of the unknown noisier ones, under the timestep label of the step that it
undoes. For noise prediction that is diffusers' DDIMInverseScheduler to rounding. For v prediction it is not: that
scheduler converts v at the cleaner level although the network was asked at the noisier one, so its step is not the
inverse of the DDIM step even when the network answers the same; here both directions use the same noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from common.backbones.conditioning import Conditioning
from common.sampling.guidance import GuidanceRule, classifier_free
from common.sampling.sampler import guided_noise, loop_dtype, network_conditionings, sample_latents
from common.sampling.schedulers import make_scheduler

if TYPE_CHECKING:
    from common.backbones import Backbone


def ddim_step(latents: Tensor, noise_pred: Tensor, alpha_from: float, alpha_to: float) -> Tensor:
    """DDIM step between two noise levels, in either direction (arXiv 2010.02502, Eq. 12 with sigma_t = 0).

    Args:
        latents: (B,4,h,w) at the level alpha_from; noise_pred: (B,4,h,w).
        alpha_from, alpha_to: alphas_cumprod of the two levels (the paper's alpha), in (0, 1].
    """
    clean = (latents - (1 - alpha_from) ** 0.5 * noise_pred) / alpha_from**0.5
    return alpha_to**0.5 * clean + (1 - alpha_to) ** 0.5 * noise_pred


def ddim_levels(backbone: Backbone, num_inference_steps: int) -> tuple[list[int], list[float]]:
    """Timesteps of the DDIM schedule, noisy to clean, and the n + 1 alphas_cumprod before, between and after them."""
    stepper = make_scheduler("ddim", backbone.noise_scheduler, num_inference_steps)
    levels = torch.cat([stepper.alphas_cumprod[stepper.timesteps], stepper.final_alpha_cumprod[None]])
    return stepper.timesteps.tolist(), levels.double().tolist()


@torch.no_grad()
def ddim_trajectory(
    backbone: Backbone,
    latents: Tensor,
    conditioning: Conditioning | Sequence[Conditioning],
    *,
    num_inference_steps: int,
    guidance_scale: float = 1.0,
    negative_conditioning: Conditioning | Sequence[Conditioning] | None = None,
    guidance: GuidanceRule = classifier_free,
) -> Tensor:
    """Invert clean latents and keep every level.

    Args:
        latents: clean latents, (B,4,h,w).
        conditioning: for B images or one; or a list with one per step, in the order of sampling (noisy to clean).
        guidance_scale: 1 = off. Inverting with guidance gives noise that is not Gaussian and reconstructs badly.
    Returns: (num_inference_steps + 1, B, 4, h, w), from clean [0] to noisiest [-1].
    """
    timesteps, levels = ddim_levels(backbone, num_inference_steps)
    conditionings = network_conditionings(
        backbone,
        conditioning,
        negative_conditioning,
        batch=len(latents),
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
    )
    trajectory = [latents.to(backbone.device, loop_dtype(backbone))]
    for step in reversed(range(num_inference_steps)):
        current = trajectory[-1]
        noise_pred = guided_noise(backbone, current, timesteps[step], conditionings[step], guidance_scale, guidance)
        trajectory.append(ddim_step(current, noise_pred, levels[step + 1], levels[step]))
    return torch.stack(trajectory)


def ddim_invert(
    backbone: Backbone,
    latents: Tensor,
    conditioning: Conditioning | Sequence[Conditioning],
    *,
    num_inference_steps: int,
    guidance_scale: float = 1.0,
    **settings,
) -> Tensor:
    """The noise, (B,4,h,w), from which DDIM makes clean latents; arguments as in `ddim_trajectory`.

    Give it to `sample_latents(..., scheduler="ddim", latents=...)` with the same number of steps.
    """
    return ddim_trajectory(
        backbone,
        latents,
        conditioning,
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        **settings,
    )[-1]


def ddim_reconstruct(
    backbone: Backbone,
    noise: Tensor,
    conditioning: Conditioning | Sequence[Conditioning],
    negative_conditioning: Conditioning | Sequence[Conditioning] | None = None,
    *,
    num_inference_steps: int,
    guidance_scale: float = 1.0,
) -> Tensor:
    """Deterministic DDIM from inverted noise, (B,4,h,w), back to clean latents, (B,4,h,w)."""
    return sample_latents(
        backbone,
        conditioning,
        negative_conditioning,
        seeds=[0] * len(noise),  # nothing is drawn from them: the start is given and eta is 0
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        latents=noise,
    )


@dataclass(frozen=True, kw_only=True)
class InversionError:
    """What inverting and reconstructing an image loses, one value per image, (B,) on CPU."""

    latent_mse: Tensor  # mean squared difference of the latents (unit-variance scale), >= 0
    psnr_db: Tensor  # reconstructed against original pixels in [-1, 1], decibels; contains the autoencoder's loss
    autoencoder_psnr_db: Tensor  # the same without inversion: what is possible at best


def psnr_db(pixel_values: Tensor, reference: Tensor) -> Tensor:
    """Peak signal-to-noise ratio per image, decibels, (B,), for pixels in [-1, 1] (peak to peak 2)."""
    mse = (pixel_values.float() - reference.float()).square().flatten(1).mean(1)
    return 10 * torch.log10(4 / mse)


@torch.no_grad()
def inversion_error(
    backbone: Backbone,
    pixel_values: Tensor,
    conditioning: Conditioning,
    *,
    num_inference_steps: int,
    guidance_scale: float = 1.0,
) -> InversionError:
    """Invert images without guidance, sample them again, and measure the difference.

    Args:
        pixel_values: (B,3,H,W) in [-1,1].
        guidance_scale: of the reconstruction; above 1 the error grows, which null-text inversion is for.
    """
    pixel_values = pixel_values.to(backbone.device, backbone.dtype)
    latents = backbone.encode_images(pixel_values)
    noise = ddim_invert(backbone, latents, conditioning, num_inference_steps=num_inference_steps)
    again = ddim_reconstruct(
        backbone, noise, conditioning, num_inference_steps=num_inference_steps, guidance_scale=guidance_scale
    )
    return InversionError(
        latent_mse=(again - latents).float().square().flatten(1).mean(1).cpu(),
        psnr_db=psnr_db(backbone.decode_latents(again), pixel_values).cpu(),
        autoencoder_psnr_db=psnr_db(backbone.decode_latents(latents), pixel_values).cpu(),
    )
