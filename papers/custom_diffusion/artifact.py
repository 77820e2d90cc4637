"""The files of a trained concept: matrices as diffusers' `load_attn_procs` reads them, or compressed; words; settings.

FOLDER/pytorch_custom_diffusion_weights.safetensors   whole matrices; or, instead of them:
       compressed.safetensors   U S and V^T of their changes
       <new1>.safetensors ...   one word each, for `pipe.load_textual_inversion`
       artifact.json            slug, backbone and settings; written last
"""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from common.io import atomic_save_safetensors, load_safetensors

from .config import CustomDiffusionConfig

WEIGHTS, COMPRESSED, HEADER = "pytorch_custom_diffusion_weights.safetensors", "compressed.safetensors", "artifact.json"
PROCESSOR = ".processor"


def diffusers_state(unet: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Matrices by their names in the U-Net -> the names of diffusers' CustomDiffusionAttnProcessor.

    diffusers wants an entry for each attention layer, and takes an empty tensor for one that is not trained; an output
    matrix goes with its bias.
    """
    state = {}
    for name, weight in weights.items():
        state[diffusers_name(name)] = weight
        if name.endswith("to_out.0.weight"):
            bias = name.replace("weight", "bias")
            state[diffusers_name(bias)] = unet.get_parameter(bias).detach()
    trained = {name.split(PROCESSOR)[0] for name in state}
    others = [name for name in unet.attn_processors if name.removesuffix(PROCESSOR) not in trained]
    return state | {name: torch.zeros(0) for name in others}


def diffusers_name(name: str) -> str:
    """ "a.attn2.to_k.weight" -> "a.attn2.processor.to_k_custom_diffusion.weight"; to_out.0 keeps its number."""
    layer, projection = name.split(".to_")
    head, tail = projection.split(".", 1)
    return f"{layer}{PROCESSOR}.to_{head}_custom_diffusion.{tail}"


def write_changes(
    folder: Path, header: Mapping[str, str], unet: nn.Module, values: Mapping[str, Tensor | tuple[Tensor, Tensor]]
) -> None:
    """Write whole matrices, or pairs (U S, V^T) of compressed changes; a file of the other kind is removed."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / HEADER).unlink(missing_ok=True)
    if all(isinstance(value, Tensor) for value in values.values()):
        tensors, path, other = diffusers_state(unet, values), folder / WEIGHTS, folder / COMPRESSED
    else:
        tensors = {f"{name}.{k}": part for name, pair in values.items() for k, part in zip("uv", pair, strict=True)}
        path, other = folder / COMPRESSED, folder / WEIGHTS
    atomic_save_safetensors(tensors, path, {**header, "format": "pt"})
    other.unlink(missing_ok=True)


def read_changes(folder: Path, shapes: Mapping[str, torch.Size]) -> dict[str, Tensor | tuple[Tensor, Tensor]]:
    """What `write_changes` wrote, for matrices of these names. Raises: ValueError naming the file if one differs."""
    path = folder / COMPRESSED if (folder / COMPRESSED).is_file() else folder / WEIGHTS
    tensors, _ = load_safetensors(path)
    found: dict[str, Tensor | tuple[Tensor, Tensor]] = {}
    for name, shape in shapes.items():
        if path.name == WEIGHTS:
            value = found[name] = tensors.get(diffusers_name(name))
            size = None if value is None else tuple(value.shape)
        else:
            up, down = (tensors.get(f"{name}.{k}") for k in "uv")
            found[name] = (up, down)
            size = None if up is None or down is None else (len(up), down.shape[1])
        if size != tuple(shape):
            raise ValueError(
                f"{path} has {size} for {name}, but {tuple(shape)} is needed: it was trained on another backbone, or "
                "with another setting of `trained`"
            )
    return found


def read_rows(path: Path) -> list[Tensor]:
    """The vectors of a word, (1,D), one per text encoder."""
    tensors, _ = load_safetensors(path)
    return [tensors[key] for key in (("clip_l", "clip_g") if "clip_l" in tensors else tensors)]


def read_header(folder: str | Path) -> tuple[CustomDiffusionConfig, dict[str, object]]:
    """The settings of an artifact, and the whole of artifact.json."""
    path = Path(folder) / HEADER
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path}: this is no trained folder, or it was not written to its end")
    header = json.loads(path.read_text(encoding="utf-8"))
    config = {name: tuple(value) if isinstance(value, list) else value for name, value in header["config"].items()}
    return CustomDiffusionConfig(**config), header
