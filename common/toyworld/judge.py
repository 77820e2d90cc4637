"""Networks that read the toy world's pictures: attribute judge, CLIP-like dual encoder, DINO-like features.

All take pixel_values (B, 3, 64, 64) in [-1, 1]; other sizes are resized. They are trained on renders by
common.toyworld.pretrain, and their accuracy on held-out renders is in the header of their files.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from common.fingerprint import weights_hash
from common.io import load_safetensors
from common.toyworld.tokenizer import MAX_TOKENS, load_tokenizer

WEIGHTS = Path(__file__).parent / "weights"
HELD_OUT_JUDGE = WEIGHTS / "held_out_judge.safetensors"  # a Judge that also knows what held_out.py names
IMAGE_PX = 64
FEATURES = 256  # width of the penultimate features
IDENTITY = 64  # width of the identity embedding


class ResidualBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), 3x3, width unchanged."""

    def __init__(self, width: int):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(8, width), nn.Conv2d(width, width, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(8, width), nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))


class ImageTrunk(nn.Module):
    """Small residual network, (B, 3, 64, 64) -> features (B, 256). Its 4x4 end keeps places, for relations."""

    def __init__(self, widths: Sequence[int]):
        super().__init__()
        stages: list[nn.Module] = [nn.Conv2d(3, widths[0], 4, stride=2, padding=1)]
        for width, next_width in zip(widths, [*widths[1:], None], strict=True):
            stages.append(ResidualBlock(width))
            if next_width is not None:
                stages.append(nn.Conv2d(width, next_width, 2, stride=2))
        self.stages = nn.Sequential(*stages)
        self.squeeze = nn.Sequential(nn.GroupNorm(8, widths[-1]), nn.SiLU(), nn.Conv2d(widths[-1], 64, 1))
        self.project = nn.Linear(64 * 16, FEATURES)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.readout(self.stages(pixel_values))

    def readout(self, features_4: Tensor) -> Tensor:
        """Output of the stages (B, C, 4, 4) -> features (B, 256)."""
        return self.project(F.silu(self.squeeze(features_4)).flatten(1))


