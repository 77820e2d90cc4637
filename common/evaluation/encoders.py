"""Encoders that scores are computed with. Every metric takes one as an argument; the toy world brings its own.

The real ones are those of the DreamBooth benchmark: CLIP ViT-B/32 and DINO ViT-S/16 (the first DINO: values of DINOv2
are not comparable), float32, pictures preprocessed by PIL as in the original code.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import AutoConfig, CLIPModel, CLIPTokenizer, ViTModel

from common.backbones.image_encoders import CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD
from common.fingerprint import weights_hash
from common.sampling.images import to_pil
from common.toyworld.judge import ToyClip, ToyDino


class ImageEncoder(Protocol):
    """Pictures to unit vectors. `name` and `preprocessing` go into every record; together they are the encoder's id."""

    name: str
    preprocessing: str

    def embed_images(self, pixel_values: Tensor) -> Tensor:
        """(B,3,H,W) in [-1,1], any size -> unit vectors (B,D)."""
        ...


class TextEncoder(Protocol):
    """Texts to unit vectors."""

    name: str

    def embed_texts(self, texts: list[str]) -> Tensor:
        """B texts -> unit vectors (B,D)."""
        ...


class ImageTextEncoder(ImageEncoder, TextEncoder, Protocol):
    """Pictures and texts in one space, as CLIP has it."""


@dataclass(frozen=True)
class Encoders:
    """What the benchmark scores with: `clip` for CLIP-I and CLIP-T, `dino` for DINO."""

    clip: ImageTextEncoder
    dino: ImageEncoder


def encoder_id(encoder: ImageEncoder) -> str:
    """Name and preprocessing in one text."""
    return f"{encoder.name} ({encoder.preprocessing})"


@dataclass(frozen=True)
class PilPreprocessing:
    """Shorter side to resize_px by PIL's antialiased bicubic filter, centre crop to crop_px, normalise.

    The sizes are rounded as torchvision rounds them, which the original CLIP and DINO code uses.
    """

    resize_px: int
    crop_px: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __call__(self, pixel_values: Tensor) -> Tensor:
        """(B,3,H,W) in [-1,1] -> (B,3,crop_px,crop_px) float32; pictures are first rounded to 8 bits, as files are."""
        return torch.stack([self._one(image) for image in to_pil(pixel_values)])

    def _one(self, image: Image.Image) -> Tensor:
        short = min(image.size)
        size = tuple(self.resize_px * length // short for length in image.size)
        image = image.resize(size, Image.Resampling.BICUBIC)
        left, top = (round((length - self.crop_px) / 2) for length in size)
        image = image.crop((left, top, left + self.crop_px, top + self.crop_px))
        pixels = (np.asarray(image, dtype=np.float32) / 255 - np.float32(self.mean)) / np.float32(self.std)
        return torch.from_numpy(pixels).permute(2, 0, 1)

    def __str__(self) -> str:
        stats = "CLIP" if self.mean == CLIP_MEAN else "ImageNet"
        return f"PIL bicubic {self.resize_px}, centre crop {self.crop_px}, {stats} mean and std"


class Clip:
    """CLIP, both towers. The metrics CLIP-I and CLIP-T mean openai/clip-vit-base-patch32.

    Texts longer than the model's 77 tokens are cut, as in the original evaluation code.
    """

    def __init__(self, model: CLIPModel, tokenizer: CLIPTokenizer, name: str) -> None:
        self.model, self.tokenizer = model.float().eval().requires_grad_(False), tokenizer
        self.name = f"{name}@{weights_hash(model)}"
        size = model.config.vision_config.image_size
        self._preprocess = PilPreprocessing(size, size, CLIP_MEAN, CLIP_STD)
        self.preprocessing = str(self._preprocess)

    @classmethod
    def load(cls, source: str | Path, device: str = "cpu") -> "Clip":
        """Args: source: local folder with model and tokenizer, or hub id (openai/clip-vit-base-patch32)."""
        model = CLIPModel.from_pretrained(source, dtype=torch.float32).to(device)
        return cls(model, CLIPTokenizer.from_pretrained(source), _short_name(source))

    @torch.no_grad()
    def embed_images(self, pixel_values: Tensor) -> Tensor:
        inputs = self._preprocess(pixel_values).to(self.model.device)
        return F.normalize(self.model.get_image_features(inputs).pooler_output, dim=-1).cpu()

    @torch.no_grad()
    def embed_texts(self, texts: list[str]) -> Tensor:
        max_length = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(texts, padding=True, truncation=True, max_length=max_length, return_tensors="pt")
        features = self.model.get_text_features(**tokens.to(self.model.device)).pooler_output
        return F.normalize(features, dim=-1).cpu()


class Dino:
    """DINO, class token after the last norm. The metric DINO means facebook/dino-vits16 (384-d)."""

    def __init__(self, model: ViTModel, name: str) -> None:
        self.model = model.float().eval().requires_grad_(False)
        self.name = f"{name}@{weights_hash(model)}"
        crop = model.config.image_size
        self._preprocess = PilPreprocessing(crop * 256 // 224, crop, IMAGENET_MEAN, IMAGENET_STD)
        self.preprocessing = str(self._preprocess)

    @classmethod
    def load(cls, source: str | Path, device: str = "cpu") -> "Dino":
        """Args: source: local folder or hub id (facebook/dino-vits16).

        Raises: ValueError if the model is not a plain ViT, as DINOv2 is not.
        """
        model_type = AutoConfig.from_pretrained(source).model_type
        if model_type != "vit":
            raise ValueError(
                f"{source} is a '{model_type}' model, but DINO is scored with a 'vit': facebook/dino-vits16"
            )
        model = ViTModel.from_pretrained(source, add_pooling_layer=False, dtype=torch.float32)
        return cls(model.to(device), _short_name(source))

    @torch.no_grad()
    def embed_images(self, pixel_values: Tensor) -> Tensor:
        hidden = self.model(self._preprocess(pixel_values).to(self.model.device)).last_hidden_state
        return F.normalize(hidden[:, 0], dim=-1).cpu()


def load_encoders(clip: str = "toy", dino: str = "toy", device: str = "cpu") -> Encoders:
    """Each by "toy" (trained on the toy world, shipped here, on the CPU), by local folder or by hub id."""
    return Encoders(
        clip=ToyClip.load() if clip == "toy" else Clip.load(clip, device),
        dino=ToyDino() if dino == "toy" else Dino.load(dino, device),
    )


def _short_name(source: str | Path) -> str:
    """The last part of a folder or hub id: no record names a folder of somebody's machine."""
    return Path(source).resolve().name if Path(source).is_dir() else str(source)
