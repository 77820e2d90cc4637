"""A network that reads clips of the toy world: which motion, of what, along which path.

Clips are (B, 3, F, H, W) in [-1, 1]. It is trained on renders by common.toyworld.pretrain; its accuracy on renders that
it has not seen is in the header of its file.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.io import load_safetensors
from common.toyworld.clip_shards import ALL_MOTIONS, NUM_FRAMES
from common.toyworld.judge import FEATURES, IMAGE_PX, WEIGHTS, ImageTrunk
from common.toyworld.vocabulary import CLASSES

_WIDTH = 96  # of the features over time


@dataclass(frozen=True)
class ClipReading:
    """What the judge sees in B clips.

    motions: (B, M) probabilities of ALL_MOTIONS.   classes: (B, C) probabilities of CLASSES.
    trajectories: (B, F, 2) the entity's centre in pixels of a 64 px picture, x right, y down.
    areas: (B, F) share of the picture that the entity covers.
    """

    motions: Tensor
    classes: Tensor
    trajectories: Tensor
    areas: Tensor


class MotionJudge(nn.Module):
    """Reads frames one by one, then their features over time.   accuracy: what -> top-1 or error, on other clips."""

    WIDTHS = (24, 48, 80, 112)

    def __init__(self, accuracy: dict[str, float] | None = None):
        super().__init__()
        self.accuracy = accuracy or {}
        self.trunk = ImageTrunk(self.WIDTHS)
        self.place = nn.Linear(FEATURES, 3)
        self.classes = nn.Linear(FEATURES, len(CLASSES))
        self.over_time = nn.Sequential(
            nn.Conv1d(FEATURES + 3, _WIDTH, 3, padding=1), nn.SiLU(),
            nn.Conv1d(_WIDTH, _WIDTH, 3, padding=1), nn.SiLU(),
        )  # fmt: skip
        self.motions = nn.Sequential(
            nn.Flatten(), nn.Linear(_WIDTH * NUM_FRAMES, 128), nn.SiLU(), nn.Linear(128, len(ALL_MOTIONS))
        )

    @classmethod
    def load(cls, path: Path = WEIGHTS / "motion_judge.safetensors", device: torch.device | str = "cpu"):
        """The trained judge, frozen."""
        if not path.is_file():
            raise FileNotFoundError(
                f"no weights at {path}; train them with: python -m common.toyworld.pretrain motion-judge"
            )
        tensors, header = load_safetensors(path)
        judge = cls(json.loads(header["accuracy"]))
        judge.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
        return judge.to(device).eval().requires_grad_(False)

    def forward(self, clips: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Clips of NUM_FRAMES frames of 64 px -> logits of motions (B, M) and classes (B, C), and places (B, F, 3).

        A place is the centre's x and y as shares of the picture, and the entity's share of it.
        """
        batch, _, num_frames, _, _ = clips.shape
        features = F.silu(self.trunk(clips.permute(0, 2, 1, 3, 4).flatten(0, 1))).unflatten(0, (batch, num_frames))
        places = self.place(features)
        series = torch.cat([features, places], dim=-1).transpose(1, 2)  # (B, FEATURES + 3, F)
        return self.motions(self.over_time(series)), self.classes(features.mean(1)), places

    def read(self, clips: Tensor) -> ClipReading:
        """Clips of any size and of at least two frames; places are of the clip's own frames.

        Motions are read from NUM_FRAMES frames at even distances.
        """
        if clips.ndim != 5 or clips.shape[1] != 3 or clips.shape[2] < 2:
            raise ValueError(f"clips must be (B, 3, F, H, W) with F >= 2, got {tuple(clips.shape)}")
        size = (IMAGE_PX, IMAGE_PX)
        if clips.shape[-2:] != size:
            frames = clips.permute(0, 2, 1, 3, 4).flatten(0, 1)
            frames = F.interpolate(frames, size, mode="bilinear", antialias=True, align_corners=False)
            clips = frames.unflatten(0, (len(clips), -1)).permute(0, 2, 1, 3, 4)
        chosen = torch.linspace(0, clips.shape[2] - 1, NUM_FRAMES).round().long()
        motions, classes, places = self(clips[:, :, chosen])
        if clips.shape[2] != NUM_FRAMES:
            features = F.silu(self.trunk(clips.permute(0, 2, 1, 3, 4).flatten(0, 1)))
            places = self.place(features).unflatten(0, (len(clips), -1))
        return ClipReading(motions.softmax(-1), classes.softmax(-1), places[..., :2] * IMAGE_PX, places[..., 2])
