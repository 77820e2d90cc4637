"""The attention hooks that several methods share. Install them with `common.backbones.attention.install`.

`where` always is a function of LayerInfo that picks the layers, such as
`lambda layer: layer.kind == "cross" and layer.resolution == (16, 16)`.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from common.backbones.attention import (
    AttentionCall,
    AttentionHook,
    ChooseContext,
    LayerInfo,
    Projections,
    attend,
    attention_layers,
    split_heads,
)

__all__ = [
    "AddBranch",
    "BranchProjections",
    "ChooseContext",
    "RecordProbabilities",
    "ReplaceProbabilities",
    "ShareKeysValues",
    "cross_attention",
    "first_row_of_each_group",
    "self_attention",
]


def cross_attention(layer: LayerInfo) -> bool:
    return layer.kind == "cross"


def self_attention(layer: LayerInfo) -> bool:
    return layer.kind == "self"


class RecordProbabilities(AttentionHook):
    """Keep the probabilities of the last forward pass in `.by_layer`, one tensor for each layer.

    Tensors are (B, Q, K), or (B, heads, Q, K) with average_heads=False, and keep their graph, so that losses can use
    them. What earlier hooks replaced is recorded, what later hooks replace is not.
    """

    needs_probabilities = True

    def __init__(self, where: Callable[[LayerInfo], bool] = cross_attention, *, average_heads: bool = True) -> None:
        self.applies_to, self.average_heads = where, average_heads
        self.by_layer: dict[LayerInfo, Tensor] = {}

    def probabilities(self, call: AttentionCall, probabilities: Tensor) -> Tensor:
        self.by_layer[call.layer] = probabilities.mean(1) if self.average_heads else probabilities
        return probabilities

    def maps(self, resolution: tuple[int, int]) -> Tensor:
        """Mean over the recorded layers of one resolution, on its token grid.

        Args:
            resolution: (height, width) in tokens.
        Returns: (B, height, width, K); head-averaged.
        Raises: ValueError if no such layer was recorded, or if it got another number of tokens than it was bound to.
        """
        found = [probs for layer, probs in self.by_layer.items() if layer.resolution == tuple(resolution)]
        if not found:
            known = sorted({layer.resolution for layer in self.by_layer})
            raise ValueError(f"no attention recorded at {resolution}; recorded resolutions: {known}")
        height, width = resolution
        if any(probs.shape[-2] != height * width for probs in found):
            raise ValueError(
                f"layers bound to {resolution} got {found[0].shape[-2]} tokens: pass latent_size to install()"
            )
        mean = torch.stack([probs if self.average_heads else probs.mean(1) for probs in found]).mean(0)
        return mean.unflatten(1, (height, width))


class ReplaceProbabilities(AttentionHook):
    """Let a function of (layer, probabilities (B, heads, Q, K)) return the probabilities to use."""

    needs_probabilities = True

    def __init__(
        self, replace: Callable[[LayerInfo, Tensor], Tensor], where: Callable[[LayerInfo], bool] = cross_attention
    ) -> None:
        self.replace, self.applies_to = replace, where

    def probabilities(self, call: AttentionCall, probabilities: Tensor) -> Tensor:
        return self.replace(call.layer, probabilities)


def first_row_of_each_group(groups: int) -> Callable[[int], Tensor]:
    """References for a batch of equal contiguous groups (2 for [unconditional; conditional]): each group's row 0.

    Returns: function of the batch size B that gives (B, 1) int64 row numbers.
    """

    def references(batch_size: int) -> Tensor:
        if batch_size % groups:
            raise ValueError(f"a batch of {batch_size} rows does not split into {groups} equal groups")
        size = batch_size // groups
        return (torch.arange(batch_size) // size * size)[:, None]

    return references


class ShareKeysValues(AttentionHook):
    """Every row attends to its own tokens and to those of R reference rows of the batch.

    Args:
        references: function of the batch size B that gives (B, R) int64 row numbers; `first_row_of_each_group(2)`
            for one reference in each half of a classifier-free guidance batch.
        match_query, match_key: functions of (own, reference), both (B, heads, N, d), that adapt a row's queries and
            keys to its first reference, such as AdaIN; default: leave them.
        score_shift: added to the logits of reference tokens; log 2 doubles their weight.
        where: layers to share in.
    """

    def __init__(
        self,
        references: Callable[[int], Tensor],
        *,
        match_query: Callable[[Tensor, Tensor], Tensor] | None = None,
        match_key: Callable[[Tensor, Tensor], Tensor] | None = None,
        score_shift: float = 0.0,
        where: Callable[[LayerInfo], bool] = self_attention,
    ) -> None:
        self.references, self.applies_to, self.score_shift = references, where, score_shift
        self.match_query, self.match_key = match_query, match_key

    def projections(self, call: AttentionCall, projections: Projections) -> Projections:
        query, key, value, bias = projections
        rows = self.references(call.batch_size).to(key.device)  # (B, R)
        if self.match_query is not None:
            query = self.match_query(query, query[rows[:, 0]])
        if self.match_key is not None:
            key = self.match_key(key, key[rows[:, 0]])
        keys = [key, *(key[column] for column in rows.unbind(1))]
        values = [value, *(value[column] for column in rows.unbind(1))]
        if bias is not None or self.score_shift:
            own = torch.zeros_like(key[:, :1, None, :, 0]) if bias is None else bias
            bias = torch.cat([own, *(own[column] + self.score_shift for column in rows.unbind(1))], dim=-1)
        return Projections(query, torch.cat(keys, 2), torch.cat(values, 2), bias)


class BranchProjections(nn.Module):
    """Trainable to_k and to_v for every cross-attention layer of a UNet, for tokens that are no text.

    Args:
        unet: gives the layers and, where the widths agree, the initial values (copies of its own to_k and to_v).
        token_dim: width D of the extra tokens. SD 1.x with 768: 19,169,280 parameters.
    """

    def __init__(self, unet: nn.Module, token_dim: int) -> None:
        super().__init__()
        layers = [layer.module for layer in attention_layers(unet) if layer.info.kind == "cross"]
        self.to_k = nn.ModuleList(_like(layer.to_k, token_dim) for layer in layers)
        self.to_v = nn.ModuleList(_like(layer.to_v, token_dim) for layer in layers)

    def forward(self, layer: LayerInfo) -> tuple[nn.Module, nn.Module]:
        """The pair (to_k, to_v) of one cross-attention layer."""
        return self.to_k[layer.index], self.to_v[layer.index]


def _like(base: nn.Linear, in_features: int) -> nn.Linear:
    projection = nn.Linear(in_features, base.out_features, bias=False, device=base.weight.device)
    if in_features == base.in_features and not base.weight.is_meta:
        with torch.no_grad():
            projection.weight.copy_(base.weight)
    return projection


class AddBranch(AttentionHook):
    """output + scale * attention of the same queries to extra tokens with their own to_k and to_v.

    Args:
        projections_of: function of LayerInfo that gives (to_k, to_v); a BranchProjections is one. Reference features
            pass the layer's own `to_k` and `to_v`.
        tokens_of: function of AttentionCall that gives the tokens (B, n, D): image tokens, or features recorded from
            another pass for this layer.
        scale: a number (0 skips the branch, so the output is that of the base bit for bit), or a function of
            AttentionCall giving a tensor that broadcasts to (B, heads, Q, d): a gate, a mask, one value per sample.
        where: layers that get the branch.
    """

    def __init__(
        self,
        projections_of: Callable[[LayerInfo], tuple[nn.Module, nn.Module]],
        tokens_of: Callable[[AttentionCall], Tensor],
        *,
        scale: float | Callable[[AttentionCall], Tensor] = 1.0,
        where: Callable[[LayerInfo], bool] = cross_attention,
    ) -> None:
        self.projections_of, self.tokens_of, self.scale, self.applies_to = projections_of, tokens_of, scale, where

    def output(self, call: AttentionCall, output: Tensor) -> Tensor:
        if not callable(self.scale) and self.scale == 0:
            return output
        tokens, heads = self.tokens_of(call), call.attention.heads
        to_k, to_v = self.projections_of(call.layer)
        branch = attend(call.query, split_heads(to_k(tokens), heads), split_heads(to_v(tokens), heads))
        return output + (self.scale(call) if callable(self.scale) else self.scale) * branch
