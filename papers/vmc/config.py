"""Settings of VMC."""

from dataclasses import dataclass
from typing import Literal, get_args

ResidualLoss = Literal["paper", "official", "l2"]
RESIDUAL_LOSSES: tuple[str, ...] = get_args(ResidualLoss)


@dataclass(frozen=True, kw_only=True)
class VMCConfig:
    """For ModelScope text-to-video, 256 px; the paper's own is the keyframe network of Show-1, 40 x 64 px (D1).

    Comments: unit; the paper's value, "(code)" where only the official code gives it; why ours differs.
    """

    residual_loss: ResidualLoss = "paper"   # signed cosine of each step; "official": the code's (D2); "l2": Fig. 7
    num_frames: int = 8                     # of the clip and of what is made, consecutive, >= 2; 8
    train_steps: int = 400                  # optimiser steps; 400 (code)
    batch_size: int = 1                     # draws of noise and timestep per step over all GPUs; 1 (code)
    learning_rate: float = 1e-4             # constant, AdamW; 1e-4 (configs of the code; 3e-5 is its default)
    weight_decay: float = 0.01              # >= 0; 0.01 (code), of the matrices, here of their changes (D4)
    rank: int = 0                           # of the changes, 0 = full matrices; full. > 0 is not in the paper
    num_inference_steps: int = 75           # DDIM steps of inversion and of sampling; 75 (code)
    guidance_scale: float = 9.0             # s, 1 = off; 9.0 (code)
    inverted_share: float = 1.0             # of the clip's inverted noise in the initial noise, [0, 1], 0 = off; 1
    seed: int = 0                           # noise, timesteps, posterior of the clip; 12345 (code)

    def __post_init__(self) -> None:
        if self.residual_loss not in RESIDUAL_LOSSES:
            raise ValueError(f"residual_loss must be one of {', '.join(RESIDUAL_LOSSES)}, got {self.residual_loss!r}")
        for name, least in (("num_frames", 2), ("train_steps", 1), ("batch_size", 1), ("num_inference_steps", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be >= {least}, got {getattr(self, name)}")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be > 0, got {self.learning_rate}")
        for name in ("weight_decay", "rank"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be >= 0, got {getattr(self, name)}")
        if not 0 <= self.inverted_share <= 1:
            raise ValueError(f"inverted_share must be in [0, 1], got {self.inverted_share}")

    @classmethod
    def tiny(cls) -> "VMCConfig":
        """tiny-video, 64 px: what the notebook and the reproduction run."""
        return cls(train_steps=120, learning_rate=1e-3, num_inference_steps=16, guidance_scale=5.0)
