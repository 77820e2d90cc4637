"""Clips from a learned motion, with or without a learned look: `python -m papers.motion_director.generate --help`."""

from dataclasses import dataclass
from pathlib import Path

import tyro

from common.sampling.clips import save_mp4
from common.training.optimize import default_device

from .method import load_method


@dataclass(frozen=True, kw_only=True)
class GenerateOptions:
    """Make mp4 clips with a learned motion."""

    motion: Path
    """Run folder of a motion."""
    prompt: str
    """ "a tank is running in the desert"; with an appearance, the words of its pictures: "a sks toy car is running"."""
    output: Path
    """An mp4 file; several seeds make NAME-SEED.mp4."""
    appearance: Path | None = None
    """Run folder of a look that was learned from pictures; default: the backbone's own."""
    seeds: tuple[int, ...] = (0,)
    """One clip for each."""
    noise_prior: float | None = None
    """Share of the learned clip's inverted noise, 0 to 1; more makes motion surer and clips more alike."""
    clip_index: int = 0
    """Whose inverted noise, where several clips were learned from."""
    guidance_scale: float | None = None
    """Default: as in the run's config, and so are the steps."""
    num_inference_steps: int | None = None
    """DDIM steps."""
    backbone: str | None = None
    """Default: the one of training."""
    fps: float = 8.0
    """Frames per second of the file."""
    upscale: int = 1
    """Whole factor, nearest neighbour; 4 suits tiny-video."""


def main(argv: list[str] | None = None) -> None:
    """Make one file for each seed."""
    options = tyro.cli(GenerateOptions, args=argv)
    if options.output.suffix != ".mp4":
        raise ValueError(f"--output must end in .mp4, got {options.output}")
    method = load_method(options.motion, options.backbone, default_device(), appearance=options.appearance)
    clips = method.generate(
        options.prompt,
        seeds=list(options.seeds),
        noise_prior=options.noise_prior,
        clip_index=options.clip_index,
        num_inference_steps=options.num_inference_steps,
        guidance_scale=options.guidance_scale,
    )
    for seed, clip in zip(options.seeds, clips, strict=True):
        several = len(options.seeds) > 1
        path = options.output.with_stem(f"{options.output.stem}-{seed}") if several else options.output
        save_mp4(clip, path, options.fps, upscale=options.upscale)
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
