"""DreamBooth3D in nerfstudio: `ns-train pcs-dreambooth3d --pipeline.images duck/ --pipeline.config.class-noun duck`.

The first stages run before nerfstudio's trainer starts; it shows the final field while it is made.
"""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
import tyro

from common.backbones import load_backbone
from common.three_d.nerfstudio_bridge import FieldPipelineConfig, Plan, method_specification

from .config import DreamBooth3DConfig
from .method import DreamBooth3D
from .train import read_photos


@dataclass
class DreamBooth3DPipelineConfig(FieldPipelineConfig):
    """Settings of `python -m papers.dreambooth3d.train`."""

    images: Path | None = None
    """Folder of 3-6 photos of one subject; cameras are not needed."""
    masks: Path | None = None
    """Folder of masks named as the photos; the rest becomes white."""
    stages: Path = Path("runs/dreambooth3d")
    """Folder of the tuned models, the first field and the pseudo views; what is there is not made again."""
    backbone: str = "tiny-sd"
    """A preset (tiny-sd, sd15, sd21), hub id, or folder."""
    config: DreamBooth3DConfig = field(default_factory=lambda: DreamBooth3DConfig.tiny(tyro.MISSING))
    """Of the method; --pipeline.config.final-steps ends the run."""

    def plan(self, device: torch.device) -> Plan:
        """The stages before the final field, and that field."""
        if self.images is None:
            raise ValueError("say what to make: --pipeline.images FOLDER, with photos of one subject")
        make_backbone = partial(load_backbone, self.backbone, device=device)
        photos = read_photos(self.images, self.masks, make_backbone().resolution_px)
        method = DreamBooth3D(make_backbone, self.config, photos, self.stages)
        views = method.pseudo_views(method.first_field())
        final = method.new_field(method.tune_multi(views), self.config.final_steps, views)
        groups = [{"params": final.parameters(), "lr": self.config.field.learning_rate}]
        return Plan(method=final, parameters=groups, train_steps=self.config.final_steps)


pcs_dreambooth3d = method_specification(
    "pcs-dreambooth3d", DreamBooth3DPipelineConfig(), "DreamBooth3D on tiny-sd: an object from a few photos"
)
pcs_dreambooth3d_sd = method_specification(
    "pcs-dreambooth3d-sd",
    DreamBooth3DPipelineConfig(backbone="sd15", config=DreamBooth3DConfig(class_noun=tyro.MISSING)),
    "DreamBooth3D on Stable Diffusion 1.5, with the paper's settings where they are known",
)  # fmt: skip
