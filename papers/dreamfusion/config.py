"""Settings of DreamFusion."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class DreamFusionConfig:
    """One object on Stable Diffusion, with the paper's values where it has them and threestudio's for the rest.

    Comments: unit; value in the paper; threestudio's dreamfusion-sd.yaml ("ts") where it is another.
    """

    # fmt: off
    train_steps: int = 10_000                # optimiser steps; 15,000, ts 10,000
    views_per_step: int = 1                  # pictures a step; 4, ts 1
    learning_rate: float = 1e-2              # Adam, of the field; paper: Shampoo; ts 1e-2
    background_learning_rate: float = 1e-3   # ts 1e-3
    guidance_scale: float = 101.0            # s = 1 + omega; omega = 100
    lowest_timestep: float = 0.02            # share of the schedule; 0.02
    highest_timestep: float = 0.98           # likewise; 0.98
    final_timestep: float = 0.98             # the highest one at the end, linearly; 0.98
    weighting: Literal["sigma2", "uniform"] = "sigma2"  # w(t); sigma^2
    view_prompts: bool = True                # ", front view" and so on; on
    field: Literal["voxels", "triplane", "hash"] = "hash"  # paper: MLP; ts: hash grid
    field_resolution: int = 2048             # corners a side of voxels or planes, finest level of the hash grid
    background: Literal["learned", "white"] = "learned"  # paper and ts: learned
    render_px: int = 64                      # side of a rendered picture; 64; scaled up to what the backbone sees
    num_samples: int = 128                   # of each ray; ts 512
    albedo_share: float = 0.2                # of the steps, the first ones, without light; 1k of 15k, ts 2k of 10k
    lit_probability: float = 0.75            # afterwards; 0.75
    textureless_probability: float = 0.5     # of the lit steps; 0.5
    orientation_weight: float = 1e-2         # rising from 0 over the first third; 1e-4 to 1e-2
    opacity_weight: float = 1e-3             # 1e-3 to 5e-3
    elevation_low: float = -10.0             # degrees, of random cameras; -10
    elevation_high: float = 60.0             # degrees; 90, ts 45
    distance_low: float = 2.4                # object heights; ours, with the field of view below
    distance_high: float = 3.0
    fov_low: float = 32.0                    # degrees, of the whole picture; ts 40 to 70 at other distances
    fov_high: float = 40.0
    seed: int = 0                            # cameras, lights, noise, timesteps, jitter of samples, networks
    # fmt: on

    def __post_init__(self) -> None:
        for name in ("train_steps", "views_per_step", "field_resolution", "render_px", "num_samples"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        for name in ("learning_rate", "background_learning_rate", "distance_low", "fov_low"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be positive and finite, got {getattr(self, name)}")
        for name in ("albedo_share", "lit_probability", "textureless_probability"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}")
        ends = (self.lowest_timestep, self.highest_timestep, self.final_timestep)
        if not (0 <= ends[0] < min(ends[1:]) and max(ends) < 1):
            raise ValueError(f"need 0 <= lowest_timestep < highest_timestep, final_timestep < 1; got {ends}")
        for kind in ("elevation", "distance", "fov"):
            if getattr(self, f"{kind}_low") > getattr(self, f"{kind}_high"):
                raise ValueError(f"{kind}_low must not be above {kind}_high")

    @classmethod
    def tiny(cls) -> "DreamFusionConfig":
        """tiny-sd, 64 px: what notebook and reproduction run."""
        return cls(
            train_steps=600, learning_rate=5e-2, guidance_scale=30.0, final_timestep=0.6, field="voxels",
            field_resolution=48, background="white", num_samples=48, orientation_weight=10.0, opacity_weight=300.0,
            elevation_low=0.0, elevation_high=35.0, distance_low=2.3, distance_high=2.8,
        )  # fmt: skip
