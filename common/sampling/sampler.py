"""The sampling loop: latents from conditionings and seeds.

What is exact: all random numbers of an image come from its own CPU generator, in the order initial noise, then one draw
per step where eta > 0. So they are the same bits whatever the batch size, the order, the device, and whichever images
are made beside it; they are also what a diffusers pipeline draws from `generator=[torch.Generator().manual_seed(s)]`.
What is not: convolutions and matrix products may round differently at another batch size (about 1e-6 per call), so the
pictures agree to about 1e-4, not to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from common.backbones.conditioning import Conditioning
from common.sampling.guidance import GuidanceRule, classifier_free
from common.sampling.schedulers import input_scales, make_scheduler

if TYPE_CHECKING:
    from common.backbones import Backbone

OnStep = Callable[[int, int, Tensor, Tensor], Tensor | None]


def seed_generators(seeds: Sequence[int]) -> list[torch.Generator]:
    """One CPU generator per image."""
    if isinstance(seeds, int) or len(seeds) == 0:
        raise ValueError(f"seeds must be a list with one int per image, got {seeds!r}")
    return [torch.Generator().manual_seed(int(seed)) for seed in seeds]


def draw_noise(generators: Sequence[torch.Generator], shape: Sequence[int]) -> Tensor:
    """The next standard normal draw of each generator, (len(generators), *shape), float32 on CPU."""
    return torch.stack([torch.randn(tuple(shape), generator=generator) for generator in generators])


def seeded_noise(backbone: Backbone, seeds: Sequence[int]) -> Tensor:
    """The initial noise that `sample_latents` uses for these seeds, (B,4,h,w), float32 on CPU."""
    return draw_noise(seed_generators(seeds), backbone.latent_shape)


def loop_dtype(backbone: Backbone) -> torch.dtype:
    """Latents stay in at least float32 between network calls, also for half-precision networks."""
    return torch.promote_types(backbone.dtype, torch.float32)


def guided_noise(
    backbone: Backbone,
    latents: Tensor,
    timestep: int | Tensor,
    network_conditioning: Conditioning,
    guidance_scale: float,
    guidance: GuidanceRule = classifier_free,
) -> Tensor:
    """One network call and the guidance rule; differentiable.

    Args:
        latents: noisy latents at `timestep`, (B,4,h,w), variance preserving.
        timestep: of all, or one each, (B,), for a rule that does not look at it.
        network_conditioning: batch 2B, the B unconditional ones first; batch B when guidance_scale is 1.
    Returns: guided noise prediction, (B,4,h,w), in the latents' dtype.
    """
    network_input = latents.to(backbone.dtype)
    timesteps = torch.as_tensor(timestep, device=latents.device).expand(len(latents))
    if guidance_scale != 1:
        network_input, timesteps = torch.cat([network_input, network_input]), timesteps.repeat(2)
    noise_pred = backbone.predict_noise(network_input, timesteps, network_conditioning).to(latents.dtype)
    if guidance_scale == 1:
        return noise_pred
    noise_uncond, noise_cond = noise_pred.chunk(2)
    return guidance(noise_uncond, noise_cond, timestep, guidance_scale)


def network_conditionings(
    backbone: Backbone,
    conditioning: Conditioning | Sequence[Conditioning],
    negative_conditioning: Conditioning | Sequence[Conditioning] | None,
    *,
    batch: int,
    num_inference_steps: int,
    guidance_scale: float,
) -> list[Conditioning]:
    """What the network is told at each step: one entry per step (the same object where nothing changes).

    Raises: ValueError if a conditioning is neither for one image nor for `batch`, or a list has not one per step.
    """
    parts = {"conditioning": conditioning}
    if guidance_scale != 1:
        if negative_conditioning is None:
            with torch.no_grad():
                negative_conditioning = backbone.encode_prompt("")
        parts = {"negative_conditioning": negative_conditioning, **parts}
    for name, part in parts.items():
        if not isinstance(part, Conditioning) and len(part) != num_inference_steps:
            raise ValueError(f"{name} has {len(part)} entries; a list needs one per step, {num_inference_steps}")

    def at_step(step: int) -> Conditioning:
        now = {name: part if isinstance(part, Conditioning) else part[step] for name, part in parts.items()}
        whole = [_for_batch(part, batch, name) for name, part in now.items()]
        return whole[0] if len(whole) == 1 else Conditioning.cat(whole)

    if all(isinstance(part, Conditioning) for part in parts.values()):
        return [at_step(0)] * num_inference_steps
    return [at_step(step) for step in range(num_inference_steps)]


def _for_batch(conditioning: Conditioning, batch: int, name: str) -> Conditioning:
    if conditioning.batch_size == batch:
        return conditioning
    if conditioning.batch_size == 1:
        return conditioning.repeat(batch)
    raise ValueError(f"{name} is for {conditioning.batch_size} images but there are {batch} seeds; give 1 or {batch}")


@torch.no_grad()  # not inference_mode: its tensors could not be used in a later training step
def sample_latents(
    backbone: Backbone,
    conditioning: Conditioning | Sequence[Conditioning],
    negative_conditioning: Conditioning | Sequence[Conditioning] | None = None,
    *,
    seeds: Sequence[int],
    num_inference_steps: int = 30,
    guidance_scale: float = 7.5,
    scheduler: str = "ddim",
    eta: float = 0.0,
    guidance: GuidanceRule = classifier_free,
    on_step: OnStep | None = None,
    latents: Tensor | None = None,
    start_step: int = 0,
) -> Tensor:
    """Denoise one latent image per seed.

    Args:
        conditioning: for len(seeds) images or for one, which then serves all; or a list with one per step.
        negative_conditioning: the same; None = the empty prompt. Not used when guidance_scale is 1.
        seeds: one int per image.
        guidance_scale: s in uncond + s * (cond - uncond); 1 = off, one network pass.
        scheduler: "ddim", "dpmpp" or "euler" (`schedulers.py` says which timesteps each visits).
        eta: DDIM only, in [0, 1]; 0 = deterministic, 1 = as much fresh noise per step as DDPM.
        guidance: rule of `guidance.py`.
        on_step: called after each step as on_step(step_index, timestep, latents, noise_pred) with the step's index in
            the whole schedule, the timestep (int) that the network saw, the new latents and the guided noise
            prediction. What it returns replaces the latents; None keeps them. The latents are variance preserving for
            every scheduler.
        latents: (B,4,h,w), starting latents instead of the seeds' noise; variance preserving, at the noise level of
            timestep number `start_step`.
        start_step: number of steps of the schedule to skip, 0..num_inference_steps - 1; needs `latents` when not 0.
    Returns: clean latents, (B,4,h,w), on the backbone's device, float32 also for a half-precision backbone.
    """
    generators = seed_generators(seeds)
    stepper = make_scheduler(scheduler, backbone.noise_scheduler, num_inference_steps)
    if eta != 0 and scheduler != "ddim":
        raise ValueError(f"eta is a setting of ddim only, got eta={eta} with scheduler {scheduler!r}")
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must be in [0, 1], got {eta}")
    if start_step and latents is None:
        raise ValueError(f"start_step {start_step} needs latents at the noise level of that step")
    if not 0 <= start_step < num_inference_steps:
        raise ValueError(f"start_step must be in 0..{num_inference_steps - 1}, got {start_step}")
    if latents is not None and len(latents) != len(generators):
        raise ValueError(f"latents hold {len(latents)} images but there are {len(generators)} seeds")

    shape = backbone.latent_shape if latents is None else latents.shape[1:]
    noise = draw_noise(generators, shape)  # drawn also when not needed, so that eta's draws never repeat it
    dtype = loop_dtype(backbone)
    latents = (noise if latents is None else latents).to(backbone.device, dtype)
    conditionings = network_conditionings(
        backbone,
        conditioning,
        negative_conditioning,
        batch=len(generators),
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
    )
    scales = input_scales(stepper)
    timesteps = [int(timestep) for timestep in stepper.timesteps]
    for step in range(start_step, num_inference_steps):
        sample = latents if scales[step] == 1 else latents * scales[step]
        network_input = stepper.scale_model_input(sample, stepper.timesteps[step])
        noise_pred = guided_noise(
            backbone, network_input, timesteps[step], conditionings[step], guidance_scale, guidance
        )
        fresh = {}
        if scheduler == "ddim" and eta:
            fresh = {"eta": eta, "variance_noise": draw_noise(generators, shape).to(backbone.device, dtype)}
        latents = stepper.step(noise_pred, stepper.timesteps[step], sample, return_dict=False, **fresh)[0]
        if scales[step + 1] != 1:
            latents = latents / scales[step + 1]
        if on_step is not None:
            replaced = on_step(step, timesteps[step], latents, noise_pred)
            latents = latents if replaced is None else replaced
    return latents


def img2img(
    backbone: Backbone,
    latents: Tensor,
    conditioning: Conditioning | Sequence[Conditioning],
    negative_conditioning: Conditioning | Sequence[Conditioning] | None = None,
    *,
    seeds: Sequence[int],
    strength: float,
    num_inference_steps: int = 30,
    scheduler: str = "ddim",
    **settings,
) -> Tensor:
    """Noise clean latents part of the way and denoise them again (SDEdit, arXiv 2108.01073).

    Args:
        latents: clean latents, (B,4,h,w), e.g. `backbone.encode_images(pixel_values)`.
        strength: share of the schedule to run, in (0, 1]; as in diffusers, the last int(steps * strength) steps run.
        settings: guidance_scale, eta, guidance, on_step, as in `sample_latents`.
    Returns: clean latents, (B,4,h,w).
    """
    if not 0 < strength <= 1:
        raise ValueError(f"strength must be in (0, 1], got {strength}")
    steps_to_run = int(num_inference_steps * strength)
    if steps_to_run == 0:
        raise ValueError(f"strength {strength} of {num_inference_steps} steps leaves none to run; raise one of them")
    start_step = num_inference_steps - steps_to_run
    stepper = make_scheduler(scheduler, backbone.noise_scheduler, num_inference_steps)
    noise = draw_noise(seed_generators(seeds), latents.shape[1:]).to(latents)
    if len(noise) != len(latents):
        raise ValueError(f"latents hold {len(latents)} images but there are {len(noise)} seeds")
    timesteps = torch.full((len(latents),), int(stepper.timesteps[start_step]), device=latents.device)
    return sample_latents(
        backbone,
        conditioning,
        negative_conditioning,
        seeds=seeds,
        num_inference_steps=num_inference_steps,
        scheduler=scheduler,
        latents=backbone.add_noise(latents, noise, timesteps),
        start_step=start_step,
        **settings,
    )
