"""Settings of DreamBooth3D."""

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class TuningConfig:
    """The three tuned U-Nets. Comments: unit; value in the paper; that of the re-implementation ("fork")."""

    # fmt: off
    partial_steps: int = 150            # optimiser steps of D_partial; 150, fork 500
    full_steps: int = 800               # of D_full, those of D_partial included; 800
    multi_steps: int = 150              # of D_multi, after those of D_partial; 150
    batch_size: int = 1                 # pictures a step; not in the paper, fork 1
    learning_rate: float = 2e-6         # constant; not in the paper, fork 2e-6
    prior_loss_weight: float = 1.0      # of as many class images a step, 0 = off; optional in the paper, fork 1
    num_class_images: int = 100         # samples of the untuned model; fork 50 to 100
    # fmt: on

    def __post_init__(self) -> None:
        for name in ("partial_steps", "multi_steps", "batch_size", "num_class_images"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        if not self.full_steps > self.partial_steps:
            raise ValueError(f"full_steps must exceed partial_steps, got {self.full_steps} and {self.partial_steps}")
        if not self.learning_rate > 0 or not self.prior_loss_weight >= 0:
            raise ValueError(f"need learning_rate > 0 and prior_loss_weight >= 0, got {self}")


@dataclass(frozen=True, kw_only=True)
class FieldConfig:
    """A field and its score distillation, "with DreamFusion's exact settings", for both fields.

    Comments: unit; DreamFusion's value; threestudio's dreamfusion-sd.yaml ("ts") where it is another.
    """

    # fmt: off
    learning_rate: float = 1e-2              # Adam; DreamFusion: Shampoo; ts 1e-2
    guidance_scale: float = 101.0            # s = 1 + omega; omega = 100
    lowest_timestep: float = 0.02            # share of the schedule; 0.02
    highest_timestep: float = 0.98           # likewise; 0.98
    final_timestep: float = 0.98             # the highest one at the end, linearly; 0.98
    kind: Literal["voxels", "triplane", "hash"] = "hash"  # DreamFusion: MLP; ts: hash grid
    resolution: int = 2048                   # corners a side of voxels or planes, finest level of the hash grid
    render_px: int = 64                      # side of a rendered picture; 64; scaled up to what the backbone sees
    num_samples: int = 128                   # of each ray; ts 512
    albedo_share: float = 0.2                # of the steps, the first ones, without light; 1k of 15k, ts 2k of 10k
    lit_probability: float = 0.75            # afterwards; 0.75
    textureless_probability: float = 0.5     # of the lit steps; 0.5
    orientation_weight: float = 1e-2         # rising from 0 over the first third; 1e-4 to 1e-2
    opacity_weight: float = 1e-3             # 1e-3 to 5e-3
    distortion_weight: float = 1e-2          # of L_nerf, mip-NeRF 360's regulariser; its paper 0.01
    elevation_low: float = -10.0             # degrees, of random cameras; -10
    elevation_high: float = 60.0             # degrees; 90, ts 45
    distance_low: float = 2.4                # object heights; ours, with the field of view below
    distance_high: float = 3.0
    fov_low: float = 32.0                    # degrees, of the whole picture; ts 40 to 70 at other distances
    fov_high: float = 40.0
    # fmt: on

    def __post_init__(self) -> None:
        for name in ("resolution", "render_px", "num_samples"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        for name in ("learning_rate", "distance_low", "fov_low"):
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


@dataclass(frozen=True, kw_only=True)
class DreamBooth3DConfig:
    """One subject. Comments: unit; value in the paper; that of the re-implementation ("fork")."""

    # fmt: off
    class_noun: str                     # text, "dog"
    identifier: str = "sks"             # [V], a rare token; the same word in all stages
    prompt_template: str = "a photo of {}"  # text with one {}; "a photo of [V] <class>"
    context: str = ""                   # added to the prompt of both fields: "sleeping", "wearing a hat"
    first_steps: int = 10_000           # optimiser steps of the first field; fork 10,000
    final_steps: int = 5_000            # of the final field; fork 5,000
    num_pseudo_views: int = 20          # 20
    strength: float = 0.4               # of img2img, share of the schedule; t_pseudo is unknown, fork 0.3 to 0.5
    num_inference_steps: int = 50       # DDIM steps of the whole schedule; diffusers' default
    guidance_scale: float = 7.5         # of img2img and samples; fork 7.5
    recon_weight: float = 0.1           # lambda_recon, of the mean squared error; not in the paper, fork 0.1
    seed: int = 0                       # of everything
    tuning: TuningConfig = field(default_factory=TuningConfig)
    field: FieldConfig = field(default_factory=FieldConfig)
    # fmt: on

    def __post_init__(self) -> None:
        for name in ("first_steps", "final_steps", "num_pseudo_views", "num_inference_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        for name in ("class_noun", "identifier"):
            if getattr(self, name) == "":
                raise ValueError(f"{name} must be a word")
        if self.prompt_template.count("{}") != 1:
            raise ValueError(f"prompt_template must hold {{}} once, got {self.prompt_template!r}")
        if not 1 <= int(self.strength * self.num_inference_steps) <= self.num_inference_steps:
            raise ValueError(f"strength must be in (0, 1] and leave a step of img2img to run, got {self.strength}")
        if not self.recon_weight >= 0:
            raise ValueError(f"recon_weight must be >= 0, got {self.recon_weight}")

    @classmethod
    def tiny(cls, class_noun: str) -> "DreamBooth3DConfig":
        """tiny-sd, 64 px: what notebook and reproduction run."""
        return cls(
            class_noun=class_noun, prompt_template="a photo of a {}", first_steps=400, final_steps=500, strength=0.6,
            num_inference_steps=30, guidance_scale=5.0, recon_weight=2e4,
            tuning=TuningConfig(
                partial_steps=20, full_steps=120, multi_steps=40, batch_size=2, learning_rate=1e-4,
                prior_loss_weight=0.0,
            ),
            field=FieldConfig(
                learning_rate=5e-2, guidance_scale=15.0, final_timestep=0.6, kind="voxels", resolution=48,
                num_samples=48, orientation_weight=10.0, opacity_weight=700.0, distortion_weight=10.0,
                elevation_low=0.0, elevation_high=35.0, distance_low=2.3, distance_high=2.8,
            ),
        )  # fmt: skip
