"""What a personalization method must offer to be trained by `fit`, and nothing more."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from torch import Tensor
from torch.nn import Parameter

# As torch.optim takes them: parameters, (name, parameter) pairs, or groups {"params": ..., "lr": ...} of either.
Parameters = Iterable[Parameter] | Iterable[tuple[str, Parameter]] | Iterable[dict[str, Any]]


@runtime_checkable
class Method(Protocol):
    """The five verbs of a method. There is nothing to inherit: any class with these methods will do.

    A method that keeps its settings in a dataclass named `config` has them recorded, and compared when a run resumes.
    """

    def parameters(self) -> Parameters:
        """What is trained, float32. Named pairs (`list(module.named_parameters())`) give readable checkpoints."""
        ...

    def training_loss(self, batch: dict[str, Any]) -> Tensor:
        """The loss of one batch, a scalar: the mean over its samples.

        `batch` holds the collated dataset items, "sample_keys" (B,) int64 on the CPU for `common.training.seeding`,
        and "step", the optimiser step counted from 0. Draw randomness from the keys only.
        """
        ...

    def generate(self, prompt: str, *, seeds: list[int], **settings: Any) -> Tensor:
        """Pictures for a prompt, one per seed, pixel_values (B, 3, H, W) in [-1, 1]."""
        ...

    def save(self, folder: Path) -> None:
        """Write the artifact into a folder."""
        ...

    def load(self, folder: Path) -> None:
        """Read the artifact that `save` wrote."""
        ...
