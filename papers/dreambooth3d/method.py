"""DreamBooth3D (Raj et al., ICCV 2023, arXiv 2303.13508), in the order of its Section 3.

Paper -> here:  D_theta -> backbone with tuned U-Net: tuning.py   M_phi, F_gamma -> SubjectField: subject_field.py
    I_v^pseudo, P_v -> PseudoViews: pseudo_views.py   I_aug -> pseudo views and photos, `DreamBooth3D.tune_multi`
Departures D1 to D5 are in the card.
"""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.backbones import Backbone, load_backbone
from common.distillation import picture_latents
from common.three_d.artifact import read_field
from common.training.config import FitConfig
from common.training.loop import fit
from common.training.seeding import derive_seed

from .config import DreamBooth3DConfig, FieldConfig, TuningConfig
from .pseudo_views import VIEWS, PseudoViews, make_pseudo_views, read_pseudo_views
from .subject_field import ARTIFACT, SLUG, SubjectField
from .tuning import UNET, SubjectTuning, class_latents, load_unet, tuning_items

PARTIAL, FULL, MULTI, FIRST, FINAL = "partial", "full", "multi", "first_field", "final_field"


class DreamBooth3D:
    """The three stages, each in a folder of its own; what is there already is read, not made again.

    FOLDER/partial, full, multi     unet.safetensors
           first_field              field.safetensors, and the pseudo views
           final_field              field.safetensors
           training/                the run folder of each

    Args:
        make_backbone: an untuned backbone, for a stage to tune; called once a stage.
        photos: (K,3,H,W) in [-1,1], the subject on white.
        options: more fields of FitConfig, such as mixed_precision.
    """

    def __init__(
        self, make_backbone: Callable[[], Backbone], config: DreamBooth3DConfig, photos: Tensor, folder: Path,
        **options: Any,
    ) -> None:  # fmt: skip
        self.make_backbone, self.config, self.photos, self.folder = make_backbone, config, photos, Path(folder)
        self.options = options

    def run(self) -> SubjectField:
        """All three stages."""
        views = self.pseudo_views(self.first_field())
        return self.distil(FINAL, self.tune_multi(views), self.config.final_steps, views)

    def first_field(self) -> SubjectField:
        """Stage 1."""
        return self.distil(FIRST, self.tune_partial(), self.config.first_steps)

    def tune_partial(self) -> Backbone:
        """D_partial: DreamBooth that stops early, while the model still knows all sides of the class."""
        return self.tune(PARTIAL, self.make_backbone(), self.photos, self.config.tuning.partial_steps)

    def tune_full(self) -> Backbone:
        """D_full: goes on from D_partial."""
        steps = self.config.tuning.full_steps - self.config.tuning.partial_steps
        return self.tune(FULL, self.tune_partial(), self.photos, steps)

    def tune_multi(self, views: PseudoViews) -> Backbone:
        """D_multi: D_partial, not D_full, tuned on I_aug, which is the pseudo views and the photos."""
        augmented = torch.cat([views.pictures, self.photos])
        return self.tune(MULTI, self.tune_partial(), augmented, self.config.tuning.multi_steps)

    def tune(self, stage: str, backbone: Backbone, pictures: Tensor, steps: int) -> Backbone:
        """DreamBooth on pictures (N,3,H,W) in [-1,1], from what the backbone's U-Net is now."""
        folder, tuning = self.folder / stage, self.config.tuning
        if (folder / UNET).is_file():
            return load_unet(backbone, folder)
        of_class = None
        if tuning.prior_loss_weight > 0:
            of_class = class_latents(self.make_backbone(), self.config, self.folder / "class_latents.safetensors")
        with torch.no_grad():
            latents = torch.cat([picture_latents(backbone, one[None].to(backbone.device)) for one in pictures]).cpu()
        method = SubjectTuning(backbone, self.config, derive_seed(self.config.seed, stage))
        settings = self.fit_config(steps, tuning.learning_rate, tuning.batch_size, max_grad_norm=1.0)
        fit(method, tuning_items(latents, of_class), settings, self.folder / "training" / stage, resume=True)
        method.save(folder)
        return backbone.freeze()

    def distil(self, stage: str, backbone: Backbone, steps: int, views: PseudoViews | None = None) -> SubjectField:
        """A new field: L_SDS and L_nerf, and with pseudo views L_recon."""
        method, folder = self.new_field(backbone, steps, views), self.folder / stage
        if (folder / ARTIFACT).is_file():
            method.load(folder)
            return method
        fit(
            method,
            [{"view": 0}],  # a step needs no data but its number
            self.fit_config(steps, self.config.field.learning_rate, 1, max_grad_norm=None, adam_betas=(0.9, 0.99)),
            self.folder / "training" / stage,
            sample_grid=lambda: method.side_views(4).images(),
            scalars=lambda: method.losses,
            resume=True,
        )
        method.save(folder)
        return method

    def new_field(self, backbone: Backbone, steps: int, views: PseudoViews | None = None) -> SubjectField:
        """A field before its first step, whose artifact knows this run's config."""
        header = {"backbone": backbone.name, "config": json.dumps(asdict(self.config))}
        return SubjectField(backbone, self.config, steps, views=views, header=header)

    def pseudo_views(self, first: SubjectField) -> PseudoViews:
        """Stage 2: renderings of the first field, through img2img of D_full."""
        folder = self.folder / FIRST
        if not (folder / VIEWS).is_file():
            make_pseudo_views(self.tune_full(), first.field, self.config).save(folder)
        return read_pseudo_views(folder)

    def fit_config(self, steps: int, learning_rate: float, batch_size: int, **settings: Any) -> FitConfig:
        """Settings of one stage's loop."""
        return FitConfig(
            train_steps=steps, learning_rate=learning_rate, batch_size=batch_size, seed=self.config.seed,
            keep_checkpoints=1, **settings, **self.options,
        )  # fmt: skip


def read_config(text: str) -> DreamBooth3DConfig:
    """Of the JSON in an artifact's header."""
    values = json.loads(text)
    nested = {"tuning": TuningConfig(**values.pop("tuning")), "field": FieldConfig(**values.pop("field"))}
    return DreamBooth3DConfig(**values, **nested)


def load_method(
    artifact_path: str | Path, backbone_name: str | None = None, device: torch.device | str = "cpu"
) -> SubjectField:
    """The final field of a run, or any field of it, ready to be looked at.

    Args: artifact_path: the folder of a run or of a field, or a field's file.   backbone_name: None = that of training.
    """
    path = Path(artifact_path)
    folder = next((own for own in (path / FINAL, path) if (own / ARTIFACT).is_file()), path.parent)
    _, header = read_field(folder / ARTIFACT, SLUG)
    backbone = load_backbone(backbone_name or header["backbone"], device=device)
    method = SubjectField(backbone, read_config(header["config"]), 1, header=header)
    method.load(folder)
    return method
