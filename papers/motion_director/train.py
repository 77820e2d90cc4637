"""Learn a motion from clips, or a look from pictures: `python -m papers.motion_director.train --help`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
import tyro
from PIL import Image
from torch.utils.data import Dataset

from common.backbones import load_backbone
from common.backbones.video import VideoBackbone
from common.data.clip_dataset import ClipDataset
from common.data.clip_folder import ClipFolder
from common.data.clip_latents import ClipLatents
from common.data.image_folder import ImageFolder
from common.data.latent_cache import LatentCache
from common.data.subject_dataset import SubjectDataset
from common.sampling.clips import filmstrip
from common.training.config import FitConfig
from common.training.loop import fit
from common.training.optimize import default_device

from .config import MotionDirectorConfig
from .method import Appearance, MotionDirector, sized

TINY = "tiny-video"


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """Learn a motion from clips (--clips), or the look of a thing from pictures (--images)."""

    clips: Path | None = None
    """A video file, or a folder of video files or of folders of frames, all of one motion."""
    images: Path | None = None
    """Folder of pictures of one thing."""
    prompt: str | None = None
    """What they show, in a few words: "a person is riding a bicycle". Default: captions, NAME.txt beside NAME.mp4."""
    output: Path
    """Run folder; the artifacts *_lora.safetensors are written into it."""
    backbone: str = TINY
    """A preset (tiny-video, modelscope, zeroscope), a hub id, or a diffusers folder. It decides the defaults below."""
    config: tyro.conf.OmitArgPrefixes[MotionDirectorConfig] = field(default_factory=MotionDirectorConfig.tiny)
    fps: float | None = None
    """Frames per second of the clips; default: stored frames as they come."""
    stride: int = 1
    """Every stride-th stored frame, without --fps."""
    frames_fps: float = 8.0
    """Frame rate of folders of frames, which have none of their own."""
    windows_per_clip: int = 1
    """Stretches of each video that are learned from, evenly spread."""
    flip: bool = False
    """Mirror half of the pictures, as the code does."""
    invert: bool = True
    """Keep the clips' inverted noise beside the artifact, for --noise-prior."""
    latent_cache: Path | None = None
    """Folder that keeps encoded clips and pictures between runs."""
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    """Of the forward pass; the pairs stay float32."""
    checkpoint_every: int = 50
    """Steps."""
    sample_every: int = 0
    """Steps between film strips; 0 = only at the end."""
    resume: bool = False
    """Continue the run in the output folder."""

    def __post_init__(self) -> None:
        if (self.clips is None) == (self.images is None):
            raise ValueError("give either clips (--clips), for a motion, or images (--images), for a look")


def fit_config(config: MotionDirectorConfig, **options: object) -> FitConfig:
    """Settings of the loop: one clip or picture a step, nothing clipped.   options: more fields of FitConfig."""
    return FitConfig(
        train_steps=config.train_steps,
        learning_rate=config.learning_rate,
        batch_size=1,
        weight_decay=config.weight_decay,
        max_grad_norm=None,
        seed=config.seed,
        **options,
    )


def clip_dataset(options: TrainOptions, backbone: VideoBackbone) -> ClipDataset:
    """Latents of the videos, in the config's size."""
    config = options.config
    folder = ClipFolder(
        options.clips, num_frames=config.num_frames, height_px=config.resolution_px, width_px=config.resolution_px,
        fps=options.fps, stride=options.stride, frames_fps=options.frames_fps,
    )  # fmt: skip
    latents = ClipLatents(folder, backbone, num_windows=options.windows_per_clip, cache_dir=options.latent_cache)
    return ClipDataset(latents, _prompts(options), seed=config.seed)


def picture_dataset(options: TrainOptions, backbone: VideoBackbone) -> SubjectDataset:
    """Latents of the pictures, in the config's size."""
    config = options.config
    folder = ImageFolder(options.images, resolution_px=config.resolution_px, flip=options.flip)
    return SubjectDataset(
        LatentCache(folder, backbone, cache_dir=options.latent_cache), _prompts(options), seed=config.seed
    )


def _prompts(options: TrainOptions) -> list[str] | None:
    return None if options.prompt is None else [options.prompt]


def train(options: TrainOptions) -> MotionDirector:
    """Everything in plain sight: backbone, data, method, loop, inversion, save."""
    config = options.config
    backbone = load_backbone(options.backbone, device=default_device())
    sized(backbone, config.num_frames, config.resolution_px)  # before the data is encoded
    dataset: Dataset
    if options.images is None:
        dataset = clip_dataset(options, backbone)
        method = MotionDirector(backbone, config, num_clips=len(dataset))
    else:
        dataset = picture_dataset(options, backbone)
        method = Appearance(backbone, config)
    for path in method.paths.paths:
        pairs = method.paths.pairs(path)
        print(f"training {path}: {len(pairs) // 2} pairs, {sum(p.numel() for _, p in pairs):,} numbers")

    plain = [dataset[i] for i in range(len(dataset))]
    fit(
        method,
        dataset,
        fit_config(
            config,
            mixed_precision=options.mixed_precision,
            checkpoint_every=options.checkpoint_every,
            sample_every=options.sample_every,
        ),
        options.output,
        sample_grid=lambda: film(method, plain[0]["prompt"]),
        scalars=lambda: method.last_losses,
        resume=options.resume,
    )
    if options.images is None and options.invert:
        method.invert(torch.stack([item["latents"] for item in plain]).to(backbone.device))
    method.save(options.output)
    print(f"wrote {', '.join(sorted(path.name for path in options.output.glob('*.safetensors')))} to {options.output}")
    return method


def film(method: MotionDirector, prompt: str) -> Image.Image:
    """One clip for the prompt of training, from fresh noise, as a row of frames."""
    (clip,) = method.generate(prompt, seeds=[0], noise_prior=0.0)
    return filmstrip(clip)


@dataclass(frozen=True)
class _Chosen:
    backbone: str = TINY
    images: Path | None = None


def main(argv: list[str] | None = None) -> None:
    """Defaults are those for one clip or for pictures, on tiny-video or on a real backbone; every field is a flag."""
    chosen, _ = tyro.cli(_Chosen, args=argv, return_unknown_args=True, add_help=False)
    presets = {
        (True, True): MotionDirectorConfig.tiny,
        (True, False): MotionDirectorConfig.tiny_appearance,
        (False, True): MotionDirectorConfig,
        (False, False): MotionDirectorConfig.appearance,
    }
    config = presets[chosen.backbone == TINY, chosen.images is None]()
    clips = tyro.MISSING if chosen.images is None else None
    defaults = TrainOptions(clips=clips, images=chosen.images, output=tyro.MISSING, config=config)
    train(tyro.cli(TrainOptions, args=argv, default=defaults))


if __name__ == "__main__":
    main()
