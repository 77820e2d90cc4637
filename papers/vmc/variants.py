"""What VMC is compared with: the same network tuned by the loss that it was trained with."""

from typing import Any

from torch import Tensor, nn

from common.training.losses import per_sample_mse

from .method import VMC

SPATIAL_QUERIES = ("attn1.to_q", "attn2.to_q")
TEMPORAL_PROJECTIONS = (".to_q", ".to_k", ".to_v", ".to_out.0")


class DenoisingTuning(VMC):
    """The same matrices and prompts with |eps - eps_theta|^2 in the place of the residual loss."""

    def training_loss(self, batch: dict[str, Any]) -> Tensor:
        noise_pred, noise = self.predict_noise(batch)
        return per_sample_mse(noise_pred, noise).mean()


def tune_a_video_projections(unet: nn.Module) -> dict[str, Tensor]:
    """Queries of spatial self- and cross-attention, and all of temporal attention; name in the UNet -> weight."""
    return {
        f"{name}.weight": module.weight
        for name, module in unet.named_modules()
        if ("temp_attentions" in name and name.endswith(TEMPORAL_PROJECTIONS))
        or (".attentions." in name and name.endswith(SPATIAL_QUERIES))
    }


class TuneAVideoStyle(DenoisingTuning):
    """What Tune-A-Video (Wu et al., ICCV 2023, arXiv 2212.11565) tunes, in a network that has seen clips before.

    Like VMC it begins at the inverted noise of the clip. It is meant for the clip's full caption. Tune-A-Video's own
    network is an image network, whose new temporal layers learn from this clip alone, and whose frames attend to the
    first and the previous one; here trained temporal layers do that.
    """

    select = staticmethod(tune_a_video_projections)
