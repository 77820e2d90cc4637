"""Recipe 2: the dual encoder; its text half becomes tiny-sd's text encoder.

Contrastive loss with a learnt temperature, and attribute losses on the image features, on the pooled text state and on
the mean of the word states. The last keeps what each word says readable in the states that the UNet attends to.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from common.io import atomic_save_safetensors
from common.toyworld.examples import LABELS
from common.toyworld.judge import FEATURES, WEIGHTS, DualEncoder
from common.toyworld.pretrain.data import load_training_data, to_pixel_values, tokenize
from common.toyworld.pretrain.loop import LoopConfig, Recipe, train
from common.toyworld.pretrain.vae import ARCHITECTURE
from common.toyworld.tokenizer import load_tokenizer, padded_vocabulary_size
from common.training.optimize import default_device


@dataclass(frozen=True, kw_only=True)
class ClipConfig(LoopConfig):
    """Dual encoder: 25 minutes on 2 cores."""

    output: Path = Path("runs/clip")
    minutes: float | None = 25.0
    batch_schedule: str = "0:128"
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    ema_decay: float = 0.997
    validate_minutes: float = 5.0
    weights: Path = WEIGHTS / "clip.safetensors"  # file to write at the end
    text_encoder: Path | None = None  # transformers folder to take as it is and keep; by default it is trained too
    attribute_weight: float = 0.3  # of the attribute losses; 1 for the contrastive loss


class ClipTrainer(nn.Module):
    """The dual encoder with what only training needs: temperature and attribute heads."""

    def __init__(self, text_config: CLIPTextConfig):
        super().__init__()
        self.encoder = DualEncoder(text_config)
        self.log_scale = nn.Parameter(torch.tensor(math.log(14.0)))  # CLIP's start, 1 / 0.07
        width = text_config.hidden_size
        self.heads = nn.ModuleDict(
            {"image": attribute_heads(FEATURES), "pooled": attribute_heads(width), "words": attribute_heads(width)}
        )

    def forward(self, pixel_values: Tensor, input_ids: Tensor, labels: dict[str, Tensor]) -> dict[str, Tensor]:
        """Contrastive and attribute losses of matching pictures and captions."""
        image_embeds, features = self.encoder.encode_image(pixel_values)
        text_embeds, pooled, states = self.encoder.encode_text(input_ids)
        loss, accuracy = contrastive_loss(image_embeds, text_embeds, self.log_scale)
        words = mean_of_words(states, input_ids, self.encoder.text_encoder.config.eos_token_id)
        attribute_losses = {
            f"{name}_attributes": attribute_loss(self.heads[name], x, labels)
            for name, x in (("image", features), ("pooled", pooled), ("words", words))
        }
        return {"contrastive": loss, "accuracy": accuracy} | attribute_losses


def attribute_heads(width: int) -> nn.ModuleDict:
    return nn.ModuleDict({name: nn.Linear(width, len(values)) for name, values in LABELS.items()})


def attribute_loss(heads: nn.ModuleDict, features: Tensor, labels: dict[str, Tensor]) -> Tensor:
    """Mean over attributes of the cross-entropy over the samples that have the attribute (label >= 0)."""
    losses = []
    for name, head in heads.items():
        known = labels[name] >= 0
        if known.any():
            losses.append(F.cross_entropy(head(features[known]).float(), labels[name][known]))
    return torch.stack(losses).mean()


def contrastive_loss(image_embeds: Tensor, text_embeds: Tensor, log_scale: Tensor) -> tuple[Tensor, Tensor]:
    """CLIP's symmetric cross-entropy over the batch, and how often a picture finds its own caption."""
    logits = log_scale.clamp(max=math.log(100.0)).exp() * image_embeds.float() @ text_embeds.float().T
    target = torch.arange(len(logits), device=logits.device)
    loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    return loss, (logits.argmax(1) == target).float().mean()


