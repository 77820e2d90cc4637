"""One attention processor with five small places where hooks can act."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from diffusers.image_processor import IPAdapterMaskProcessor
from diffusers.models.attention_processor import Attention, IPAdapterAttnProcessor, IPAdapterAttnProcessor2_0
from torch import Tensor, nn

from common.backbones.attention.layers import LayerInfo


class Projections(NamedTuple):
    """What softmax(query key^T / sqrt(d) + bias) value gets; change it with `_replace`."""

    query: Tensor  # (B, heads, Q, d)
    key: Tensor  # (B, heads, K, d)
    value: Tensor  # (B, heads, K, d)
    bias: Tensor | None = None  # added to the logits, broadcasts to (B, heads, Q, K)


@dataclass
class AttentionCall:
    """One call of one layer, as hooks see it."""

    layer: LayerInfo
    attention: Attention
    hidden_states: Tensor  # (B, Q, C), input of to_q
    image_contexts: Sequence[Tensor] = ()  # the IP-Adapter image tokens that came as `(text, [image, ...])`
    query: Tensor | None = None  # (B, heads, Q, d), known once the projections are made

    @property
    def batch_size(self) -> int:
        return self.hidden_states.shape[0]


class AttentionHook:
    """Base of all hooks: does nothing. Subclasses override the places they need, usually one.

    Hooks of a layer run in the order in which they were installed.
    """

    needs_probabilities = False  # True computes an explicit softmax and calls `probabilities`; False allows SDPA

    def applies_to(self, layer: LayerInfo) -> bool:
        """Say, once at installation, whether the hook works in this layer."""
        return True

    def contexts(self, call: AttentionCall, key_context: Tensor, value_context: Tensor) -> tuple[Tensor, Tensor]:
        """Choose what to_k and to_v read, each (B, L, D)."""
        return key_context, value_context

    def projections(self, call: AttentionCall, projections: Projections) -> Projections:
        """Change queries, keys, values or logit bias."""
        return projections

    def probabilities(self, call: AttentionCall, probabilities: Tensor) -> Tensor:
        """Read or replace the attention probabilities (B, heads, Q, K)."""
        return probabilities

    def output(self, call: AttentionCall, output: Tensor) -> Tensor:
        """Add to or replace the attention output (B, heads, Q, d) before to_out."""
        return output


class HookedAttnProcessor:
    """Attention with hooks; without any it computes exactly what diffusers' AttnProcessor2_0 computes."""

    def __init__(self, base: object, layer: LayerInfo, hooks: Sequence[AttentionHook]) -> None:
        self.base = base  # the processor of the network itself; an IP-Adapter's keeps its image branch
        self.layer = layer
        self.hooks = tuple(hooks)

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | tuple[Tensor, list[Tensor]] | None = None,
        attention_mask: Tensor | None = None,
        ip_adapter_masks: list[Tensor] | None = None,
        **cross_attention_kwargs: object,
    ) -> Tensor:
        """Map (B, Q, C) to (B, Q, C); other cross_attention_kwargs are ignored, as diffusers' processors do."""
        call = AttentionCall(self.layer, attn, hidden_states)
        context = encoder_hidden_states
        if isinstance(context, tuple):
            context, call.image_contexts = context
        context = hidden_states if context is None else context
        keys_from, values_from = context, context
        for hook in self.hooks:
            keys_from, values_from = hook.contexts(call, keys_from, values_from)

        projected = Projections(
            query=split_heads(attn.to_q(hidden_states), attn.heads),
            key=split_heads(attn.to_k(keys_from), attn.heads),
            value=split_heads(attn.to_v(values_from), attn.heads),
            bias=_logit_bias(attn, attention_mask, context),
        )
        for hook in self.hooks:
            projected = hook.projections(call, projected)
        call.query = projected.query

        if any(hook.needs_probabilities for hook in self.hooks):
            probabilities = attention_probabilities(projected.query, projected.key, projected.bias)
            for hook in self.hooks:
                probabilities = hook.probabilities(call, probabilities)
            output = probabilities @ projected.value
        else:
            output = attend(*projected)
        if isinstance(self.base, IPAdapterAttnProcessor | IPAdapterAttnProcessor2_0):
            output = _add_image_prompts(self.base, call, output, ip_adapter_masks)
        for hook in self.hooks:
            output = hook.output(call, output)

        output = output.transpose(1, 2).flatten(2).to(projected.query.dtype)
        return attn.to_out[1](attn.to_out[0](output)) / attn.rescale_output_factor


def split_heads(states: Tensor, heads: int) -> Tensor:
    """(B, ..., C) -> (B, heads, tokens, C / heads); several token axes are joined."""
    return states.reshape(states.shape[0], -1, heads, states.shape[-1] // heads).transpose(1, 2)


def attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
    """softmax(query key^T / sqrt(d) + bias) value with PyTorch's fused kernel; (B, heads, Q, d)."""
    if bias is not None:
        bias = bias.to(query.dtype)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=bias)


def attention_probabilities(query: Tensor, key: Tensor, bias: Tensor | None = None) -> Tensor:
    """softmax(query key^T / sqrt(d) + bias) in at least float32, returned in the query's dtype; (B, heads, Q, K)."""
    logits = (query @ key.transpose(-1, -2)) * query.shape[-1] ** -0.5
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if bias is not None:
        logits = logits + bias
    return logits.softmax(-1).to(query.dtype)


def _logit_bias(attn: Attention, mask: Tensor | None, context: Tensor) -> Tensor | None:
    if mask is None:
        return None
    batch_size, length = context.shape[:2]
    mask = attn.prepare_attention_mask(mask, length, batch_size)
    return mask.view(batch_size, attn.heads, -1, mask.shape[-1])


def _add_image_prompts(adapter: nn.Module, call: AttentionCall, output: Tensor, masks: list[Tensor] | None) -> Tensor:
    """The IP-Adapter branch of diffusers: output + scale * attention to each adapter's image tokens.

    `masks` has one entry for each adapter: (1, images, height, width) from IPAdapterMaskProcessor, or None.
    """
    masks = [None] * len(adapter.scale) if masks is None else masks
    parts = zip(call.image_contexts, adapter.scale, adapter.to_k_ip, adapter.to_v_ip, masks, strict=True)
    for tokens, scale, to_k, to_v, mask in parts:
        if mask is None:
            images, scales = [tokens], [scale]
        else:
            images = tokens.unbind(1)
            scales = scale if isinstance(scale, list) else [scale] * len(images)
        for index, (image, image_scale) in enumerate(zip(images, scales, strict=True)):
            if image_scale == 0:
                continue
            heads = call.attention.heads
            branch = attend(call.query, split_heads(to_k(image), heads), split_heads(to_v(image), heads))
            if mask is not None:
                area = IPAdapterMaskProcessor.downsample(mask[:, index], call.batch_size, branch.shape[2], 1)
                branch = branch * area[:, None].to(branch)
            output = output + image_scale * branch
    return output
