"""What the three stages are measured against."""

from dataclasses import replace

from .config import DreamBooth3DConfig
from .method import DreamBooth3D
from .subject_field import SubjectField


def naive(method: DreamBooth3D) -> SubjectField:
    """DreamBooth+Fusion: score distillation from D_full, in as many steps as both fields have together."""
    steps = method.config.first_steps + method.config.final_steps
    return method.distil("naive", method.tune_full(), steps)


def without_reconstruction(config: DreamBooth3DConfig) -> DreamBooth3DConfig:
    """The final field from score distillation alone."""
    return replace(config, recon_weight=0.0)
