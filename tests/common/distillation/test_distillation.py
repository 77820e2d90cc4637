"""Score distillation against a prior whose best answer is known, and by hand."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler

from common.backbones import Backbone, load_backbone
from common.distillation import (
    TimestepRange,
    ViewPrompts,
    guided_predictor,
    perp_neg_guidance,
    sds_gradient,
    sds_loss,
    view_of,
)
from common.distillation.perp_neg import perpendicular
from common.distillation.sds import sds_weights
from common.distillation.view_prompts import view_negatives


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def gaussian():
    """Latents are N(mu, 0.3^2): eps* = sqrt(1-a) (z_t - sqrt(a) mu) / (a 0.09 + 1 - a)."""
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    levels = scheduler.alphas_cumprod
    mu = randn(1, 4, 3, 3, seed=9)

    def predict(noisy, timesteps):
        a = levels[timesteps].view(-1, 1, 1, 1)
        return (1 - a).sqrt() * (noisy - a.sqrt() * mu) / (a * 0.09 + 1 - a)

    stand_in = SimpleNamespace(noise_scheduler=scheduler, add_noise=lambda z, e, t: scheduler.add_noise(z, e, t))
    return SimpleNamespace(backbone=stand_in, predict=predict, mu=mu, levels=levels)


def test_the_gradient_of_a_gaussian_prior(gaussian):
    """Its mean over noise in closed form: w sqrt(a (1-a)) (z - mu) / (a 0.09 + 1 - a)."""
    z, timestep, draws = randn(1, 4, 3, 3), 400, 20000
    timesteps = torch.full((draws,), timestep)
    gradient = sds_gradient(
        gaussian.backbone, z.expand(draws, -1, -1, -1), gaussian.predict, timesteps=timesteps,
        noise=randn(draws, 4, 3, 3, seed=1),
    )  # fmt: skip
    a = gaussian.levels[timestep]
    expected = (1 - a) * (a * (1 - a)).sqrt() * (z - gaussian.mu) / (a * 0.09 + 1 - a)
    torch.testing.assert_close(gradient.mean(0, keepdim=True), expected, rtol=0, atol=0.01)
    at_mode = sds_gradient(
        gaussian.backbone, gaussian.mu.expand(draws, -1, -1, -1), gaussian.predict, timesteps=timesteps,
        noise=randn(draws, 4, 3, 3, seed=1),
    )  # fmt: skip
    assert at_mode.mean(0).abs().max() < 0.01


def test_descent_finds_the_mode(gaussian):
    z = torch.zeros(1, 4, 3, 3, requires_grad=True)
    optimizer, generator = torch.optim.Adam([z], lr=0.05), torch.Generator().manual_seed(0)
    for _ in range(300):
        timesteps = TimestepRange().sample(1, 1000, generator)
        noise = torch.randn(z.shape, generator=generator)
        gradient = sds_gradient(gaussian.backbone, z.detach(), gaussian.predict, timesteps=timesteps, noise=noise)
        optimizer.zero_grad()
        sds_loss(z, gradient).backward()
        optimizer.step()
    assert (z - gaussian.mu).abs().mean() < 0.15


def test_the_loss_has_just_that_gradient():
    latents, gradient = randn(3, 4, 2, 2).double().requires_grad_(), randn(3, 4, 2, 2, seed=1).double()
    sds_loss(latents, gradient).backward()
    torch.testing.assert_close(latents.grad, gradient / 3)
    assert sds_loss(latents, gradient).item() == pytest.approx(0.5 * gradient.square().sum().item() / 3)


def test_the_latent_form_goes_through_the_encoder():
    """The pictures' gradient is the encoder's Jacobian, transposed, times g / B; by finite differences along v."""
    backbone = load_backbone("tiny-sd").freeze()
    pictures = (0.5 * randn(2, 3, 64, 64).tanh()).requires_grad_()
    latents = backbone.encode_images(pictures)
    gradient, direction, step = randn(*latents.shape, seed=1), randn(2, 3, 64, 64, seed=2), 1e-2
    sds_loss(latents, gradient).backward()
    with torch.no_grad():
        ahead, behind = (backbone.encode_images(pictures + sign * step * direction) for sign in (1, -1))
    along = ((ahead - behind) / (2 * step) * gradient / 2).sum().item()
    assert (pictures.grad * direction).sum().item() == pytest.approx(along, rel=0.02)
    assert all(parameter.grad is None for parameter in backbone.vae.parameters())


def test_weights_and_timesteps():
    levels, timesteps = torch.linspace(0.99, 0.01, 1000), torch.tensor([0, 500])
    torch.testing.assert_close(sds_weights(levels, timesteps, "sigma2").flatten(), 1 - levels[timesteps])
    assert sds_weights(levels, timesteps, "uniform").flatten().tolist() == [1, 1]
    with pytest.raises(ValueError, match="weighting"):
        sds_weights(levels, timesteps, "other")
    drawn = TimestepRange().sample(5000, 1000, torch.Generator().manual_seed(0))
    assert drawn.min() == 20 and drawn.max() == 980
    annealed = TimestepRange(final_high=0.5).sample(5000, 1000, torch.Generator().manual_seed(0), progress=1.0)
    assert annealed.max() == 500


@torch.no_grad()
def test_guidance_convention():
    """s = 1 is the prompt's own prediction, s = 0 the empty prompt's, and it is linear in between and beyond."""
    backbone = load_backbone("tiny-sd").freeze()
    told, empty = backbone.encode_prompt("a red car"), backbone.encode_prompt("")
    noisy, timesteps = randn(1, *backbone.latent_shape), torch.tensor([300])
    found = {s: guided_predictor(backbone, told, empty, s)(noisy, timesteps) for s in (0.0, 1.0, 7.5)}
    own = [backbone.predict_noise(noisy, timesteps, c) for c in (empty, told)]
    torch.testing.assert_close(found[0.0], own[0], rtol=0, atol=1e-4)
    torch.testing.assert_close(found[1.0], own[1], rtol=0, atol=1e-4)
    omega = 6.5  # DreamFusion: eps_c + omega (eps_c - eps_u)
    torch.testing.assert_close(found[7.5], own[1] + omega * (own[1] - own[0]), rtol=0, atol=1e-3)


def test_perp_neg_by_numpy():
    u, p, n1, n2 = (randn(2, 4, 2, 2, seed=k) for k in range(4))
    weights = torch.tensor([[-0.5, 0.0], [-1.0, -2.0]])
    found = perp_neg_guidance(u, p, torch.stack([n1, n2]), weights, 7.5).numpy()
    for b in range(2):
        towards = (p - u)[b].numpy().ravel()
        total = towards.copy()
        for k, negative in enumerate((n1, n2)):
            away = (negative - u)[b].numpy().ravel()
            total += weights[k, b].item() * (away - away @ towards / (towards @ towards) * towards)
        np.testing.assert_allclose(found[b].ravel(), u[b].numpy().ravel() + 7.5 * total, rtol=1e-4, atol=1e-4)
    assert (perpendicular(n1, p) * p).flatten(1).sum(1).abs().max() < 1e-5


def test_negative_prompts_of_views():
    """Seen from the front the prompt is all front; from a side all side, from the back all back."""
    shares, weights = view_negatives(torch.tensor([0.0, 45.0, 90.0, 270.0, 180.0]))
    torch.testing.assert_close(
        shares,
        torch.tensor([[1, 0, 0], [0.5, 0.5, 0], [0, 1, 0], [0, 1, 0], [0, 0, 1.0]]),
    )
    assert weights[0, 0].item() == pytest.approx(-(4 * np.exp(-0.5) - 2.426), abs=1e-4)  # front, of the front: about 0
    assert weights[0, 1].item() == pytest.approx(-(4 - 2.426), abs=1e-4)  # side, of the front
    assert weights[2, 0].item() == pytest.approx(-(np.exp(-0.5) + 0.967), abs=1e-4)  # front, of the side
    assert weights[4, 1].item() == pytest.approx(-(1 - 0.606), abs=1e-4)  # side, of the back


def test_names_of_views():
    azimuths = torch.tensor([0.0, 44.0, 46.0, 90.0, 136.0, 180.0, 224.0, 300.0, 330.0, 10.0])
    elevations = torch.tensor([0.0] * 9 + [70.0])
    expected = ["front", "front", "side", "side", "back", "back", "back", "side", "front", "overhead"]
    assert view_of(azimuths, elevations) == expected


@torch.no_grad()
def test_prompts_of_views():
    backbone: Backbone = load_backbone("tiny-sd").freeze()
    prompts = ViewPrompts(backbone, "a bear")
    told = prompts.at(torch.tensor([0.0, 180.0]), torch.zeros(2))
    expected = backbone.encode_prompt(["a bear, front view", "a bear, back view"])
    torch.testing.assert_close(told.prompt_embeds, expected.prompt_embeds, rtol=0, atol=1e-5)
    assert ViewPrompts(backbone, "a bear", names=False).texts == ["a bear"] * 4
    assert prompts.empty(3).batch_size == 3
