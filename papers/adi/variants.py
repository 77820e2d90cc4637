"""ADI's ablations: what is left without its masks, and with masks that know nothing."""

from typing import Any

import torch
from torch import Tensor

from common.training.noising import noise_batch
from common.training.seeding import seeded_uniform

from .method import ADI, denoising_loss


class LayerwiseInversion(ADI):
    """Layer-wise Textual Inversion, as P+ does it: all channels learn, from the anchors alone.

    It makes one pass where ADI makes three.
    """

    def training_loss(self, batch: dict[str, Any]) -> Tensor:
        noised = noise_batch(self.backbone, batch["anchor"], batch["sample_keys"], seed=self.config.seed)
        return denoising_loss(self.backbone, noised, self.conditioning(batch["prompt"])).mean()


class RandomMasks(ADI):
    """ADI whose masks have their channels shuffled within each layer: the same density, drawn blindly."""

    def masks(self, gradients: Tensor, sample_keys: Tensor) -> Tensor:
        return shuffled(super().masks(gradients, sample_keys), sample_keys, seed=self.config.seed)


def shuffled(masks: Tensor, sample_keys: Tensor, *, seed: int) -> Tensor:
    """Masks (B,L,D) with the channels of every layer in an order of their own, drawn for each sample key."""
    draws = seeded_uniform(sample_keys, tuple(masks.shape[1:]), seed=seed, stream="random masks")
    return torch.gather(masks, -1, draws.argsort(-1).to(masks.device))
