"""Settings of LoRA."""

from dataclasses import dataclass
from typing import Literal

from common.backbones.adapters import ATTENTION_PROJECTIONS

# Endings of module names in the U-Net; their numbers of values for rank 1 are those of Stable Diffusion 1.x.
ATTENTION = ATTENTION_PROJECTIONS                          # 128 linears, 199,296: diffusers
ATTENTION_AND_GEGLU = (*ATTENTION, "ff.net.0.proj")        # 144 linears, 311,616: cloneofsimo/lora
TRANSFORMER = (*ATTENTION_AND_GEGLU, "ff.net.2", "proj_in", "proj_out")  # 192 layers, 423,936: kohya sd-scripts
TEXT_ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")  # in CLIP; 48 linears, 73,728; kohya adds fc1, fc2: 165,888
PLAIN_PROMPT = "a photo of a {}"


@dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    """The diffusers recipe for SD 1.5, 512 px. Comments read: unit; the code's value (whose); why ours differs.

    The paper has no image model: of its values, only rank 1-64, a Gaussian A and B = 0 (Sec. 4.1) carry over.
    """

    class_noun: str                   # text, "dog"
    identifier: str = "sks"           # rare word, or the new token where inversion_steps > 0; "sks" (diffusers)
    rank: int = 4                     # r >= 1; 4 (diffusers, cloneofsimo, kohya)
    alpha: float | None = None        # scale s = alpha / rank; None = rank (diffusers); 1 (kohya)
    layers: tuple[str, ...] = ATTENTION  # endings of module names in the U-Net
    init: Literal["gaussian", "kaiming"] = "gaussian"  # of A; N(0, 1/r^2) (diffusers, cloneofsimo), Kaiming (Hu, kohya)
    train_steps: int = 500            # optimiser steps; 500 (diffusers)
    batch_size: int = 1               # subject pictures per step, and as many class images; 1 (diffusers)
    learning_rate: float = 1e-4       # U-Net, constant; 1e-4 (diffusers recipe); 1e-6 of full tuning learns nothing
    text_encoder_learning_rate: float = 0.0  # 0 = frozen (diffusers); 5e-5 (cloneofsimo)
    weight_decay: float = 1e-2        # AdamW; 1e-2 (diffusers), 1e-3 (cloneofsimo pivotal tuning)
    prior_loss_weight: float = 0.0    # lambda of DreamBooth's loss, >= 0; 0 = off (diffusers)
    num_class_images: int = 100       # images, used if lambda > 0; 100 (diffusers)
    timestep_share: float = 1.0       # t from the first part of the schedule, (0, 1]; 0.8 in pivotal tuning
    inversion_steps: int = 0          # stage 1 of pivotal tuning; 0 = off, the identifier is a rare word
    inversion_learning_rate: float = 5e-4  # of the new token (cloneofsimo)
    num_inference_steps: int = 50     # DDIM steps; diffusers' default
    guidance_scale: float = 7.5       # s, 1 = off; diffusers' default
    seed: int = 0                     # A's values, order, noise, timesteps, class images

    def __post_init__(self) -> None:
        for name in ("rank", "train_steps", "batch_size", "num_class_images", "num_inference_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        for name in ("text_encoder_learning_rate", "weight_decay", "prior_loss_weight", "inversion_steps"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be >= 0, got {getattr(self, name)}")
        for name in ("learning_rate", "inversion_learning_rate"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be > 0, got {getattr(self, name)}")
        if self.alpha is not None and not self.alpha > 0:
            raise ValueError(f"alpha must be > 0, or None for the rank, got {self.alpha}")
        if not 0 < self.timestep_share <= 1:
            raise ValueError(f"timestep_share must be in (0, 1], got {self.timestep_share}")
        if self.init not in ("gaussian", "kaiming"):
            raise ValueError(f'init must be "gaussian" or "kaiming", got {self.init!r}')
        for name in ("class_noun", "identifier"):
            if getattr(self, name) == "":
                raise ValueError(f"{name} must be a text, got {getattr(self, name)!r}")

    @property
    def words(self) -> str:
        """What stands for the subject in prompts: "sks dog", or the new token alone."""
        return self.identifier if self.inversion_steps else f"{self.identifier} {self.class_noun}"

    def instance_prompt(self) -> str:
        return PLAIN_PROMPT.format(self.words)

    def class_prompt(self) -> str:
        return PLAIN_PROMPT.format(self.class_noun)

    @classmethod
    def pivotal(cls, class_noun: str) -> "LoRAConfig":
        """cloneofsimo/lora's pivotal tuning on SD 1.5: a new token first, then pairs in U-Net and text encoder."""
        return cls(
            class_noun=class_noun, identifier="<s1>", layers=ATTENTION_AND_GEGLU, train_steps=1000, batch_size=4,
            text_encoder_learning_rate=1e-5, weight_decay=1e-3, timestep_share=0.8, inversion_steps=1000,
        )

    @classmethod
    def tiny(cls, class_noun: str) -> "LoRAConfig":
        """tiny-sd, 64 px: what the notebook and the reproduction run."""
        return cls(
            class_noun=class_noun, train_steps=200, batch_size=2, learning_rate=5e-4, num_class_images=16,
            num_inference_steps=30, guidance_scale=5.0,
        )
