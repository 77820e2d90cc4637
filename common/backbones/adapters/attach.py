"""Compute layers with weight + strength * delta, without touching the weights until they are merged."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.backbones.adapters.residuals import WeightResidual

_LAYERS = nn.Linear | nn.Conv2d | nn.GroupNorm | nn.LayerNorm | nn.Embedding
_LAYER_NAMES = "Linear, Conv2d, GroupNorm, LayerNorm and Embedding"


def apply_weight(layer: nn.Module, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """What `layer` computes with another weight and bias; without bias it is linear in the weight."""
    match layer:
        case nn.Linear():
            return F.linear(inputs, weight, bias)
        case nn.Conv2d():
            return layer._conv_forward(inputs, weight, bias)
        case nn.GroupNorm():
            return F.group_norm(inputs, layer.num_groups, weight, bias, layer.eps)
        case nn.LayerNorm():
            return F.layer_norm(inputs, layer.normalized_shape, weight, bias, layer.eps)
        case nn.Embedding():
            return F.embedding(inputs, weight)
    raise TypeError(f"weight residuals work on {_LAYER_NAMES}, got {type(layer).__name__}")


class _ResidualForward:
    """Stands in for `layer.forward`: the frozen weight plus every attached residual, in the order of attachment."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer
        self.residuals: list[WeightResidual] = []
        self.merged_original: Tensor | None = None  # the frozen weight while a sum is written into the layer

    def __call__(self, inputs: Tensor) -> Tensor:
        layer = self.layer
        active = [] if self.merged_original is not None else [r for r in self.residuals if not _is_zero(r.strength)]
        if not active:
            return type(layer).forward(layer, inputs)
        changes = [(residual, residual.output_change(layer, inputs)) for residual in active]
        rebuilt = [residual for residual, change in changes if change is None]
        output = apply_weight(layer, inputs, self.weight(rebuilt), getattr(layer, "bias", None))
        for residual, change in changes:
            if change is not None or _is_per_sample(residual.strength):
                output = output + self._scaled(residual, inputs, change)
        return output

    def weight(self, residuals: list[WeightResidual]) -> Tensor:
        """Frozen weight plus the residuals that have one strength for the whole batch."""
        weight = frozen = self.layer.weight
        for residual in residuals:
            if not _is_per_sample(residual.strength):
                weight = weight + residual.strength * residual.delta(frozen)
        return weight.to(frozen.dtype)

    def _scaled(self, residual: WeightResidual, inputs: Tensor, change: Tensor | None) -> Tensor:
        """strength * what the residual adds to the output; `change` is that at strength 1, if it is known."""
        strength = residual.strength
        if _is_per_sample(strength) and len(strength) != len(inputs):
            raise ValueError(
                f"strength has {len(strength)} values, but a layer got {len(inputs)} rows: give one for each row, "
                "both halves of a guidance batch and every frame included"
            )
        if change is None:
            weight = self.layer.weight
            change = apply_weight(self.layer, inputs, residual.delta(weight).to(weight.dtype), None)
        if _is_per_sample(strength):
            strength = strength.to(change).reshape(-1, *[1] * (change.ndim - 1))
        return strength * change


def _is_per_sample(strength: float | Tensor) -> bool:
    return isinstance(strength, Tensor) and strength.ndim == 1


def _is_zero(strength: float | Tensor) -> bool:
    return not isinstance(strength, Tensor) and strength == 0  # tensors are not read: that would stall a GPU


class AttachedResiduals:
    """Residuals working in a network; `detach()` or leaving the `with` block restores the network bit for bit."""

    def __init__(self, patched: list[tuple[_ResidualForward, WeightResidual]]) -> None:
        self._patched = patched
        self._merged = False

    def set_strength(self, strength: float | Tensor) -> None:
        """Set all strengths: one number, or (B,) values, one for each row of the batch."""
        if self._merged:
            raise RuntimeError("the residuals are merged into the weights: unmerge() before changing their strength")
        for _, residual in self._patched:
            residual.strength = strength

    @torch.no_grad()
    def merge(self) -> None:
        """Write weight + strength * delta into the weights and compute without the residuals.

        Raises: RuntimeError if a weight is merged already or holds residuals of another `attach`; ValueError for
            strengths per sample.
        """
        ours = {id(residual) for _, residual in self._patched}
        for forward, residual in self._patched:
            if forward.merged_original is not None or any(id(other) not in ours for other in forward.residuals):
                raise RuntimeError(
                    "a weight is merged already or holds residuals attached elsewhere: detach those first"
                )
            if _is_per_sample(residual.strength):
                raise ValueError("one weight cannot hold a strength per sample: set_strength(number) before merge()")
        for forward, _ in self._patched:
            merged = forward.weight([r for r in forward.residuals if not _is_zero(r.strength)])
            forward.merged_original = forward.layer.weight.detach().clone()
            forward.layer.weight.copy_(merged)
        self._merged = True

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put the kept original weights back, exactly; harmless when nothing is merged."""
        for forward, _ in self._patched if self._merged else []:
            forward.layer.weight.copy_(forward.merged_original)
            forward.merged_original = None
        self._merged = False

    def detach(self) -> None:
        """Unmerge and take these residuals out of the network; those of other `attach` calls stay."""
        self.unmerge()
        for forward, residual in self._patched:
            forward.residuals.remove(residual)
            if not forward.residuals:
                del forward.layer.forward  # the class's own forward shows again
        self._patched = []

    def __enter__(self) -> "AttachedResiduals":
        return self

    def __exit__(self, *exception: object) -> None:
        self.detach()


def attach(residuals: Mapping[str, WeightResidual], module: nn.Module) -> AttachedResiduals:
    """Let weights of `module` act as weight + strength * delta; several residuals on one weight add up.

    Args:
        residuals: parameter name inside `module`, ending in ".weight" -> residual.
        module: UNet, text encoder, ...; its weights are not changed and keep their requires_grad.
    Raises: KeyError for an unknown name; TypeError for a layer of another kind; ValueError for a delta of another
        shape; RuntimeError if something else has replaced the layer's forward.
    """
    targets, names = [], {name for name, _ in module.named_parameters()}
    for name, residual in residuals.items():
        if name not in names or not name.endswith(".weight"):
            raise KeyError(f"{name} is no weight of {type(module).__name__}: use names of named_parameters()")
        layer = _layer_of(module, name)
        with torch.no_grad():
            shape = residual.delta(layer.weight).shape
        if shape != layer.weight.shape:
            raise ValueError(f"{name} has shape {tuple(layer.weight.shape)}, its residual {tuple(shape)}")
        targets.append((layer, residual))
    patched = []
    for layer, residual in targets:  # only now, so that an error above leaves the network as it was
        if "forward" not in vars(layer):
            layer.forward = _ResidualForward(layer)
        layer.forward.residuals.append(residual)
        patched.append((layer.forward, residual))
    return AttachedResiduals(patched)


def _layer_of(module: nn.Module, name: str) -> nn.Module:
    path = name.removesuffix(".weight")
    layer = module.get_submodule(path)
    if not isinstance(layer, _LAYERS):
        raise TypeError(f"{name} belongs to {type(layer).__name__}; {_LAYER_NAMES} are supported")
    if not isinstance(vars(layer).get("forward"), _ResidualForward | None):
        raise RuntimeError(f"the forward of {path} has been replaced by something else: attach residuals first")
    return layer
