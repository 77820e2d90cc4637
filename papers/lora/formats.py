"""LoRA files: the layout of diffusers and PEFT, and that of kohya's sd-scripts, as pairs by layer name.

A layer's name is network and module: "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q".
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from torch import Tensor

from common.io import atomic_save_safetensors, load_safetensors


class Factors(NamedTuple):
    """The pair of one layer; Delta W = alpha / r * up @ down."""

    down: Tensor  # A, (r, in) or (r, in, k, k)
    up: Tensor  # B, (out, r) or (out, r, 1, 1)
    alpha: float


def read_diffusers(path: str | Path) -> dict[str, Factors]:
    """Read a file in the layout of diffusers: NAME.lora_A.weight, NAME.lora_B.weight, alpha in the header.

    Raises: ValueError naming the file if it holds something else.
    """
    tensors, header = load_safetensors(path)
    settings = json.loads(header.get(LORA_ADAPTER_METADATA_KEY, "{}"))
    downs = {key.removesuffix(".lora_A.weight"): tensor for key, tensor in tensors.items() if ".lora_A." in key}
    strange = sorted(tensors.keys() - {f"{name}.lora_{side}.weight" for name in downs for side in "AB"})
    if strange or 2 * len(downs) != len(tensors) or not downs:
        raise ValueError(
            f"{path} is no LoRA in the layout of diffusers (for example {(strange or sorted(tensors))[:2]})"
        )
    return {
        name.replace("text_encoder.text_model.", "text_encoder."): Factors(
            down,
            tensors[f"{name}.lora_B.weight"],
            float(settings.get(f"{name.partition('.')[0]}.lora_alpha", len(down))),
        )
        for name, down in downs.items()
    }


def kohya_name(name: str) -> str:
    """ "unet.mid_block.attentions.0.proj_in" -> "lora_unet_mid_block_attentions_0_proj_in"; of a text encoder:
    "lora_te_text_model_..."."""
    network, _, module = name.partition(".")
    prefixes = {"unet": "lora_unet_", "text_encoder": "lora_te_text_model_"}
    if network not in prefixes:
        raise ValueError(f"a layer is in one of {list(prefixes)}, got {name!r}")
    return prefixes[network] + module.replace(".", "_")


def write_kohya(factors: Mapping[str, Factors], path: str | Path) -> None:
    """Write the layout of sd-scripts: NAME.lora_down.weight, NAME.lora_up.weight, NAME.alpha, which is read by
    `pipe.load_lora_weights` and by the usual graphical programs."""
    tensors: dict[str, Tensor] = {}
    for name, pair in factors.items():
        key = kohya_name(name)
        tensors[f"{key}.lora_down.weight"] = pair.down
        tensors[f"{key}.lora_up.weight"] = pair.up
        tensors[f"{key}.alpha"] = torch.tensor(float(pair.alpha))
    ranks, alphas = {len(pair.down) for pair in factors.values()}, {pair.alpha for pair in factors.values()}
    header = {"ss_network_module": "networks.lora"}
    if len(ranks) == len(alphas) == 1:
        header |= {"ss_network_dim": str(ranks.pop()), "ss_network_alpha": str(alphas.pop())}
    atomic_save_safetensors(tensors, path, header)


def read_kohya(path: str | Path, names: Iterable[str]) -> dict[str, Factors]:
    """Read the layout of sd-scripts. A missing alpha means alpha = r, as sd-scripts reads it.

    Args: names: of the layers that may have pairs, as in `LoRA.factors()`: the file's underscores do not tell where
        a module's name ends.
    Raises: ValueError naming the file and the first layers that are not among the names.
    """
    tensors, _ = load_safetensors(path)
    known = {kohya_name(name): name for name in names}
    factors = {}
    for key in {key.partition(".")[0] for key in tensors} & known.keys():
        down, up = (tensors.pop(f"{key}.lora_{side}.weight", None) for side in ("down", "up"))
        if down is None or up is None:
            raise ValueError(f"{path} lacks one half of the pair {key}")
        alpha = tensors.pop(f"{key}.alpha", None)
        factors[known[key]] = Factors(down, up, float(len(down) if alpha is None else alpha))
    if tensors or not factors:
        raise ValueError(f"{path} has pairs of layers that are not adapted here: {sorted(tensors)[:2]}")
    return factors
