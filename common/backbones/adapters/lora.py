"""LoRA on diffusers and transformers networks through PEFT: add, set the strength, merge, write for every pipeline."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from diffusers.utils.peft_utils import set_weights_and_activate_adapters
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn

from common.io import atomic_save_safetensors

ATTENTION_PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")


def add_lora(
    network: nn.Module,
    rank: int,
    *,
    alpha: float | None = None,
    target_modules: Sequence[str] = ATTENTION_PROJECTIONS,
    init: Literal["kaiming", "gaussian"] = "kaiming",
    seed: int = 0,
    adapter_name: str = "default",
) -> list[nn.Parameter]:
    """Add trainable pairs with delta W = alpha / rank * B A to linear layers and convolutions; B = 0 changes nothing.

    Args:
        network: frozen UNet or text encoder; with the default projections SD 1.x gets 199,296 * rank parameters.
        rank: >= 1.
        alpha: default `rank`, a scale of 1.
        target_modules: endings of module names.
        init: of A: "kaiming" is uniform in +-1 / sqrt(inputs), PEFT's default; "gaussian" is N(0, (1 / rank)^2).
        seed: of A's values; the global random state is left alone.
    Returns: the new parameters, for the optimiser.
    """
    config = LoraConfig(
        r=rank,
        lora_alpha=rank if alpha is None else alpha,
        target_modules=list(target_modules),
        init_lora_weights="gaussian" if init == "gaussian" else True,
    )
    before = {id(parameter) for parameter in network.parameters()}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network.add_adapter(config, adapter_name=adapter_name)
    return [parameter for parameter in network.parameters() if id(parameter) not in before]


def lora_layers(network: nn.Module, adapter_name: str = "default") -> dict[str, LoraLayer]:
    """PEFT's layers that hold pairs of this adapter, by the name that the layer has in the network without them."""
    return {
        name: module
        for name, module in network.named_modules()
        if isinstance(module, LoraLayer) and adapter_name in module.lora_A
    }


def set_lora_strength(network: nn.Module, strength: float, *, adapter_name: str = "default") -> None:
    """Use one LoRA with strength * delta W, 1 = as trained; 0 gives the base output bit for bit."""
    set_weights_and_activate_adapters(network, [adapter_name], [float(strength)])


@torch.no_grad()
def merge_lora(network: nn.Module, *, adapter_name: str = "default") -> dict[str, Tensor]:
    """Write W + strength * delta W into the weights and compute without the pairs.

    Returns: the weights of before, for `unmerge_lora`.
    Raises: RuntimeError if a layer is merged already.
    """
    layers = lora_layers(network, adapter_name)
    if any(layer.merged for layer in layers.values()):
        raise RuntimeError(f"the LoRA {adapter_name!r} is merged already: unmerge_lora(network, originals) first")
    originals = {name: layer.get_base_layer().weight.detach().clone() for name, layer in layers.items()}
    for layer in layers.values():
        layer.merge(adapter_names=[adapter_name])
    return originals


@torch.no_grad()
def unmerge_lora(network: nn.Module, originals: dict[str, Tensor]) -> None:
    """Put the weights of before `merge_lora` back, exactly: PEFT's own unmerge subtracts, which rounds."""
    for name, original in originals.items():
        layer = network.get_submodule(name)
        layer.unmerge()
        layer.get_base_layer().weight.copy_(original)


def export_lora(
    unet: nn.Module,
    path: str | Path,
    *,
    text_encoder: nn.Module | None = None,
    metadata: dict[str, str] | None = None,
    adapter_name: str = "default",
) -> Path:
    """Write the LoRA as a safetensors file for `pipe.load_lora_weights(path)`, replacing an old file at once.

    Rank, alpha and target modules travel in the header, so that an alpha other than the rank is not lost.

    Args:
        text_encoder: of SD 1.x or 2.x, if it has pairs too.
        metadata: more strings for the header.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"a LoRA file ends in .safetensors, got {path}")
    tensors, settings = {}, {}
    for prefix, network in (("unet", unet), ("text_encoder", text_encoder)):
        if network is None:
            continue
        # transformers 5 has no inner `text_model`; files keep it, and diffusers reads them with both
        inner = "text_model." if prefix == "text_encoder" and not hasattr(network, "text_model") else ""
        state = get_peft_model_state_dict(network, adapter_name=adapter_name, save_embedding_layers=False)
        tensors |= {f"{prefix}.{inner}{key}": value for key, value in state.items()}
        config = network.peft_config[adapter_name]
        settings |= {
            f"{prefix}.r": config.r,
            f"{prefix}.lora_alpha": config.lora_alpha,
            f"{prefix}.target_modules": sorted(config.target_modules),
        }
    header = {"format": "pt", **(metadata or {}), LORA_ADAPTER_METADATA_KEY: json.dumps(settings)}
    atomic_save_safetensors(tensors, path, header)
    return path
