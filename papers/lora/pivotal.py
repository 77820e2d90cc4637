"""Stage 1 of pivotal tuning: a new token before the pairs. Not in the paper: cloneofsimo/lora (`lora_pti`)."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from common.backbones import Backbone, PlaceholderTokens
from common.training.noising import noise_batch
from common.training.seeding import derive_seed

from .config import LoRAConfig
from .method import denoising_loss


def controlled_norm(vectors: Tensor, learning_rate: float, target_norm: float) -> Tensor:
    """e / |e| * (|e| + lambda (target - |e|)), lambda = min(1, 100 lr), after each step: e keeps a word's length.

    Args:
        vectors: e, (V,D).
        target_norm: length of a word's embedding; 0.4 in the code, for SD 1.x.
    """
    norms = vectors.norm(dim=-1, keepdim=True)
    return vectors / norms * (norms + min(1.0, 100 * learning_rate) * (target_norm - norms))


class PivotalInversion:
    """The token, learned over all timesteps on a frozen backbone, which keeps it; then `LoRA` is built on the backbone.

    Args:
        backbone: is frozen here; the token starts as the class noun's embedding.
    """

    def __init__(self, backbone: Backbone, config: LoRAConfig) -> None:
        if len(backbone.text_encoders) > 1:
            raise ValueError(
                f"{backbone.name} has two text encoders; pivotal tuning is for Stable Diffusion 1.x and 2.x"
            )
        self.backbone, self.config = backbone.freeze(), config
        tokens = PlaceholderTokens(backbone) if backbone.placeholders is None else backbone.placeholders
        (self.vectors,) = tokens.add(config.identifier, initializer_token=config.class_noun)
        words = backbone.text_encoder.get_input_embeddings().weight.detach().float()
        self.target_norm = words.norm(dim=-1).median().item()
        self._last_step: int | None = None

    def parameters(self) -> list[tuple[str, Parameter]]:
        return [("token", self.vectors)]

    def training_loss(self, batch: dict[str, Any]) -> Tensor:
        """The denoising loss. A step begins with the norm control that belongs after the step before."""
        if batch["step"] > 0 and batch["step"] != self._last_step:  # once, however many parts a batch has
            self.control_norm()
        self._last_step = batch["step"]
        samples, seed = batch["instance"], derive_seed(self.config.seed, "inversion")
        noised = noise_batch(self.backbone, samples["latents"], batch["sample_keys"], seed=seed)
        return denoising_loss(self.backbone, noised, self.backbone.encode_prompt(list(samples["prompt"]))).mean()

    @torch.no_grad()
    def control_norm(self) -> None:
        """In place; call it once more when training is over."""
        self.vectors.copy_(controlled_norm(self.vectors, self.config.inversion_learning_rate, self.target_norm))
