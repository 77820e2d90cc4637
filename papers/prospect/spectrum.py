"""The observation behind the stages: generation goes from low to high frequencies (power of predicted pictures)."""

import numpy as np
import torch
from torch import Tensor

from common.backbones import Backbone, Conditioning
from common.sampling import make_scheduler, seeded_noise
from common.sampling.sampler import sample_latents


def predicted_clean(latents: Tensor, noise_pred: Tensor, alpha_bar: Tensor) -> Tensor:
    """z_0 as the network sees it at one step: (z_t - sqrt(1 - a_t) eps) / sqrt(a_t); latents (B,4,h,w), a_t scalar."""
    return (latents - (1 - alpha_bar).sqrt() * noise_pred) / alpha_bar.sqrt()


def radial_power(images: Tensor) -> Tensor:
    """Power of the gray pictures at each whole frequency, in cycles per picture: (B,3,S,S) -> (B,S/2 + 1) float64.

    Entry k sums |FFT|^2 / S^4 over the frequencies whose length rounds to k; the corners beyond S/2 are left out.
    """
    size = images.shape[-1]
    frequency = torch.fft.fftfreq(size, 1 / size, dtype=torch.float64)
    radius = (frequency[:, None] ** 2 + frequency**2).sqrt().round().long()  # (S,S)
    power = torch.fft.fft2(images.double().mean(1)).abs().square() / size**4
    bins = torch.zeros(len(images), size, dtype=torch.float64)
    bins.index_add_(1, radius.flatten(), power.flatten(1))
    return bins[:, : size // 2 + 1]


def high_frequency_power(power: Tensor) -> Tensor:
    """Power above half the highest frequency, (B,), of `radial_power` (B,K)."""
    return power[:, power.shape[1] // 2 + 1 :].sum(1)


def mean_frequency(power: Tensor) -> Tensor:
    """Centre of mass of the power without the mean brightness, in cycles per picture, (B,).   power: (B,K)."""
    rest = power[:, 1:]
    return (rest * torch.arange(1, power.shape[1], dtype=power.dtype)).sum(1) / rest.sum(1)


@torch.no_grad()
def predicted_pictures(
    backbone: Backbone,
    conditioning: Conditioning,
    *,
    seeds: list[int],
    num_inference_steps: int,
    guidance_scale: float,
) -> tuple[list[int], Tensor]:
    """The predicted picture at each step: timesteps, falling, and (steps,B,3,H,W) in [-1,1]."""
    alpha_bar = backbone.noise_scheduler.alphas_cumprod
    latents, pictures = seeded_noise(backbone, seeds).to(backbone.device), []

    def on_step(step: int, timestep: int, new_latents: Tensor, noise_pred: Tensor) -> None:
        nonlocal latents
        clean = predicted_clean(latents, noise_pred, alpha_bar[timestep].to(latents))
        pictures.append(backbone.decode_latents(clean.to(backbone.dtype)).float().cpu())
        latents = new_latents

    settings = {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale}
    sample_latents(backbone, conditioning, seeds=seeds, on_step=on_step, **settings)
    timesteps = make_scheduler("ddim", backbone.noise_scheduler, num_inference_steps).timesteps
    return [int(t) for t in timesteps], torch.stack(pictures)


def growth_of_detail(pictures: Tensor) -> list[float]:
    """High-frequency power of each step's predicted picture, mean over the seeds.   pictures: (steps,B,3,S,S)."""
    return [high_frequency_power(radial_power(images)).mean().item() for images in pictures]


def frequency_of_stages(timesteps: list[int], pictures: Tensor, stage_starts: list[int]) -> dict[int, float]:
    """Mean frequency of what each stage adds: of the difference between the pictures at its end and at its start.

    The end of a stage is the first step of the next one in generation, and for stage 0 the last step of all. A stage
    without a step adds nothing and is left out, as is a last stage with a single step.

    Args:
        timesteps, pictures: of `predicted_pictures`.   stage_starts: first timestep of each stage, ascending.
    Returns: stage -> cycles per picture.
    """
    stages = np.searchsorted(stage_starts, timesteps, side="right") - 1  # of each step, falling
    found = {}
    for stage in sorted(set(stages.tolist()), reverse=True):
        steps = np.flatnonzero(stages == stage)
        first, last = int(steps[0]), min(int(steps[-1]) + 1, len(timesteps) - 1)
        if last > first:
            power = radial_power(pictures[last] - pictures[first])
            found[stage] = mean_frequency(power).mean().item()
    return found
