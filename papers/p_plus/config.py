"""Settings of P+."""

from dataclasses import dataclass
from typing import Literal

from common.data.prompts import OBJECT_TEMPLATES, STYLE_TEMPLATES, fill_templates

TEMPLATES = {"object": OBJECT_TEMPLATES, "style": STYLE_TEMPLATES, "plain": OBJECT_TEMPLATES[:1]}


@dataclass(frozen=True, kw_only=True)
class PPlusConfig:
    """The paper's setting (Stable Diffusion 1.4, 512 px). Comments: unit; paper's value (place); why ours differs."""

    initializer_token: str = "object"           # coarse class word, one token; every e_i starts as its embedding
    placeholder_token: str | None = None        # S*, text without spaces; None = <INITIALIZER_TOKEN>
    kind: Literal["object", "style", "plain"] = "object"  # 27 or 19 templates; plain: "a photo of a S*" alone
    train_steps: int = 500                      # optimiser steps; 500 for XTI, 5000 for Textual Inversion (Sec. 4.2)
    batch_size: int = 8                         # samples per step over all GPUs; 8, as Textual Inversion (unverified)
    learning_rate: float = 5e-3                 # effective, constant: nothing scales it; 0.005, as Textual Inversion
    weight_decay: float = 0.0                   # AdamW; not in the paper
    flip: bool = True                           # mirror half of the samples; not in the paper. No for text and logos
    num_inference_steps: int = 50               # DDIM steps; not in the paper: 50 (re-implementations)
    guidance_scale: float = 7.5                 # s, 1 = off; not in the paper: 7.5 (re-implementations)
    seed: int = 0                               # order, templates, flips, noise, timesteps

    def __post_init__(self) -> None:
        for name in ("train_steps", "batch_size", "num_inference_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be > 0, got {self.learning_rate}")
        if not self.weight_decay >= 0:
            raise ValueError(f"weight_decay must be >= 0, got {self.weight_decay}")
        if self.kind not in TEMPLATES:
            raise ValueError(f"kind must be one of {', '.join(TEMPLATES)}, got {self.kind!r}")

    @property
    def placeholder(self) -> str:
        """S* as it stands in prompts."""
        return f"<{self.initializer_token}>" if self.placeholder_token is None else self.placeholder_token

    def training_prompts(self) -> list[str]:
        """The templates with S* in their gap."""
        return fill_templates(TEMPLATES[self.kind], self.placeholder)

    def plain_prompt(self) -> str:
        """The first template: "a photo of a S*", or "a painting in the style of S*"."""
        return self.training_prompts()[0]

    @classmethod
    def tiny(cls) -> "PPlusConfig":
        """tiny-sd, 64 px: what the notebook and the reproduction run."""
        return cls(
            kind="plain", train_steps=200, batch_size=4, flip=False, num_inference_steps=30, guidance_scale=5.0
        )
