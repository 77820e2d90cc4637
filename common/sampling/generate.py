"""Images from prompts and seeds, in batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from tqdm import tqdm

from common.backbones.conditioning import Conditioning
from common.sampling.guidance import GuidanceRule, classifier_free
from common.sampling.sampler import OnStep, sample_latents

if TYPE_CHECKING:
    from common.backbones import Backbone


@torch.no_grad()
def sample_images(
    backbone: Backbone,
    prompts: str | Sequence[str] | Conditioning,
    *,
    seeds: Sequence[int],
    negative_prompt: str | Conditioning = "",
    batch_size: int = 8,
    num_inference_steps: int = 30,
    guidance_scale: float = 7.5,
    scheduler: str = "ddim",
    eta: float = 0.0,
    guidance: GuidanceRule = classifier_free,
    on_step: OnStep | None = None,
    progress: bool = False,
) -> Tensor:
    """One image per pair of prompt and seed; the same image whatever the batch size (see `sampler.py`).

    Args:
        prompts: one prompt for all seeds, or one prompt per seed; a Conditioning for one image or for len(seeds).
        seeds: one int per image. Every prompt with every seed is
            `prompts=[p for p in prompts for _ in seeds], seeds=list(seeds) * len(prompts)`.
        negative_prompt: one for all images; encoded once. "" is the encoded empty prompt, also for SDXL, whose
            pipeline takes zeros where no negative prompt is given.
        batch_size: images per network call (which sees twice as many under guidance).
        on_step: as in `sample_latents`, for each batch.
        progress: show a bar that counts steps of all batches.
    Other arguments as in `sample_latents`.
    Returns: pixel_values, (len(seeds),3,H,W) in [-1,1], float32 on CPU.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    seeds = list(seeds)
    if isinstance(prompts, str):
        prompts = [prompts] * len(seeds)
    elif isinstance(prompts, Conditioning) and prompts.batch_size == 1:
        prompts = prompts.repeat(len(seeds)) if seeds else prompts
    num_prompts = prompts.batch_size if isinstance(prompts, Conditioning) else len(prompts)
    if num_prompts != len(seeds) or not seeds:
        raise ValueError(f"{num_prompts} prompts and {len(seeds)} seeds: give one seed per prompt, or a single prompt")
    if isinstance(negative_prompt, Conditioning):
        negative = negative_prompt
    else:
        negative = backbone.encode_prompt(negative_prompt) if guidance_scale != 1 else None

    starts = range(0, len(seeds), batch_size)
    images, encoded = [], {}
    with tqdm(total=len(starts) * num_inference_steps, unit="step", disable=not progress) as bar:

        def count_step(step_index: int, timestep: int, latents: Tensor, noise_pred: Tensor) -> Tensor | None:
            bar.update()
            return None if on_step is None else on_step(step_index, timestep, latents, noise_pred)

        for start in starts:
            part = slice(start, min(start + batch_size, len(seeds)))
            if isinstance(prompts, Conditioning):
                conditioning = prompts[part]
            else:  # each distinct prompt alone and once, so that an embedding does not depend on its neighbours
                encoded = {p: encoded[p] if p in encoded else backbone.encode_prompt(p) for p in set(prompts[part])}
                conditioning = Conditioning.cat([encoded[prompt] for prompt in prompts[part]])
            latents = sample_latents(
                backbone,
                conditioning,
                negative,
                seeds=seeds[part],
                num_inference_steps=num_inference_steps,
                guidance_scale=guidance_scale,
                scheduler=scheduler,
                eta=eta,
                guidance=guidance,
                on_step=count_step,
            )
            images.append(backbone.decode_latents(latents).float().cpu())
    return torch.cat(images)
