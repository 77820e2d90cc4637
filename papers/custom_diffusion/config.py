"""Settings of Custom Diffusion."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class CustomDiffusionConfig:
    """The paper's setting (Stable Diffusion 1.4). Comments read: unit; paper's value (place); why ours differs."""

    class_nouns: tuple[str, ...] = ()          # one noun per concept, "cat"; several are trained together (Sec. 3.2)
    initializer_tokens: tuple[str, ...] = ("ktn", "pll", "ucd")  # where <new1>, <new2>, ... start; rare (these: code);
    #                                            "" = no new word for this concept, as "moongate" (code)
    prompt_template: str = "photo of a {}"     # text with one {}; style: "painting in the style of {}" (code)
    trained: Literal["crossattn_kv", "crossattn"] = "crossattn_kv"  # W^k, W^v (Sec. 3.1); all of attn2: faces (code)
    train_steps: int = 250                     # optimiser steps; 250, and 500 for two concepts together
    batch_size: int = 4                        # subject pictures per step, as many regularisation images; 8 in all
    learning_rate: float = 8e-5                # constant, nothing scales it; 8e-5
    weight_decay: float = 1e-2                 # AdamW, of the changes of matrices, not of words; code: 1e-2 (D2)
    prior_loss_weight: float = 1.0             # of the regularisation images, >= 0, 0 = none are needed; code: 1.0 (D3)
    num_regularisation_images: int = 200       # generated per concept, or found; 200
    scale_augmentation: bool = True            # resize subject pictures at random, 0.4 to 1.4 times (D4)
    flip: bool = False                         # mirror half of the subject pictures; code: an option
    num_inference_steps: int = 200             # DDIM steps; 200; 50 also tabulated
    guidance_scale: float = 6.0                # s, 1 = off; 6
    eta: float = 1.0                           # of DDIM, 0 = deterministic, 1 = ancestral; code: 1
    seed: int = 0                              # order, scales, noise, timesteps, generated regularisation images

    def __post_init__(self) -> None:
        for name in ("train_steps", "batch_size", "num_regularisation_images", "num_inference_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        for name in ("prior_loss_weight", "weight_decay", "eta"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be >= 0, got {getattr(self, name)}")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be > 0, got {self.learning_rate}")
        if self.prompt_template.count("{}") != 1:
            raise ValueError(f"prompt_template must hold {{}} once, got {self.prompt_template!r}")
        if self.trained not in ("crossattn_kv", "crossattn"):
            raise ValueError(f'trained must be "crossattn_kv" or "crossattn", got {self.trained!r}')
        if len(self.class_nouns) > len(self.initializer_tokens):
            raise ValueError(
                f"initializer_tokens has {len(self.initializer_tokens)} words for {len(self.class_nouns)} class_nouns"
            )

    @property
    def placeholders(self) -> list[str]:
        """The modifier token V* of each concept, "" where it has none."""
        used = self.initializer_tokens[: len(self.class_nouns)]
        return [f"<new{i + 1}>" if start else "" for i, start in enumerate(used)]

    def words(self, concept: int = 0) -> str:
        """What stands for a concept in prompts: "<new1> cat"."""
        return f"{self.placeholders[concept]} {self.class_nouns[concept]}".strip()

    def instance_prompt(self, concept: int = 0) -> str:
        """ "photo of a <new1> cat"."""
        return self.prompt_template.format(self.words(concept))

    def class_prompt(self, concept: int = 0) -> str:
        """ "photo of a cat": what regularisation images are like."""
        return self.prompt_template.format(self.class_nouns[concept])

    @classmethod
    def tiny(cls, *class_nouns: str) -> "CustomDiffusionConfig":
        """tiny-sd, 64 px: what the notebook and the reproduction run. Its captions all begin like this template."""
        return cls(
            class_nouns=class_nouns, initializer_tokens=("sks", "zwx", "qlv"), prompt_template="a photo of a {}",
            batch_size=2, learning_rate=3e-4, num_regularisation_images=48, scale_augmentation=False,
            num_inference_steps=30, guidance_scale=5.0, eta=0.0,
        )  # fmt: skip
