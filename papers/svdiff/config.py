"""Settings of SVDiff."""

from collections.abc import Callable
from dataclasses import dataclass


def _in(*prefixes: str) -> Callable[[str, int], bool]:
    return lambda name, ndim: name.startswith(prefixes)


def _cross_attention(*prefixes: str) -> Callable[[str, int], bool]:
    return lambda name, ndim: ".attn2." in name and name.startswith(prefixes or "")


# Table 1: weights of the U-Net, by parameter name and number of dimensions.
SUBSETS: dict[str, Callable[[str, int], bool]] = {
    "UNet": lambda name, ndim: True,
    "UNet-CA": _cross_attention(),
    "UNet-CA-KV": lambda name, ndim: name.endswith(("attn2.to_k.weight", "attn2.to_v.weight")),
    "UNet-1D": lambda name, ndim: ndim == 1,
    "UNet-2D": lambda name, ndim: ndim == 2,
    "UNet-4D": lambda name, ndim: ndim == 4,
    "Up-Blocks": _in("up_blocks."),
    "Down-Blocks": _in("down_blocks."),
    "Mid-Block": _in("mid_block."),
    "Up-CA": _cross_attention("up_blocks."),
    "Down-CA": _cross_attention("down_blocks."),
    "Mid-CA": _cross_attention("mid_block."),
}


@dataclass(frozen=True, kw_only=True)
class SVDiffConfig:
    """The paper's Stable Diffusion setting. Comments read: unit; paper's value (place); why ours differs.

    "mkshing" is mkshing/svdiff-pytorch, the public code that trains.
    """

    class_nouns: tuple[str, ...] = ()            # "dog"; two or three learn several subjects together (Sec. 3.3)
    identifiers: tuple[str, ...] = ("sks", "ktn", "ucd")  # [V1], [V2], [V3], rare words; not in the paper
    prompt_template: str = "photo of a {}"       # text with one {}; "photo of a [V] dog" (Fig. 3)
    description: str | None = None               # of the one picture to edit, instead of class_nouns (Sec. 3.4)
    subset: str = "UNet"                         # which weights of the U-Net, a key of SUBSETS; all (Sec. 4.4, Table 1)
    train_text_encoder: bool = True              # not in the text; its 1.7 MB (abstract) hold U-Net and text encoder
    train_steps: int = 1000                      # optimiser steps; 500 or 1000, the better (Sec. 4.1)
    batch_size: int = 1                          # pictures per step, and as many class images; 1 (Sec. 4.1)
    learning_rate: float = 1e-3                  # of shifts; not in the text: 1e-3 (mkshing)
    norm_learning_rate: float = 1e-6             # of the 1-D weights; not in the text: 1e-6 (mkshing)
    weight_decay: float = 1e-2                   # AdamW, of the shifts; not in the text: 1e-2 (mkshing)
    prior_loss_weight: float = 1.0               # lambda of Eq. 3, >= 0; not in the text: 1 (mkshing); 0 for editing
    num_class_images: int = 200                  # per class noun; not in the text: 200 (mkshing)
    cut_mix_probability: float = 0.6             # of a collage, where there are several subjects; 0.6 (Sec. 3.3, 4.2)
    unmix_loss_weight: float = 0.0               # of the attention loss, >= 0; an extension without number (Sec. 3.3)
    unmix_resolutions: tuple[int, ...] = (16, 8) # token grids where it acts; not in the text
    num_inference_steps: int = 50                # DDIM steps, eta = 0 (Sec. 4); not in the text: diffusers' default
    guidance_scale: float = 7.5                  # s, 1 = off; not in the text: diffusers' default
    seed: int = 0                                # draws of pictures and collages, noise, timesteps, class images

    def __post_init__(self) -> None:
        for name in ("train_steps", "batch_size", "num_class_images", "num_inference_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        for name in ("weight_decay", "prior_loss_weight", "unmix_loss_weight"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be >= 0, got {getattr(self, name)}")
        for name in ("learning_rate", "norm_learning_rate"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be > 0, got {getattr(self, name)}")
        if not 0 <= self.cut_mix_probability <= 1:
            raise ValueError(f"cut_mix_probability must be in [0, 1], got {self.cut_mix_probability}")
        if self.subset not in SUBSETS:
            raise ValueError(f"subset must be one of {list(SUBSETS)}, got {self.subset!r}")
        if self.prompt_template.count("{}") != 1:
            raise ValueError(f"prompt_template must hold {{}} once, got {self.prompt_template!r}")
        if self.description is not None and self.class_nouns:
            raise ValueError("give class_nouns of the subjects, or the description of one picture to edit, not both")
        if self.description is not None and self.prior_loss_weight > 0:
            raise ValueError("a description has no class to preserve: set prior_loss_weight=0 for editing")
        used = self.identifiers[: len(self.class_nouns)]
        if len(set(used)) < len(self.class_nouns):
            raise ValueError(f"{len(self.class_nouns)} class_nouns need as many different identifiers, got {used}")

    @property
    def words(self) -> tuple[str, ...]:
        """What stands for each subject in prompts: "sks dog"."""
        return tuple(f"{v} {noun}" for v, noun in zip(self.identifiers, self.class_nouns, strict=False))

    def instance_prompts(self) -> tuple[str, ...]:
        """One for each subject; the description where a picture is edited."""
        if self.description is not None:
            return (self.description,)
        return tuple(self.prompt_template.format(words) for words in self.words)

    def class_prompts(self) -> tuple[str, ...]:
        return tuple(self.prompt_template.format(noun) for noun in self.class_nouns)

    @classmethod
    def tiny(cls, *class_nouns: str, **changes: object) -> "SVDiffConfig":
        """tiny-sd, 64 px: what the notebook and the reproduction run; with class images where subjects are joined."""
        tiny = {
            "class_nouns": class_nouns, "identifiers": ("sks", "zwx", "qlv"), "prompt_template": "a photo of a {}",
            "train_text_encoder": False, "train_steps": 150, "batch_size": 2, "learning_rate": 3e-3,
            "norm_learning_rate": 1e-4, "prior_loss_weight": 0.0, "num_class_images": 8, "num_inference_steps": 30,
            "guidance_scale": 5.0,
        }  # fmt: skip
        return cls(**tiny | changes)
