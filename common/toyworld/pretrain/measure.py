"""Measure an exported tiny-sd on seeded held-out prompts, with the judge's own accuracy beside every number."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from common.backbones import load_backbone
from common.evaluation.metrics import feature_gaussian, frechet_distance
from common.io import atomic_write_text
from common.sampling import sample_images
from common.sampling.images import image_grid, save_png
from common.toyworld.judge import WEIGHTS, Judge
from common.toyworld.pretrain.data import HELD_OUT_FIRST_SEED, to_pixel_values
from common.toyworld.pretrain.export import MEASUREMENTS, TINY_SD, measurement_table, write_card
from common.toyworld.pretrain.judge import attribute_accuracy
from common.toyworld.pretrain.vae import reconstruction_psnr
from common.toyworld.shards import render
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
    backbone = load_backbone(str(config.weights), device=device).freeze()
    prompts = [captions[0] for captions in renders.captions]
    pictures = sample_images(
        backbone, prompts, seeds=range(len(prompts)), batch_size=config.batch_size, progress=True,
        num_inference_steps=config.num_inference_steps, guidance_scale=config.guidance_scale,
    )  # fmt: skip
    generated = ((pictures.permute(0, 2, 3, 1) + 1) * 127.5).round().to(torch.uint8)
    if config.grid is not None:
        save_png(image_grid(pictures[:64], columns=8, labels=prompts[:64], upscale=2), config.grid)

    scores = attribute_accuracy(judge, generated, renders.labels, renders.mentioned)
    own = attribute_accuracy(judge, renders.images, renders.labels)
    ours, truth, floor = (judge_gaussian(judge, images) for images in (generated, renders.images, more.images))
    settings = ("num_images", "first_seed", "num_inference_steps", "guidance_scale")
    result = {
        "settings": {name: getattr(config, name) for name in settings},
        "attributes": {
            name: {"generated": score, "goal": GOALS.get(name), "judge": own[name][0], "prompts": prompts_with_it}
            for name, (score, prompts_with_it) in scores.items()
        },
        "vae": reconstruction_psnr(backbone.vae, renders.images, renders.masks),
        "frechet": frechet_distance(*ours, *truth),
        "frechet_floor": frechet_distance(*floor, *truth),
    }
    atomic_write_text(config.weights / MEASUREMENTS, json.dumps(result, indent=2) + "\n")
    write_card(config.weights)
    print("\n".join(measurement_table(result)))
    return result


@torch.no_grad()
def judge_gaussian(judge: Judge, images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (256,) and covariance (256, 256) of the judge's features of (N, 64, 64, 3) uint8."""
    device = next(judge.parameters()).device
    batches = [judge.features(to_pixel_values(batch.to(device))).cpu() for batch in images.split(128)]
    return feature_gaussian(torch.cat(batches))
