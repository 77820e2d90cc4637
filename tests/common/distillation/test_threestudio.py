"""Whole gradients and views against threestudio's.

Numbers: threestudio-project/threestudio at 28d9d80d9d00f308244adfcf3be8b17ca0cb6465, run on a CPU: its
StableDiffusionGuidance.compute_grad_sds with PromptProcessorOutput and the directions of PromptProcessor.configure. In
the place of U-Net, embeddings, latents and noise stand the closed forms below. Of the 16 numbers of each sample every
fifth is kept.
"""

from dataclasses import replace
from functools import partial

import pytest
import torch
from diffusers import DDIMScheduler

from common.backbones import Conditioning
from common.distillation import ViewPrompts, guided_predictor, perp_neg_noise, sds_gradient, view_of

AZIMUTHS = torch.tensor([0.0, 30.0, 75.0, 100.0, 150.0, 180.0, 250.0, 20.0])
ELEVATIONS = torch.tensor([0.0] * 7 + [70.0])
TIMESTEPS = torch.tensor([20, 150, 300, 450, 600, 750, 900, 980])

# omega = 100, "sds"
SDS = [
    [-0.05695, 0.22832, -0.34998, -0.09199], [-6.87335, 4.70216, -2.94424, -0.57284],
    [-4.36035, -8.59611, 14.87373, 1.71517], [-9.2419, 11.36154, 32.18219, -3.6379],
    [-13.8672, 22.75736, 48.74882, -4.39324], [22.29621, -25.33248, -51.69506, -6.80792],
    [28.55093, 21.51687, -11.67368, 7.91472], [-39.58656, 29.35872, 51.14779, 5.61906],
]  # fmt: skip
# omega = 20, "uniform"
SDS_UNIFORM = [
    [-1.14744, 2.0895, -4.834, -1.78188], [-7.82018, 6.19526, -3.21757, -0.42421],
    [-1.92289, -3.60305, 7.2973, 0.48516], [-3.42169, 3.32626, 9.51175, -1.73613],
    [-3.36111, 5.76139, 11.98765, -0.90591], [4.83068, -5.18474, -10.80987, -1.56499],
    [5.42133, 4.04824, -2.61569, 1.3099], [-7.88124, 6.08993, 10.58039, 1.41609],
]  # fmt: skip
# use_perp_neg, where guidance_scale = 7.5 is our s, not omega; "sds". Each sample in a batch of its own: in a larger
# one it pairs the negative prompts, listed sample by sample, with latents listed batch after batch: of other samples.
PERP_NEG = [
    [-0.01545, 0.00708, -0.04652, -0.02337], [-0.41389, 0.45324, -0.15069, 0.01131],
    [-0.18456, -0.27424, 0.98235, -0.05699], [-1.05182, 0.62177, 1.82747, -0.71151],
    [-0.95645, 1.81021, 3.53151, -0.14701], [1.56566, -1.44126, -3.20479, -0.57494],
    [1.42868, 1.0339, -1.04378, 0.17423], [-2.47715, 2.12173, 3.66237, 0.69717],
]  # fmt: skip
# its weights of front and side; in the back half it lists the side first
PERP_NEG_WEIGHTS = [
    [-0.00012, -1.574], [-0.44013, -0.95993], [-1.25418, -0.21096], [-1.60818, -0.03518], [-1.81348, -0.24048],
    [-1.967, -0.394], [-1.64481, -0.07181], [0.0, 0.0],
]  # fmt: skip


def wave(*shape: int, k: float) -> torch.Tensor:
    return torch.sin(k * torch.arange(1.0, torch.Size(shape).numel() + 1)).view(shape)


class Waves:
    """A prior in closed form, whose prompts are known numbers."""

    dtype = torch.float32
    noise_scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    add_noise = staticmethod(noise_scheduler.add_noise)

    def encode_prompt(self, prompts: list[str] | str) -> Conditioning:
        if prompts == "":
            return Conditioning(wave(1, 3, 6, k=1.9))
        rows = [("side", "front", "back", "overhead").index(text.split()[-2]) for text in prompts]
        return Conditioning(wave(4, 3, 6, k=0.7)[rows])

    def predict_noise(self, noisy: torch.Tensor, timesteps: torch.Tensor, told: Conditioning) -> torch.Tensor:
        amount = told.prompt_embeds.mean(1)[:, :4, None, None]
        return 0.6 * noisy + amount * torch.cos(2 * noisy.roll(1, -1) + timesteps.view(-1, 1, 1, 1) / 500)


def gradient_of(predict, weighting: str) -> torch.Tensor:
    gradient = sds_gradient(
        Waves(), wave(8, 4, 2, 2, k=0.37), predict, timesteps=TIMESTEPS, noise=wave(8, 4, 2, 2, k=1.31),
        weighting=weighting,
    )  # fmt: skip
    return gradient.flatten(1)[:, ::5]


@pytest.mark.parametrize(("omega", "weighting", "expected"), [(100, "sigma2", SDS), (20, "uniform", SDS_UNIFORM)])
def test_score_distillation_of_views(omega, weighting, expected):
    backbone = Waves()
    prompts = ViewPrompts(backbone, "a bear")
    predict = guided_predictor(backbone, prompts.at(AZIMUTHS, ELEVATIONS), prompts.empty(8), 1.0 + omega)
    torch.testing.assert_close(gradient_of(predict, weighting), torch.tensor(expected), rtol=1e-4, atol=2e-4)


def test_perp_neg():
    backbone = Waves()
    prompts = ViewPrompts(backbone, "a bear")
    mixed, negatives, weights = prompts.perp_neg(AZIMUTHS, ELEVATIONS)
    torch.testing.assert_close(weights.T, torch.tensor(PERP_NEG_WEIGHTS), rtol=0, atol=2e-5)
    predict = partial(
        perp_neg_noise, backbone, conditioning=mixed, negatives=negatives, unconditional=prompts.empty(8),
        weights=weights, guidance_scale=7.5,
    )  # fmt: skip
    torch.testing.assert_close(gradient_of(predict, "sigma2"), torch.tensor(PERP_NEG), rtol=1e-4, atol=2e-4)


def test_perp_neg_needs_prompts_that_have_a_mean():
    class Pooled(Waves):
        def encode_prompt(self, prompts):
            told = super().encode_prompt(prompts)
            return replace(told, pooled_prompt_embeds=torch.zeros(told.batch_size, 2))

    with pytest.raises(ValueError, match="prompt_embeds only"):
        ViewPrompts(Pooled(), "a bear").perp_neg(AZIMUTHS, ELEVATIONS)


@pytest.mark.parametrize(
    ("elevation", "expected"), [(0.0, "fffsssssssbbbbbsssssssff"), (60.0, "fffsssssssbbbbbsssssssff"), (61.0, "o" * 24)]
)
def test_names_of_views_every_15_degrees(elevation, expected):
    azimuths = torch.arange(0.0, 360.0, 15.0)
    assert "".join(name[0] for name in view_of(azimuths, torch.full_like(azimuths, elevation))) == expected
