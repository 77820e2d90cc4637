"""Measurements of the video layer, for tests.benchmarks.speed: each returns {"value", "unit", "goal"} and details."""

import time
from dataclasses import replace
from pathlib import Path

import torch

from common.backbones import load_backbone
from common.data.videos import crop_frames, read_frames, to_clip, video_info
from common.sampling import sample_clips, save_mp4
from common.toyworld.motion_tasks import motion_tasks
from papers.motion_director import train as motion_director
from papers.vmc import train as vmc

FPS, SECONDS = 30, 3


def clip_loading(folder: Path) -> dict:
    """A 320x240 mp4 of 3 s at 30 fps: all frames, cut to 256 px, as a tensor; seconds per second of video."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(1, 3, 12, 12, 16, generator=generator)  # smooth motion with noise on it, as a camera gives
    smooth = torch.nn.functional.interpolate(coarse, (FPS * SECONDS, 240, 320), mode="trilinear")[0] * 2 - 1
    clip = (smooth + 0.05 * torch.randn(smooth.shape, generator=generator)).clamp(-1, 1)
    save_mp4(clip, folder / "clip.mp4", FPS)
    started = time.perf_counter()
    info = video_info(folder / "clip.mp4")
    checked = time.perf_counter()
    to_clip(crop_frames(read_frames(info, range(info.num_frames)), 256, 256))
    loaded = time.perf_counter() - checked
    return {
        "value": loaded / SECONDS, "unit": "s per second of video", "goal": 0.2,
        "times_real_time": SECONDS / loaded, "seconds_of_the_check": checked - started,
    }  # fmt: skip


def clip_sampling(steps: int) -> dict:
    """One clip of 8 frames on tiny-video, 30 DDIM steps, with guidance."""
    backbone = load_backbone("tiny-video").freeze()
    sample_clips(backbone, "a video of a dog", seeds=[0], num_inference_steps=1)
    started = time.perf_counter()
    sample_clips(backbone, "a video of a dog", seeds=[0], num_inference_steps=steps, guidance_scale=5.0)
    return {"value": time.perf_counter() - started, "unit": "s", "goal": 15, "steps": steps}


def clip_tuning(folder: Path, share: float) -> dict:
    """A toy clip learned with the tiny presets, from mp4 to artifact with its sample clip; the slower of both methods.

    Args: share: of the presets' steps that are made.
    """
    (task,) = motion_tasks(1)
    video, prompt = folder / "motion.mp4", task.plain_captions[0]
    save_mp4(task.clips[0], video, fps=8)
    runs = {
        motion_director: motion_director.TrainOptions(clips=video, prompt=prompt, output=folder / "motion_director"),
        vmc: vmc.TrainOptions(video=video, prompt=prompt, output=folder / "vmc"),
    }
    seconds, steps = {}, {}
    for paper, options in runs.items():
        name, config = options.output.name, options.config
        steps[name] = round(share * config.train_steps)
        started = time.perf_counter()
        paper.train(replace(options, config=replace(config, train_steps=steps[name])))
        seconds[name] = time.perf_counter() - started
    return {"value": max(seconds.values()), "unit": "s", "goal": 150, "steps": steps, "seconds": seconds}
