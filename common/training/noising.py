"""The forward process of one training batch: timestep, noise, noisy latents and what the network should answer."""

from collections.abc import Callable
from typing import TYPE_CHECKING, TypedDict

from torch import Tensor

from common.training.seeding import seeded_randn, seeded_timesteps

if TYPE_CHECKING:
    from common.backbones import Backbone

# (sample_keys (B,), seed, num_train_timesteps) -> timesteps (B,) int64 in [0, num_train_timesteps)
TimestepSampler = Callable[[Tensor, int, int], Tensor]


class NoisedBatch(TypedDict):
    """One noised batch; all on the device of the latents."""

    noisy_latents: Tensor  # (B, 4, h, w), video (B, 4, F, h, w)
    timesteps: Tensor  # (B,) int64
    noise: Tensor  # as noisy_latents
    target: Tensor  # as noisy_latents; the noise, or the velocity for a v-prediction backbone


def uniform_timesteps(sample_keys: Tensor, seed: int, num_train_timesteps: int) -> Tensor:
    """Every timestep equally likely."""
    return seeded_timesteps(sample_keys, seed=seed, high=num_train_timesteps)


def timesteps_between(low: int, high: int) -> TimestepSampler:
    """A sampler of timesteps low <= t < high, uniform."""

    def sampler(sample_keys: Tensor, seed: int, num_train_timesteps: int) -> Tensor:
        if not 0 <= low < high <= num_train_timesteps:
            raise ValueError(f"need 0 <= low < high <= {num_train_timesteps}, got low={low}, high={high}")
        return seeded_timesteps(sample_keys, seed=seed, low=low, high=high)

    return sampler


def training_noise(
    backbone: "Backbone", latents: Tensor, sample_keys: Tensor, *, seed: int, stream: str = "noise"
) -> Tensor:
    """Standard normal noise like the latents; of clips, frames have the backbone's `noise_share` in common.

    Args: as of `noise_batch`, and `stream`, a name: other streams give other noise.
    """
    noise = seeded_randn(sample_keys, tuple(latents.shape[1:]), seed=seed, stream=stream).to(latents)
    if latents.ndim != 5:
        return noise
    channels, _, height, width = latents.shape[1:]
    shared = seeded_randn(sample_keys, (channels, 1, height, width), seed=seed, stream=f"{stream}, shared")
    return backbone.mix_noise(noise, shared.to(latents))


def noise_batch(
    backbone: "Backbone",
    latents: Tensor,
    sample_keys: Tensor,
    *,
    seed: int,
    timestep_sampler: TimestepSampler = uniform_timesteps,
) -> NoisedBatch:
    """Draw timesteps and noise for a batch and noise it.

    Args:
        backbone: supplies the noise schedule and, for clips, what their noise is like.
        latents: clean scaled latents, (B, 4, h, w) or (B, 4, F, h, w).
        sample_keys: (B,) int64; they alone, with `seed`, decide what is drawn.
        timestep_sampler: see `TimestepSampler`.
    """
    if len(sample_keys) != len(latents):
        raise ValueError(f"need one sample key per sample, got {len(sample_keys)} keys for {len(latents)} latents")
    timesteps = timestep_sampler(sample_keys, seed, backbone.noise_scheduler.config.num_train_timesteps)
    timesteps = timesteps.to(latents.device)
    noise = training_noise(backbone, latents, sample_keys, seed=seed)
    return NoisedBatch(
        noisy_latents=backbone.add_noise(latents, noise, timesteps),
        timesteps=timesteps,
        noise=noise,
        target=backbone.training_target(latents, noise, timesteps),
    )
