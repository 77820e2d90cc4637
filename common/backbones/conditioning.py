"""`Conditioning`: the one object that carries what the denoising network is told."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, fields, replace

import torch
from torch import Tensor

_CONTEXT_FIELDS = ("prompt_embeds", "value_embeds", "layer_prompt_embeds", "layer_value_embeds")


@dataclass(frozen=True, eq=False)
class Conditioning:
    """What the network is told about B samples.

    The plain case is `prompt_embeds` alone. The other context fields refine it: what cross-attention layer i reads at
    timestep t is `for_layer(i, t)`. Layers are numbered in the order in which the UNet's forward pass reaches them.

    prompt_embeds: the context, (B,L,D).
    value_embeds: context of the value projections where it differs from that of the keys, (B,L,D).
    layer_prompt_embeds: one context per cross-attention layer, each (B,L,D).
    layer_value_embeds: one context per cross-attention layer for the values, each (B,L,D).
    stages: (first timestep, contexts) pairs, ascending from timestep 0; each serves the timesteps up to the next pair.
    pooled_prompt_embeds: SDXL, pooled text features, (B,P).
    time_ids: SDXL, (original height, width, crop top, left, target height, width) in pixels, (B,6) int64.
    image_tokens: tokens of the extra cross-attention branches, each (B,N,D); hooks read them as `call.image_contexts`.
    down_block_residuals, mid_block_residual: ControlNet residuals as diffusers returns them, each (B,C,h,w).
    """

    prompt_embeds: Tensor
    _: KW_ONLY
    value_embeds: Tensor | None = None
    layer_prompt_embeds: tuple[Tensor, ...] | None = None
    layer_value_embeds: tuple[Tensor, ...] | None = None
    stages: tuple[tuple[int, Conditioning], ...] | None = None
    pooled_prompt_embeds: Tensor | None = None
    time_ids: Tensor | None = None
    image_tokens: tuple[Tensor, ...] | None = None
    down_block_residuals: tuple[Tensor, ...] | None = None
    mid_block_residual: Tensor | None = None

    def __post_init__(self) -> None:
        if self.prompt_embeds.ndim != 3:
            raise ValueError(f"prompt_embeds must be (B,L,D), got shape {tuple(self.prompt_embeds.shape)}")
        for field in fields(self):
            for tensor in _tensors(getattr(self, field.name)):
                if tensor.ndim == 0 or tensor.shape[0] != self.batch_size:
                    raise ValueError(
                        f"{field.name} has shape {tuple(tensor.shape)} but prompt_embeds has batch {self.batch_size}"
                    )
        self._check_layers()
        self._check_stages()

    def _check_layers(self) -> None:
        lengths = {len(layers) for layers in (self.layer_prompt_embeds, self.layer_value_embeds) if layers is not None}
        if len(lengths) > 1 or 0 in lengths:
            raise ValueError(
                f"layer_prompt_embeds and layer_value_embeds need one entry per layer, got {sorted(lengths)}"
            )
        for layer in range(self.num_layers or 1):
            keys, values = self._contexts(layer)
            if keys.ndim != 3 or values.shape[:2] != keys.shape[:2]:
                raise ValueError(
                    f"keys {tuple(keys.shape)} and values {tuple(values.shape)} of layer {layer} must be (B,L,D) "
                    "with one value for each key"
                )

    def _check_stages(self) -> None:
        if self.stages is None:
            return
        starts = [start for start, _ in self.stages]
        if not starts or starts[0] != 0 or starts != sorted(set(starts)):
            raise ValueError(f"the first timesteps of the stages must ascend from 0, got {starts}")
        for start, stage in self.stages:
            others = [f.name for f in fields(stage) if f.name not in _CONTEXT_FIELDS]
            extra = [name for name in others if getattr(stage, name) is not None]
            if extra:
                raise ValueError(f"stage {start} has {extra}; a stage holds contexts only, give these to the whole")

    @classmethod
    def staged(cls, stages: Mapping[int, Conditioning]) -> Conditioning:
        """One context per denoising stage: {first timestep: conditioning}, starting at timestep 0.

        What is not a context (pooled features, image tokens, residuals) is that of the stage at timestep 0.
        """
        if 0 not in stages:
            raise ValueError(f"the first timesteps of the stages must ascend from 0, got {sorted(stages)}")
        return replace(stages[0], stages=tuple((start, stages[start]._contexts_only()) for start in sorted(stages)))

    @property
    def batch_size(self) -> int:
        """Number of samples, B."""
        return self.prompt_embeds.shape[0]

    @property
    def num_layers(self) -> int | None:
        """Number of cross-attention layers that have their own context; None where all share one."""
        layers = self.layer_prompt_embeds if self.layer_prompt_embeds is not None else self.layer_value_embeds
        return None if layers is None else len(layers)

    @property
    def is_plain(self) -> bool:
        """True where the UNet reads this without hooks: one context for all layers and timesteps, no branches."""
        refined = (self.value_embeds, self.layer_prompt_embeds, self.layer_value_embeds, self.stages, self.image_tokens)
        return all(part is None for part in refined)

    def for_layer(self, layer_index: int, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Contexts of the keys and of the values, each (B,L,D), at one cross-attention layer.

        Args:
            layer_index: 0-based, in the order of the forward pass.
            timesteps: (B,) or a single one, int64; samples of a batch may be in different stages.
        """
        if self.stages is None:
            return self._contexts(layer_index)
        keys, values = self.stages[0][1]._contexts(layer_index)
        for start, stage in self.stages[1:]:
            begun = (timesteps >= start).view(-1, 1, 1)
            stage_keys, stage_values = stage._contexts(layer_index)
            keys, values = torch.where(begun, stage_keys, keys), torch.where(begun, stage_values, values)
        return keys, values

    def _contexts(self, layer_index: int) -> tuple[Tensor, Tensor]:
        if self.num_layers is not None and not 0 <= layer_index < self.num_layers:
            raise ValueError(f"layer_index {layer_index} is outside this conditioning's {self.num_layers} layers")
        keys = self.prompt_embeds if self.layer_prompt_embeds is None else self.layer_prompt_embeds[layer_index]
        if self.layer_value_embeds is not None:
            return keys, self.layer_value_embeds[layer_index]
        return keys, keys if self.value_embeds is None else self.value_embeds

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Conditioning:
        """Move to a device; a dtype applies to floating-point tensors only."""
        return self._map(lambda t: t.to(device=device, dtype=dtype if t.is_floating_point() else None))

    def repeat(self, n: int) -> Conditioning:
        """Each sample n times in place (a a b b), batch n * B."""
        return self._map(lambda tensor: tensor.repeat_interleave(n, dim=0))

    def __getitem__(self, index: int | slice) -> Conditioning:
        """A part of the batch; an int gives batch size 1."""
        if isinstance(index, int):
            if not -self.batch_size <= index < self.batch_size:
                raise IndexError(f"index {index} is outside a conditioning of batch {self.batch_size}")
            index = slice(index % self.batch_size, index % self.batch_size + 1)
        return self._map(lambda tensor: tensor[index])

    @staticmethod
    def cat(conditionings: Sequence[Conditioning]) -> Conditioning:
        """Join along the batch.

        Where one part has contexts per layer, per stage, or apart for values, a part without them is written in the
        same form (the same context everywhere), which changes nothing of what the network reads.
        Raises: ValueError where the parts do not fit, or one has a field (pooled, image tokens, ...) another lacks.
        """
        if not conditionings:
            raise ValueError("Conditioning.cat needs at least one conditioning")
        parts = _same_form(conditionings)
        joined = {f.name: _join(f.name, [getattr(part, f.name) for part in parts]) for f in fields(Conditioning)}
        return Conditioning(**joined)

    def _map(self, transform: Callable[[Tensor], Tensor]) -> Conditioning:
        return replace(self, **{f.name: _map_tensors(getattr(self, f.name), transform) for f in fields(self)})

    def _contexts_only(self) -> Conditioning:
        return Conditioning(**{name: getattr(self, name) for name in _CONTEXT_FIELDS})

    def _stage_at(self, timestep: int) -> Conditioning:
        stages = self.stages or ((0, self._contexts_only()),)
        return [stage for start, stage in stages if start <= timestep][-1]


