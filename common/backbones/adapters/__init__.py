"""Trainable residuals on frozen weights, for what PEFT does not have, and helpers around PEFT's LoRA.

    residuals = {"mid_block...attn2.to_k.weight": SpectralShift(weight), ...}
    with attach(residuals, unet) as attached:
        ...                              # every layer computes with weight + strength * delta
        attached.set_strength(0.5)
        attached.merge()                 # write the sum into the weights; unmerge() restores them exactly

Attaching replaces `forward` of the layer objects, so the network's state_dict keys and values stay what they were.
"""

from common.backbones.adapters.attach import AttachedResiduals, attach
from common.backbones.adapters.lora import (
    ATTENTION_PROJECTIONS,
    add_lora,
    export_lora,
    lora_layers,
    merge_lora,
    set_lora_strength,
    unmerge_lora,
)
from common.backbones.adapters.residuals import DenseDelta, LowRank, SpectralShift, WeightResidual

__all__ = [
    "ATTENTION_PROJECTIONS",
    "AttachedResiduals",
    "DenseDelta",
    "LowRank",
    "SpectralShift",
    "WeightResidual",
    "add_lora",
    "attach",
    "export_lora",
    "lora_layers",
    "merge_lora",
    "set_lora_strength",
    "unmerge_lora",
]
