"""Settings of ADI."""

from dataclasses import dataclass
from typing import Literal

Merge = Literal["union", "intersection", "context", "action"]
MERGES: tuple[str, ...] = ("union", "intersection", "context", "action")


@dataclass(frozen=True, kw_only=True)
class ADIConfig:
    """For Stable Diffusion 2.1-base, 512 px (as far as known; SD 1.5 works too). There is no official code.

    Comments: unit; the paper's value, or "unknown" where it could not be looked up and the value is our choice.
    """

    initializer_token: str = "pose"         # one token; all identifiers start as its embedding; unknown
    placeholder: str = "<A>"                # text without spaces; <A>
    kept_share: float = 0.6                 # beta: share of channels that each mask keeps, (0, 1]; unknown
    merge: Merge = "union"                  # of the two masks; "context", "action": one of them alone; unknown
    train_steps: int = 3000                 # optimiser steps; unknown
    batch_size: int = 4                     # triples per step over all GPUs, each three samples; unknown
    learning_rate: float = 1e-3             # effective, constant: nothing scales it; unknown. AdamW, no weight decay
    num_inference_steps: int = 50           # DDIM steps; unknown
    guidance_scale: float = 7.5             # s, 1 = off; unknown
    seed: int = 0                           # order, partners, noise, timesteps

    def __post_init__(self) -> None:
        for name in ("train_steps", "batch_size", "num_inference_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be > 0, got {self.learning_rate}")
        if not 0 < self.kept_share <= 1:
            raise ValueError(f"kept_share must be in (0, 1], got {self.kept_share}; 1 switches the masks off")
        if self.merge not in MERGES:
            raise ValueError(f"merge must be one of {', '.join(MERGES)}, got {self.merge!r}")

    @classmethod
    def tiny(cls) -> "ADIConfig":
        """tiny-sd, 64 px: what the notebook and the reproduction run. A triple takes 48 passes of the text encoder."""
        return cls(train_steps=60, batch_size=1, learning_rate=2e-2, num_inference_steps=30, guidance_scale=5.0)
