"""Measure an exported tiny-sd on seeded held-out prompts, with the judge's own accuracy beside every number."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from torch import Tensor
from tqdm import tqdm
from transformers import CLIPTextModel

from common.io import atomic_write_text
from common.sampling.images import image_grid, save_png
from common.toyworld.judge import WEIGHTS, Judge
from common.toyworld.pretrain.data import HELD_OUT_FIRST_SEED, encode_texts, to_pixel_values
from common.toyworld.pretrain.export import MEASUREMENTS, TINY_SD, measurement_table, write_card
from common.toyworld.pretrain.judge import attribute_accuracy
from common.toyworld.pretrain.unet import generate
from common.toyworld.pretrain.vae import reconstruction_psnr
from common.toyworld.shards import render
from common.toyworld.tokenizer import load_tokenizer
from common.training.optimize import default_device

GOALS = {
    "class": 0.90, "color": 0.85, "background": 0.92, "style": 0.92, "view": 0.80, "relation": 0.65, "pose": 0.70,
    "celebrity": 0.60,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class MeasureConfig:
    """What the card states."""

    weights: Path = TINY_SD  # exported diffusers folder
    judge: Path = WEIGHTS / "judge.safetensors"
    num_images: int = 512
    first_seed: int = HELD_OUT_FIRST_SEED  # of the prompts
    num_inference_steps: int = 30
    guidance_scale: float = 4.0  # s of uncond + s * (cond - uncond)
    batch_size: int = 32
    grid: Path | None = None  # PNG of the first 64 pictures with their prompts


def measure(config: MeasureConfig) -> dict:
    """Write measurements.json and the card in the weights folder; returns the numbers."""
    device = default_device()
    judge = Judge.load(config.judge, device)
    renders = render(list(range(config.first_seed, config.first_seed + config.num_images)))
    more = render(list(range(config.first_seed + config.num_images, config.first_seed + 2 * config.num_images)))
    vae = AutoencoderKL.from_pretrained(config.weights / "vae", torch_dtype=torch.float32).to(device)
    prompts = [captions[0] for captions in renders.captions]
    pictures = generate_all(config, vae, prompts, device)
    generated = ((pictures.permute(0, 2, 3, 1) + 1) * 127.5).round().to(torch.uint8)
    if config.grid is not None:
        save_png(image_grid(pictures[:64], columns=8, labels=prompts[:64], upscale=2), config.grid)

    scores = attribute_accuracy(judge, generated, renders.labels, renders.mentioned)
    own = attribute_accuracy(judge, renders.images, renders.labels)
    features = [judge_features(judge, images) for images in (generated, renders.images, more.images)]
    settings = ("num_images", "first_seed", "num_inference_steps", "guidance_scale")
    result = {
        "settings": {name: getattr(config, name) for name in settings},
        "attributes": {
            name: {"generated": score, "goal": GOALS.get(name), "judge": own[name][0], "prompts": prompts_with_it}
            for name, (score, prompts_with_it) in scores.items()
        },
        "vae": reconstruction_psnr(vae, renders.images, renders.masks),
        "frechet": frechet_distance(features[0], features[1]),
        "frechet_floor": frechet_distance(features[2], features[1]),
    }
    atomic_write_text(config.weights / MEASUREMENTS, json.dumps(result, indent=2) + "\n")
    write_card(config.weights)
    print("\n".join(measurement_table(result)))
    return result


def generate_all(config: MeasureConfig, vae: AutoencoderKL, prompts: list[str], device: torch.device) -> Tensor:
    """One picture for each prompt, noise seed = its position; (N, 3, 64, 64) in [-1, 1]."""
    unet = UNet2DConditionModel.from_pretrained(config.weights / "unet", torch_dtype=torch.float32).to(device).eval()
    text_encoder = CLIPTextModel.from_pretrained(config.weights / "text_encoder", dtype=torch.float32).to(device).eval()
    scheduler = DDPMScheduler.from_pretrained(config.weights / "scheduler")
    tokenizer = load_tokenizer(config.weights / "tokenizer")
    empty = encode_texts(tokenizer, text_encoder, [""])
    pictures = []
    for start in tqdm(range(0, len(prompts), config.batch_size), desc="generating"):
        texts = prompts[start : start + config.batch_size]
        embeds = encode_texts(tokenizer, text_encoder, texts)
        pictures.append(
            generate(
                unet, vae, scheduler, embeds, empty, seeds=range(start, start + len(texts)),
                guidance_scale=config.guidance_scale, num_inference_steps=config.num_inference_steps,
            )
        )  # fmt: skip
    return torch.cat(pictures)


@torch.no_grad()
def judge_features(judge: Judge, images: Tensor) -> Tensor:
    """(N, 64, 64, 3) uint8 -> (N, 256) float64."""
    device = next(judge.parameters()).device
    return torch.cat([judge.features(to_pixel_values(batch.to(device))).double().cpu() for batch in images.split(128)])


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """|mean_a - mean_b|^2 + tr(A + B - 2 (A B)^(1/2)) of two sets of features (N, D), A and B their covariances."""
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)
    # tr (AB)^(1/2): the eigenvalues of AB are those of the symmetric A^(1/2) B A^(1/2)
    values, vectors = torch.linalg.eigh(cov_a)
    root_a = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root_a @ cov_b @ root_a).clamp(min=0).sqrt().sum()
    return ((a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross).item()
