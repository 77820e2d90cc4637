"""A backbone of tiny real diffusers modules, and one whose denoiser is exact for a Gaussian."""

import hashlib

import pytest
import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel

from common.backbones.conditioning import Conditioning

STABLE_DIFFUSION_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


class SmallBackbone:
    """What the sampler asks of a Backbone, on randomly initialised modules: 8x8 latents, 16x16 px, context (5, 12)."""

    device, dtype, latent_shape = torch.device("cpu"), torch.float32, (4, 8, 8)

    def __init__(self, prediction_type: str = "epsilon") -> None:
        torch.manual_seed(0)
        self.unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(16, 32),
            layers_per_block=1,
            norm_num_groups=8,
            cross_attention_dim=12,
            attention_head_dim=4,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        ).eval()
        self.vae = AutoencoderKL(
            block_out_channels=(16, 16),
            norm_num_groups=8,
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            sample_size=16,
        ).eval()
        self.noise_scheduler = DDPMScheduler(**STABLE_DIFFUSION_BETAS, prediction_type=prediction_type)
        self.network_batches: list[int] = []
        self.encoded_prompts: list[str] = []

    def encode_prompt(self, prompts: str | list[str]) -> Conditioning:
        prompts = [prompts] if isinstance(prompts, str) else prompts
        self.encoded_prompts += prompts
        seeds = [int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:4], "big") for prompt in prompts]
        return Conditioning(
            torch.stack([torch.randn(5, 12, generator=torch.Generator().manual_seed(s)) for s in seeds])
        )

    def predict_noise(self, latents, timesteps, conditioning):
        self.network_batches.append(len(latents))
        output = self.unet(latents, timesteps, encoder_hidden_states=conditioning.prompt_embeds).sample
        if self.noise_scheduler.config.prediction_type == "epsilon":
            return output
        alpha = self.noise_scheduler.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
        return alpha**0.5 * output + (1 - alpha) ** 0.5 * latents

    def add_noise(self, latents, noise, timesteps):
        return self.noise_scheduler.add_noise(latents, noise, timesteps)

    def encode_images(self, pixel_values):
        return self.vae.encode(pixel_values).latent_dist.mode() * self.vae.config.scaling_factor

    def decode_latents(self, latents):
        return self.vae.decode(latents / self.vae.config.scaling_factor).sample.clamp(-1, 1)


class GaussianBackbone(SmallBackbone):
    """The exact noise prediction for data drawn from N(mean, std^2) in every latent entry, in float64."""

    dtype, mean, std = torch.float64, 0.7, 0.4

    def __init__(self) -> None:
        self.noise_scheduler = DDPMScheduler(**STABLE_DIFFUSION_BETAS)

    def alpha(self, timestep: int) -> float:
        return self.noise_scheduler.alphas_cumprod.double()[timestep].item()

    def encode_prompt(self, prompts: str | list[str]) -> Conditioning:
        return Conditioning(torch.zeros(1, 1, 1, dtype=torch.float64))

    def standardise(self, latents: torch.Tensor, alpha: float) -> torch.Tensor:
        """Quantile of the noisy marginal N(sqrt(a) mean, a std^2 + 1 - a); constant along the probability-flow ODE."""
        return (latents - alpha**0.5 * self.mean) / (alpha * self.std**2 + 1 - alpha) ** 0.5

    def unstandardise(self, quantile: torch.Tensor, alpha: float) -> torch.Tensor:
        return alpha**0.5 * self.mean + (alpha * self.std**2 + 1 - alpha) ** 0.5 * quantile

    def predict_noise(self, latents, timesteps, conditioning):
        alpha = self.alpha(int(timesteps[0]))  # E[noise | x] = sqrt(1-a) (x - sqrt(a) mean) / variance of x
        return (1 - alpha) ** 0.5 * (latents - alpha**0.5 * self.mean) / (alpha * self.std**2 + 1 - alpha)


@pytest.fixture(scope="module")
def small_backbone() -> SmallBackbone:
    return SmallBackbone()


@pytest.fixture(scope="module")
def small_v_backbone() -> SmallBackbone:
    return SmallBackbone("v_prediction")


@pytest.fixture(scope="module")
def gaussian_backbone() -> GaussianBackbone:
    return GaussianBackbone()


@pytest.fixture(scope="module", params=["epsilon", "v_prediction"])
def calm_backbone(request) -> SmallBackbone:
    """Either prediction type with a tenth of the output, which varies as slowly with x as a trained network's does."""
    backbone = SmallBackbone(request.param)
    backbone.unet.conv_out.weight.data.mul_(0.1)
    return backbone
