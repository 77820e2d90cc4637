"""`load_backbone`: from a preset, a hub id or a local diffusers folder to a `Backbone`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    DiffusionPipeline,
    MotionAdapter,
    UNet2DConditionModel,
    UNet3DConditionModel,
    UNetMotionModel,
)
from safetensors import SafetensorError
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from common.backbones.backbone import Backbone
from common.backbones.inflate import inflate
from common.backbones.presets import PRESETS, VIDEO_EXTENSIONS, VideoExtension
from common.backbones.video import VideoBackbone
from common.io import load_safetensors

UNETS = {
    "StableDiffusionPipeline": UNet2DConditionModel,
    "StableDiffusionXLPipeline": UNet2DConditionModel,
    "TextToVideoSDPipeline": UNet3DConditionModel,
}
TEXT_CLASSES = {"": CLIPTextModel, "_2": CLIPTextModelWithProjection}
WORDS = "words.safetensors"  # beside the layers of an inflated network: word -> (D,)
VOCABULARY_MULTIPLE = 64  # rows of a new embedding table are padded to it


def load_backbone(
    name: str | Path,
    *,
    weights: Literal["pretrained", "random", "meta"] = "pretrained",
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Backbone:
    """Load or build a Stable Diffusion 1.x, 2.x or XL backbone, or a `VideoBackbone`.

    Args:
        name: a preset ("tiny-sd", "sd14", "sd15", "sd21", "sdxl"; for video "tiny-video", "modelscope", "zeroscope",
            "animatediff"), a hub id ("owner/model"), or a diffusers folder.
        weights: "pretrained" reads safetensors. "random" builds the architecture with weights that depend on `seed`
            alone. "meta" builds it on torch's meta device, without memory: for shapes and counts; `device` is ignored.
            The architectures of the sd presets hold no tokenizer, so random and meta ones cannot encode prompts.
        dtype: of all weights, whatever the files hold. float32 is right for training: in half precision a small
            learning rate does not move the weights.
        seed: of the random weights, int.
    Returns: the backbone in eval mode; `freeze()` it if its own weights are not trained.
    Raises: ValueError or FileNotFoundError that says what is missing where, and what to do.
    """
    if weights not in ("pretrained", "random", "meta"):
        raise ValueError(f'weights must be "pretrained", "random" or "meta", got {weights!r}')
    device = "meta" if weights == "meta" else device
    if str(name) in VIDEO_EXTENSIONS:
        extended = extended_backbone(str(name), VIDEO_EXTENSIONS[str(name)], weights, seed)
        return extended.to(device, dtype).eval()
    source = _source(str(name), pretrained=weights == "pretrained")
    with _explained(name, source):
        pipeline = _pipeline_class(source)
        suffixes = ("", "_2") if pipeline == "StableDiffusionXLPipeline" else ("",)
        _check_parts(source, suffixes)
        parts = _tokenizers_and_scheduler(source, suffixes)
        if weights == "pretrained":
            parts |= _pretrained_modules(source, UNETS[pipeline], suffixes, dtype)
        else:
            with torch.random.fork_rng(devices=[]), torch.device("meta" if weights == "meta" else "cpu"):
                torch.manual_seed(seed)
                parts |= _new_modules(source, UNETS[pipeline], suffixes, parts)
    _use_the_real_end_token(parts)
    if UNETS[pipeline] is UNet3DConditionModel:
        num_frames = PRESETS[str(name)].num_frames if str(name) in PRESETS else VideoBackbone.num_frames
        return VideoBackbone(name=str(name), **parts, num_frames=num_frames).to(device, dtype).eval()
    return Backbone(name=str(name), **parts).to(device, dtype).eval()


def extended_backbone(
    name: str, extension: VideoExtension, weights: str = "pretrained", seed: int = 0
) -> VideoBackbone:
    """An image backbone with layers across frames; arguments and errors as for `load_backbone`."""
    base = load_backbone(extension.base, weights=weights, seed=seed)
    if extension.inflated is not None:
        with torch.device(base.device):
            unet = inflate(base.unet, seed=seed)
        if weights == "pretrained":
            load_trained_layers(unet, extension.inflated)
            load_words(base, extension.inflated)
    else:
        with _explained(name, extension.motion_adapter), torch.random.fork_rng(devices=[]), torch.device(base.device):
            torch.manual_seed(seed)
            pretrained = weights == "pretrained"
            adapter = MotionAdapter.from_pretrained(extension.motion_adapter) if pretrained else MotionAdapter()
            unet = UNetMotionModel.from_unet2d(base.unet, adapter)
    return VideoBackbone(
        name=name, unet=unet, vae=base.vae, text_encoder=base.text_encoder, tokenizer=base.tokenizer,
        noise_scheduler=base.noise_scheduler, num_frames=extension.num_frames, noise_share=extension.noise_share,
    )  # fmt: skip


def load_trained_layers(unet: UNet3DConditionModel, folder: Path) -> None:
    """Put the layers of a folder of safetensors into an inflated network.

    Raises: FileNotFoundError if there are none, ValueError if they have no place in it.
    """
    files = sorted(folder.glob("video*.safetensors"))
    if not files:
        raise FileNotFoundError(
            f"there are no trained weights at {folder}: make them with `python -m common.toyworld.pretrain video`, or "
            'use weights="random"'
        )
    trained = {name: tensor for path in files for name, tensor in load_safetensors(path)[0].items()}
    unknown = unet.load_state_dict(trained, strict=False).unexpected_keys
    if unknown:
        raise ValueError(f"{folder} has weights that this network has no place for: {unknown[:3]}")


def load_words(backbone: Backbone, folder: Path) -> None:
    """Put the embeddings of words that were trained with a video network, words.safetensors, into the text encoder.

    Raises: ValueError if a word is not one token.
    """
    table = backbone.text_encoder.get_input_embeddings().weight.data
    for word, embedding in load_safetensors(folder / WORDS)[0].items():
        table[word_id(backbone.tokenizer, word)] = embedding.to(table)


def word_id(tokenizer: CLIPTokenizer, word: str) -> int:
    """The token of a word. Raises: ValueError if it is not one token."""
    ids = tokenizer(word, add_special_tokens=False).input_ids
    if len(ids) != 1:
        raise ValueError(f"{word!r} is not one token but {tokenizer.convert_ids_to_tokens(ids)}")
    return ids[0]


def _source(name: str, *, pretrained: bool) -> str:
    """The folder or hub id to read from."""
    if name in PRESETS:
        source = PRESETS[name].weights if pretrained else PRESETS[name].architecture
        if isinstance(source, Path) and not source.is_dir():
            raise FileNotFoundError(
                f"{name} has no trained weights at {source}: make them with `python -m common.toyworld.pretrain`, "
                'or use weights="random"'
            )
        return str(source)
    if Path(name).is_dir():
        if not (Path(name) / "model_index.json").is_file():
            raise FileNotFoundError(
                f"{name} is not a diffusers model folder: it has no model_index.json (a folder written by "
                "pipe.save_pretrained has one beside unet/, vae/, text_encoder/, tokenizer/, scheduler/)"
            )
        return name
    if Path(name).is_file():
        raise ValueError(
            f"{name} is a single file; convert it with StableDiffusionPipeline.from_single_file(...) and "
            ".save_pretrained(folder), and pass the folder"
        )
    if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name):
        return name
    presets = ", ".join([*PRESETS, *VIDEO_EXTENSIONS])
    raise ValueError(f"{name!r} is no preset ({presets}), no existing folder and no hub id (owner/model)")


@contextmanager
def _explained(name: str | Path, source: str) -> Iterator[None]:
    """Say which backbone could not be read, and the way out."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if Path(source).is_dir():
            raise FileNotFoundError(f"the model folder {source} is incomplete or broken: {error}") from error
        raise FileNotFoundError(
            f"cannot get {name} from the hub as {source!r} (offline? no such model? no access?). Download it elsewhere "
            f"with `hf download {source}` and pass the path of that folder instead of {str(name)!r}. Cause: {error}"
        ) from error


