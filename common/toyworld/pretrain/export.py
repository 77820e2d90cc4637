"""Write the trained parts as a plain diffusers folder of float16 safetensors, with a card.

StableDiffusionPipeline.from_pretrained(folder) loads it as it is.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextModel

from common.io import atomic_write_text, load_safetensors
from common.toyworld.pretrain.loop import load_average
from common.toyworld.pretrain.vae import ARCHITECTURE
from common.toyworld.tokenizer import load_tokenizer, save_tokenizer

TINY_SD = Path(__file__).parents[2] / "backbones" / "weights" / "tiny-sd"
MAX_SHARD = "15MB"  # per file
MEASUREMENTS = "measurements.json"


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Write the diffusers folder of tiny-sd from finished or running training runs."""

    vae: Path = Path("runs/vae/vae")  # diffusers folder
    text_encoder: Path = Path("runs/clip/text_encoder")  # transformers folder
    unet_run: Path = Path("runs/unet")  # run folder; the average in its last checkpoint is taken
    output: Path = TINY_SD


def export(config: ExportConfig) -> None:
    """Write config.output and its card."""
    unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(ARCHITECTURE / "unet"))
    load_average(unet, config.unet_run)
    pipeline = StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(config.vae),
        text_encoder=CLIPTextModel.from_pretrained(config.text_encoder),
        tokenizer=load_tokenizer(),
        unet=unet,
        scheduler=DDIMScheduler.from_pretrained(ARCHITECTURE / "scheduler", set_alpha_to_one=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.to(torch.float16).save_pretrained(config.output, max_shard_size=MAX_SHARD)
    save_tokenizer(pipeline.tokenizer, config.output / "tokenizer")
    forget_origin(config.output)
    _, header = load_safetensors(config.unet_run / "checkpoint.safetensors")
    training = json.loads(header["progress"]) | {"validation_loss": validation_curve(config.unet_run / "log.jsonl")}
    atomic_write_text(config.output / "training.json", json.dumps(training, indent=2) + "\n")
    write_card(config.output)
    print(f"written to {config.output}, {folder_bytes(config.output) / 2**20:.1f} MiB")


def validation_curve(log: Path) -> dict[int, float]:
    """Fixed-noise validation loss by steps done, from a run's log."""
    rows = [json.loads(line) for line in log.read_text("utf-8").splitlines()]
    return {row["step"]: row["validation/loss"] for row in rows if "validation/loss" in row}


def forget_origin(folder: Path) -> None:
    """Take out of the configs the folders that the parts were read from."""
    for path in folder.rglob("*config.json"):
        settings = json.loads(path.read_text("utf-8"))
        if settings.pop("_name_or_path", None) is not None:
            atomic_write_text(path, json.dumps(settings, indent=2, sort_keys=True) + "\n")


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def write_card(folder: Path) -> None:
    """Write README.md of a weights folder from its training.json and measurements.json."""
    training = json.loads((folder / "training.json").read_text("utf-8"))
    lines = [
        "# tiny-sd",
        "",
        "Stable Diffusion 1.x in miniature, trained on the toy world only (64x64 px, 16x16x4 latents).",
        f"A plain diffusers folder in float16, {folder_bytes(folder) / 2**20:.1f} MiB, made by",
        "`python -m common.toyworld.pretrain`.",
        "",
        f"UNet: {training['step']:,} steps, {training['samples']:,} samples, {training['seconds'] / 3600:.1f} hours; "
        "the averaged weights are stored.",
        "Fixed-noise validation loss after steps: "
        + ", ".join(f"{int(step):,}: {loss:.4f}" for step, loss in training["validation_loss"].items())
        + ".",
        "To train on from these weights: `python -m common.toyworld.pretrain unet --start-from FOLDER/unet --vae "
        "FOLDER/vae --text-encoder FOLDER/text_encoder --data SHARDS --minutes N`, with FOLDER this one.",
        "Latents have zero mean and unit variance in each channel by the VAE's own weights, so scaling_factor is 1.",
    ]
    measured = folder / MEASUREMENTS
    if measured.exists():
        lines += ["", *measurement_table(json.loads(measured.read_text("utf-8")))]
    else:
        lines += ["", "Not measured yet: `python -m common.toyworld.pretrain measure`."]
    atomic_write_text(folder / "README.md", "\n".join(lines) + "\n")


def measurement_table(measured: dict) -> list[str]:
    """Markdown lines of what `measure` wrote."""
    settings = measured["settings"]
    lines = [
        f"Measured on {settings['num_images']} held-out prompts (seeds from {settings['first_seed']}), "
        f"{settings['num_inference_steps']} DDIM steps, guidance scale {settings['guidance_scale']}, by the judge;",
        "an attribute counts where the prompt names it. The judge's own accuracy is on the renders of the prompts.",
        "",
        "| attribute | generated | goal | judge on renders | prompts |",
        "|---|---|---|---|---|",
    ]
    for name, row in measured["attributes"].items():
        goal = "" if row["goal"] is None else f"{row['goal']:.0%}"
        lines.append(f"| {name} | {row['generated']:.1%} | {goal} | {row['judge']:.1%} | {row['prompts']} |")
    return [
        *lines,
        "",
        f"VAE: {measured['vae']['psnr']:.1f} dB whole image (goal 28), "
        f"{measured['vae']['psnr_object']:.1f} dB on object pixels (goal 25).",
        f"Frechet distance in the judge's features to renders of the same prompts: {measured['frechet']:.2f}; "
        f"between two sets of renders: {measured['frechet_floor']:.2f}.",
    ]