def mean_of_words(states: Tensor, input_ids: Tensor, end_id: int) -> Tensor:
    """Mean state (B, D) of the tokens between the start token and the first end token."""
    before_end = (input_ids == end_id).cumsum(1) == 0
    weights = before_end.float() * (torch.arange(input_ids.shape[1], device=input_ids.device) > 0)
    return (states * weights[..., None]).sum(1) / weights.sum(1, keepdim=True).clamp(min=1)


def text_config(tokenizer) -> CLIPTextConfig:
    """tiny-sd's text encoder architecture with the vocabulary of the tokenizer."""
    config = CLIPTextConfig.from_pretrained(ARCHITECTURE / "text_encoder")
    config.vocab_size = max(config.vocab_size, padded_vocabulary_size(tokenizer))
    config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    config.pad_token_id = tokenizer.pad_token_id
    return config


def train_clip(config: ClipConfig) -> None:
    """Train, write config.weights and the transformers folder OUTPUT/text_encoder."""
    torch.manual_seed(config.seed)
    device, tokenizer = default_device(), load_tokenizer()
    data, validation = load_training_data(config.data, config.max_images)
    trainer = ClipTrainer(text_config(tokenizer))
    if config.text_encoder is not None:
        kept = CLIPTextModel.from_pretrained(config.text_encoder)
        trainer.encoder.text_encoder.load_state_dict(kept.state_dict())
        trainer.encoder.text_encoder.requires_grad_(False)
    images, labels = data.images.to(device), {name: values.to(device) for name, values in data.labels.items()}
    paraphrases = len(data.captions[0])
    ids = tokenize(tokenizer, [text for captions in data.captions for text in captions], padding="longest")
    ids = ids.view(len(data), paraphrases, -1)
    validation_ids = tokenize(tokenizer, [captions[0] for captions in validation.captions], padding="longest")

    def loss(indices: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        choice = torch.randint(paraphrases, indices.shape, generator=generator)
        input_ids = trim(ids[indices, choice], tokenizer.eos_token_id).to(device)
        indices = indices.to(device)
        parts = trainer(to_pixel_values(images[indices]), input_ids, {name: x[indices] for name, x in labels.items()})
        attributes = sum(value for name, value in parts.items() if name.endswith("_attributes"))
        return {"loss": parts["contrastive"] + config.attribute_weight * attributes} | parts

    def validate() -> dict[str, float]:
        totals: dict[str, float] = {}
        batches = torch.arange(len(validation)).split(128)
        for rows in batches:
            targets = {name: values[rows].to(device) for name, values in validation.labels.items()}
            pixel_values = to_pixel_values(validation.images[rows].to(device))
            for name, value in trainer(pixel_values, validation_ids[rows].to(device), targets).items():
                totals[name] = totals.get(name, 0.0) + value.item() / len(batches)
        return totals

    train(Recipe("clip", trainer, len(data), loss, validate), config)
    with torch.no_grad():
        own_caption = validate()["accuracy"]
    save_clip(trainer.encoder, own_caption, config.weights)
    trainer.encoder.text_encoder.save_pretrained(config.output / "text_encoder")
    print(f"written: {config.output / 'text_encoder'}")


def trim(input_ids: Tensor, end_id: int) -> Tensor:
    """Cut the columns in which every row is padding. Exact for what is read, because the text encoder is causal."""
    longest = int((input_ids != end_id).sum(1).max())
    return input_ids[:, : longest + 1]


def save_clip(encoder: DualEncoder, own_caption: float, path: Path) -> None:
    """Write float16 weights; own_caption: how often a held-out picture finds its own caption among 128."""
    tensors = {name: tensor.half().contiguous() for name, tensor in encoder.state_dict().items()}
    header = {
        "text_config": json.dumps(encoder.text_encoder.config.to_diff_dict()),
        "accuracy": json.dumps({"own caption of 128": round(own_caption, 4)}),
    }
    atomic_save_safetensors(tensors, path, header)
    print(f"written: {path}")