def _same_form(conditionings: Sequence[Conditioning]) -> list[Conditioning]:
    """The same conditionings, all with the same set of context fields."""
    parts = list(conditionings)
    starts = sorted({start for part in parts for start, _ in part.stages or ()})
    if starts:
        stages = [_same_form([part._stage_at(start) for part in parts]) for start in starts]
        by_part = zip(*stages, strict=True)
        parts = [
            replace(part, stages=tuple(zip(starts, own, strict=True))) for part, own in zip(parts, by_part, strict=True)
        ]
    num_layers = max(part.num_layers or 0 for part in parts)
    split = any(part.value_embeds is not None or part.layer_value_embeds is not None for part in parts)
    if num_layers:
        contexts = [[part._contexts(layer) for layer in range(num_layers)] for part in parts]
        return [
            replace(
                part,
                value_embeds=None,
                layer_prompt_embeds=tuple(keys for keys, _ in own),
                layer_value_embeds=tuple(values for _, values in own) if split else None,
            )
            for part, own in zip(parts, contexts, strict=True)
        ]
    return [replace(part, value_embeds=part._contexts(0)[1]) for part in parts] if split else parts


def _join(name: str, values: list) -> object:
    """One field of several conditionings joined along the batch."""
    if all(value is None for value in values):
        return None
    if any(value is None for value in values):
        raise ValueError(f"cannot join conditionings: some have {name} and some do not")
    first = values[0]
    if isinstance(first, Tensor):
        if len({tuple(value.shape[1:]) for value in values}) > 1:
            raise ValueError(f"cannot join conditionings: {name} has shapes {[tuple(value.shape) for value in values]}")
        return torch.cat(values)
    if isinstance(first, Conditioning):
        return Conditioning.cat(values)
    if isinstance(first, tuple):
        if len({len(value) for value in values}) > 1:
            raise ValueError(f"cannot join conditionings: {name} has {[len(value) for value in values]} entries")
        return tuple(_join(f"{name}[{i}]", list(entry)) for i, entry in enumerate(zip(*values, strict=True)))
    return first  # a stage's first timestep, equal in all parts


def _map_tensors(value: object, transform: Callable[[Tensor], Tensor]) -> object:
    if isinstance(value, Tensor):
        return transform(value)
    if isinstance(value, Conditioning):
        return value._map(transform)
    if isinstance(value, tuple):
        return tuple(_map_tensors(entry, transform) for entry in value)
    return value


def _tensors(value: object) -> list[Tensor]:
    found: list[Tensor] = []
    _map_tensors(value, lambda tensor: found.append(tensor) or tensor)
    return found
