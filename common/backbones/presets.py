"""The backbones that have a short name."""

from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Preset:
    """Where a named backbone comes from.

    weights: a hub id, or a diffusers folder that is shipped with this package.
    architecture: a diffusers folder without weights, from which `random` and `meta` are built.
    """

    weights: str | Path
    architecture: Path
    num_frames: int | None = None  # of a clip; None = pictures


@dataclass(frozen=True)
class VideoExtension:
    """A named video backbone that is an image preset with layers across frames.

    base: the image preset.   num_frames: of a clip.
    inflated: folder of safetensors with the layers that `inflate` adds, and others that were trained with them; or
    motion_adapter: hub id or folder of a diffusers MotionAdapter.
    noise_share: of the noise of a clip, what all its frames have in common, in training as in sampling.
    """

    base: str
    num_frames: int
    inflated: Path | None = None
    motion_adapter: str | None = None
    noise_share: float = 0.0


PRESETS = {
    "tiny-sd": Preset(HERE / "weights" / "tiny-sd", HERE / "architectures" / "tiny-sd"),
    # 1.4 and 1.5 differ in weights only
    "sd14": Preset("CompVis/stable-diffusion-v1-4", HERE / "architectures" / "sd15"),
    "sd15": Preset("stable-diffusion-v1-5/stable-diffusion-v1-5", HERE / "architectures" / "sd15"),
    "sd21": Preset("stabilityai/stable-diffusion-2-1", HERE / "architectures" / "sd21"),
    "sdxl": Preset("stabilityai/stable-diffusion-xl-base-1.0", HERE / "architectures" / "sdxl"),
    "modelscope": Preset("ali-vilab/text-to-video-ms-1.7b", HERE / "architectures" / "modelscope", num_frames=16),
    # ModelScope's architecture, tuned on clips without watermark
    "zeroscope": Preset("cerspense/zeroscope_v2_576w", HERE / "architectures" / "modelscope", num_frames=24),
}
VIDEO_EXTENSIONS = {
    "tiny-video": VideoExtension("tiny-sd", 8, inflated=HERE / "weights" / "tiny-video", noise_share=0.5),
    "animatediff": VideoExtension("sd15", 16, motion_adapter="guoyww/animatediff-motion-adapter-v1-5-2"),
}
