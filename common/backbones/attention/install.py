"""Put hooks into a UNet, take them out again, and keep both right under gradient checkpointing."""

from collections.abc import Sequence

import torch
from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor,
    AttnProcessor2_0,
    IPAdapterAttnProcessor,
    IPAdapterAttnProcessor2_0,
    SlicedAttnProcessor,
    XFormersAttnProcessor,
)
from torch import Tensor, nn

from common.backbones.attention.layers import LayerInfo, attention_layers
from common.backbones.attention.processor import AttentionHook, HookedAttnProcessor

# Processors whose formula HookedAttnProcessor computes itself.
_KNOWN = (
    AttnProcessor,
    AttnProcessor2_0,
    IPAdapterAttnProcessor,
    IPAdapterAttnProcessor2_0,
    SlicedAttnProcessor,
    XFormersAttnProcessor,
)


class HookHandle:
    """Hooks installed in a UNet; `remove()` or leaving the `with` block puts the earlier processors back."""

    def __init__(self, swapped: list[tuple[Attention, object, HookedAttnProcessor]]) -> None:
        self._swapped = swapped

    @property
    def layers(self) -> list[LayerInfo]:
        return [hooked.layer for _, _, hooked in self._swapped]

    def remove(self) -> None:
        """Restore the very objects that were there before. Removing twice is harmless.

        Raises: RuntimeError if hooks that were installed later are still in place; nothing is changed then.
        """
        for attention, _, hooked in self._swapped:
            if attention.processor is not hooked:
                raise RuntimeError(
                    f"{hooked.layer.name} has got another processor since these hooks were installed: "
                    "remove what was installed later first"
                )
        for attention, before, _ in self._swapped:
            _set_processor(attention, before)
        self._swapped = []

    def __enter__(self) -> "HookHandle":
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()


def install(
    unet: nn.Module, hooks: Sequence[AttentionHook], *, latent_size: int | tuple[int, int] | None = None
) -> HookHandle:
    """Install hooks in the attention layers they apply to; hooks that are already there stay and run first.

    An IP-Adapter's image branch stays active. Its modules are no part of `unet` while hooks are installed: move the
    UNet, list its parameters and save it before or after.

    Args:
        unet: see `attention_layers`.
        hooks: run in this order in every layer.
        latent_size: latent height and width; default the config's `sample_size`. Sets `LayerInfo.resolution`.
    Raises: ValueError for a hook that applies to no layer; TypeError for a processor with a formula of its own;
        RuntimeError if plain gradient checkpointing is on (see `enable_gradient_checkpointing`).
    """
    layers = attention_layers(unet, latent_size)
    for hook in hooks:
        if not any(hook.applies_to(layer.info) for layer in layers):
            raise ValueError(f"{type(hook).__name__} applies to none of the {len(layers)} attention layers")
    swapped = []
    for attention, transformer, info in layers:
        chosen = [hook for hook in hooks if hook.applies_to(info)]
        if chosen:
            _check_checkpointing(transformer)
            swapped.append((attention, attention.processor, _with_hooks(attention.processor, info, chosen)))
    for attention, _, hooked in swapped:  # only now, so that an error above leaves the network as it was
        _set_processor(attention, hooked)
    return HookHandle(swapped)


def _with_hooks(before: object, info: LayerInfo, hooks: list[AttentionHook]) -> HookedAttnProcessor:
    if isinstance(before, HookedAttnProcessor):
        return HookedAttnProcessor(before.base, info, (*before.hooks, *hooks))
    if not isinstance(before, _KNOWN):
        raise TypeError(
            f"hooks would replace the formula of {type(before).__name__} in {info.name}: call "
            "unet.set_attn_processor(AttnProcessor2_0()) first, or write what it does as a hook"
        )
    return HookedAttnProcessor(before, info, hooks)


def _set_processor(attention: Attention, processor: object) -> None:
    attention._modules.pop("processor", None)  # an IP-Adapter's processor is a submodule; ours is a plain object
    attention.processor = processor


def enable_gradient_checkpointing(unet: nn.Module) -> None:
    """Gradient checkpointing that recomputes every block with the hooks of its forward pass.

    The recomputation happens in `backward()`, when a `with conditioned(...)` block has ended. With diffusers' own
    checkpointing it would silently see the bare network and give wrong gradients.
    """
    unet.enable_gradient_checkpointing(_checkpoint_with_processors)


def _checkpoint_with_processors(module: nn.Module, *args: object) -> Tensor:
    forward_processors = [(m, m.processor) for m in module.modules() if isinstance(m, Attention)]

    def run(*inputs: object) -> Tensor:
        now = [(attention, attention.processor) for attention, _ in forward_processors]
        try:
            for attention, processor in forward_processors:
                _set_processor(attention, processor)
            return module(*inputs)
        finally:
            for attention, processor in now:
                _set_processor(attention, processor)

    return torch.utils.checkpoint.checkpoint(run, *args, use_reentrant=False)


def _check_checkpointing(transformer: nn.Module) -> None:
    if getattr(transformer, "gradient_checkpointing", False):
        if transformer._gradient_checkpointing_func is not _checkpoint_with_processors:
            raise RuntimeError(
                "hooks need common.backbones.attention.enable_gradient_checkpointing(unet) instead of "
                "unet.enable_gradient_checkpointing(), whose backward pass would not see them"
            )
