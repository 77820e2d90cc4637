"""What the recipes train on: rendered shards in memory, and caches of latents and prompt embeddings."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from numpy.lib.format import open_memmap
from torch import Tensor
from tqdm import tqdm
from transformers import CLIPTextModel, CLIPTokenizer

from common.io import atomic_save_safetensors, atomic_write_text, load_safetensors
from common.toyworld.shards import ShardData, load_shards

NUM_VALIDATION = 1024  # images at the end of the shards that no recipe trains on
HELD_OUT_FIRST_SEED = 500_000_000  # seeds from here on are for measuring; shards must stay below


def load_training_data(directory: Path, max_images: int | None = None) -> tuple[ShardData, ShardData]:
    """Training images and validation images (the last NUM_VALIDATION, or a tenth of a small set)."""
    data = load_shards(directory, max_images)
    held_out = min(NUM_VALIDATION, len(data) // 10)
    if held_out == 0:
        raise ValueError(f"{directory} holds {len(data)} images; training needs at least 10")
    return _part(data, slice(0, len(data) - held_out)), _part(data, slice(len(data) - held_out, None))


def to_pixel_values(images: Tensor) -> Tensor:
    """(B, 64, 64, 3) uint8 -> pixel_values (B, 3, 64, 64) float32 in [-1, 1]."""
    return images.permute(0, 3, 1, 2).contiguous().float() / 127.5 - 1


def tokenize(tokenizer: CLIPTokenizer, texts: Sequence[str], *, padding: str = "max_length") -> Tensor:
    """Token ids (B, 77), or (B, longest) with padding="longest"."""
    return tokenizer(list(texts), padding=padding, truncation=True, max_length=77, return_tensors="pt").input_ids


@torch.no_grad()
def cached_latents(vae: AutoencoderKL, images: Tensor, path: Path) -> Tensor:
    """Scaled posterior means (N, 4, 16, 16) float16 of uint8 images, computed once and kept in a file.

    Raises: ValueError if the latents are far from unit variance, which the UNet and its schedule expect.
    """
    fingerprint = _fingerprint(vae, [str(tuple(images.shape)), str(int(images[:: max(1, len(images) // 64)].sum()))])
    if path.exists():
        tensors, header = load_safetensors(path)
        if header.get("fingerprint") == fingerprint:
            return tensors["latents"]
    device = next(vae.parameters()).device
    batches = [
        (vae.encode(to_pixel_values(batch.to(device))).latent_dist.mode() * vae.config.scaling_factor).half().cpu()
        for batch in tqdm(images.split(64), desc="encoding images", mininterval=5)
    ]
    latents = torch.cat(batches)
    spread = latents.float().std().item()
    if not 0.8 < spread < 1.25:
        raise ValueError(
            f"latents have standard deviation {spread:.3f}, expected 1; normalise the VAE first: "
            "python -m common.toyworld.pretrain fold --help"
        )
    atomic_save_safetensors({"latents": latents}, path, {"fingerprint": fingerprint})
    return latents


@torch.no_grad()
def encode_texts(
    tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel, texts: Sequence[str], batch_size: int = 64
) -> Tensor:
    """Prompt embeddings (N, 77, 256) float32 as Stable Diffusion sees them: last hidden state, padded to 77 tokens."""
    device = next(text_encoder.parameters()).device
    batches = [texts[i : i + batch_size] for i in range(0, len(texts), batch_size)]
    return torch.cat([text_encoder(tokenize(tokenizer, b).to(device)).last_hidden_state.cpu() for b in batches])


class PromptTable:
    """Prompt embeddings of many captions, float16 in a memory-mapped file (39 KB each), computed once.

    rows: caption -> row; the empty prompt is row 0.
    """

    def __init__(self, tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel, captions: Sequence[str], path: Path):
        unique = ["", *sorted(set(captions) - {""})]
        self.rows = {text: row for row, text in enumerate(unique)}
        fingerprint, record = _fingerprint(text_encoder, unique), path.with_suffix(".json")
        if not (record.exists() and path.exists() and json.loads(record.read_text("utf-8")) == fingerprint):
            path.parent.mkdir(parents=True, exist_ok=True)
            record.unlink(missing_ok=True)
            width = text_encoder.config.hidden_size
            file = open_memmap(path, mode="w+", dtype=np.float16, shape=(len(unique), 77, width))
            for start in tqdm(range(0, len(unique), 256), desc="encoding captions", mininterval=5):
                texts = unique[start : start + 256]
                file[start : start + len(texts)] = encode_texts(tokenizer, text_encoder, texts).half().numpy()
            file.flush()
            atomic_write_text(record, json.dumps(fingerprint))
        self.embeds = np.load(path, mmap_mode="r")

    def __getitem__(self, rows: Tensor) -> Tensor:
        """Prompt embeddings (B, 77, 256) float32 of row numbers (B,)."""
        return torch.from_numpy(self.embeds[rows.numpy()]).float()


def caption_rows(captions: list[list[str]], rows: dict[str, int]) -> Tensor:
    """Row numbers (N, paraphrases) of each image's captions."""
    return torch.tensor([[rows[text] for text in paraphrases] for paraphrases in captions])


def _fingerprint(module: torch.nn.Module, texts: Sequence[str]) -> str:
    digest = hashlib.sha256()
    for tensor in module.state_dict().values():
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    digest.update("\n".join(texts).encode())
    return digest.hexdigest()


def _part(data: ShardData, part: slice) -> ShardData:
    return ShardData(
        images=data.images[part],
        masks=data.masks[part],
        labels={name: values[part] for name, values in data.labels.items()},
        instances=data.instances[part],
        mentioned={name: values[part] for name, values in data.mentioned.items()},
        captions=data.captions[part],
    )
