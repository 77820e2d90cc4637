"""Steps against the formulas of the papers in numpy, and against the exact solution for Gaussian data."""

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler

from common.sampling.sampler import sample_latents
from common.sampling.schedulers import SCHEDULERS, input_scales, make_scheduler


@pytest.fixture
def noise_scheduler():
    return DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")


def sd_alphas() -> np.ndarray:
    """alphas_cumprod of Stable Diffusion, from its definition."""
    return np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)


@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
def test_ddim_step_is_eq_12_and_16(noise_scheduler, eta):
    """arXiv 2010.02502, Eq. 12 with sigma of Eq. 16, at the first, a middle and the last of 20 steps."""
    stepper = make_scheduler("ddim", noise_scheduler, 20)
    rng = np.random.default_rng(0)
    latents, noise_pred, fresh = rng.normal(size=(3, 2, 4, 3, 3)) * 3
    alphas = sd_alphas()
    for timestep, previous in ((951, 901), (501, 451), (1, 0)):
        a, b = alphas[timestep], alphas[previous]
        sigma = eta * np.sqrt((1 - b) / (1 - a)) * np.sqrt(1 - a / b)
        clean = (latents - np.sqrt(1 - a) * noise_pred) / np.sqrt(a)
        expected = np.sqrt(b) * clean + np.sqrt(1 - b - sigma**2) * noise_pred + sigma * fresh
        given = [torch.from_numpy(array) for array in (noise_pred, latents, fresh)]
        actual = stepper.step(given[0], timestep, given[1], eta=eta, variance_noise=given[2]).prev_sample
        np.testing.assert_allclose(actual.numpy(), expected, rtol=2e-4, atol=2e-4)


def test_timesteps_are_the_documented_ones(noise_scheduler):
    """No clipping, Stable Diffusion's final level, and timesteps that a table lookup at an integer can serve."""
    ddim, dpmpp, euler = (make_scheduler(name, noise_scheduler, 30) for name in ("ddim", "dpmpp", "euler"))
    assert ddim.timesteps.tolist() == list(range(958, 0, -33)) == euler.timesteps.tolist()
    assert dpmpp.timesteps.tolist()[:2] == [999, 966] and dpmpp.timesteps.tolist()[-1] == 33
    assert not ddim.config.clip_sample and ddim.final_alpha_cumprod == ddim.alphas_cumprod[0]
    scales = 1 / np.sqrt(sd_alphas()[euler.timesteps.long().numpy()])
    np.testing.assert_allclose(input_scales(euler), [*scales, 1.0], rtol=1e-4)
    assert input_scales(ddim) == [1.0] * 31


def test_unknown_scheduler_names_the_choices(noise_scheduler):
    with pytest.raises(ValueError, match="ddim, dpmpp, euler, got 'plms'"):
        make_scheduler("plms", noise_scheduler, 10)


@pytest.mark.parametrize("steps", [0, 1000])
def test_number_of_steps_is_checked(noise_scheduler, steps):
    with pytest.raises(ValueError, match=f"between 1 and 999, got {steps}"):
        make_scheduler("ddim", noise_scheduler, steps)


def test_zero_terminal_snr_is_refused():
    with pytest.raises(ValueError, match="zero terminal SNR"):
        make_scheduler("ddim", DDPMScheduler(beta_schedule="scaled_linear", rescale_betas_zero_snr=True), 10)


@pytest.mark.parametrize(("name", "order"), [("ddim", 1), ("euler", 1), ("dpmpp", 2)])
def test_error_to_the_exact_solution_falls_with_the_order_of_the_solver(gaussian_backbone, name, order):
    """For Gaussian data the quantile of the noisy marginal is constant along the ODE: every point is known.

    Half-way the error falls with the solver's order. At the end all are first order: the last step is a DDIM step.
    """
    quantile = torch.linspace(-2, 2, 8, dtype=torch.float64).reshape(8, 1, 1, 1)
    half_way, end = [], []
    for steps in (25, 50, 100, 200):
        timesteps = make_scheduler(name, gaussian_backbone.noise_scheduler, steps).timesteps.long().tolist()
        levels = [gaussian_backbone.alpha(t) for t in timesteps]
        levels.append(gaussian_backbone.alpha(0) if name == "ddim" else 1.0)
        exact = [gaussian_backbone.unstandardise(quantile, level) for level in levels]
        errors = []
        sample_latents(
            gaussian_backbone,
            gaussian_backbone.encode_prompt(""),
            seeds=[0] * 8,
            num_inference_steps=steps,
            guidance_scale=1,
            scheduler=name,
            latents=exact[0],
            on_step=lambda i, t, x, n, exact=exact, errors=errors: errors.append((x - exact[i + 1]).abs().max().item()),
        )
        half_way.append(errors[steps // 2 - 1])
        end.append(errors[-1])
    for errors, expected in ((half_way, order), (end, 1)):
        ratios = [coarse / fine for coarse, fine in zip(errors[:-1], errors[1:], strict=True)]
        assert errors[0] < 0.1 and min(ratios) > 0.85 * 2**expected, errors


def test_every_scheduler_samples_the_gaussian(gaussian_backbone):
    """Mean and spread of 64 x 256 entries; starting from a mean of 0 instead of sqrt(alpha) mean costs 0.02 of it."""
    for name in SCHEDULERS:
        latents = sample_latents(
            gaussian_backbone,
            gaussian_backbone.encode_prompt(""),
            seeds=range(64),
            num_inference_steps=100,
            guidance_scale=1,
            scheduler=name,
            latents=torch.randn(64, 4, 8, 8, generator=torch.Generator().manual_seed(1)),
        )
        assert abs(latents.mean().item() - 0.7) < 0.03 and abs(latents.std().item() - 0.4) < 0.02, name
