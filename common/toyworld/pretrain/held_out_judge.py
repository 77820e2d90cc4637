"""Recipe 6: the judge of what is held out, which starts as the judge and also learns the names that training hides.

It examines methods that learn a relation, an action, a concept or a style. No backbone ever sees what it is trained on.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from common.toyworld.held_out import LABELS, render_held_out
from common.toyworld.judge import HELD_OUT_JUDGE, WEIGHTS, Judge
from common.toyworld.pretrain.data import HELD_OUT_FIRST_SEED, load_training_data, to_pixel_values
from common.toyworld.pretrain.judge import JudgeConfig, JudgeTrainer, attribute_accuracy, augment, save_judge
from common.toyworld.pretrain.loop import Recipe, train
from common.toyworld.shards import ShardData
from common.training.optimize import default_device


@dataclass(frozen=True, kw_only=True)
class HeldOutJudgeConfig(JudgeConfig):
    """Judge of held-out things: 25 minutes on one core."""

    output: Path = Path("runs/held_out_judge")
    minutes: float | None = 25.0
    learning_rate: float = 7e-4
    weights: Path = HELD_OUT_JUDGE  # file to write at the end
    start_from: Path = WEIGHTS / "judge.safetensors"  # the judge that is trained on
    num_held_out: int = 16_000  # renders of held-out things; as many samples are drawn from them as from the shards


def extended(judge: Judge, labels: dict[str, list[str]]) -> dict[str, Tensor]:
    """The judge's weights for longer lists of labels; what it has no row for starts at zero.

    Raises: ValueError if a list does not begin with the judge's own labels.
    """
    state = dict(judge.state_dict())
    for name, names in labels.items():
        own = judge.labels.get(name, [])
        if names[: len(own)] != own:
            raise ValueError(f"the labels of {name!r} must begin with {own}, got {names[: len(own)]}")
        for part in ("weight", "bias"):
            head = state[f"heads.{name}.{part}"]
            state[f"heads.{name}.{part}"] = torch.cat([head, head.new_zeros(len(names) - len(own), *head.shape[1:])])
    return state


def train_held_out_judge(config: HeldOutJudgeConfig) -> None:
    """Train, and write config.weights."""
    torch.manual_seed(config.seed)
    device = default_device()
    data, ordinary = load_training_data(config.data, config.max_images)
    held_out = render_held_out(range(config.num_held_out))
    validation = render_held_out(range(HELD_OUT_FIRST_SEED, HELD_OUT_FIRST_SEED + 1024))
    trainer = JudgeTrainer(1, LABELS)
    trainer.judge.load_state_dict(extended(Judge.load(config.start_from), LABELS))
    trainer.judge.requires_grad_(True)
    trainer.instances.requires_grad_(False)
    trainer.judge.identity.requires_grad_(False)
    sources = (data, held_out)

    def batch_of(source: ShardData, indices: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        return source.images[indices], source.masks[indices], {name: x[indices] for name, x in source.labels.items()}

    def loss(indices: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        parts = [batch_of(source, indices[k::2] % len(source)) for k, source in enumerate(sources)]
        images, masks = (torch.cat([part[i] for part in parts]).to(device) for i in range(2))
        labels = {name: torch.cat([part[2][name] for part in parts]).to(device) for name in LABELS}
        pixel_values = augment(to_pixel_values(images), generator)
        found = trainer(pixel_values, masks, labels, torch.full((len(images),), -1, device=device))
        return {"loss": found["attributes"] + config.entity_weight * found["entities"]} | found

    def validate() -> dict[str, float]:
        accuracy = attribute_accuracy(trainer.judge, validation.images, validation.labels)
        before = attribute_accuracy(trainer.judge, ordinary.images, ordinary.labels)
        return {name: value for name, (value, _) in accuracy.items()} | {
            f"ordinary_{name}": value for name, (value, _) in before.items()
        }

    train(Recipe("held_out_judge", trainer, len(data), loss, validate), config)
    save_judge(trainer.judge, validation, config.weights)
