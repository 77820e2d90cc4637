"""Prompts that name the side from which the camera looks (DreamFusion, Sec. 3.2)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from common.backbones import Backbone, Conditioning

VIEWS = ("front", "side", "back", "overhead")
OVERHEAD_DEG, FRONT_DEG, BACK_DEG = 60.0, 45.0, 45.0  # threestudio's; the half angles of front and back


def view_of(azimuths_deg: Tensor, elevations_deg: Tensor) -> list[str]:
    """The view's name for each camera: overhead above 60 degrees, else front, side or back."""
    turned = ((azimuths_deg + 180) % 360 - 180).abs()
    names = []
    for angle, elevation in zip(turned.tolist(), elevations_deg.tolist(), strict=True):
        if elevation > OVERHEAD_DEG:
            names.append("overhead")
        elif angle < FRONT_DEG:
            names.append("front")
        else:
            names.append("back" if angle > 180 - BACK_DEG else "side")
    return names


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

    def empty(self, count: int) -> Conditioning:
        """The empty prompt, for `count` pictures."""
        return self._empty.repeat(count)
