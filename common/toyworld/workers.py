"""Work shared among processes of one torch thread each."""

import multiprocessing
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import TypeVar

import torch

T = TypeVar("T")


def in_processes(work: Callable[..., T], jobs: Iterable[tuple], workers: int) -> Iterator[T]:
    """What `work(*job)` returns, as it comes. Nothing new begins after an error.

    Raises: BrokenProcessPool if a process was killed.
    """
    # "spawn" keeps every worker at one torch thread whatever the parent has done with its thread pool.
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, spawn, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        try:
            for done in as_completed([pool.submit(work, *job) for job in jobs]):
                yield done.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
