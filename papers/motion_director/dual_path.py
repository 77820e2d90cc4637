"""Dual-path LoRA: where the pairs of the two paths sit, and which of them compute and learn at a time.

A path is a set of pairs: "temporal", and for each clip a spatial one, "spatial_000", ... PEFT computes the layers,
y = W x + strength * U D x with D ~ N(0, 1/r^2), U = 0 and no factor alpha / r. diffusers' UNet3DConditionModel has no
`add_adapter`, so the pairs are injected.
"""

import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers.models.resnet import TemporalConvLayer
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.nn import Parameter

from common.backbones.adapters import export_lora, lora_layers
from common.backbones.inflate import spatial_transformers, temporal_modules
from common.io import load_safetensors
from common.training.seeding import derive_seed

TEMPORAL = "temporal"
FILE = "{}_lora.safetensors"  # one for each path


def spatial_path(number: int) -> str:
    """The path of one clip's appearance."""
    return f"spatial_{number:03d}"


def spatial_layers(unet: nn.Module) -> list[str]:
    """Linear layers of self-attention and feed-forward of the transformers within frames: 96 in ModelScope.

    Not those of attn2, which reads the prompt, nor proj_in and proj_out.
    """
    return _linear_layers(spatial_transformers(unet), {"attn1", "ff"})


def temporal_layers(unet: nn.Module) -> list[str]:
    """Linear layers of both self-attentions and feed-forward of the transformers across frames: 170 in ModelScope.

    The one behind the first convolution, transformer_in, is among them.
    """
    across = {name: module for name, module in temporal_modules(unet).items() if not _is_convolution(module)}
    return _linear_layers(across, {"attn1", "attn2", "ff"})


def _is_convolution(module: nn.Module) -> bool:
    return isinstance(module, TemporalConvLayer)


def _linear_layers(modules: Mapping[str, nn.Module], parts: Collection[str]) -> list[str]:
    return [
        f"{name}.{inner}"
        for name, module in modules.items()
        for inner, layer in module.named_modules()
        if isinstance(layer, nn.Linear) and not set(parts).isdisjoint(inner.split("."))
    ]


class DualPath:
    """The pairs of all paths in a frozen network; outside of `using`, it computes what it did without them.

    Args:
        unet: of a video backbone, frozen.
        rank, dropout: of all pairs.
        num_spatial: spatial paths, in parallel on the same layers.
        temporal: whether there is a temporal path.
        seed: of the values of D.
    Raises: ValueError if the network has pairs already.
    """

    def __init__(
        self, unet: nn.Module, *, rank: int, dropout: float, num_spatial: int, temporal: bool = True, seed: int = 0
    ) -> None:
        if any(isinstance(module, LoraLayer) for module in unet.modules()):
            raise ValueError("this network has LoRA layers already; load a fresh backbone")
        self.unet = unet
        places = {spatial_path(number): spatial_layers(unet) for number in range(num_spatial)}
        places |= {TEMPORAL: temporal_layers(unet)} if temporal else {}
        for path, layers in places.items():
            _inject(unet, path, layers, rank, dropout, derive_seed(seed, path))
        self.paths = tuple(places)
        self._layers = [module for module in unet.modules() if isinstance(module, LoraLayer)]
        self._pairs = {path: _pairs_of(unet, path) for path in self.paths}
        self._switch({}, learning=self.paths)

    def pairs(self, path: str) -> list[tuple[str, Parameter]]:
        """D and U of every layer of a path, with names."""
        return self._pairs[path]

    @contextmanager
    def using(self, strengths: Mapping[str, float], learning: Collection[str] = ()) -> Iterator[None]:
        """Compute with some paths, path -> strength; gradients reach the `learning` ones alone.

        Where something learns, all pairs drop out. What was recorded inside may be differentiated afterwards.
        """
        self._switch(strengths, learning)
        try:
            yield
        finally:
            self._switch({}, learning=self.paths)

    def _switch(self, strengths: Mapping[str, float], learning: Collection[str]) -> None:
        if unknown := (strengths.keys() | set(learning)) - set(self.paths):
            raise ValueError(f"there is no path {sorted(unknown)[0]!r}; this network has {', '.join(self.paths)}")
        for layer in self._layers:
            active = [path for path in strengths if path in layer.lora_A]
            layer.set_adapter(active, inference_mode=True)
            for path in active:
                layer.set_scale(path, strengths[path])
            layer.lora_dropout.train(bool(strengths) and bool(learning))
        for path, pairs in self._pairs.items():
            for _, parameter in pairs:
                parameter.requires_grad_(path in learning)

    def save(self, path: str, folder: Path, header: Mapping[str, str]) -> None:
        """Write PATH_lora.safetensors in the layout of diffusers: "unet.LAYER.lora_A.weight" is D, lora_B is U."""
        export_lora(self.unet, folder / FILE.format(path), adapter_name=path, metadata=dict(header))

    @torch.no_grad()
    def load(self, path: str, file: Path) -> None:
        """Read the pairs of a path. Raises: ValueError naming the file if they are of other layers or shapes."""
        tensors, _ = load_safetensors(file)
        own = {f"unet.{name.removeprefix(f'{path}.')}.weight": pair for name, pair in self.pairs(path)}
        if {key: tensor.shape for key, tensor in tensors.items()} != {key: pair.shape for key, pair in own.items()}:
            raise ValueError(
                f"{file} does not fit: it has {len(tensors)} tensors, the largest {_largest(tensors)}; the path "
                f"{path!r} has {len(own)}, the largest {_largest(own)}. Another rank or backbone?"
            )
        for key, pair in own.items():
            pair.copy_(tensors[key])


def _inject(unet: nn.Module, path: str, layers: list[str], rank: int, dropout: float, seed: int) -> None:
    settings = LoraConfig(
        r=rank, lora_alpha=rank, lora_dropout=dropout, target_modules=layers, init_lora_weights="gaussian"
    )
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several paths are meant
        torch.manual_seed(seed)
        inject_adapter_in_model(settings, unet, adapter_name=path)


def _pairs_of(unet: nn.Module, path: str) -> list[tuple[str, Parameter]]:
    return [
        (f"{path}.{name}.{side}", getattr(layer, side)[path].weight)
        for name, layer in lora_layers(unet, path).items()
        for side in ("lora_A", "lora_B")
    ]


def _largest(tensors: Mapping[str, torch.Tensor]) -> tuple[int, ...]:
    return max((tuple(tensor.shape) for tensor in tensors.values()), default=())
