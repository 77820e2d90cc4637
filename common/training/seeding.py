"""Randomness that belongs to a sample, not to a process.

Every sample of a run has a key: `step * global_batch_size + position`. What is drawn for a sample is a pure function of
(seed, stream, key), so a run gives the same numbers whatever the batch is split into, however many processes share it,
and wherever it was resumed. A stream is a name ("noise", "timesteps", "dropout", ...): two streams never share numbers.
"""

import random
from hashlib import blake2b

import numpy as np
import torch
from torch import Tensor


def derive_seed(seed: int, stream: str, *keys: int) -> int:
    """Hash (seed, stream, keys) to a seed in [0, 2**63)."""
    text = f"{seed}/{stream}/{'/'.join(str(key) for key in keys)}"
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def seeded_generator(seed: int, stream: str, *keys: int) -> torch.Generator:
    """A CPU generator of its own for (seed, stream, keys)."""
    return torch.Generator().manual_seed(derive_seed(seed, stream, *keys))


def keys_of_step(step: int, global_batch_size: int) -> Tensor:
    """Keys of all samples of one optimiser step (counted from 0), (global_batch_size,) int64 on the CPU."""
    return torch.arange(step * global_batch_size, (step + 1) * global_batch_size)


def seeded_randn(sample_keys: Tensor, shape: tuple[int, ...], *, seed: int, stream: str = "noise") -> Tensor:
    """Standard normal numbers, (B, *shape) float32 on the CPU; row i depends on sample_keys[i] only.

    Args:
        sample_keys: (B,) int64.
        shape: of one sample, for latents (4, h, w).
    """
    return torch.stack([torch.randn(shape, generator=seeded_generator(seed, stream, k)) for k in sample_keys.tolist()])


def seeded_uniform(sample_keys: Tensor, shape: tuple[int, ...] = (), *, seed: int, stream: str = "uniform") -> Tensor:
    """Uniform numbers in [0, 1), (B, *shape) float32 on the CPU; row i depends on sample_keys[i] only."""
    return torch.stack([torch.rand(shape, generator=seeded_generator(seed, stream, k)) for k in sample_keys.tolist()])


def seeded_integers(sample_keys: Tensor, low: int, high: int, *, seed: int, stream: str = "integers") -> Tensor:
    """Whole numbers low <= n < high, uniform, (B,) int64 on the CPU; entry i depends on sample_keys[i] only."""
    if high <= low:
        raise ValueError(f"need low < high, got low={low}, high={high}")
    draws = [torch.randint(low, high, (), generator=seeded_generator(seed, stream, k)) for k in sample_keys.tolist()]
    return torch.stack(draws)


def seeded_timesteps(sample_keys: Tensor, *, seed: int, low: int = 0, high: int = 1000) -> Tensor:
    """Diffusion timesteps low <= t < high, uniform, (B,) int64 on the CPU."""
    return seeded_integers(sample_keys, low, high, seed=seed, stream="timesteps")


def seed_global_generators(seed: int, *keys: int) -> None:
    """Seed Python, NumPy and torch (all devices) from (seed, keys).

    The training loop calls this before each step with (step, process), so that code that draws from global generators
    (dropout layers, third-party augmentation) also resumes exactly, and pictures sampled between steps change nothing.
    """
    value = derive_seed(seed, "global", *keys)
    random.seed(value)
    np.random.seed(value % 2**32)
    torch.manual_seed(value)