def _pipeline_class(source: str) -> str:
    pipeline = DiffusionPipeline.load_config(source)["_class_name"]
    if pipeline not in UNETS:
        raise ValueError(f"{source} is a {pipeline}; a backbone must be one of {', '.join(UNETS)}")
    return pipeline


def _check_parts(source: str, suffixes: tuple[str, ...]) -> None:
    if not Path(source).is_dir() or any(source == str(preset.architecture) for preset in PRESETS.values()):
        return
    parts = [
        "unet",
        "vae",
        "scheduler",
        *(f"{part}{suffix}" for part in ("text_encoder", "tokenizer") for suffix in suffixes),
    ]
    absent = [f"{part}/" for part in parts if not (Path(source) / part).is_dir()]
    if absent:
        raise FileNotFoundError(f"there is no {', '.join(absent)} in it")


def _tokenizers_and_scheduler(source: str, suffixes: tuple[str, ...]) -> dict[str, object]:
    scheduler_config = DDPMScheduler.load_config(source, subfolder="scheduler")
    # latents are not confined to [-1, 1], and clipping is the default of a config that does not mention it
    parts = {"noise_scheduler": DDPMScheduler.from_config(scheduler_config, clip_sample=False)}
    for part in (f"tokenizer{suffix}" for suffix in suffixes):
        has_none = Path(source).is_dir() and not (Path(source) / part).is_dir()  # an architecture of a preset
        parts[part] = None if has_none else CLIPTokenizer.from_pretrained(source, subfolder=part)
    return parts


