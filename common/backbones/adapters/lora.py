"""LoRA on a diffusers UNet through PEFT: add, set the strength, write a file that every pipeline reads."""

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from torch import nn

ATTENTION_PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")


def add_lora(
    unet: nn.Module,
    rank: int,
    *,
    alpha: float | None = None,
    target_modules: Sequence[str] = ATTENTION_PROJECTIONS,
    seed: int = 0,
    adapter_name: str = "default",
) -> list[nn.Parameter]:
    """Add trainable pairs with delta W = alpha / rank * B A to the projections; the output does not change (B = 0).

    Args:
        unet: frozen UNet; with the default projections SD 1.x gets 199,296 * rank parameters.
        rank: >= 1.
        alpha: default `rank`, a scale of 1.
        target_modules: endings of module names.
        seed: of A's initial values (Kaiming uniform, PEFT's default); the global random state is left alone.
    Returns: the new parameters, for the optimiser.
    """
    config = LoraConfig(r=rank, lora_alpha=rank if alpha is None else alpha, target_modules=list(target_modules))
    before = {id(parameter) for parameter in unet.parameters()}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet.add_adapter(config, adapter_name=adapter_name)
    return [parameter for parameter in unet.parameters() if id(parameter) not in before]


def set_lora_strength(unet: nn.Module, strength: float, *, adapter_name: str = "default") -> None:
    """Use one LoRA with strength * delta W, 1 = as trained; 0 gives the base output bit for bit."""
    unet.set_adapters([adapter_name], weights=[float(strength)])


def export_lora(unet: nn.Module, path: str | Path, *, adapter_name: str = "default") -> Path:
    """Write the LoRA as a safetensors file for `pipe.load_lora_weights(path)`, replacing an old file at once.

    Rank, alpha and target modules travel in the header, so that an alpha other than the rank is not lost.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"a LoRA file ends in .safetensors, got {path}")
    path.parent.mkdir(parents=True, exist_ok=True)
    state = convert_state_dict_to_diffusers(get_peft_model_state_dict(unet, adapter_name=adapter_name))
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        StableDiffusionPipeline.save_lora_weights(
            folder,
            unet_lora_layers=state,
            unet_lora_adapter_metadata=unet.peft_config[adapter_name].to_dict(),
            weight_name=path.name,
        )
        os.replace(Path(folder) / path.name, path)
    return path
