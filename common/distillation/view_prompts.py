"""Prompts that name the side from which the camera looks (DreamFusion, Sec. 3.2)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from common.backbones import Backbone, Conditioning

VIEWS = ("front", "side", "back", "overhead")
OVERHEAD_DEG, FRONT_DEG, BACK_DEG = 60.0, 45.0, 45.0  # threestudio's; the half angles of front and back


def degrees_from_front(azimuths_deg: Tensor) -> Tensor:
    """0 = front, 90 = either side, 180 = back."""
    return ((azimuths_deg + 180) % 360 - 180).abs()


def view_of(azimuths_deg: Tensor, elevations_deg: Tensor) -> list[str]:
    """The view's name for each camera: overhead above 60 degrees, else front, side or back."""
    turned = degrees_from_front(azimuths_deg)
    names = []
    for angle, elevation in zip(turned.tolist(), elevations_deg.tolist(), strict=True):
        if elevation > OVERHEAD_DEG:
            names.append("overhead")
        elif angle < FRONT_DEG:
            names.append("front")
        else:
            names.append("back" if angle > 180 - BACK_DEG else "side")
    return names


def view_negatives(azimuths_deg: Tensor) -> tuple[Tensor, Tensor]:
    """Prompts for azimuths: shares of the positive ones, and weights of the negative ones.

    Between the front and a side the positive prompt is a mix of both, and between a side and the back likewise. Front
    and side are negative prompts too: w = -(a exp(-b r) + c), with the constants of threestudio
    (threestudio-project/threestudio at 28d9d80, PromptProcessorOutput).

    Args: azimuths_deg: (B,), 0 = front.
    Returns: shares (B,3) of front, side and back; weights (B,2) of the negative prompts front and side.
    """
    turned = degrees_from_front(azimuths_deg) / 90  # 0 front, 1 side, 2 back
    r = torch.where(turned < 1, 1 - turned, 2 - turned)  # 1 at the end nearer to the front
    zero = torch.zeros_like(r)
    ahead, behind = torch.stack([r, 1 - r, zero], -1), torch.stack([zero, r, 1 - r], -1)
    in_front = (turned < 1)[:, None]
    front_side = torch.stack([_decay(4.0, 0.5, -2.426, r), _decay(4.0, 0.5, -2.426, 1 - r)], -1)
    side_back = torch.stack([_decay(1.0, 0.5, 0.967, r), _decay(1.0, 0.5, -0.606, r)], -1)
    return torch.where(in_front, ahead, behind), -torch.where(in_front, front_side, side_back)


def _decay(a: float, b: float, c: float, r: Tensor) -> Tensor:
    return a * torch.exp(-b * r) + c


class ViewPrompts:
    """A prompt, told with each view's name, "a bear, front view", and the empty prompt.

    Args: backbone: encodes them once.   names: False tells the prompt alone, whatever the view.
    """

    def __init__(self, backbone: Backbone, prompt: str, *, names: bool = True) -> None:
        self.texts = [f"{prompt}, {view} view" if names else prompt for view in VIEWS]
        with torch.no_grad():
            self._told = backbone.encode_prompt(self.texts)
            self._empty = backbone.encode_prompt("")

    def at(self, azimuths_deg: Tensor, elevations_deg: Tensor) -> Conditioning:
        """The conditioning of each camera."""
        return self.of(view_of(azimuths_deg, elevations_deg))

    def of(self, views: Sequence[str]) -> Conditioning:
        """The conditioning of named views."""
        return Conditioning.cat([self._told[VIEWS.index(view)] for view in views])

    def perp_neg(self, azimuths_deg: Tensor, elevations_deg: Tensor) -> tuple[Conditioning, list[Conditioning], Tensor]:
        """What `perp_neg_noise` asks for: prompts mixed between the sides, their negatives front and side, weights.

        From overhead the prompt is the overhead one, and nothing is negative.
        Returns: the mixed prompts of B cameras; two conditionings of B prompts; weights (2,B), <= 0.
        Raises: ValueError if the backbone's conditioning is more than one context, which has no mean.
        """
        if not self._told.is_plain or self._told.pooled_prompt_embeds is not None:
            raise ValueError("Perp-Neg mixes prompts, which needs a backbone whose prompts are prompt_embeds only")
        count = len(azimuths_deg)
        shares, weights = view_negatives(azimuths_deg)
        overhead = (elevations_deg > OVERHEAD_DEG)[:, None]
        shares = torch.cat([shares.masked_fill(overhead, 0.0), overhead.to(shares)], 1)  # as VIEWS
        embeds = self._told.prompt_embeds
        mixed = Conditioning(torch.einsum("bv,vld->bld", shares.to(embeds), embeds))
        negatives = [self.of(["front"] * count), self.of(["side"] * count)]
        return mixed, negatives, weights.masked_fill(overhead, 0.0).T

    def empty(self, count: int) -> Conditioning:
        """The empty prompt, for `count` pictures."""
        return self._empty.repeat(count)
