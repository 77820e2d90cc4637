"""The three samplers, built from diffusers schedulers on the noise schedule of a backbone.

Every scheduler is built for noise prediction: a backbone trained for v is converted before (`Backbone.predict_noise`),
which is the same sampler, because noise and v are related linearly at a given noise level. So guidance rules, callbacks
and inversion always see epsilon.
"""

from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler

Scheduler = DDIMScheduler | DPMSolverMultistepScheduler | EulerDiscreteScheduler

# Latents are not bounded to [-1, 1], so the predicted clean latents are never clipped.
SCHEDULERS: dict[str, tuple[type, dict]] = {
    # As Stable Diffusion's own DDIM: 30 steps visit 958, 925, ..., 34, 1 and end at the noise level of timestep 0.
    "ddim": (
        DDIMScheduler,
        {"timestep_spacing": "leading", "steps_offset": 1, "clip_sample": False, "set_alpha_to_one": False},
    ),
    # DPM-Solver++(2M), midpoint: 30 steps visit 999, 966, ..., 33 and end without noise.
    "dpmpp": (
        DPMSolverMultistepScheduler,
        {"timestep_spacing": "linspace", "algorithm_type": "dpmsolver++", "solver_order": 2},
    ),
    # As SDXL's own Euler: the timesteps of DDIM, but ends without noise.
    "euler": (EulerDiscreteScheduler, {"timestep_spacing": "leading", "steps_offset": 1}),
}


def make_scheduler(name: str, noise_scheduler: DDPMScheduler, num_inference_steps: int) -> Scheduler:
    """Build a sampler on the betas of `noise_scheduler`, with its timesteps set.

    Leading spacing (ddim, euler) steps by floor(1000 / n), as in diffusers. Prefer an n that divides 1000 or is below
    about 50: n = 600 starts at timestep 600, where a sample should not be pure noise yet.

    Args:
        name: "ddim", "dpmpp" or "euler".
        noise_scheduler: the backbone's training scheduler (1000 timesteps for Stable Diffusion).
        num_inference_steps: number of network calls per image, 1 to 999.
    Raises: ValueError for another name or number of steps, or a schedule with zero terminal signal, where the noise
        prediction says nothing about the image.
    """
    if name not in SCHEDULERS:
        raise ValueError(f"scheduler must be one of {', '.join(SCHEDULERS)}, got {name!r}")
    most = noise_scheduler.config.num_train_timesteps - 1
    if not 1 <= num_inference_steps <= most:
        raise ValueError(f"num_inference_steps must be between 1 and {most}, got {num_inference_steps}")
    if float(noise_scheduler.alphas_cumprod[-1]) <= 1e-6:
        raise ValueError("the noise schedule has zero terminal SNR (rescale_betas_zero_snr); use one without it")
    scheduler_class, settings = SCHEDULERS[name]
    settings = {"prediction_type": "epsilon", "thresholding": False, **settings}
    if scheduler_class is EulerDiscreteScheduler:
        del settings["thresholding"]
    scheduler = scheduler_class.from_config(noise_scheduler.config, **settings)
    scheduler.set_timesteps(num_inference_steps)
    return scheduler


def input_scales(scheduler: Scheduler) -> list[float]:
    """Factor from variance-preserving latents to the scheduler's own at each step, and after the last: n + 1 values.

    Euler works on x / sqrt(alpha_cumprod), whose factor is sqrt(1 + sigma^2); the others work on x itself.
    """
    if isinstance(scheduler, EulerDiscreteScheduler):
        return (scheduler.sigmas.double() ** 2 + 1).sqrt().tolist()
    return [1.0] * (len(scheduler.timesteps) + 1)
