"""Recipe 8: the judge of clips, on renders of all motions, the held-out ones too, made a little worse."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from common.io import atomic_save_safetensors
from common.toyworld.clip_shards import ClipData, load_clip_shards
from common.toyworld.judge import IMAGE_PX, WEIGHTS
from common.toyworld.motion_judge import MotionJudge
from common.toyworld.pretrain.loop import LoopConfig, Recipe, train
from common.training.optimize import default_device

PLACE_WEIGHT = 30.0  # of the squared error of places, which are shares of the picture


@dataclass(frozen=True, kw_only=True)
class MotionJudgeConfig(LoopConfig):
    """Judge of clips: 12 minutes on one core."""

    data: Path  # clip shards of named motions
    held_out: Path  # clip shards of held-out motions
    output: Path = Path("runs/motion_judge")
    minutes: float | None = 12.0
    batch_schedule: str = "0:16"
    learning_rate: float = 1e-3
    weight_decay: float = 0.02
    validate_minutes: float = 4.0
    weights: Path = WEIGHTS / "motion_judge.safetensors"  # file to write at the end


def worsened(clips: Tensor, generator: torch.Generator) -> Tensor:
    """Brightness, blur and noise, drawn for each clip; noise for each frame.   clips: (B, 3, F, H, W) in [-1, 1]."""

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(len(clips), 1, 1, 1, 1, generator=generator)

    x = clips * uniform(0.92, 1.06) + uniform(-0.06, 0.06)
    small = F.avg_pool3d(x, (1, 2, 2))
    blurred = small.repeat_interleave(2, 3).repeat_interleave(2, 4)
    x = torch.lerp(x, blurred, uniform(-0.5, 0.9).clamp(min=0))
    noise = torch.randn(x.shape, generator=generator)
    return (x + noise * uniform(-0.04, 0.10).clamp(min=0)).clamp(-1, 1)


def to_clips(frames: Tensor) -> Tensor:
    """(B, F, 64, 64, 3) uint8 -> (B, 3, F, 64, 64) float32 in [-1, 1]."""
    return frames.permute(0, 4, 1, 2, 3).float() / 127.5 - 1


def places(data: ClipData) -> Tensor:
    """What `MotionJudge.forward` calls places, (N, F, 3)."""
    return torch.cat([data.trajectories / IMAGE_PX, data.areas[..., None]], dim=-1)


def train_motion_judge(config: MotionJudgeConfig) -> None:
    """Train, and write config.weights."""
    torch.manual_seed(config.seed)
    device, judge = default_device(), MotionJudge()
    parts = [load_clip_shards(folder, config.max_images) for folder in (config.data, config.held_out)]
    frames, motions, classes = (
        torch.cat([getattr(part, name) for part in parts]) for name in ("frames", "motions", "classes")
    )
    truth = torch.cat([places(part) for part in parts])
    order = torch.randperm(len(frames), generator=torch.Generator().manual_seed(0))
    held_out, used = order[: min(512, len(order) // 10)], order[min(512, len(order) // 10) :]

    def loss(indices: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        chosen = used[indices]
        clips = worsened(to_clips(frames[chosen]), generator).to(device)
        of_motions, of_classes, found = judge(clips)
        found_places = F.mse_loss(found.float(), truth[chosen].to(device))
        motion = F.cross_entropy(of_motions.float(), motions[chosen].to(device))
        noun = F.cross_entropy(of_classes.float(), classes[chosen].to(device))
        return {
            "loss": motion + noun + PLACE_WEIGHT * found_places, "motion": motion, "class": noun, "place": found_places
        }  # fmt: skip

    def validate() -> dict[str, float]:
        return accuracy(judge, frames[held_out], motions[held_out], classes[held_out], truth[held_out])

    train(Recipe("motion_judge", judge, len(used), loss, validate), config)
    header = {"accuracy": json.dumps({name: round(value, 4) for name, value in validate().items()})}
    weights = {name: t.half().contiguous() for name, t in judge.state_dict().items()}
    atomic_save_safetensors(weights, config.weights, header)
    print(f"written: {config.weights}")


@torch.no_grad()
def accuracy(judge: MotionJudge, frames: Tensor, motions: Tensor, classes: Tensor, truth: Tensor) -> dict[str, float]:
    """Share of right motions and classes, and the mean distance of the centre from the truth in pixels."""
    device = next(judge.parameters()).device
    parts = []
    for batch in frames.split(64):
        found = judge.read(to_clips(batch).to(device))
        parts.append((found.motions.argmax(-1).cpu(), found.classes.argmax(-1).cpu(), found.trajectories.cpu()))
    read_motions, read_classes, paths = (torch.cat(column) for column in zip(*parts, strict=True))
    return {
        "motion": (read_motions == motions).float().mean().item(),
        "class": (read_classes == classes).float().mean().item(),
        "centre_error_px": (paths - truth[..., :2] * IMAGE_PX).norm(dim=-1).mean().item(),
    }
