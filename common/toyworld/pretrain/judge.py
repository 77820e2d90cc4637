"""Recipe 3: the judge that reads attributes and identity back from a picture.

Trained on renders made a little worse (noise, blur, brightness, shifts), so that it also reads generated pictures.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.io import atomic_save_safetensors
from common.toyworld.examples import LABELS
from common.toyworld.judge import IDENTITY, WEIGHTS, Judge
from common.toyworld.pretrain.clip import attribute_loss
from common.toyworld.pretrain.data import load_training_data, to_pixel_values
from common.toyworld.pretrain.loop import LoopConfig, Recipe, train
from common.toyworld.shards import ShardData
from common.training.optimize import default_device

IDENTITY_SCALE, IDENTITY_MARGIN = 16.0, 0.1  # of the cosine softmax over instances


@dataclass(frozen=True, kw_only=True)
class JudgeConfig(LoopConfig):
    """Judge: 40 minutes on 2 cores."""

    output: Path = Path("runs/judge")
    minutes: float | None = 40.0
    batch_schedule: str = "0:64"
    learning_rate: float = 1.5e-3
    weight_decay: float = 0.02
    ema_decay: float = 0.998
    validate_minutes: float = 5.0
    weights: Path = WEIGHTS / "judge.safetensors"  # file to write at the end
    identity_weight: float = 0.03  # of the identity loss; 1 for the mean of the attribute losses
    entity_weight: float = 0.3  # of the loss of the entity map


class JudgeTrainer(nn.Module):
    """The judge with what only training needs: one direction for each recurring instance."""

    def __init__(self, num_instances: int, labels: dict[str, list[str]] = LABELS):
        super().__init__()
        self.judge = Judge({name: list(values) for name, values in labels.items()})
        self.instances = nn.Parameter(torch.randn(num_instances, IDENTITY))

    def forward(
        self, pixel_values: Tensor, masks: Tensor, labels: dict[str, Tensor], instances: Tensor
    ) -> dict[str, Tensor]:
        """Losses of attributes (see clip.attribute_loss), entity map, and identity (of samples with instances >= 0)."""
        features, entity_logits = self.judge.features_and_entities(pixel_values)
        parts = {"attributes": attribute_loss(self.judge.heads, features, labels)}
        parts["entities"] = F.cross_entropy(entity_logits.float(), entity_shares(masks))
        known = instances >= 0
        embeds = F.normalize(self.judge.identity(features[known]).float(), dim=-1)
        parts["identity"] = identity_loss(embeds, self.instances, instances[known])
        return parts


def entity_shares(masks: Tensor) -> Tensor:
    """Share of background, first and second entity in 8x8 px cells; masks (B, 64, 64) -> (B, 3, 8, 8)."""
    return F.avg_pool2d(F.one_hot(masks.long().clamp(max=2), 3).permute(0, 3, 1, 2).float(), 8)


def identity_loss(embeds: Tensor, directions: Tensor, instances: Tensor) -> Tensor:
    """Softmax over cosines to each instance's direction, the right cosine lowered by a margin (CosFace)."""
    cosines = embeds @ F.normalize(directions, dim=-1).T
    cosines = cosines - IDENTITY_MARGIN * F.one_hot(instances, len(directions))
    return F.cross_entropy(IDENTITY_SCALE * cosines, instances, reduction="sum") / max(1, len(instances))


def augment(pixel_values: Tensor, generator: torch.Generator) -> Tensor:
    """Brightness, a shift of up to 2 px, blur, noise; drawn on the CPU for each picture (the shift for the batch)."""
    batch = len(pixel_values)

    def uniform(low: float, high: float) -> Tensor:
        return (low + (high - low) * torch.rand(batch, 1, 1, 1, generator=generator)).to(pixel_values.device)

    x = pixel_values * uniform(0.92, 1.06) + uniform(-0.06, 0.06)
    dx, dy = (int(n) for n in torch.randint(-2, 3, (2,), generator=generator))
    x = F.pad(x, (2, 2, 2, 2), mode="replicate")[..., 2 + dy : 66 + dy, 2 + dx : 66 + dx]
    blurred = F.interpolate(F.avg_pool2d(x, 2), scale_factor=2.0, mode="bilinear", align_corners=False)
    x = torch.lerp(x, blurred, uniform(-0.5, 0.9).clamp(min=0))
    noise = torch.randn(x.shape, generator=generator).to(x.device)
    return (x + noise * uniform(-0.04, 0.10).clamp(min=0)).clamp(-1, 1)


