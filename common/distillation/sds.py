"""Score distillation sampling (Poole et al., DreamFusion, arXiv 2209.14988, Sec. 3).

Guidance has one convention here: eps_uncond + s (eps_cond - eps_uncond), s = 1 being off. DreamFusion and threestudio
write eps_cond + omega (eps_cond - eps_uncond): s = 1 + omega.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from common.backbones import Backbone, Conditioning
from common.sampling.sampler import guided_noise

Weighting = Literal["sigma2", "uniform"]
NoisePredictor = Callable[[Tensor, Tensor], Tensor]  # (z_t, t) -> eps_hat


@dataclass(frozen=True)
class TimestepRange:
    """Which timesteps are drawn, as shares of the schedule; the upper end may fall linearly during the run."""

    low: float = 0.02
    high: float = 0.98
    final_high: float | None = None  # at the end of the run; None = high

    def sample(self, count: int, num_train_timesteps: int, generator: torch.Generator, progress: float = 0.0) -> Tensor:
        """Uniform integers, (count,).   progress: of the run, in [0, 1]."""
        final = self.high if self.final_high is None else self.final_high
        high = self.high + (final - self.high) * progress
        first, last = int(self.low * num_train_timesteps), int(high * num_train_timesteps)
        return torch.randint(first, last + 1, (count,), generator=generator)


def guided_predictor(
    backbone: Backbone, conditioning: Conditioning, unconditional: Conditioning, guidance_scale: float
) -> NoisePredictor:
    """(z_t, t) -> eps_uncond + s (eps_cond - eps_uncond).   conditionings: of B prompts each."""
    parts = [conditioning] if guidance_scale == 1 else [unconditional, conditioning]
    told = Conditioning.cat(parts)
    return lambda noisy, timesteps: guided_noise(backbone, noisy, timesteps, told, guidance_scale)


def picture_latents(backbone: Backbone, pictures: Tensor) -> Tensor:
    """The VAE's latents of pictures (B,3,H,W) in [-1,1], scaled to the backbone's size, (B,4,h,w); with gradients."""
    side = backbone.resolution_px
    if pictures.shape[-1] != side:
        pictures = F.interpolate(pictures, (side, side), mode="bilinear", align_corners=False)
    return backbone.encode_images(pictures)


def sds_weights(alphas_cumprod: Tensor, timesteps: Tensor, weighting: Weighting) -> Tensor:
    """w(t): "sigma2" = 1 - alpha_bar_t (DreamFusion), "uniform" = 1; (B,1,1,1)."""
    if weighting == "uniform":
        weights = torch.ones_like(timesteps, dtype=torch.float32)
    elif weighting == "sigma2":
        weights = 1 - alphas_cumprod.to(timesteps.device)[timesteps].float()
    else:
        raise ValueError(f"weighting must be sigma2 or uniform, got {weighting!r}")
    return weights.view(-1, 1, 1, 1)


@torch.no_grad()
def sds_gradient(
    backbone: Backbone, latents: Tensor, predict: NoisePredictor, *, timesteps: Tensor,
    noise: Tensor, weighting: Weighting = "sigma2",
) -> Tensor:  # fmt: skip
    """w(t) (eps_hat(z_t) - eps), (B,4,h,w): the gradient that SDS puts in the place of the loss's.

    Args:
        latents: z, of pictures (the latent form), or pictures themselves for a model of pixels.
        predict: (z_t, t) -> eps_hat with guidance, such as `guided_predictor` gives.
        timesteps: (B,).   noise: as latents.
    """
    noisy = backbone.add_noise(latents, noise, timesteps)
    residual = predict(noisy, timesteps).float() - noise
    gradient = sds_weights(backbone.noise_scheduler.alphas_cumprod, timesteps, weighting) * residual
    return torch.nan_to_num(gradient)


def sds_loss(latents: Tensor, gradient: Tensor) -> Tensor:
    """1/2 |z - sg(z - g)|^2 / B, a sum over all other numbers: its gradient with regard to z is g / B."""
    target = (latents - gradient).detach()
    return 0.5 * (latents - target).square().sum() / len(latents)


def distillation_loss(
    backbone: Backbone, pictures: Tensor, predict: NoisePredictor, times: TimestepRange, generator: torch.Generator, *,
    weighting: Weighting = "sigma2", progress: float = 0.0,
) -> Tensor:  # fmt: skip
    """L_SDS of pictures (B,3,H,W) in [-1,1], whose gradient is w(t) (eps_hat - eps) dz/dtheta; timesteps, then noise.

    Args: progress: of the run, in [0, 1].   generator: on the CPU.
    """
    latents = picture_latents(backbone, pictures)
    steps = backbone.noise_scheduler.config.num_train_timesteps
    timesteps = times.sample(len(latents), steps, generator, progress).to(latents.device)
    noise = torch.randn(latents.shape, generator=generator).to(latents)
    gradient = sds_gradient(
        backbone, latents.detach(), predict, timesteps=timesteps, noise=noise, weighting=weighting
    )  # fmt: skip
    return sds_loss(latents, gradient)
