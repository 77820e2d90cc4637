"""What is behind the object: a colour, or a small network of the ray's direction."""

import torch
from nerfstudio.field_components.encodings import SHEncoding
from torch import Tensor, nn


class SolidBackground(nn.Module):
    """One colour, in [0,1]."""

    def __init__(self, color: tuple[float, float, float] = (1.0, 1.0, 1.0)) -> None:
        super().__init__()
        self.register_buffer("color", torch.tensor(color))

    def forward(self, directions: Tensor) -> Tensor:
        """Unit directions (R,3) -> (R,3)."""
        return self.color.expand(len(directions), 3)


class LearnedBackground(nn.Module):
    """Spherical harmonics of degree 3 (9 numbers) and a network 9-16-16-3, as threestudio's; without biases."""

    def __init__(self) -> None:
        super().__init__()
        self.encoding = SHEncoding(levels=3, implementation="torch")
        self.network = nn.Sequential(
            nn.Linear(9, 16, bias=False), nn.ReLU(), nn.Linear(16, 16, bias=False), nn.ReLU(),
            nn.Linear(16, 3, bias=False),
        )  # fmt: skip

    def forward(self, directions: Tensor) -> Tensor:
        """Unit directions (R,3) -> colours in (0,1), (R,3)."""
        return self.network(self.encoding(directions)).sigmoid()
