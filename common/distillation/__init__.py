"""Score distillation: gradients from a frozen diffusion model for whatever makes pictures."""

from common.distillation.perp_neg import perp_neg_guidance
from common.distillation.sds import TimestepRange, guided_noise, sds_gradient, sds_loss
from common.distillation.view_prompts import ViewPrompts, view_of

__all__ = [
    "TimestepRange", "ViewPrompts", "guided_noise", "perp_neg_guidance", "sds_gradient", "sds_loss", "view_of",
]  # fmt: skip
