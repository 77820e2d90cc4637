"""Denoising losses, one value per sample, so that methods weight and combine them in plain sight."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from common.training.noising import NoisedBatch, training_noise

if TYPE_CHECKING:
    from diffusers import DDPMScheduler

    from common.backbones import Backbone, Conditioning


def per_sample_mse(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of each sample, (B,) float32, computed in float32."""
    return F.mse_loss(prediction.float(), target.float(), reduction="none").flatten(1).mean(1)


def masked_mse(prediction: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Mean squared error of each sample inside its mask, (B,) float32.

    Args:
        prediction, target: (B, C, h, w).
        mask: weights >= 0, (B, 1, H, W); averaged down to (h, w) if larger. The error is divided by the mask's area, so
            a small mask does not make the loss small; a mask of ones gives `per_sample_mse`.
    Raises: ValueError if some mask is zero everywhere.
    """
    mask = mask.float()
    if mask.shape[-2:] != prediction.shape[-2:]:
        mask = F.interpolate(mask, size=prediction.shape[-2:], mode="area")
    area = mask.expand_as(prediction).flatten(1).sum(1)
    if not area.min() > 0:
        raise ValueError(f"the mask of sample {int(area.argmin())} of the batch is zero everywhere")
    squared_error = F.mse_loss(prediction.float(), target.float(), reduction="none")
    return (squared_error * mask).flatten(1).sum(1) / area


def denoising_loss(
    backbone: "Backbone", noised: NoisedBatch, conditioning: "Conditioning", *, mask: Tensor | None = None
) -> Tensor:
    """The loss a diffusion backbone was trained with, ||target - model(z_t, t, c)||^2 averaged; (B,).

    Args:
        noised: what `noise_batch` returned; its target is the noise, or the velocity for a v-prediction backbone.
        conditioning: of B samples.
        mask: restricts the loss to a region, see `masked_mse`.
    """
    model_pred = backbone.predict(noised["noisy_latents"], noised["timesteps"], conditioning)
    if mask is None:
        return per_sample_mse(model_pred, noised["target"])
    return masked_mse(model_pred, noised["target"], mask)


def signal_to_noise(noise_scheduler: "DDPMScheduler", timesteps: Tensor) -> Tensor:
    """SNR(t) = alpha_bar_t / (1 - alpha_bar_t), (B,) float32."""
    alpha_bar = noise_scheduler.alphas_cumprod.to(timesteps.device)[timesteps].float()
    return alpha_bar / (1 - alpha_bar)


def min_snr_weights(noise_scheduler: "DDPMScheduler", timesteps: Tensor, *, gamma: float = 5.0) -> Tensor:
    """Min-SNR-gamma loss weights (Hang et al., arXiv 2303.09556, Sec. 3.4), (B,) float32, in (0, 1].

    min(SNR, gamma) / SNR for noise prediction, min(SNR, gamma) / (SNR + 1) for v-prediction.

    Raises: ValueError for another prediction type.
    """
    snr = signal_to_noise(noise_scheduler, timesteps)
    prediction_type = noise_scheduler.config.prediction_type
    if prediction_type == "epsilon":
        return torch.clamp(snr, max=gamma) / snr
    if prediction_type == "v_prediction":
        return torch.clamp(snr, max=gamma) / (snr + 1)
    raise ValueError(f"min-SNR weights are defined for epsilon and v_prediction, got {prediction_type!r}")


@torch.no_grad()
def fixed_noise_validation(
    backbone: "Backbone",
    latents: Tensor,
    conditioning: "Conditioning | Callable[[Tensor], Conditioning]",
    *,
    timesteps: tuple[int, ...] = tuple(range(50, 1000, 100)),
    seed: int = 0,
) -> float:
    """Denoising loss with noise and timesteps that never change, so that two values differ only by the weights.

    Args:
        latents: clean latents, (B, 4, h, w) or (B, 4, F, h, w).
        conditioning: of the B samples, or of one sample that serves all; where it depends on the timestep, a function
            of the timesteps, (B,) int64 and all equal, that gives either.
        timesteps: the grid; each sample is noised at each of them. The network is called once per timestep.
    Returns: the mean over samples and timesteps.
    """
    losses = []
    for timestep in timesteps:
        keys = torch.arange(len(latents)) * 1000 + timestep
        noise = training_noise(backbone, latents, keys, seed=seed, stream="validation")
        t = torch.full((len(latents),), timestep, device=latents.device)
        noised = NoisedBatch(
            noisy_latents=backbone.add_noise(latents, noise, t),
            timesteps=t,
            noise=noise,
            target=backbone.training_target(latents, noise, t),
        )
        told = conditioning(t) if callable(conditioning) else conditioning
        if told.batch_size == 1:
            told = told.repeat(len(latents))
        losses.append(denoising_loss(backbone, noised, told))
    return torch.stack(losses).mean().item()
