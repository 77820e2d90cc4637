"""Trainable changes of frozen weights."""

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class WeightResidual(nn.Module, ABC):
    """A trainable change of one weight. Subclasses implement `delta`.

    strength: a number, or a tensor (B,) with one value for each row of the batch. 0 leaves the layer untouched.
    """

    strength: float | Tensor = 1.0

    @abstractmethod
    def delta(self, weight: Tensor) -> Tensor:
        """The change at strength 1, in the shape of the frozen `weight`."""

    def output_change(self, layer: nn.Module, inputs: Tensor) -> Tensor | None:
        """What the change adds to the layer's output at strength 1, where that is cheaper than to build `delta`.

        None = build it. The two may differ by rounding, but not where the change is 0.
        """
        return None


class SpectralShift(WeightResidual):
    """W = U diag(s) V^T becomes U diag(relu(s + shift)) V^T; `shift` is trained and starts at 0 (then W exactly).

    Convolutions (out, in, h, w) are flattened to (out, in*h*w). The decomposition is made in float32 and is no part
    of the state_dict: min(out, in*h*w) numbers are stored.
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        if weight.ndim < 2:
            raise ValueError(f"SpectralShift needs a matrix or a convolution, got shape {tuple(weight.shape)}")
        left, spectrum, right = torch.linalg.svd(weight.detach().flatten(1).float(), full_matrices=False)
        self.register_buffer("left", left, persistent=False)
        self.register_buffer("spectrum", spectrum, persistent=False)
        self.register_buffer("right", right, persistent=False)
        self.shift = nn.Parameter(torch.zeros_like(spectrum))

    def delta(self, weight: Tensor) -> Tensor:
        return ((self.left * self._change()) @ self.right).reshape(weight.shape)

    def output_change(self, layer: nn.Module, inputs: Tensor) -> Tensor | None:
        """U diag(change) V^T x from right to left, in training and where there are fewer positions than shifts."""
        if not torch.is_grad_enabled():
            return None  # bit for bit what the merged weight gives
        dtype = inputs.dtype if inputs.is_floating_point() else layer.weight.dtype
        left, change, right = (part.to(dtype) for part in (self.left, self._change(), self.right))
        match layer:
            case nn.Embedding():
                return (F.embedding(inputs, left) * change) @ right
            case nn.Linear() if inputs[..., 0].numel() < len(change):
                return F.linear(F.linear(inputs, right) * change, left)
            case nn.Conv2d(groups=1) if inputs[:, 0].numel() < len(change):
                coordinates = layer._conv_forward(inputs, right.unflatten(1, layer.weight.shape[1:]), None)
                return F.conv2d(coordinates * change[:, None, None], left[:, :, None, None])
        return None

    def _change(self) -> Tensor:
        return F.relu(self.spectrum + self.shift) - self.spectrum


class DenseDelta(WeightResidual):
    """A full matrix of changes: `DenseDelta(trained - base)`, or zeros to train from the base."""

    def __init__(self, change: Tensor) -> None:
        super().__init__()
        self.change = nn.Parameter(change.detach().clone())

    def delta(self, weight: Tensor) -> Tensor:
        return self.change

    def compress(self, fraction: float) -> "LowRank":
        """Keep the fewest leading singular directions whose singular values sum to `fraction` of the total.

        Args:
            fraction: in (0, 1]; 1 keeps every direction.
        """
        if not 0 < fraction <= 1:
            raise ValueError(f"fraction must be in (0, 1], got {fraction}")
        left, spectrum, right = torch.linalg.svd(self.change.detach().flatten(1).float(), full_matrices=False)
        share = spectrum.cumsum(0) / spectrum.sum().clamp_min(torch.finfo(spectrum.dtype).tiny)
        rank = len(spectrum) if fraction == 1 else min(int((share < fraction).sum()) + 1, len(spectrum))
        compressed = LowRank(right[:rank], left[:, :rank] * spectrum[:rank])
        compressed.strength = self.strength
        return compressed


class LowRank(WeightResidual):
    """delta = up @ down, with down (r, in) and up (out, r)."""

    def __init__(self, down: Tensor, up: Tensor) -> None:
        super().__init__()
        if down.shape[0] != up.shape[1]:
            raise ValueError(f"ranks differ: down is {tuple(down.shape)}, up is {tuple(up.shape)}")
        self.down = nn.Parameter(down.detach().clone())
        self.up = nn.Parameter(up.detach().clone())

    def delta(self, weight: Tensor) -> Tensor:
        return (self.up @ self.down).reshape(weight.shape)
