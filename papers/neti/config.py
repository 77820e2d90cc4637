"""Settings of NeTI."""

from dataclasses import dataclass
from typing import Literal

from common.data.prompts import OBJECT_TEMPLATES, STYLE_TEMPLATES, fill_templates

TEMPLATES = {"object": OBJECT_TEMPLATES, "style": STYLE_TEMPLATES, "plain": OBJECT_TEMPLATES[:1]}


@dataclass(frozen=True, kw_only=True)
class NeTIConfig:
    """The paper's setting (Stable Diffusion 1.4, 512 px). Comments: unit; paper's value (place); why ours differs."""

    super_category_token: str = "object"        # coarse word, one token; its length is the length of the outputs
    placeholder_token: str | None = None        # S*, text without spaces; None = <SUPER_CATEGORY_TOKEN>
    kind: Literal["object", "style", "plain"] = "object"  # 27 or 19 templates (code); plain: "a photo of a S*" alone
    train_steps: int = 1000                     # optimiser steps; 1000 (code, whose defaults are the paper's)
    batch_size: int = 8                         # samples per step over all GPUs; 2 x 4 accumulated (code)
    learning_rate: float = 8e-3                 # effective, constant: nothing scales it; 1e-3 x 8 samples (code)
    weight_decay: float = 0.01                  # AdamW, on the whole mapper; 0.01 (code)
    nested_dropout: float = 0.5                 # probability that a call is truncated in training, [0, 1]; 0.5 (code)
    bypass: bool = True                         # whether the mapper gives v_pass too; yes
    normalise_halves: bool = False              # scale v_base and v_pass each, not both as one vector; no (code, D2)
    flip: bool = True                           # mirror half of the samples; code: yes. No for text and logos
    num_inference_steps: int = 50               # 50 (code)
    guidance_scale: float = 7.5                 # s, 1 = off; 7.5 (code)
    scheduler: Literal["dpmpp", "ddim", "euler"] = "dpmpp"  # DPM-Solver++ (code)
    seed: int = 0                               # order, templates, flips, noise, timesteps, dropout, initial weights

    def __post_init__(self) -> None:
        for name in ("train_steps", "batch_size", "num_inference_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be > 0, got {self.learning_rate}")
        if self.weight_decay < 0:
            raise ValueError(f"weight_decay must be >= 0, got {self.weight_decay}")
        if not 0 <= self.nested_dropout <= 1:
            raise ValueError(f"nested_dropout is a probability in [0, 1], got {self.nested_dropout}")
        if self.kind not in TEMPLATES:
            raise ValueError(f"kind must be one of {', '.join(TEMPLATES)}, got {self.kind!r}")

    @property
    def placeholder(self) -> str:
        """S* as it stands in prompts."""
        return f"<{self.super_category_token}>" if self.placeholder_token is None else self.placeholder_token

    def training_prompts(self) -> list[str]:
        """The templates with S* in their gap."""
        return fill_templates(TEMPLATES[self.kind], self.placeholder)

    def plain_prompt(self) -> str:
        """The first template: "a photo of a S*", or "a painting in the style of S*"."""
        return self.training_prompts()[0]

    @classmethod
    def tiny(cls) -> "NeTIConfig":
        """tiny-sd, 64 px: what the notebook and the reproduction run.

        A sample takes 16 passes of the text encoder, which bound the batch; the rate is the code's rule, 1e-3 x batch.
        """
        return cls(
            kind="plain",
            train_steps=90,
            batch_size=2,
            learning_rate=2e-3,
            flip=False,
            num_inference_steps=30,
            guidance_scale=5.0,
            scheduler="ddim",
        )
