"""From an image UNet to a video UNet: diffusers' UNet3DConditionModel around the weights of a UNet2DConditionModel.

The new temporal layers start as the identity, so an inflated network treats every frame as the image network does.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from diffusers import UNet2DConditionModel, UNet3DConditionModel
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import TemporalConvLayer
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.transformers.transformer_temporal import TransformerTemporalModel
from diffusers.models.unets.unet_motion_model import AnimateDiffTransformer3D
from torch import Tensor, nn

TEMPORAL_CLASSES = (TemporalConvLayer, TransformerTemporalModel, AnimateDiffTransformer3D)
TEMPORAL_HEAD_SIZE = 16  # of a new network's temporal attention


def inflate(unet: UNet2DConditionModel, *, seed: int = 0) -> UNet3DConditionModel:
    """A video UNet with an image UNet's weights in its spatial layers, copied.

    Args:
        unet: of SD 1.x or 2.x layout.
        seed: of the new temporal layers. Their last projections are zero, so the seed shows after training only.
    Returns: a UNet3DConditionModel whose spatial attention has as many heads as the image network's at each level,
        which its config cannot say: build it here, not from the config.
    Raises: ValueError if the image network has parts that the video network lacks.
    """
    config = unet.config
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        video = UNet3DConditionModel(
            sample_size=config.sample_size,
            in_channels=config.in_channels,
            out_channels=config.out_channels,
            down_block_types=tuple(name.replace("2D", "3D") for name in config.down_block_types),
            up_block_types=tuple(name.replace("2D", "3D") for name in config.up_block_types),
            block_out_channels=config.block_out_channels,
            layers_per_block=config.layers_per_block,
            norm_eps=config.norm_eps,
            norm_num_groups=config.norm_num_groups,
            cross_attention_dim=config.cross_attention_dim,
            attention_head_dim=TEMPORAL_HEAD_SIZE,
        )
    own = video.state_dict()
    spatial = {name: _as_linear(value, own.get(name)) for name, value in unet.state_dict().items()}
    missing, unknown = video.load_state_dict(spatial, strict=False)
    temporal = {name for name in own if any(name.startswith(f"{prefix}.") for prefix in temporal_modules(video))}
    if unknown or set(missing) != temporal:
        raise ValueError(
            f"this UNet cannot be inflated: {sorted(unknown)[:3]} have no place, {sorted(set(missing) ^ temporal)[:3]} "
            "have no source; only the layout of Stable Diffusion 1.x and 2.x fits"
        )
    for module in temporal_modules(video).values():
        if isinstance(module, TransformerTemporalModel):
            nn.init.zeros_(module.proj_out.weight)
            nn.init.zeros_(module.proj_out.bias)
    heads = {name: module.heads for name, module in unet.named_modules() if isinstance(module, Attention)}
    for name, module in video.named_modules():
        if name in heads:
            module.heads = heads[name]
            module.scale = (module.inner_dim // module.heads) ** -0.5
    nn.Module.to(video, unet.device, unet.dtype)  # diffusers' own `to` warns at every cast, without cause
    return video.train(unet.training)


def _as_linear(value: Tensor, target: Tensor | None) -> Tensor:
    """A 1x1 convolution (O,I,1,1) as the linear layer (O,I) that takes its place."""
    return value[:, :, 0, 0] if target is not None and value.ndim == 4 and target.ndim == 2 else value


def temporal_modules(unet: nn.Module) -> dict[str, nn.Module]:
    """The layers of a video UNet that look across frames, by name."""
    return {name: module for name, module in unet.named_modules() if isinstance(module, TEMPORAL_CLASSES)}


def spatial_transformers(unet: nn.Module) -> dict[str, Transformer2DModel]:
    """The layers of a video UNet that attend within a frame and to the prompt, by name."""
    return {name: module for name, module in unet.named_modules() if isinstance(module, Transformer2DModel)}


@contextmanager
def without_temporal_layers(unet: nn.Module) -> Iterator[None]:
    """Every frame by itself: the temporal layers pass on what they get. For single frames."""
    modules = list(temporal_modules(unet).values())
    for module in modules:
        module.forward = _pass_on_pair if isinstance(module, TransformerTemporalModel) else _pass_on
    try:
        yield
    finally:
        for module in modules:
            del module.forward


def _pass_on(hidden_states: Tensor, *args: object, **options: object) -> Tensor:
    return hidden_states


def _pass_on_pair(hidden_states: Tensor, *args: object, **options: object) -> tuple[Tensor]:
    return (hidden_states,)
