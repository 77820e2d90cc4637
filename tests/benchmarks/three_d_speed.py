"""Measurements of the 3D layer, for tests.benchmarks.speed: each returns {"value", "unit", "goal"} and details."""

import statistics
import time
from collections.abc import Callable

import torch

from common.backbones import load_backbone
from common.three_d.background import SolidBackground
from common.three_d.cameras import orbit_cameras
from common.three_d.fields import HashField, PointField, VoxelField
from common.three_d.occupancy import Occupancy
from common.three_d.render import render
from common.training.seeding import keys_of_step
from papers.dreamfusion.config import DreamFusionConfig
from papers.dreamfusion.method import DreamFusion

RESOLUTION, NUM_SAMPLES = 64, 48


def _forward_and_backward(field: PointField, occupancy: Occupancy | None) -> Callable[[], None]:
    camera, background = orbit_cameras([30.0], 15.0, 2.5, resolution=RESOLUTION), SolidBackground()

    def run() -> None:
        made = render(field, camera, background=background, num_samples=NUM_SAMPLES, occupancy=occupancy)
        made.rgb.square().mean().backward()

    return run


def rendering(repetitions: int) -> dict:
    """Our voxels' time over that of nerfstudio's torch hash grid: 64x64 rays, 48 samples, forward and backward.

    Both are asked for all samples; `with_occupancy` leaves out what is empty, as training does.
    """
    voxels, hash_grid = VoxelField(48), HashField(log2_size=15)
    occupancy = Occupancy(voxels)
    occupancy.update(voxels)
    ways = {
        "voxels": _forward_and_backward(voxels, None),
        "with_occupancy": _forward_and_backward(voxels, occupancy),
        "hash_grid": _forward_and_backward(hash_grid, None),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repetitions + 1):  # in turns; the first one is not counted
        for name, run in ways.items():
            started = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - started)
    medians = {name: statistics.median(times[1:]) for name, times in seconds.items()}
    return {
        "value": medians["voxels"] / medians["hash_grid"], "unit": "times the hash grid's time", "goal": 0.2,
        "seconds": medians,
    }  # fmt: skip


def distillation_step(backbone_name: str, steps: int) -> dict:
    """A DreamFusion step: 64x64 rendering, 48 samples a ray, SDS with guidance on tiny-sd, backward, Adam."""
    method = DreamFusion(load_backbone(backbone_name), DreamFusionConfig.tiny(), "a bear")
    optimizer = torch.optim.Adam(method.field.parameters(), lr=1e-2)
    times = []
    for step in range(steps):
        started = time.perf_counter()
        optimizer.zero_grad()
        method.training_loss({"step": step, "sample_keys": keys_of_step(step, 1)}).backward()
        optimizer.step()
        times.append(time.perf_counter() - started)
    return {"value": statistics.median(times[3:]), "unit": "s", "goal": 0.35, "steps": steps}
