"""Settings of ReVersion."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ReVersionConfig:
    """The paper's setting (Stable Diffusion 1.5, 512 px). Comments: unit; paper's value (place); why ours differs."""

    placeholder_token: str = "<R>"      # the relation prompt; "<R>"
    initializer_token: str = "and"      # one token; "and" (code)
    train_steps: int = 3000             # optimiser steps; 3000 (code, README)
    batch_size: int = 8                 # samples per step over all GPUs; 2 x 4 accumulated (code)
    learning_rate: float = 2e-3         # effective, constant: nothing scales it; 2.5e-4 x 8 samples (code)
    weight_decay: float = 0.01          # AdamW, on <R> alone; 0.01 (code)
    steering_weight: float = 0.01       # lambda_steer, >= 0, 0 = off; 0.01 (code), that of the denoising loss is 1
    temperature: float = 0.07           # gamma of the steering loss, > 0; 0.07
    num_positives: int = 4              # prepositions drawn for each sample; 4 (code)
    focal_skew: float = 0.5             # alpha of f(t), [0, 1], 0 = uniform; 0.5
    num_inference_steps: int = 50       # sampler steps; 50 (code)
    guidance_scale: float = 7.5         # s, 1 = off; 7.5 (code)
    seed: int = 0                       # order, captions, noise, timesteps, positives

    def __post_init__(self) -> None:
        for name in ("train_steps", "batch_size", "num_positives", "num_inference_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        for name in ("learning_rate", "temperature"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be > 0, got {getattr(self, name)}")
        for name in ("weight_decay", "steering_weight"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be >= 0, got {getattr(self, name)}")
        if not 0 <= self.focal_skew <= 1:
            raise ValueError(f"focal_skew must be in [0, 1], got {self.focal_skew}")

    @classmethod
    def tiny(cls) -> "ReVersionConfig":
        """tiny-sd, 64 px: what the notebook and the reproduction run."""
        return cls(train_steps=200, batch_size=4, learning_rate=5e-3, num_inference_steps=30, guidance_scale=5.0)
