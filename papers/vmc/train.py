"""Learn the motion of one clip: `python -m papers.vmc.train --help`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import tyro
from accelerate import PartialState
from PIL import Image

from common.backbones import load_backbone
from common.backbones.video import VideoBackbone
from common.data.clip_dataset import ClipDataset
from common.data.clip_folder import ClipFolder
from common.data.clip_latents import ClipLatents
from common.sampling.clips import filmstrip, save_mp4
from common.training.config import FitConfig
from common.training.loop import fit
from common.training.optimize import default_device

from .config import VMCConfig
from .method import ARTIFACT, VMC


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """Learn the motion of one clip, and make clips of other things that move like it."""

    video: Path
    """An mp4 or other video file, a GIF, or a folder of numbered frames; its first frames are the clip."""
    prompt: str
    """What moves and how, without background and looks: "a cat is roaring", not "a grey cat roars under a tree"."""
    output: Path
    """Run folder; the artifact temporal_attention.safetensors is written into it."""
    backbone: str = "tiny-video"
    """A preset (tiny-video, modelscope, zeroscope), a hub id, or a diffusers folder. It decides the defaults below."""
    config: tyro.conf.OmitArgPrefixes[VMCConfig] = field(default_factory=VMCConfig.tiny)
    prompts: tuple[str, ...] = ()
    """Prompts to make clips for when it has learned: OUTPUT/clips/0.mp4, 1.mp4, ..."""
    fps: float | None = None
    """Frames per second of the clip; default: stored frames as they come."""
    stride: int = 1
    """Every stride-th stored frame, without --fps."""
    frames_fps: float | None = None
    """Frame rate of a folder of frames."""
    latent_cache: Path | None = None
    """Folder that keeps the encoded clip between runs."""
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    """Of the forward pass; the changes and the differences of frames stay float32. fp16 in the official code."""
    checkpoint_every: int = 100
    """Steps."""
    validate_every: int = 100
    """Steps between losses of the clip with fixed noise; 0 = only at the end."""
    sample_every: int = 0
    """Steps between sample clips as film strips; 0 = only at the end."""
    resume: bool = False
    """Continue the run in the output folder."""


def fit_config(config: VMCConfig, **options: object) -> FitConfig:
    """Settings of the loop; gradients are clipped to norm 1 (code).   options: more fields of FitConfig."""
    return FitConfig(
        train_steps=config.train_steps,
        learning_rate=config.learning_rate,
        batch_size=config.batch_size,
        weight_decay=config.weight_decay,
        max_grad_norm=1.0,
        seed=config.seed,
        **options,
    )


def load_clip(
    video: Path,
    backbone: VideoBackbone,
    config: VMCConfig,
    *,
    fps: float | None = None,
    stride: int = 1,
    frames_fps: float | None = None,
    cache_dir: Path | None = None,
) -> ClipLatents:
    """The first `config.num_frames` frames of a video, short side scaled and centre cut, as latents.

    Raises: ValueError if there is more than one video, and as `ClipFolder`.
    """
    side = backbone.resolution_px
    folder = ClipFolder(
        video, num_frames=config.num_frames, height_px=side, width_px=side, fps=fps, stride=stride,
        frames_fps=frames_fps, seed=config.seed,
    )  # fmt: skip
    if len(folder) != 1:
        raise ValueError(f"VMC learns from one clip, but {str(video)!r} holds {len(folder)} videos; name one of them")
    return ClipLatents(folder, backbone, cache_dir=cache_dir)


def train(options: TrainOptions) -> VMC:
    """Everything in plain sight: backbone, clip, method, loop, save, clips for prompts."""
    config = options.config
    backbone = load_backbone(options.backbone, device=default_device())
    clip = load_clip(
        options.video, backbone, config, fps=options.fps, stride=options.stride, frames_fps=options.frames_fps,
        cache_dir=options.latent_cache,
    )  # fmt: skip
    dataset = ClipDataset(clip, [options.prompt], seed=config.seed)

    method = VMC(backbone, config)
    method.set_source(clip.latents(0), options.prompt)
    is_main = PartialState(cpu=backbone.device.type == "cpu").is_main_process
    if is_main:
        count = sum(parameter.numel() for _, parameter in method.parameters())
        print(f"training {len(method.changes)} matrices of temporal attention, {count:,} numbers")

    def strip() -> Image.Image:
        return filmstrip(method.generate((*options.prompts, options.prompt)[0], seeds=[config.seed])[0])

    fit(
        method,
        dataset,
        fit_config(
            config,
            mixed_precision=options.mixed_precision,
            checkpoint_every=options.checkpoint_every,
            validate_every=options.validate_every,
            sample_every=options.sample_every,
        ),
        options.output,
        validate=method.validation_loss,
        sample_grid=strip,
        resume=options.resume,
    )
    if is_main:
        method.save(options.output)
        print(f"wrote {options.output / ARTIFACT}")
        fps = clip.folder[0]["fps"]
        for i, prompt in enumerate(options.prompts):
            path = options.output / "clips" / f"{i}.mp4"
            save_mp4(method.generate(prompt, seeds=[config.seed])[0], path, fps)
            print(f"wrote {path}: {prompt}")
    return method


@dataclass(frozen=True)
class _Backbone:
    backbone: str = "tiny-video"


def main(argv: list[str] | None = None) -> None:
    """Defaults are those of VMCConfig, or of tiny() for tiny-video; every field is a flag."""
    chosen, _ = tyro.cli(_Backbone, args=argv, return_unknown_args=True, add_help=False)
    preset = VMCConfig.tiny if chosen.backbone == "tiny-video" else VMCConfig
    defaults = TrainOptions(video=tyro.MISSING, prompt=tyro.MISSING, output=tyro.MISSING, config=preset())
    train(tyro.cli(TrainOptions, args=argv, default=defaults))


if __name__ == "__main__":
    main()
