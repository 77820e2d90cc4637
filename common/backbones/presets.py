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


PRESETS = {
    "tiny-sd": Preset(HERE / "weights" / "tiny-sd", HERE / "architectures" / "tiny-sd"),
    # 1.4 and 1.5 differ in weights only
    "sd14": Preset("CompVis/stable-diffusion-v1-4", HERE / "architectures" / "sd15"),
    "sd15": Preset("stable-diffusion-v1-5/stable-diffusion-v1-5", HERE / "architectures" / "sd15"),
    "sd21": Preset("stabilityai/stable-diffusion-2-1", HERE / "architectures" / "sd21"),
    "sdxl": Preset("stabilityai/stable-diffusion-xl-base-1.0", HERE / "architectures" / "sdxl"),
}
