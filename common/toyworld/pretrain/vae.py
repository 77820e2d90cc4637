"""Recipe 1: the autoencoder, 64x64x3 pixels to 16x16x4 latents.

Plain L1 + MSE loses the hue of small parts, so object pixels weigh more than background and colour differences count
twice: in RGB and as chroma.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor

from common.sampling.images import image_grid
from common.toyworld.pretrain.data import load_training_data, to_pixel_values
from common.toyworld.pretrain.loop import LoopConfig, Recipe, train
from common.training.optimize import default_device

ARCHITECTURE = Path(__file__).parents[2] / "backbones" / "architectures" / "tiny-sd"
CHROMA = ((-0.168736, -0.331264, 0.5), (0.5, -0.418688, -0.081312))  # BT.601: RGB -> Cb, Cr


@dataclass(frozen=True, kw_only=True)
class VaeConfig(LoopConfig):
    """Autoencoder: 20 minutes on 2 cores."""

    output: Path = Path("runs/vae")
    minutes: float | None = 20.0
    batch_schedule: str = "0:16"
    learning_rate: float = 1.5e-3
    ema_decay: float = 0.997
    validate_minutes: float = 3.0
    object_weight: float = 6.0  # weight of a pixel inside the mask; 1 outside
    chroma_weight: float = 1.0  # of the squared error of Cb and Cr; 1 for that of RGB
    absolute_weight: float = 0.005  # of the absolute error; it keeps flat areas calm
    kl_weight: float = 1e-8  # per latent element, summed
    start_from: Path | None = None  # diffusers folder of a VAE to go on from
    decoder_only: bool = False  # with start_from: keep its encoder, so that a UNet trained on its latents stays right
    posterior_std: float = 0.02  # with decoder_only: width of the posterior, where latents have unit variance

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.decoder_only and self.start_from is None:
            raise ValueError("--decoder-only keeps a trained encoder; name its folder with --start-from")


def reconstruction_loss(error: Tensor, masks: Tensor, config: VaeConfig) -> Tensor:
    """Mean over pixels of the squared error in RGB and chroma, and a little absolute error, entities weighing more.

    Args:
        error: reconstruction minus image, (B, 3, H, W).
        masks: (B, H, W), above 0 on entities.
    """
    chroma = torch.einsum("ij,bjhw->bihw", error.new_tensor(CHROMA), error)
    pixels = error.square().mean(1) + config.chroma_weight * chroma.square().sum(1)
    pixels = pixels + config.absolute_weight * error.abs().mean(1)
    weights = 1 + (config.object_weight - 1) * (masks > 0).float()
    return (pixels * weights).mean() / weights.mean()


def psnr(squared_error: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of squared errors of values in [-1, 1]."""
    return (10 * torch.log10(4 / squared_error.mean())).item()


@torch.no_grad()
def reconstruction_psnr(vae: AutoencoderKL, images: Tensor, masks: Tensor) -> dict[str, float]:
    """PSNR of the whole image and of object pixels, dB. images (N, 64, 64, 3) uint8; masks (N, 64, 64)."""
    device, errors = next(vae.parameters()).device, []
    for batch in images.split(64):
        pixel_values = to_pixel_values(batch.to(device))
        decoded = vae.decode(vae.encode(pixel_values).latent_dist.mode()).sample.clamp(-1, 1)
        errors.append((decoded - pixel_values).square().mean(1).cpu())
    squared = torch.cat(errors)
    return {"psnr": psnr(squared), "psnr_object": psnr(squared[masks.bool()])}