class EntityPooling(nn.Module):
    """Finds the first and the second entity of a picture and averages features over each, so that roles stay apart.

    A 1x1 convolution of the 8x8 features says what each cell shows: background, first or second entity.
    """

    def __init__(self, width_16: int, width_8: int):
        super().__init__()
        self.entity_logits = nn.Conv2d(width_8, 3, 1)
        self.norm_16, self.norm_8 = nn.GroupNorm(8, width_16), nn.GroupNorm(8, width_8)
        self.project = nn.Linear(2 * (width_16 + width_8), FEATURES)

    def forward(self, features_16: Tensor, features_8: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C, 16, 16) and (B, C', 8, 8) -> features (B, 256), logits of background / first / second (B, 3, 8, 8)."""
        logits = self.entity_logits(features_8)
        weights = logits.softmax(1)[:, 1:]
        weights = weights / weights.sum((2, 3), keepdim=True).clamp(min=0.5)
        fine = weights.repeat_interleave(2, 2).repeat_interleave(2, 3) / 4
        pooled = [
            torch.einsum("bkhw,bchw->bkc", fine, F.silu(self.norm_16(features_16))),
            torch.einsum("bkhw,bchw->bkc", weights, F.silu(self.norm_8(features_8))),
        ]
        return self.project(torch.cat(pooled, 2).flatten(1)), logits


class Judge(nn.Module):
    """Reads attributes and identity from a picture.

    labels: attribute -> names of its classes. accuracy: attribute -> top-1 on held-out renders.
    """

    WIDTHS = (48, 96, 160, 192)

    def __init__(self, labels: dict[str, list[str]], accuracy: dict[str, float] | None = None):
        super().__init__()
        self.labels, self.accuracy = labels, accuracy or {}
        self.trunk, self.entities = ImageTrunk(self.WIDTHS), EntityPooling(self.WIDTHS[1], self.WIDTHS[2])
        self.heads = nn.ModuleDict({name: nn.Linear(FEATURES, len(values)) for name, values in labels.items()})
        self.identity = nn.Linear(FEATURES, IDENTITY)

    @classmethod
    def load(cls, path: Path = WEIGHTS / "judge.safetensors", device: torch.device | str = "cpu") -> "Judge":
        """The trained judge, frozen."""
        tensors, header = _load(path, "judge")
        judge = cls(json.loads(header["labels"]), json.loads(header["accuracy"]))
        judge.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
        return judge.to(device).eval().requires_grad_(False)

    def features(self, pixel_values: Tensor) -> Tensor:
        """Penultimate features (B, 256), not normalised."""
        return self.features_and_entities(pixel_values)[0]

    def features_and_entities(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """Features (B, 256), and logits of background, first and second entity in 8x8 cells (B, 3, 8, 8)."""
        x, maps = _to_world_size(pixel_values), {}
        for stage in self.trunk.stages:
            x = stage(x)
            maps[x.shape[-1]] = x
        of_entities, entity_logits = self.entities(maps[16], maps[8])
        return F.silu(self.trunk.readout(x) + of_entities), entity_logits

    def forward(self, pixel_values: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Logits of every attribute, and the unit identity embedding."""
        features = self.features(pixel_values)
        return {name: head(features) for name, head in self.heads.items()}, F.normalize(self.identity(features), dim=-1)

    def read(self, pixel_values: Tensor) -> dict[str, Tensor]:
        """Attribute -> probabilities (B, classes). An attribute that the picture lacks is read all the same."""
        return {name: logits.softmax(-1) for name, logits in self(pixel_values)[0].items()}

    def embed_identity(self, pixel_values: Tensor) -> Tensor:
        """Unit vectors (B, 64) that are close for pictures of one face, or of one object instance."""
        return self(pixel_values)[1]


class ToyDino:
    """Image encoder of common.evaluation: the judge's features, normalised."""

    preprocessing = "64x64 px, [-1, 1]"

    def __init__(self, judge: Judge | None = None):
        self.judge = judge or Judge.load()
        self.name = f"toy-dino@{weights_hash(self.judge)}"

    @torch.no_grad()
    def embed_images(self, pixel_values: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> unit (B, 256)."""
        return F.normalize(self.judge.features(pixel_values), dim=-1)


class DualEncoder(nn.Module):
    """CLIP in miniature: text encoder and image trunk with a common space of 256 dimensions."""

    WIDTHS = (32, 64, 96, 128)

    def __init__(self, text_config: CLIPTextConfig):
        super().__init__()
        self.text_encoder = CLIPTextModel(text_config)
        self.text_projection = nn.Linear(text_config.hidden_size, FEATURES, bias=False)
        self.trunk = ImageTrunk(self.WIDTHS)
        self.image_projection = nn.Linear(FEATURES, FEATURES, bias=False)

    def encode_text(self, input_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Ids (B, L) -> unit embeddings (B, 256), pooled states (B, 256), states of all tokens (B, L, 256)."""
        output = self.text_encoder(input_ids)
        embeds = F.normalize(self.text_projection(output.pooler_output), dim=-1)
        return embeds, output.pooler_output, output.last_hidden_state

    def encode_image(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, H, W) -> unit embeddings (B, 256), features (B, 256)."""
        features = F.silu(self.trunk(_to_world_size(pixel_values)))
        return F.normalize(self.image_projection(features), dim=-1), features


class ToyClip:
    """Image and text encoder of common.evaluation: the dual encoder with its tokenizer."""

    preprocessing = "64x64 px, [-1, 1]"

    def __init__(self, encoder: DualEncoder, tokenizer):
        self.encoder, self.tokenizer = encoder, tokenizer
        self.name = f"toy-clip@{weights_hash(encoder)}"

    @classmethod
    def load(cls, path: Path = WEIGHTS / "clip.safetensors", device: torch.device | str = "cpu") -> "ToyClip":
        """The trained encoder, frozen, with tiny-sd's tokenizer."""
        tensors, header = _load(path, "clip")
        encoder = DualEncoder(CLIPTextConfig.from_dict(json.loads(header["text_config"])))
        encoder.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, strict=True)
        return cls(encoder.to(device).eval().requires_grad_(False), load_tokenizer())

    @torch.no_grad()
    def embed_images(self, pixel_values: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> unit (B, 256)."""
        return self.encoder.encode_image(pixel_values)[0]

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """N texts -> unit (N, 256)."""
        ids = self.tokenizer(
            list(texts), padding="max_length", truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
        ).input_ids
        return self.encoder.encode_text(ids.to(self.encoder.text_projection.weight.device))[0]


def _to_world_size(pixel_values: Tensor) -> Tensor:
    if pixel_values.ndim != 4 or pixel_values.shape[1] != 3:
        raise ValueError(f"pixel_values must be (B, 3, H, W), got {tuple(pixel_values.shape)}")
    if pixel_values.shape[-2:] == (IMAGE_PX, IMAGE_PX):
        return pixel_values
    return F.interpolate(pixel_values, (IMAGE_PX, IMAGE_PX), mode="bilinear", antialias=True, align_corners=False)


def _load(path: Path, recipe: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    if not Path(path).is_file():
        raise FileNotFoundError(f"no weights at {path}; train them with: python -m common.toyworld.pretrain {recipe}")
    return load_safetensors(path)
