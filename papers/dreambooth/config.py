"""Settings of DreamBooth."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class DreamBoothConfig:
    """The paper's Stable Diffusion setting. Comments read: unit; paper's value (place); why ours differs."""

    class_noun: str                  # text, "dog"; "" = none, an ablation without prior loss (Sec. 4.3, Table 4)
    identifier: str | None = "sks"   # [V]; a rare token (Sec. 3.2); "sks" is usual for CLIP; None = drawn by the seed
    prompt_template: str = "a {}"    # text with one {}; "a [V] [class noun]", "a [class noun]" (Sec. 3.2, 3.3)
    train_steps: int = 1000          # optimiser steps; ~1000 (Sec. 3.3)
    batch_size: int = 1              # subject pictures per step, and as many class images; not in the paper: 1 (code)
    learning_rate: float = 5e-6      # constant; 5e-6 for SD, 1e-5 for Imagen (Sec. 3.3); code with text encoder: 2e-6
    weight_decay: float = 1e-2       # AdamW; not in the paper: 1e-2 (code)
    prior_loss_weight: float = 1.0   # lambda of Eq. 2, >= 0, 0 = off; 1 (Sec. 3.3)
    num_class_images: int = 1000     # images; ~1000 (Sec. 3.3); 100-200 are usual in code
    train_text_encoder: bool = False # besides the U-Net; the paper leaves it open for SD, code: off
    num_inference_steps: int = 50    # sampler steps; not in the paper: diffusers' default
    guidance_scale: float = 7.5      # s, 1 = off; not in the paper: diffusers' default
    seed: int = 0                    # order, noise, timesteps, class images, a drawn identifier

    def __post_init__(self) -> None:
        for name in ("train_steps", "batch_size", "num_class_images", "num_inference_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        for name in ("prior_loss_weight", "weight_decay"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be >= 0, got {getattr(self, name)}")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be > 0, got {self.learning_rate}")
        if self.prompt_template.count("{}") != 1:
            raise ValueError(f"prompt_template must hold {{}} once, got {self.prompt_template!r}")
        if self.identifier is not None and not self.identifier.strip():
            raise ValueError(f"identifier must be a text, or None to draw a rare token, got {self.identifier!r}")
        if self.class_noun == "" and self.prior_loss_weight > 0:
            raise ValueError("the prior loss needs a class_noun; give one, or set prior_loss_weight=0")

    @classmethod
    def tiny(cls, class_noun: str) -> "DreamBoothConfig":
        """tiny-sd, 64 px: what the notebook and the reproduction run. Its captions all begin like this template."""
        return cls(
            class_noun=class_noun, prompt_template="a photo of a {}", train_steps=200, batch_size=2,
            learning_rate=2e-4, num_class_images=16, num_inference_steps=30, guidance_scale=5.0,
        )
