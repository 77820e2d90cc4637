"""Settings of MotionDirector."""

from dataclasses import dataclass, replace


@dataclass(frozen=True, kw_only=True)
class MotionDirectorConfig:
    """One clip on ModelScope or ZeroScope. Comments: unit; the value of the official code, which the paper's is not
    known to contradict; why ours differs."""

    rank: int = 32                      # r of all pairs; 32
    dropout: float = 0.1                # share, [0, 1); 0.1, there on what a pair adds (D1)
    debias_strength: float = 1.0        # beta of Eq. 5, >= 0; 1
    spatial_off_share: float = 0.2      # share of steps without spatial path, [0, 1]; 0.2, for speed (issue 29)
    single_spatial_lora: bool = False   # one spatial path for all clips; False
    train_steps: int = 150              # optimiser steps; 50-150 for one clip, 300-500 for several
    learning_rate: float = 5e-4         # of both paths, constant; 5e-4
    weight_decay: float = 1e-2          # AdamW; 1e-2 for one clip, 1e-4 for several and for pictures
    num_frames: int = 16                # F; 16
    resolution_px: int = 384            # side; 384
    num_inference_steps: int = 30       # DDIM steps; 30
    guidance_scale: float = 12.0        # s, 1 = off; 12
    noise_prior: float = 0.0            # p of x_T, [0, 1], 0 = off; 0 for several clips, 0.1-0.5 for one
    num_inversion_steps: int = 50       # DDIM steps of the inversion; 50
    spatial_scale: float = 0.0          # strength of a spatial path at inference, 0 = off; 0, with an appearance 1
    seed: int = 0                       # pairs, order, noise, timesteps, frames, dropout

    def __post_init__(self) -> None:
        counts = ("rank", "train_steps", "num_frames", "resolution_px", "num_inference_steps", "num_inversion_steps")
        for name in counts:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        for name in ("debias_strength", "weight_decay", "spatial_scale"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be >= 0, got {getattr(self, name)}")
        for name in ("spatial_off_share", "noise_prior"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be > 0, got {self.learning_rate}")

    @classmethod
    def several_clips(cls) -> "MotionDirectorConfig":
        """Several clips of one motion."""
        return cls(train_steps=300, weight_decay=1e-4)

    @classmethod
    def appearance(cls) -> "MotionDirectorConfig":
        """Pictures of one thing, for a spatial path alone."""
        return cls(train_steps=300, weight_decay=1e-4, spatial_scale=1.0)

    @classmethod
    def tiny(cls) -> "MotionDirectorConfig":
        """One clip on tiny-video, 64 px: what notebook and reproduction run. Dropout would be a sixth of the time."""
        return cls(
            rank=8, dropout=0.0, train_steps=100, learning_rate=3e-3, num_frames=8, resolution_px=64,
            num_inference_steps=16, guidance_scale=5.0, num_inversion_steps=32,
        )

    @classmethod
    def tiny_appearance(cls) -> "MotionDirectorConfig":
        """Pictures on tiny-video."""
        return replace(cls.tiny(), train_steps=200, learning_rate=2e-3, weight_decay=1e-4, spatial_scale=1.0)
