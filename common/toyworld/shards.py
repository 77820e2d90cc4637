"""Render the toy world into shard files, and load them back into memory.

A shard is one safetensors file: images (n, 64, 64, 3) uint8, masks (n, 64, 64) uint8, one int64 vector per label and
one bool vector per attribute (does the first caption state it?); captions and label names are JSON in the header.
An image depends on its seed alone, so workers, shard size and order of rendering do not change it.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from torch import Tensor
from tqdm import tqdm

from common.io import atomic_save_safetensors, load_safetensors
from common.toyworld.workers import in_processes

RENDER_BATCH = 50  # images rendered at once by one worker


@dataclass(frozen=True, kw_only=True)
class ShardConfig:
    """What to render and where to put it."""

    output: Path  # folder for the shard files
    num_images: int = 40_000
    first_seed: int = 0  # image i is rendered from seed first_seed + i
    workers: int = 2  # processes, one torch thread each
    shard_size: int = 500  # images per file

    def __post_init__(self) -> None:
        for name in ("num_images", "workers", "shard_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")


@dataclass(frozen=True)
class ShardData:
    """Rendered images in memory.

    images (N, 64, 64, 3) uint8; masks (N, 64, 64) uint8, 0 on background, k on entity k, the first one being that which
    captions name first; labels: (N,) int64 each, -1 where the attribute does not apply; mentioned: (N,) bool each,
    whether captions[i][0] names the attribute; instances: (N,) int64, recurring identity or -1; captions: paraphrases.
    """

    images: Tensor
    masks: Tensor
    labels: dict[str, Tensor]
    mentioned: dict[str, Tensor]
    instances: Tensor
    captions: list[list[str]]

    def __len__(self) -> int:
        return len(self.images)


def render(seeds: list[int]) -> ShardData:
    """Render one image per seed, RENDER_BATCH at a time."""
    from common.toyworld.examples import make_examples

    batches = [make_examples(seeds[i : i + RENDER_BATCH]) for i in range(0, len(seeds), RENDER_BATCH)]
    return ShardData(
        images=stack([batch.images for batch in batches]),
        masks=stack([batch.masks for batch in batches]).to(torch.uint8),
        labels={name: stack([batch.labels[name] for batch in batches]).long() for name in batches[0].labels},
        mentioned={name: stack([batch.mentioned[name] for batch in batches]).bool() for name in batches[0].mentioned},
        instances=stack([batch.instances for batch in batches]).long(),
        captions=[list(captions) for batch in batches for captions in batch.captions],
    )


def stack(arrays: list[np.ndarray]) -> Tensor:
    """Arrays joined along their first axis."""
    return torch.from_numpy(np.concatenate([np.asarray(array) for array in arrays]))


def shard_path(directory: Path, first_seed: int, num_images: int) -> Path:
    return directory / f"shard-{first_seed:09d}-{num_images:05d}.safetensors"


def write_shard(directory: Path, first_seed: int, num_images: int) -> int:
    """Render and write one shard atomically; a file that is already there is complete and is kept."""
    path = shard_path(directory, first_seed, num_images)
    if not path.exists():
        data = render(list(range(first_seed, first_seed + num_images)))
        tensors = {"images": data.images, "masks": data.masks, "instances": data.instances}
        tensors |= {f"labels.{name}": values for name, values in data.labels.items()}
        tensors |= {f"mentioned.{name}": values for name, values in data.mentioned.items()}
        header = {"captions": json.dumps(data.captions), "label_names": json.dumps(_label_names())}
        atomic_save_safetensors(tensors, path, header)
    return num_images


def write_shards(config: ShardConfig) -> None:
    """Render all missing shards of the configured range with several processes."""
    config.output.mkdir(parents=True, exist_ok=True)
    jobs = []
    for start in range(0, config.num_images, config.shard_size):
        jobs.append((config.output, config.first_seed + start, min(config.shard_size, config.num_images - start)))
    missing = [job for job in jobs if not shard_path(*job).exists()]
    done = config.num_images - sum(count for _, _, count in missing)
    with tqdm(total=config.num_images, initial=done, unit="image", desc="rendering", smoothing=0.05) as progress:
        for count in in_processes(write_shard, missing, config.workers):
            progress.update(count)


def load_shards(directory: Path, max_images: int | None = None) -> ShardData:
    """Read the shards of a folder, in the order of their seeds, into memory.

    Raises: FileNotFoundError if the folder holds no shard; ValueError if a shard's label names are not today's.
    """
    parts = list(_read_shards(Path(directory), max_images))
    if not parts:
        raise FileNotFoundError(
            f"no shard-*.safetensors in {directory}; write some with: "
            f"python -m common.toyworld.shards --output {directory}"
        )
    end = max_images
    return ShardData(
        images=torch.cat([part.images for part in parts])[:end],
        masks=torch.cat([part.masks for part in parts])[:end],
        labels={name: torch.cat([part.labels[name] for part in parts])[:end] for name in parts[0].labels},
        mentioned={name: torch.cat([part.mentioned[name] for part in parts])[:end] for name in parts[0].mentioned},
        instances=torch.cat([part.instances for part in parts])[:end],
        captions=[captions for part in parts for captions in part.captions][:end],
    )


def _read_shards(directory: Path, max_images: int | None) -> Iterator[ShardData]:
    expected = _label_names()
    count = 0
    for path in sorted(directory.glob("shard-*.safetensors")):
        tensors, header = load_safetensors(path)
        if json.loads(header["label_names"]) != expected:
            raise ValueError(f"{path} is from another version of the toy world; delete the folder and render again")
        yield ShardData(
            images=tensors["images"],
            masks=tensors["masks"],
            labels={key.removeprefix("labels."): value for key, value in tensors.items() if key.startswith("labels.")},
            mentioned={
                key.removeprefix("mentioned."): value for key, value in tensors.items() if key.startswith("mentioned.")
            },
            instances=tensors["instances"],
            captions=json.loads(header["captions"]),
        )
        count += len(tensors["images"])
        if max_images is not None and count >= max_images:
            return


def _label_names() -> dict[str, list[str]]:
    from common.toyworld.examples import LABELS

    return {name: list(values) for name, values in LABELS.items()}


if __name__ == "__main__":
    write_shards(tyro.cli(ShardConfig, description=__doc__))
