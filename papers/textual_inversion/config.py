"""Settings of Textual Inversion."""

from dataclasses import dataclass
from typing import Literal

from common.data.prompts import OBJECT_TEMPLATES, STYLE_TEMPLATES, fill_templates


@dataclass(frozen=True, kw_only=True)
class TextualInversionConfig:
    """The paper's setting (LDM, 256 px). Comments read: unit; paper's value (place); why ours differs."""

    initializer_token: str = "object"            # coarse word, one token; "toy", "painting" (code README)
    placeholder_token: str | None = None         # S*, text without spaces; "*"; None = <INITIALIZER_TOKEN> (D1)
    kind: Literal["object", "style"] = "object"  # which templates; 27 "photo" or 19 "in the style of" lines (D2)
    num_vectors: int = 1                         # V >= 1; 1, ablations with more (Sec. 5)
    train_steps: int = 5000                      # optimiser steps; 5000 (Sec. 3)
    batch_size: int = 8                          # samples per step over all GPUs; 2 GPUs x 4 (Sec. 3)
    learning_rate: float = 0.04                  # effective, constant: nothing scales it; 0.005 x 8 samples (Sec. 3)
    weight_decay: float = 0.0                    # AdamW; code: 0.01 by torch's default, which shrinks v* (D3)
    regularisation_weight: float = 0.0           # lambda of |v - v_init|^2, >= 0; 0, an ablation (Sec. 5)
    flip: bool = True                            # mirror half of the samples; code: yes. No for text and logos
    num_inference_steps: int = 50                # DDIM steps; 50 (code README)
    guidance_scale: float = 10.0                 # s, 1 = off; 10 (code README), 5 for its evaluation
    seed: int = 0                                # order, templates, flips, noise, timesteps

    def __post_init__(self) -> None:
        for name in ("num_vectors", "train_steps", "batch_size", "num_inference_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        for name in ("weight_decay", "regularisation_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be >= 0, got {getattr(self, name)}")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be > 0, got {self.learning_rate}")
        if self.kind not in ("object", "style"):
            raise ValueError(f'kind must be "object" or "style", got {self.kind!r}')

    @property
    def placeholder(self) -> str:
        """S* as it stands in prompts."""
        return f"<{self.initializer_token}>" if self.placeholder_token is None else self.placeholder_token

    def training_prompts(self) -> list[str]:
        """The neutral templates with S* in their gap."""
        return fill_templates(OBJECT_TEMPLATES if self.kind == "object" else STYLE_TEMPLATES, self.placeholder)

    def plain_prompt(self) -> str:
        """The first template: "a photo of a S*", or "a painting in the style of S*"."""
        return self.training_prompts()[0]

    @classmethod
    def sd(cls) -> "TextualInversionConfig":
        """Stable Diffusion 1.x, 512 px, as the diffusers example recommends: 5e-4 x batch 4 = 2e-3 effective."""
        return cls(train_steps=3000, batch_size=4, learning_rate=2e-3, guidance_scale=7.5)

    @classmethod
    def tiny(cls) -> "TextualInversionConfig":
        """tiny-sd, 64 px: what the notebook and the reproduction run."""
        return cls(train_steps=200, batch_size=4, learning_rate=5e-3, num_inference_steps=30, guidance_scale=5.0)
