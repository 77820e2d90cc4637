"""Attention layers of a diffusers UNet with hooks: `install`, `conditioned`; ready hooks are in attention_hooks.py."""

from common.backbones.attention.context import ChooseContext, conditioned
from common.backbones.attention.install import HookHandle, enable_gradient_checkpointing, install
from common.backbones.attention.layers import LayerInfo, attention_layers
from common.backbones.attention.processor import (
    AttentionCall,
    AttentionHook,
    HookedAttnProcessor,
    Projections,
    attend,
    attention_probabilities,
    split_heads,
)

__all__ = [
    "AttentionCall",
    "AttentionHook",
    "ChooseContext",
    "HookHandle",
    "HookedAttnProcessor",
    "LayerInfo",
    "Projections",
    "attend",
    "attention_layers",
    "attention_probabilities",
    "conditioned",
    "enable_gradient_checkpointing",
    "install",
    "split_heads",
]
