"""Render random clips of named motions into shard files: python -m common.toyworld.clip_shards --help

A shard is one safetensors file: frames (n, F, 64, 64, 3) uint8, trajectories (n, F, 2) in pixels, areas (n, F), motions
and classes (n,) as indices; captions are JSON in the header. A clip depends on its seed alone.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from torch import Tensor
from tqdm import tqdm

from common.io import atomic_save_safetensors, load_safetensors
from common.toyworld.captions import clip_caption
from common.toyworld.clips import render_clip
from common.toyworld.sampling import compose, sample_object, sample_person
from common.toyworld.scene import Placed, Scene
from common.toyworld.vocabulary import BACKGROUNDS, CLASSES, HELD_OUT_MOTIONS, MOTIONS
from common.toyworld.workers import in_processes

NUM_FRAMES = 8
NUM_CAPTIONS = 3
ALL_MOTIONS = (*MOTIONS, *HELD_OUT_MOTIONS)


@dataclass(frozen=True, kw_only=True)
class ClipShardConfig:
    """What to render and where to put it."""

    output: Path  # folder for the shard files
    num_clips: int = 5_000
    first_seed: int = 0  # clip i is rendered from seed first_seed + i
    held_out: bool = False  # of held-out motions, for the judge of motions alone
    workers: int = 2  # processes, one torch thread each
    shard_size: int = 100  # clips per file


@dataclass(frozen=True)
class ClipData:
    """Rendered clips in memory.

    frames (N, F, 64, 64, 3) uint8; trajectories (N, F, 2) float32, the entity's centre in pixels, x right, y down;
    areas (N, F) float32, share of the picture that it covers; motions (N,) int64, in ALL_MOTIONS; classes (N,) int64,
    in CLASSES; captions: paraphrases, none for held-out motions.
    """

    frames: Tensor
    trajectories: Tensor
    areas: Tensor
    motions: Tensor
    classes: Tensor
    captions: list[list[str]]

    def __len__(self) -> int:
        return len(self.frames)


def sample_clip(seed: int, *, held_out: bool = False) -> tuple[Scene, str]:
    """A scene of one entity with room to move, and a motion for it."""
    rng = np.random.default_rng([14, seed])
    motions = HELD_OUT_MOTIONS if held_out else MOTIONS
    motion = motions[rng.integers(len(motions))]
    entity = sample_person(rng, portrait=False) if rng.random() < 0.1 else sample_object(rng)
    background = BACKGROUNDS[rng.integers(len(BACKGROUNDS))]
    fill = float(rng.uniform(0.48, 0.6))
    return compose(rng, (Placed(entity),), background=background, fill=fill, spread_deg=15.0), motion


def render_clips(seeds: list[int], *, held_out: bool = False) -> ClipData:
    """Render one clip per seed."""
    drawn = [sample_clip(seed, held_out=held_out) for seed in seeds]
    clips = [render_clip(scene, motion, num_frames=NUM_FRAMES) for scene, motion in drawn]
    captions = []
    for seed, (scene, motion) in zip(seeds, drawn, strict=True):
        rng = np.random.default_rng([15, seed])
        captions.append([] if held_out else [clip_caption(scene, motion, rng) for _ in range(NUM_CAPTIONS)])
    return ClipData(
        frames=torch.stack([(clip.frames * 255).round().byte().permute(0, 2, 3, 1) for clip in clips]),
        trajectories=torch.from_numpy(np.stack([clip.trajectory for clip in clips])).float(),
        areas=torch.from_numpy(np.stack([clip.areas for clip in clips])).float(),
        motions=torch.tensor([ALL_MOTIONS.index(motion) for _, motion in drawn]),
        classes=torch.tensor([CLASSES.index(scene.placed[0].entity.noun) for scene, _ in drawn]),
        captions=captions,
    )


def write_clip_shard(directory: Path, first_seed: int, num_clips: int, held_out: bool) -> int:
    """Render and write one shard atomically; a file that is already there is complete and is kept."""
    path = _shard_path(directory, first_seed, num_clips)
    if not path.exists():
        data = render_clips(list(range(first_seed, first_seed + num_clips)), held_out=held_out)
        tensors = {name: getattr(data, name) for name in ("frames", "trajectories", "areas", "motions", "classes")}
        header = {"captions": json.dumps(data.captions), "motions": json.dumps(ALL_MOTIONS)}
        atomic_save_safetensors(tensors, path, header)
    return num_clips


def write_clip_shards(config: ClipShardConfig) -> None:
    """Render all missing shards of the configured range with several processes."""
    config.output.mkdir(parents=True, exist_ok=True)
    jobs = [
        (config.output, config.first_seed + start, min(config.shard_size, config.num_clips - start), config.held_out)
        for start in range(0, config.num_clips, config.shard_size)
    ]
    missing = [job for job in jobs if not _shard_path(*job[:3]).exists()]
    done = config.num_clips - sum(job[2] for job in missing)
    with tqdm(total=config.num_clips, initial=done, unit="clip", desc="rendering", smoothing=0.05) as progress:
        for count in in_processes(write_clip_shard, missing, config.workers):
            progress.update(count)


def load_clip_shards(directory: Path, max_clips: int | None = None) -> ClipData:
    """Read the shards of a folder, in the order of their seeds, into memory.

    Raises: FileNotFoundError if the folder holds no shard; ValueError if a shard's motions are not today's.
    """
    parts, captions = [], []
    for path in sorted(Path(directory).glob("clips-*.safetensors")):
        tensors, header = load_safetensors(path)
        if json.loads(header["motions"]) != list(ALL_MOTIONS):
            raise ValueError(f"{path} is from another version of the toy world; delete the folder and render again")
        parts.append(tensors)
        captions += json.loads(header["captions"])
        if max_clips is not None and len(captions) >= max_clips:
            break
    if not parts:
        raise FileNotFoundError(
            f"no clips-*.safetensors in {directory}; write some with: "
            f"python -m common.toyworld.clip_shards --output {directory}"
        )
    whole = {name: torch.cat([part[name] for part in parts])[:max_clips] for name in parts[0]}
    return ClipData(**whole, captions=captions[:max_clips])


def _shard_path(directory: Path, first_seed: int, num_clips: int) -> Path:
    return directory / f"clips-{first_seed:09d}-{num_clips:05d}.safetensors"


if __name__ == "__main__":
    write_clip_shards(tyro.cli(ClipShardConfig, description=__doc__))
