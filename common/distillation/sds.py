"""Score distillation sampling (Poole et al., DreamFusion, arXiv 2209.14988, Sec. 3).

Guidance has one convention here: eps_uncond + s (eps_cond - eps_uncond), s = 1 being off. DreamFusion and threestudio
write eps_cond + omega (eps_cond - eps_uncond): s = 1 + omega.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from common.backbones import Backbone, Conditioning

Weighting = Literal["sigma2", "uniform"]


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


def guided_noise(
    backbone: Backbone, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning,
    unconditional: Conditioning, guidance_scale: float,
) -> Tensor:  # fmt: skip
    """eps_uncond + s (eps_cond - eps_uncond), (B,4,h,w), from one batch of both.   conditionings: of B prompts each."""
    told = Conditioning.cat([unconditional, conditioning])
    without, with_prompt = backbone.predict_noise(noisy_latents.repeat(2, 1, 1, 1), timesteps.repeat(2), told).chunk(2)
    return without + guidance_scale * (with_prompt - without)


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
    backbone: Backbone, latents: Tensor, predict: Callable[[Tensor, Tensor], Tensor], *, timesteps: Tensor,
    noise: Tensor, weighting: Weighting = "sigma2",
) -> Tensor:  # fmt: skip
    """w(t) (eps_hat(z_t) - eps), (B,4,h,w): the gradient that SDS puts in the place of the loss's.

    Args:
        latents: z, of pictures (the latent form), or pictures themselves for a model of pixels.
        predict: (z_t, t) -> eps_hat with guidance, such as `guided_noise` with its other arguments bound.
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
