"""Which sample is seen when: a pure function of (seed, sample key), so that a resumed run sees what it would have seen.

The samples of a run are one endless sequence of shuffled epochs. Sample key k (see `seeding`) is its k-th element.
A dataset is anything with `__len__` and `__getitem__`; one that draws at random (a flip, a crop, a latent from its
posterior) offers `sample(index, sample_key)` instead and draws from the key. It may offer `collate(items)`.
"""

import signal
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from common.training.seeding import keys_of_step, seeded_generator


@lru_cache(maxsize=4)
def _epoch_order(dataset_length: int, seed: int, epoch: int) -> list[int]:
    return torch.randperm(dataset_length, generator=seeded_generator(seed, "data order", epoch)).tolist()


def dataset_index(sample_key: int, dataset_length: int, *, seed: int) -> int:
    """The dataset item that sample `sample_key` of a run shows; each epoch shows every item once, in its own order."""
    epoch, position = divmod(sample_key, dataset_length)
    return _epoch_order(dataset_length, seed, epoch)[position]


class StepSampler(Sampler):
    """Yields micro-batches, each a list of (dataset index, sample key), for one process.

    Step s holds the keys s * batch_size ... (s + 1) * batch_size - 1. They are cut into contiguous micro-batches, dealt
    to the processes in turn, so that together they make up the step whatever the number of processes.
    """

    def __init__(
        self,
        dataset_length: int,
        *,
        seed: int,
        first_step: int,
        last_step: int,
        batch_size: int,
        micro_batch_size: int,
        process_index: int,
        num_processes: int,
    ):
        self.dataset_length, self.seed = dataset_length, seed
        self.steps = range(first_step, last_step)
        self.batch_size, self.micro_batch_size = batch_size, micro_batch_size
        self.offsets = range(process_index * micro_batch_size, batch_size, num_processes * micro_batch_size)

    def __len__(self) -> int:
        return len(self.steps) * len(self.offsets)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step in self.steps:
            keys = keys_of_step(step, self.batch_size).tolist()
            for offset in self.offsets:
                micro_batch = keys[offset : offset + self.micro_batch_size]
                yield [(dataset_index(key, self.dataset_length, seed=self.seed), key) for key in micro_batch]


def micro_batches(dataset: Dataset, sampler: StepSampler, *, num_workers: int = 0) -> DataLoader:
    """A loader of collated micro-batches with "sample_keys" (B,) int64; starts at the sampler's first step at once."""
    return DataLoader(
        _Keyed(dataset),
        batch_sampler=sampler,
        collate_fn=_Collate(getattr(dataset, "collate", default_collate)),
        num_workers=num_workers,
        worker_init_fn=_leave_interrupts_to_the_main_process,
        generator=torch.Generator(),  # the loader's own base seed, so that it takes nothing from the global generator
    )


def _leave_interrupts_to_the_main_process(worker: int) -> None:
    """Ctrl-C reaches every process of a terminal; the main one still needs data for the step it finishes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class _Keyed(Dataset):
    def __init__(self, dataset: Dataset):
        self.dataset, self.draw = dataset, getattr(dataset, "sample", None)

    def __getitem__(self, index_and_key: tuple[int, int]) -> tuple[int, Any]:
        index, key = index_and_key
        return key, self.dataset[index] if self.draw is None else self.draw(index, key)


class _Collate:
    def __init__(self, collate: Any):
        self.collate = collate

    def __call__(self, keyed_items: list[tuple[int, Any]]) -> dict[str, Any]:
        batch = self.collate([item for _, item in keyed_items])
        return {**batch, "sample_keys": torch.tensor([key for key, _ in keyed_items])}