@torch.no_grad()
def attribute_accuracy(
    judge: Judge, images: Tensor, labels: dict[str, Tensor], mask: dict[str, Tensor] | None = None
) -> dict[str, tuple[float, int]]:
    """Top-1 accuracy of each attribute over the pictures that have it (and that `mask` selects).

    Args:
        images: (N, 64, 64, 3) uint8.
        labels: attribute -> (N,) int64, -1 = does not apply.
        mask: attribute -> (N,) bool.
    Returns: attribute -> (accuracy, number of pictures); attributes without pictures are left out.
    """
    device = next(judge.parameters()).device
    rows = []
    for batch in images.split(128):
        probabilities = judge.read(to_pixel_values(batch.to(device)))
        rows.append({name: p.argmax(-1).cpu() for name, p in probabilities.items()})
    result = {}
    for name in judge.labels:
        counted = labels[name] >= 0
        if mask is not None:
            counted &= mask[name]
        if counted.any():
            correct = torch.cat([row[name] for row in rows]) == labels[name]
            result[name] = (correct[counted].float().mean().item(), int(counted.sum()))
    return result


@torch.no_grad()
def same_instance_auc(judge: Judge, images: Tensor, instances: Tensor) -> float:
    """Chance that two pictures of one instance are closer in the identity embedding than pictures of two instances."""
    device, known = next(judge.parameters()).device, instances >= 0
    embeds = torch.cat([judge.embed_identity(to_pixel_values(b.to(device))).cpu() for b in images[known].split(128)])
    upper = torch.ones(len(embeds), len(embeds)).triu(1).bool()
    same = (instances[known][:, None] == instances[known])[upper]
    similarity = (embeds @ embeds.T)[upper]
    positive, negative = similarity[same], similarity[~same].sort().values
    return (torch.searchsorted(negative, positive).float().mean() / len(negative)).item()


def train_judge(config: JudgeConfig) -> None:
    """Train, and write config.weights."""
    torch.manual_seed(config.seed)
    device = default_device()
    data, validation = load_training_data(config.data, config.max_images)
    trainer = JudgeTrainer(int(data.instances.max()) + 1)
    images, masks, instances = (part.to(device) for part in (data.images, data.masks, data.instances))
    labels = {name: values.to(device) for name, values in data.labels.items()}

    def loss(indices: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        indices = indices.to(device)
        pixel_values = augment(to_pixel_values(images[indices]), generator)
        parts = trainer(
            pixel_values, masks[indices], {name: x[indices] for name, x in labels.items()}, instances[indices]
        )
        total = parts["attributes"] + config.entity_weight * parts["entities"]
        return {"loss": total + config.identity_weight * parts["identity"]} | parts

    def validate() -> dict[str, float]:
        accuracy = attribute_accuracy(trainer.judge, validation.images, validation.labels)
        same = same_instance_auc(trainer.judge, validation.images, validation.instances)
        return {name: value for name, (value, _) in accuracy.items()} | {"same_instance_auc": same}

    train(Recipe("judge", trainer, len(data), loss, validate), config)
    save_judge(trainer.judge, validation, config.weights)


@torch.no_grad()
def save_judge(judge: Judge, validation: ShardData, path: Path) -> None:
    """Write float16 weights with the label names and the accuracy on renders that were not trained on."""
    accuracy = attribute_accuracy(judge, validation.images, validation.labels)
    header = {
        "labels": json.dumps(judge.labels),
        "accuracy": json.dumps({name: round(value, 4) for name, (value, _) in accuracy.items()}),
    }
    atomic_save_safetensors({name: t.half().contiguous() for name, t in judge.state_dict().items()}, path, header)
    print(f"written: {path}")
