"""Settings of ProSpect."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ProSpectConfig:
    """The paper's setting (Stable Diffusion 1.4, 512 px). Comments: unit; paper's value (place); why ours differs."""

    initializer_token: str = "object"      # p_0, one token; a word such as "cup" or "teddy" that names the picture
    placeholder_token: str | None = None   # S*, text without spaces; "*"; None = <INITIALIZER_TOKEN> (D1)
    training_prompt: str = "{}"            # with {} for S*; the bare "*" (code). tiny-sd knows "a photo of a ..." only
    num_stages: int = 10                   # n >= 1; 10
    direct: bool = False                   # train the p_i themselves, without f: an ablation, 7,680 numbers
    train_steps: int = 1000                # optimiser steps; 1000 to 3000 (a reading note), 600 (code's config)
    batch_size: int = 1                    # samples per step over all GPUs; 1 (code, which cannot do more)
    learning_rate: float = 1e-4            # effective, constant: nothing scales it; 1e-4 x batch 1 (code)
    weight_decay: float = 0.01             # AdamW, on all of f; 0.01 (code, by torch's default)
    flip: bool = True                      # mirror half of the samples; yes (code). It hides which way a layout faces
    num_inference_steps: int = 50          # DDIM steps; 50 (code)
    guidance_scale: float = 10.0           # s, 1 = off; 10 (code)
    seed: int = 0                          # order, flips, noise, timesteps, dropout, initial weights

    def __post_init__(self) -> None:
        for name in ("num_stages", "train_steps", "batch_size", "num_inference_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be > 0, got {self.learning_rate}")
        if self.weight_decay < 0:
            raise ValueError(f"weight_decay must be >= 0, got {self.weight_decay}")
        if self.training_prompt.count("{}") != 1:
            raise ValueError(f"training_prompt needs one {{}} for S*, got {self.training_prompt!r}")

    @property
    def placeholder(self) -> str:
        """S* as it stands in prompts."""
        return f"<{self.initializer_token}>" if self.placeholder_token is None else self.placeholder_token

    def plain_prompt(self) -> str:
        """The training prompt with S*: "<cup>" in the paper, "a photo of a <cup>" on tiny-sd."""
        return self.training_prompt.format(self.placeholder)

    @classmethod
    def tiny(cls) -> "ProSpectConfig":
        """tiny-sd, 64 px: what the notebook and the reproduction run."""
        return cls(
            training_prompt="a photo of a {}",
            train_steps=300,
            batch_size=4,
            learning_rate=1e-3,
            flip=False,
            num_inference_steps=30,
            guidance_scale=5.0,
        )
