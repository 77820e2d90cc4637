"""Clips from prompts and seeds, and initial noise that remembers a clip."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from common.backbones.conditioning import Conditioning
from common.sampling.guidance import GuidanceRule, classifier_free
from common.sampling.sampler import draw_noise, sample_latents, seed_generators

if TYPE_CHECKING:
    from common.backbones.video import VideoBackbone


@torch.no_grad()
def sample_clips(
    backbone: VideoBackbone,
    prompt: str | Conditioning,
    *,
    seeds: Sequence[int],
    negative_prompt: str = "",
    batch_size: int = 4,
    num_inference_steps: int = 30,
    guidance_scale: float = 7.5,
    scheduler: str = "ddim",
    guidance: GuidanceRule = classifier_free,
    noise: Tensor | None = None,
) -> Tensor:
    """One clip per seed for one prompt; the same clip whatever the batch size (see `sampler.py`).

    Args:
        prompt: text, or a Conditioning of one clip.
        batch_size: clips per network call (which sees twice as many under guidance).
        noise: initial latents, (len(seeds),4,F,h,w), e.g. of `mixed_noise`; None = `clip_noise` of the seeds.
        others: as in `sample_latents`.
    Returns: (len(seeds),3,F,H,W) in [-1,1], float32 on CPU.
    """
    seeds = list(seeds)
    if batch_size < 1 or not seeds:
        raise ValueError(f"batch_size and the number of seeds must be at least 1, got {batch_size} and {len(seeds)}")
    noise = clip_noise(backbone, seeds) if noise is None else noise
    if len(noise) != len(seeds):
        raise ValueError(f"noise holds {len(noise)} clips but there are {len(seeds)} seeds")
    conditioning = prompt if isinstance(prompt, Conditioning) else backbone.encode_prompt(prompt)
    negative = backbone.encode_prompt(negative_prompt) if guidance_scale != 1 else None
    clips = []
    for start in range(0, len(seeds), batch_size):
        part = slice(start, start + batch_size)
        latents = sample_latents(
            backbone, conditioning, negative, seeds=seeds[part], num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale, scheduler=scheduler, guidance=guidance, latents=noise[part],
        )  # fmt: skip
        clips.append(backbone.decode_clips(latents).float().cpu())
    return torch.cat(clips)


def clip_noise(backbone: VideoBackbone, seeds: Sequence[int]) -> Tensor:
    """Initial noise of clips, (len(seeds),4,F,h,w), float32 on CPU: standard normal, in part the same in all frames.

    The part is `backbone.noise_share`: a network gets the noise that it was trained with. At 0 it is `seeded_noise`.
    """
    generators = seed_generators(seeds)
    own = draw_noise(generators, backbone.latent_shape)
    channels, _, height, width = backbone.latent_shape
    return backbone.mix_noise(own, draw_noise(generators, (channels, 1, height, width)))


def mixed_noise(backbone: VideoBackbone, inverted: Tensor, seeds: Sequence[int], share: float) -> Tensor:
    """Initial noise that keeps a share of a clip's own: sqrt(p) inverted + sqrt(1 - p) noise, (len(seeds),4,F,h,w).

    Both parts have unit variance and are independent, so the mixture has unit variance too (MotionDirector and VMC call
    it the noise prior).

    Args:
        inverted: DDIM inversion of a clip, (1,4,F,h,w), `common.sampling.ddim_invert`.
        seeds: of the fresh noise.
        share: p in [0, 1]; 0 = fresh noise alone, 1 = the inverted noise alone, for all seeds.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share must be in [0, 1], got {share}")
    fresh = clip_noise(backbone, seeds).to(inverted)
    if fresh.shape[1:] != inverted.shape[1:]:
        own = backbone.latent_shape
        raise ValueError(f"the inverted clip is {tuple(inverted.shape[1:])}, but {backbone.name} makes {own}")
    return share**0.5 * inverted + (1 - share) ** 0.5 * fresh
