"""Score distillation: gradients from a frozen diffusion model for whatever makes pictures."""

from common.distillation.perp_neg import perp_neg_guidance, perp_neg_noise
from common.distillation.sds import (
    TimestepRange,
    distillation_loss,
    guided_predictor,
    picture_latents,
    sds_gradient,
    sds_loss,
)
from common.distillation.view_prompts import ViewPrompts, view_of

__all__ = [
    "TimestepRange", "ViewPrompts", "distillation_loss", "guided_predictor", "perp_neg_guidance", "perp_neg_noise",
    "picture_latents", "sds_gradient", "sds_loss", "view_of",
]  # fmt: skip