@torch.no_grad()
def fold_latent_statistics(vae: AutoencoderKL, images: Tensor) -> AutoencoderKL:
    """Give each latent channel zero mean and unit variance by rescaling quant_conv and post_quant_conv in place.

    Exact: reconstructions do not change, and scaling_factor becomes 1, so that every Stable Diffusion code works as is.
    """
    device = next(vae.parameters()).device
    means = torch.cat([vae.encode(to_pixel_values(b.to(device))).latent_dist.mode() for b in images.split(64)])
    mean, std = means.mean((0, 2, 3)), means.std((0, 2, 3))
    channels = len(mean)
    # decoder side: post_quant_conv(z) == old_post_quant_conv(z * std + mean)
    decode = vae.post_quant_conv
    decode.bias += (decode.weight * mean[:, None, None]).sum((1, 2, 3))
    decode.weight *= std[:, None, None]
    # encoder side: means become (m - mean) / std, log variances lose 2 log std
    encode = vae.quant_conv
    encode.weight[:channels] /= std[:, None, None, None]
    encode.bias[:channels] = (encode.bias[:channels] - mean) / std
    encode.bias[channels:] -= 2 * std.log()
    vae.register_to_config(scaling_factor=1.0)
    return vae


@torch.no_grad()
def keep_encoder(vae: AutoencoderKL, posterior_std: float) -> AutoencoderKL:
    """Freeze the encoder and give its posterior one width for all latents, in place.

    With next to no KL loss nothing holds the width: a fine-tuned encoder that reconstructs well can have a posterior as
    wide as the latents themselves, and whoever samples it trains on noise.
    """
    vae.encoder.requires_grad_(False)
    encode = vae.quant_conv.requires_grad_(False)
    channels = vae.config.latent_channels
    encode.weight[channels:] = 0
    encode.bias[channels:] = 2 * math.log(posterior_std)
    return vae


def train_vae(config: VaeConfig) -> None:
    """Train, normalise the latents, write the diffusers folder OUTPUT/vae."""
    torch.manual_seed(config.seed)
    device = default_device()
    data, validation = load_training_data(config.data, config.max_images)
    if config.start_from is None:
        vae = AutoencoderKL.from_config(AutoencoderKL.load_config(ARCHITECTURE / "vae"))
    else:
        vae = AutoencoderKL.from_pretrained(config.start_from, torch_dtype=torch.float32)
    if config.decoder_only:
        keep_encoder(vae, config.posterior_std)
    images, masks = data.images.to(device), data.masks.to(device)

    def loss(indices: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        pixel_values = to_pixel_values(images[indices.to(device)])
        posterior = vae.encode(pixel_values).latent_dist
        decoded = vae.decode(posterior.sample(generator)).sample
        reconstruction = reconstruction_loss((decoded - pixel_values).float(), masks[indices.to(device)], config)
        kl = posterior.kl().mean()
        return {"loss": reconstruction + config.kl_weight * kl, "reconstruction": reconstruction, "kl": kl}

    def sample_grid() -> Image.Image:
        pixel_values = to_pixel_values(validation.images[:16].to(device))
        decoded = vae.decode(vae.encode(pixel_values).latent_dist.mode()).sample
        return image_grid(torch.stack([pixel_values, decoded], 1).flatten(0, 1).float().cpu(), columns=8, upscale=2)

    def validate() -> dict[str, float]:
        return reconstruction_psnr(vae, validation.images[:256], validation.masks[:256])

    train(Recipe("vae", vae, len(data), loss, validate, sample_grid), config)
    if not config.decoder_only:
        fold_latent_statistics(vae, data.images[:4096])
    vae.save_pretrained(config.output / "vae")


@dataclass(frozen=True, kw_only=True)
class FoldConfig:
    """Normalise the latents of a trained diffusers VAE folder."""

    data: Path  # folder of shards
    vae: Path  # diffusers folder to read
    output: Path  # diffusers folder to write


def fold(config: FoldConfig) -> None:
    vae = AutoencoderKL.from_pretrained(config.vae).eval()
    data, validation = load_training_data(config.data, 8192)
    before = reconstruction_psnr(vae, validation.images[:256], validation.masks[:256])
    fold_latent_statistics(vae, data.images[:4096]).save_pretrained(config.output)
    after = reconstruction_psnr(vae, validation.images[:256], validation.masks[:256])
    print(f"before {before}\nafter  {after}\nwritten to {config.output}")
