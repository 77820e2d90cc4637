"""Frozen image encoders behind one interface: CLIP vision, DINO, face identity.

All take pixel_values (B, 3, H, W) in [-1, 1] of any size, do their own preprocessing on tensors (so gradients reach
the pixels), and return `ImageFeatures`. Methods take an encoder as an argument; the toy world brings its own.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModel, CLIPVisionModelWithProjection

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

# Where ArcFace expects left eye, right eye, nose, left and right mouth corner, (x, y) in its 112 x 112 px input.
ARCFACE_TEMPLATE_PX = (
    (38.2946, 51.6963),
    (73.5318, 51.5014),
    (56.0252, 71.7366),
    (41.5493, 92.3655),
    (70.7299, 92.2041),
)


@dataclass(frozen=True)
class ImageFeatures:
    """embedding: one vector for each image, (B, D), not normalised.
    tokens: features in space, (B, N, W), class token first; None when the encoder has none."""

    embedding: Tensor
    tokens: Tensor | None = None


class ImageEncoder(Protocol):
    """What methods ask of an encoder. Face identity encoders take aligned faces (see `align_faces`)."""

    name: str

    def features(self, pixel_values: Tensor) -> ImageFeatures:
        """Encode images (B, 3, H, W) in [-1, 1]; differentiable with respect to them."""

    def embed_images(self, pixel_values: Tensor) -> Tensor:
        """Unit embeddings (B, D)."""


@dataclass(frozen=True)
class Preprocessing:
    """Shorter side to resize_px (bicubic, antialiased as in PIL), centre crop to crop_px, normalise."""

    resize_px: int
    crop_px: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __call__(self, pixel_values: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, 3, crop_px, crop_px). PIL also rounds to 8 bits, which is left out here."""
        if pixel_values.ndim != 4 or pixel_values.shape[1] != 3:
            raise ValueError(f"pixel_values must be (B, 3, H, W), got {tuple(pixel_values.shape)}")
        height, width = pixel_values.shape[-2:]
        short = min(height, width)
        size = (self.resize_px * height // short, self.resize_px * width // short)
        images = pixel_values / 2 + 0.5
        if size != (height, width):
            images = F.interpolate(images, size, mode="bicubic", antialias=True).clamp(0, 1)
        top, left = ((length - self.crop_px) // 2 for length in size)
        images = images[..., top : top + self.crop_px, left : left + self.crop_px]
        mean, std = (images.new_tensor(v).view(3, 1, 1) for v in (self.mean, self.std))
        return (images - mean) / std


class ClipVisionEncoder(nn.Module):
    """CLIP's image tower. embedding: the projected image_embeds (ViT-L/14: 768, ViT-H/14: 1024);
    tokens: hidden_states[-2] with the class token (ViT-L/14: (B, 257, 1024)), as IP-Adapter Plus reads them."""

    def __init__(self, model: CLIPVisionModelWithProjection, name: str) -> None:
        super().__init__()
        self.model, self.name = model.eval().requires_grad_(False), name
        size = model.config.image_size
        self.preprocessing = Preprocessing(size, size, CLIP_MEAN, CLIP_STD)

    @classmethod
    def load(cls, source: str | Path, *, dtype: torch.dtype = torch.float32) -> "ClipVisionEncoder":
        """Args: source: local folder or hub id, such as openai/clip-vit-large-patch14."""
        return cls(CLIPVisionModelWithProjection.from_pretrained(source, dtype=dtype), str(source))

    def features(self, pixel_values: Tensor) -> ImageFeatures:
        inputs = self.preprocessing(pixel_values).to(self.model.dtype)
        output = self.model(inputs, output_hidden_states=True)
        return ImageFeatures(output.image_embeds, output.hidden_states[-2])

    def embed_images(self, pixel_values: Tensor) -> Tensor:
        return F.normalize(self.features(pixel_values).embedding, dim=-1)


class DinoEncoder(nn.Module):
    """DINO (ViT) or DINOv2. embedding: the class token after the last norm (ViT-S: 384);
    tokens: class token and patches, without register tokens. The two versions' values are not comparable."""

    def __init__(self, model: nn.Module, name: str) -> None:
        super().__init__()
        self.model, self.name = model.eval().requires_grad_(False), name
        # 256 -> 224 for both; DINOv2 checkpoints keep the 518 px of their position table, and interpolate from it.
        crop = min(model.config.image_size, 224)
        self.preprocessing = Preprocessing(crop * 256 // 224, crop, IMAGENET_MEAN, IMAGENET_STD)

    @classmethod
    def load(cls, source: str | Path, *, dtype: torch.dtype = torch.float32) -> "DinoEncoder":
        """Args: source: local folder or hub id: facebook/dino-vits16 (the DreamBooth metric), facebook/dinov2-base."""
        return cls(AutoModel.from_pretrained(source, dtype=dtype), str(source))

    def features(self, pixel_values: Tensor) -> ImageFeatures:
        hidden = self.model(self.preprocessing(pixel_values).to(self.model.dtype)).last_hidden_state
        registers = getattr(self.model.config, "num_register_tokens", 0)
        return ImageFeatures(hidden[:, 0], torch.cat([hidden[:, :1], hidden[:, 1 + registers :]], dim=1))

    def embed_images(self, pixel_values: Tensor) -> Tensor:
        return F.normalize(self.features(pixel_values).embedding, dim=-1)


def similarity_transform(source: Tensor, target: Tensor) -> Tensor:
    """Rotation, uniform scale and shift that move points onto others with the least squared error (Umeyama 1991).

    Args:
        source, target: (B, P, 2) coordinates (x, y), P >= 2 different points.
    Returns: (B, 2, 3) matrices M with M @ (x, y, 1) = target. Mirroring is not allowed.
    """
    source_mean, target_mean = source.mean(1, keepdim=True), target.mean(1, keepdim=True)
    s = torch.view_as_complex((source - source_mean).contiguous())
    t = torch.view_as_complex((target - target_mean).contiguous())
    # In the plane, scale and rotation are one complex factor: t = factor * s in the least-squares sense.
    factor = (s.conj() * t).sum(1) / s.abs().square().sum(1)
    a, b = factor.real, factor.imag
    linear = torch.stack([torch.stack([a, -b], -1), torch.stack([b, a], -1)], -2)  # (B, 2, 2)
    shift = target_mean[:, 0, :, None] - linear @ source_mean[:, 0, :, None]
    return torch.cat([linear, shift], -1)


def align_faces(pixel_values: Tensor, keypoints_px: Tensor, *, size_px: int = 112) -> Tensor:
    """Warp each face so that its five key points fall on ArcFace's template; differentiable in the pixels.

    Args:
        pixel_values: (B, 3, H, W) in [-1, 1].
        keypoints_px: (B, 5, 2), (x, y) of pixel centres: eyes, nose, mouth corners, left before right in the image.
        size_px: side of the result; the template is scaled to it.
    Returns: (B, 3, size_px, size_px) in [-1, 1], bilinear; outside the picture black.
    """
    if keypoints_px.shape != (len(pixel_values), 5, 2):
        raise ValueError(f"keypoints_px must be ({len(pixel_values)}, 5, 2), got {tuple(keypoints_px.shape)}")
    height, width = pixel_values.shape[-2:]
    keypoints = keypoints_px.to(pixel_values)
    template = pixel_values.new_tensor(ARCFACE_TEMPLATE_PX) * (size_px / 112)
    to_template = similarity_transform(keypoints, template.expand_as(keypoints))  # (B, 2, 3)
    y, x = torch.meshgrid(torch.arange(size_px), torch.arange(size_px), indexing="ij")
    grid = torch.stack([x, y], -1).to(pixel_values).flatten(0, 1)  # (size * size, 2), pixels of the result
    points = torch.linalg.solve(to_template[..., :2], (grid - to_template[:, None, :, 2]).mT).mT  # in the picture
    points = points.unflatten(1, (size_px, size_px))
    normalised = 2 * points / points.new_tensor([width - 1, height - 1]) - 1
    return F.grid_sample(pixel_values + 1, normalised, align_corners=True) - 1  # 0 (outside) becomes -1, black
