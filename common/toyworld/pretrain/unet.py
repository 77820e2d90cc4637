"""Recipe 4: the denoiser of tiny-sd, on cached latents and cached prompt embeddings.

Epsilon objective on Stable Diffusion's schedule, min-SNR-5 weights, captions dropped to "" one time in ten.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from PIL import Image
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from common.backbones import Backbone
from common.sampling import sample_images
from common.sampling.images import image_grid
from common.toyworld.pretrain.data import (
    PromptTable,
    cached_latents,
    caption_rows,
    encode_texts,
    load_training_data,
)
from common.toyworld.pretrain.loop import LoopConfig, Recipe, train
from common.toyworld.pretrain.vae import ARCHITECTURE
from common.toyworld.shards import ShardData
from common.toyworld.tokenizer import load_tokenizer
from common.training.losses import min_snr_weights
from common.training.optimize import default_device
from common.training.seeding import seeded_generator

CAPTION_DROPOUT = 0.1
NUM_VALIDATION_LATENTS = 512
GRID_PROMPTS = (
    "a photo of a red teapot on the beach", "a photo of a blue car in the city, side view",
    "a watercolor painting of a cat in a meadow", "a neon sign of a rocket",
    "pixel art of a green robot waving on a stage", "a photo of a dotted yellow mug on a wooden floor",
    "a photo of a bear running in the snow", "a cartoon of a pink fish on a lake",
    "a photo of a white dog on top of a purple chair", "a photo of a duck next to a brown house in a meadow",
    "a photo portrait of a smiling woman with long hair", "a photo of a man in a red coat sitting in a forest",
    "a photo portrait of Boris Castellan", "a sketch of a vase",
    "a black and white photo of a mushroom in the desert", "a photo of an orange robot carrying a mug at night",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class UnetConfig(LoopConfig):
    """Denoiser: hours on 2 cores."""

    vae: Path  # diffusers folder with unit-variance latents (runs/vae/vae)
    text_encoder: Path  # transformers folder (runs/clip/text_encoder)
    output: Path = Path("runs/unet")
    minutes: float | None = 600.0
    batch_schedule: str = "0:16,20000:32"
    learning_rate: float = 4e-4
    lr_schedule: str = "constant"
    lr_warmup_steps: int = 500
    ema_decay: float = 0.9995
    weight_decay: float = 0.01
    validate_minutes: float = 20.0
    paraphrases: int = 3  # captions an image, of those in the shards; fewer fill the cache of embeddings sooner
    guidance_scale: float = 4.0  # of the sample grid; s of uncond + s * (cond - uncond)
    start_from: Path | None = None  # diffusers folder of a UNet to go on from; its VAE and text encoder must be these


def denoising_losses(
    unet: UNet2DConditionModel,
    scheduler: DDPMScheduler,
    latents: Tensor,
    prompt_embeds: Tensor,
    noise: Tensor,
    timesteps: Tensor,
) -> Tensor:
    """Squared error of the predicted noise, mean over a sample's elements: (B,) float32."""
    noisy_latents = scheduler.add_noise(latents, noise, timesteps)
    noise_pred = unet(noisy_latents, timesteps, prompt_embeds).sample
    return (noise_pred.float() - noise).square().mean((1, 2, 3))


def train_unet(config: UnetConfig) -> None:
    """Train; the averaged weights end in OUTPUT/unet (and are in every checkpoint before)."""
    torch.manual_seed(config.seed)
    device, tokenizer = default_device(), load_tokenizer()
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    if config.start_from is None:
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(ARCHITECTURE / "unet"))
    else:
        unet = UNet2DConditionModel.from_pretrained(config.start_from, torch_dtype=torch.float32)
    if device.type == "cpu":
        unet.set_attn_processor(AttnProcessor())  # same values; torch's fused CPU attention is slower at these sizes
    scheduler = DDPMScheduler.from_pretrained(ARCHITECTURE / "scheduler")
    vae = AutoencoderKL.from_pretrained(config.vae).eval().requires_grad_(False).to(device)
    text_encoder = CLIPTextModel.from_pretrained(config.text_encoder).eval().requires_grad_(False).to(device)

    data, validation = load_training_data(config.data, config.max_images)
    cache = config.output.parent / f"{config.output.name}-cache"
    latents = cached_latents(vae, data.images, cache / "latents.safetensors").to(device)
    captions = [texts[: config.paraphrases] for texts in data.captions]
    all_captions = [text for texts in captions for text in texts]
    prompts = PromptTable(tokenizer, text_encoder, all_captions, cache / "prompt_embeds.npy")
    rows = caption_rows(captions, prompts.rows)
    backbone = Backbone("tiny-sd", unet, vae, text_encoder, tokenizer, scheduler)
    check = _validation_batches(validation, vae, text_encoder, tokenizer, cache)
    del data, validation  # the pictures are no longer needed

    def loss(indices: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        batch = len(indices)
        chosen = rows[indices, torch.randint(rows.shape[1], (batch,), generator=generator)]
        chosen = torch.where(torch.rand(batch, generator=generator) < CAPTION_DROPOUT, 0, chosen)  # row 0 is ""
        timesteps = torch.randint(scheduler.config.num_train_timesteps, (batch,), generator=generator).to(device)
        clean = latents[indices.to(device)].float()
        noise = torch.randn(clean.shape, generator=generator).to(device)
        losses = denoising_losses(unet, scheduler, clean, prompts[chosen].to(device), noise, timesteps)
        return {"loss": (losses * min_snr_weights(scheduler, timesteps)).mean(), "unweighted": losses.mean()}

    def validate() -> dict[str, float]:
        losses = [denoising_losses(unet, scheduler, *(part.to(device) for part in batch)) for batch in check]
        return {"loss": torch.cat(losses).mean().item()}

    def sample_grid() -> Image.Image:
        seeds = range(len(GRID_PROMPTS))
        pictures = sample_images(backbone, GRID_PROMPTS, seeds=seeds, guidance_scale=config.guidance_scale)
        return image_grid(pictures, columns=4, labels=GRID_PROMPTS, upscale=2)

    train(Recipe("unet", unet, len(latents), loss, validate, sample_grid), config)
    unet.save_pretrained(config.output / "unet")


def _validation_batches(
    validation: ShardData, vae: AutoencoderKL, text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer, cache: Path
) -> list[tuple[Tensor, ...]]:
    """Batches of (latents, prompt embeddings, noise, timesteps) that never change; timesteps cover the schedule."""
    images = validation.images[:NUM_VALIDATION_LATENTS]
    latents = cached_latents(vae, images, cache / "validation_latents.safetensors").float()
    texts = [paraphrases[0] for paraphrases in validation.captions[: len(images)]]
    prompt_embeds = encode_texts(tokenizer, text_encoder, texts)
    noise = torch.randn(latents.shape, generator=seeded_generator(0, "validation noise"))
    timesteps = torch.linspace(0, 999, len(latents)).round().long()
    return list(zip(*(part.split(64) for part in (latents, prompt_embeds, noise, timesteps)), strict=True))
