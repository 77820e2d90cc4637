"""Settings of Lego."""

from dataclasses import dataclass
from typing import Literal

from tyro.conf import Suppress

from common.data.prompts import OBJECT_TEMPLATES, fill_templates

from .words import Concept

TEMPLATES = {"object": OBJECT_TEMPLATES, "plain": OBJECT_TEMPLATES[:1]}


@dataclass(frozen=True, kw_only=True)
class LegoConfig:
    """For Stable Diffusion 1.x, 512 px (as far as known). There is no official code.

    Comments: unit; the paper's value, or "unknown" where it could not be looked up and the value is our choice.
    """

    concept: Suppress[Concept] = ()             # words of the phrase, a vector each, with their lists; from a file
    class_noun: str = "object"                  # of the subject in the pictures, one token; where its vector starts
    placeholder: str = "<concept>"              # c_1 .. c_k, lower-case text without spaces; unknown
    subject_placeholder: str = "<subject>"      # s, likewise; not used after training
    kind: Literal["object", "plain"] = "object" # 27 templates; plain: "a photo of a" alone; unknown
    temperature: float = 0.07                   # tau, > 0; unknown: as ReVersion
    context_weight: float = 0.01                # lambda, >= 0, 0 = off; unknown: as ReVersion
    train_steps: int = 3000                     # optimiser steps; unknown: as Textual Inversion in diffusers
    batch_size: int = 4                         # samples per step over all GPUs, even: half of each set; unknown
    learning_rate: float = 2e-3                 # effective, constant: nothing scales it; unknown: 5e-4 x 4 samples
    num_inference_steps: int = 50               # DDIM steps; unknown
    guidance_scale: float = 7.5                 # s, 1 = off; unknown
    seed: int = 0                               # order, templates, noise, timesteps

    def __post_init__(self) -> None:
        for name in ("train_steps", "num_inference_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        if self.batch_size < 2 or self.batch_size % 2:
            raise ValueError(f"batch_size must be even, half of it for either set, got {self.batch_size}")
        for name in ("learning_rate", "temperature"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be > 0, got {getattr(self, name)}")
        if not self.context_weight >= 0:
            raise ValueError(f"context_weight must be >= 0, got {self.context_weight}")
        if self.kind not in TEMPLATES:
            raise ValueError(f"kind must be one of {', '.join(TEMPLATES)}, got {self.kind!r}")
        for name in ("placeholder", "subject_placeholder"):
            if getattr(self, name) != getattr(self, name).lower():
                raise ValueError(f"{name} must be lower-case, or diffusers uses its first vector only; got "
                                 f"{getattr(self, name)!r}")
        if self.placeholder == self.subject_placeholder:
            raise ValueError(f"concept and subject need two placeholders, got {self.placeholder!r} for both")

    def subject_prompts(self) -> list[str]:
        """For set S: the templates with s in their gap."""
        return fill_templates(TEMPLATES[self.kind], self.subject_placeholder)

    def concept_prompts(self) -> list[str]:
        """For set C: the templates with s c_1 .. c_k in their gap, without a class noun."""
        return fill_templates(TEMPLATES[self.kind], f"{self.subject_placeholder} {self.placeholder}")

    @classmethod
    def tiny(cls) -> "LegoConfig":
        """tiny-sd, 64 px: what the notebook and the reproduction run."""
        return cls(kind="plain", train_steps=120, learning_rate=8e-3, num_inference_steps=30, guidance_scale=5.0)
