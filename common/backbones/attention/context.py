"""Give every cross-attention layer its own text context, keys apart from values."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from torch import Tensor, nn

from common.backbones.attention.install import install
from common.backbones.attention.layers import LayerInfo, attention_layers
from common.backbones.attention.processor import AttentionCall, AttentionHook


class LayerContexts(Protocol):
    def for_layer(self, layer_index: int, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Contexts of keys and values for cross-attention layer `layer_index` (call order), each (B, L, D)."""


class ChooseContext(AttentionHook):
    """Let a function choose the contexts of keys and values, (B, L, D) each, by layer (and by whatever it knows)."""

    def __init__(
        self,
        choose: Callable[[LayerInfo], tuple[Tensor, Tensor]],
        where: Callable[[LayerInfo], bool] = lambda layer: layer.kind == "cross",
        frames_in_batch: bool = False,
    ) -> None:
        """`frames_in_batch`: the UNet folds F frames into the batch, sample by sample; a context serves F rows."""
        self.choose, self.applies_to, self.frames_in_batch = choose, where, frames_in_batch

    def contexts(self, call: AttentionCall, key_context: Tensor, value_context: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = self.choose(call.layer)
        return self._one_per_row(keys, call), self._one_per_row(values, call)

    def _one_per_row(self, context: Tensor, call: AttentionCall) -> Tensor:
        rows = call.batch_size
        if context.shape[0] == rows:
            return context
        if self.frames_in_batch and rows % context.shape[0] == 0:
            return context.repeat_interleave(rows // context.shape[0], dim=0)
        raise ValueError(f"{call.layer.name} has {rows} rows, but its context has batch size {context.shape[0]}")


@contextmanager
def conditioned(unet: nn.Module, conditioning: LayerContexts, timesteps: Tensor) -> Iterator[None]:
    """Inside the block, cross-attention layer i reads `conditioning.for_layer(i, timesteps)`.

    The UNet still wants `encoder_hidden_states`; pass any (B, L, D) tensor of the right batch size, IP-Adapter image
    tokens included. Hooks that are already installed stay active and act first, so this choice of context wins.

    Args:
        unet: see `install`.
        conditioning: gives (keys context, values context), (B, L, D) each, in the batch order of the latents.
        timesteps: handed on unchanged, (B,) int64.
    """
    hook = ChooseContext(
        lambda layer: conditioning.for_layer(layer.index, timesteps),
        frames_in_batch=any(layer.info.kind == "temporal" for layer in attention_layers(unet)),
    )
    with install(unet, [hook]):
        yield
