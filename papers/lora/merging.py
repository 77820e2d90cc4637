"""Several adapters in one, and adapters of fully tuned weights. Not in the paper: cloneofsimo/lora and PEFT."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .formats import Factors
from .method import weight_delta

Adapter = Mapping[str, Factors]  # layer name -> pair


def sum_of_deltas(adapters: Sequence[Adapter], weights: Sequence[float]) -> dict[str, Factors]:
    """Exactly sum_i weights_i Delta W_i: A's stacked and B's side by side, so that the ranks add up (PEFT's "cat").

    Ranks, alphas and layers may differ; where an adapter lacks a layer its part is zero. The result has alpha = rank.
    """
    _check(adapters, weights)
    ranks = [len(next(iter(adapter.values())).down) for adapter in adapters]
    result = {}
    for name in dict.fromkeys(name for adapter in adapters for name in adapter):
        like = next(adapter[name] for adapter in adapters if name in adapter)
        downs, ups = [], []
        for adapter, weight, rank in zip(adapters, weights, ranks, strict=True):
            pair = adapter.get(name, _zero_pair(like, rank))
            downs.append(weight * pair.alpha / len(pair.down) * pair.down)
            ups.append(pair.up)
        result[name] = Factors(torch.cat(downs), torch.cat(ups, dim=1), float(sum(map(len, downs))))
    return result


def average_of_factors(adapters: Sequence[Adapter], weights: Sequence[float]) -> dict[str, Factors]:
    """(sum_i w_i B_i) (sum_i w_i A_i): cloneofsimo's `lora_add` in mode "lpl". Not a sum of deltas: it has cross terms
    w_i w_j B_i A_j, and each delta only with weight w_i^2.

    Raises: ValueError unless layers, ranks and alphas agree.
    """
    _check(adapters, weights)
    first = adapters[0]
    for other in adapters[1:]:
        same = other.keys() == first.keys() and all(
            other[name].down.shape == pair.down.shape and other[name].alpha == pair.alpha
            for name, pair in first.items()
        )
        if not same:
            raise ValueError("factors can be averaged only at equal layers, ranks and alphas; use sum_of_deltas")
    return {
        name: Factors(
            sum(w * adapter[name].down for w, adapter in zip(weights, adapters, strict=True)),
            sum(w * adapter[name].up for w, adapter in zip(weights, adapters, strict=True)),
            pair.alpha,
        )
        for name, pair in first.items()
    }


def svd_of_deltas(adapters: Sequence[Adapter], weights: Sequence[float], rank: int) -> dict[str, Factors]:
    """The best approximation of the sum of deltas with a given rank (PEFT's "svd")."""
    return {name: svd_factors(weight_delta(pair), rank) for name, pair in sum_of_deltas(adapters, weights).items()}


def svd_factors(delta: Tensor, rank: int, *, clamp_quantile: float | None = None) -> Factors:
    """Delta W -> B = U_r S_r, A = V_r^T, with alpha = rank.

    Args:
        delta: change of a weight, (out, in) or (out, in, k, k).
        clamp_quantile: in (0, 1]; cut both at this quantile of all their entries, as cloneofsimo's `cli_svd` (0.99).
    Raises: ValueError unless 1 <= rank <= the smaller side.
    """
    matrix = delta.flatten(1).float()
    if not 1 <= rank <= min(matrix.shape):
        raise ValueError(f"rank must be in 1..{min(matrix.shape)} for a weight {tuple(delta.shape)}, got {rank}")
    left, spectrum, right = torch.linalg.svd(matrix, full_matrices=False)
    up, down = left[:, :rank] * spectrum[:rank], right[:rank]
    if clamp_quantile is not None:
        limit = torch.quantile(torch.cat([up.flatten(), down.flatten()]), clamp_quantile)
        up, down = up.clamp(-limit, limit), down.clamp(-limit, limit)
    tail = [1] * (delta.ndim - 2)
    return Factors(down.reshape(rank, *delta.shape[1:]), up.reshape(-1, rank, *tail), float(rank))


def distil(
    tuned: Mapping[str, Tensor], base: Mapping[str, Tensor], rank: int, *, clamp_quantile: float = 0.99
) -> dict[str, Factors]:
    """SVD distillation: an adapter of a fully tuned model, from its weights and those of the base by layer name."""
    return {name: svd_factors(tuned[name] - base[name], rank, clamp_quantile=clamp_quantile) for name in tuned}


def _zero_pair(like: Factors, rank: int) -> Factors:
    down = like.down.new_zeros(rank, *like.down.shape[1:])
    return Factors(down, like.up.new_zeros(len(like.up), rank, *like.up.shape[2:]), float(rank))


def _check(adapters: Sequence[Adapter], weights: Sequence[float]) -> None:
    if not adapters or len(adapters) != len(weights):
        raise ValueError(f"need one weight for each adapter and at least one, got {len(adapters)} and {len(weights)}")