def _pretrained_modules(
    source: str, unet_class: type[nn.Module], suffixes: tuple[str, ...], dtype: torch.dtype
) -> dict[str, nn.Module]:
    classes = {"unet": unet_class, "vae": AutoencoderKL}
    classes |= {f"text_encoder{suffix}": TEXT_CLASSES[suffix] for suffix in suffixes}
    modules = {}
    for part, module_class in classes.items():
        modules[part], info = module_class.from_pretrained(
            source, subfolder=part, dtype=dtype, use_safetensors=True, output_loading_info=True
        )
        if info["missing_keys"]:  # they would have random values
            raise ValueError(f"{part} of {source} lacks the weights {sorted(info['missing_keys'])[:5]} ...")
    return modules


def _new_modules(
    source: str, unet_class: type[nn.Module], suffixes: tuple[str, ...], parts: dict[str, object]
) -> dict[str, nn.Module]:
    modules = {
        "unet": unet_class.from_config(unet_class.load_config(source, subfolder="unet")),
        "vae": AutoencoderKL.from_config(AutoencoderKL.load_config(source, subfolder="vae")),
    }
    for suffix in suffixes:
        config = CLIPTextConfig.from_pretrained(source, subfolder=f"text_encoder{suffix}")
        tokenizer = parts[f"tokenizer{suffix}"]
        if tokenizer is not None:  # a new table is as long as the vocabulary beside it needs
            config.vocab_size = -(-len(tokenizer) // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
            config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
            config.pad_token_id = tokenizer.pad_token_id
        modules[f"text_encoder{suffix}"] = TEXT_CLASSES[suffix](config)
    return modules


def _use_the_real_end_token(parts: dict[str, object]) -> None:
    """Let pooled features be read at the end token.

    Old configs say eos_token_id 2, for which transformers takes the largest id of the prompt instead; that is the end
    token only until a token with a larger id, such as a placeholder, is added.
    """
    for part in ("text_encoder", "text_encoder_2"):
        tokenizer = parts.get(part.replace("text_encoder", "tokenizer"))
        if tokenizer is not None:
            text_model = getattr(parts[part], "text_model", parts[part])
            text_model.eos_token_id = text_model.config.eos_token_id = tokenizer.eos_token_id
