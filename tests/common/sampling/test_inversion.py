"""DDIM inversion against the equations, against diffusers, and against the exact solution for Gaussian data."""

import numpy as np
import pytest
import torch
from diffusers import DDIMInverseScheduler

from common.sampling.inversion import (
    ddim_invert,
    ddim_levels,
    ddim_reconstruct,
    ddim_step,
    ddim_trajectory,
    inversion_error,
)
from common.sampling.null_text import optimise_null_text


def test_step_is_the_closed_form_and_its_own_inverse():
    """x_b / sqrt(b) - x_a / sqrt(a) = (sqrt(1/b - 1) - sqrt(1/a - 1)) noise (arXiv 2010.02502, Eq. 13)."""
    rng = np.random.default_rng(0)
    latents, noise = rng.normal(size=(2, 3, 4, 2, 2))
    a, b = 0.2, 0.9
    expected = np.sqrt(b) * (latents / np.sqrt(a) + (np.sqrt(1 / b - 1) - np.sqrt(1 / a - 1)) * noise)
    actual = ddim_step(torch.from_numpy(latents), torch.from_numpy(noise), a, b)
    np.testing.assert_allclose(actual.numpy(), expected, rtol=1e-12)
    back = ddim_step(actual, torch.from_numpy(noise), b, a)
    np.testing.assert_allclose(back.numpy(), latents, rtol=1e-12)


def test_trajectory_equals_the_diffusers_inverse_scheduler(small_backbone):
    cond = small_backbone.encode_prompt("a dog")
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    trajectory = ddim_trajectory(small_backbone, latents, cond, num_inference_steps=10)
    stepper = DDIMInverseScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    stepper.set_timesteps(10)
    expected = [latents]
    with torch.no_grad():
        for timestep in stepper.timesteps:
            noise_pred = small_backbone.predict_noise(expected[-1], timestep[None], cond)
            expected.append(stepper.step(noise_pred, timestep, expected[-1]).prev_sample)
    torch.testing.assert_close(trajectory, torch.stack(expected), rtol=1e-4, atol=1e-5)
    assert torch.equal(trajectory[0], latents)
    final = ddim_invert(small_backbone, latents, cond, num_inference_steps=10)
    assert torch.equal(final, trajectory[-1])


def test_levels_are_those_of_sampling(small_backbone):
    timesteps, levels = ddim_levels(small_backbone, 4)
    alphas = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
    assert timesteps == [751, 501, 251, 1]
    np.testing.assert_allclose(levels, alphas[[751, 501, 251, 1, 0]], rtol=1e-4)


def test_gaussian_inversion_and_round_trip_errors_fall_with_the_steps(gaussian_backbone):
    """First order: halving the step halves the error to the exact noise, and the round trip's."""
    cond = gaussian_backbone.encode_prompt("")
    latents = torch.linspace(-0.5, 1.9, 8, dtype=torch.float64).reshape(8, 1, 1, 1)
    inversion_errors, round_trip_errors = [], []
    for steps in (25, 50, 100, 200):
        noise = ddim_invert(gaussian_backbone, latents, cond, num_inference_steps=steps)
        last = gaussian_backbone.alpha(1000 // steps * (steps - 1) + 1)
        quantile = gaussian_backbone.standardise(latents, gaussian_backbone.alpha(0))
        inversion_errors.append((noise - gaussian_backbone.unstandardise(quantile, last)).abs().max().item())
        again = ddim_reconstruct(gaussian_backbone, noise, cond, num_inference_steps=steps)
        round_trip_errors.append((again - latents).abs().max().item())
    for errors in (inversion_errors, round_trip_errors):
        ratios = [coarse / fine for coarse, fine in zip(errors[:-1], errors[1:], strict=True)]
        assert errors[-1] < 0.05 and min(ratios) > 1.5, errors


def test_round_trip_of_a_network_improves_with_the_steps(calm_backbone):
    cond = calm_backbone.encode_prompt("a dog")
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    errors = []
    for steps in (5, 20, 80):
        noise = ddim_invert(calm_backbone, latents, cond, num_inference_steps=steps)
        again = ddim_reconstruct(calm_backbone, noise, cond, num_inference_steps=steps)
        errors.append((again - latents).square().mean().item())
    assert errors[0] > errors[1] > 10 * errors[2], errors


def test_inversion_error_measures_each_image(small_backbone):
    pixel_values = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    cond = small_backbone.encode_prompt("a dog")
    error = inversion_error(small_backbone, pixel_values, cond, num_inference_steps=20)
    with torch.no_grad():
        latents = small_backbone.encode_images(pixel_values)
        decoded = small_backbone.decode_latents(latents)
    expected = [10 * np.log10(4 / ((decoded[i] - pixel_values[i]).numpy() ** 2).mean()) for i in range(2)]
    np.testing.assert_allclose(error.autoencoder_psnr_db.numpy(), expected, rtol=1e-4)
    assert error.latent_mse.shape == error.psnr_db.shape == (2,)
    noise = ddim_invert(small_backbone, latents[:1], cond, num_inference_steps=20)
    again = ddim_reconstruct(small_backbone, noise, cond, num_inference_steps=20)
    np.testing.assert_allclose(error.latent_mse[0], (again - latents[:1]).square().mean(), rtol=1e-2)


def null_text_setting(backbone):
    cond = backbone.encode_prompt(["a dog", "a red cup"])
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    return cond, latents, ddim_trajectory(backbone, latents, cond, num_inference_steps=6)


def test_null_text_lowers_the_reconstruction_error_under_guidance(calm_backbone):
    cond, latents, trajectory = null_text_setting(calm_backbone)
    settings = {"num_inference_steps": 6, "guidance_scale": 5.0}
    plain = ddim_reconstruct(calm_backbone, trajectory[-1], cond, **settings)
    nulls = optimise_null_text(calm_backbone, trajectory, cond, guidance_scale=5.0, early_stop=0)
    assert len(nulls) == 6 and nulls[0].batch_size == 2
    tuned = ddim_reconstruct(calm_backbone, trajectory[-1], cond, nulls, **settings)
    before, after = ((result - latents).square().flatten(1).mean(1) for result in (plain, tuned))
    assert (after < 0.9 * before).all(), (before, after)
    assert all(parameter.grad is None for parameter in calm_backbone.unet.parameters())


def test_null_text_images_do_not_mix(small_backbone):
    cond, _, trajectory = null_text_setting(small_backbone)
    settings = {"guidance_scale": 5.0, "inner_steps": 3, "early_stop": 0}
    both = optimise_null_text(small_backbone, trajectory, cond, **settings)
    second = optimise_null_text(small_backbone, trajectory[:, 1:], cond[1], **settings)
    torch.testing.assert_close(both[0].prompt_embeds[1:], second[0].prompt_embeds, rtol=1e-3, atol=1e-4)


def test_null_text_stops_early_where_the_step_is_good(small_backbone):
    """With a huge tolerance, one network pass for c, one Adam step and the final pass at each sampling step."""
    cond, _, trajectory = null_text_setting(small_backbone)
    small_backbone.network_batches.clear()
    optimise_null_text(small_backbone, trajectory, cond, early_stop=1e3)
    assert len(small_backbone.network_batches) == 6 * 3


def test_null_text_needs_guidance(small_backbone):
    cond, _, trajectory = null_text_setting(small_backbone)
    with pytest.raises(ValueError, match="needs guidance"):
        optimise_null_text(small_backbone, trajectory, cond, guidance_scale=1)
