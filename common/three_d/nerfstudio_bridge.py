"""`ns-train` for a method that makes a field: nerfstudio's trainer, viewer, checkpoints and `ns-render` on our losses.

Needs nerfstudio with all that its trainer imports, torchvision among it (environment.yml). Nothing in `common` imports
this module; a paper's `nerfstudio_method.py` does:

    @dataclass
    class MyPipelineConfig(FieldPipelineConfig):
        prompt: str = ""

        def plan(self, device: torch.device) -> Plan:
            method = MyMethod(load_backbone("tiny-sd", device=device), self.prompt)
            return Plan(method=method, parameters=method.parameters(), train_steps=600)

    my_method = method_specification("my-method", MyPipelineConfig(), "What it does")
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
import tyro
from nerfstudio.configs.base_config import MachineConfig
from nerfstudio.data.datamanagers.random_cameras_datamanager import (
    RandomCamerasDataManager,
    RandomCamerasDataManagerConfig,
    TrivialDataset,
)
from nerfstudio.data.utils.dataloaders import RandIndicesEvalDataloader
from nerfstudio.engine.callbacks import TrainingCallback, TrainingCallbackAttributes, TrainingCallbackLocation
from nerfstudio.engine.optimizers import OptimizerConfig
from nerfstudio.engine.trainer import TrainerConfig
from nerfstudio.pipelines.base_pipeline import Pipeline, VanillaPipelineConfig
from nerfstudio.plugins.types import MethodSpecification
from torch import Tensor, nn

from common.three_d.fields import PointField
from common.three_d.nerfstudio_model import FieldModelConfig, nerfstudio_orbit
from common.three_d.views import depth_pictures, normal_pictures, save_object, save_turntable, side_views, turntable
from common.training.seeding import keys_of_step

GROUP = "method"  # the one parameter group that nerfstudio sees
SIDES = 4  # of an evaluation picture


class FieldMethod(Protocol):
    """A `common.training.method.Method` that makes a field."""

    field: PointField
    background: nn.Module
    losses: dict[str, float]  # of the last step, by name

    def training_loss(self, batch: dict[str, Any]) -> Tensor: ...

    def save(self, folder: Path) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A method, and how it is trained."""

    method: FieldMethod
    parameters: Iterable[dict[str, Any]]  # groups {"params", "lr"}, as torch.optim takes them
    train_steps: int  # training ends there, whatever --max-num-iterations allows
    views_per_step: int = 1  # sample keys of a batch


@dataclass
class MethodOptimizerConfig(OptimizerConfig):
    """AdamW as `common.training.fit` has it. Learning rates are settings of the method, and so not asked for here."""

    _target: type = torch.optim.AdamW
    lr: tyro.conf.Suppress[float] = 0.0
    max_norm: tyro.conf.Suppress[float | None] = None
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.0


@dataclass
class OrbitDataManagerConfig(RandomCamerasDataManagerConfig):
    """Cameras for the viewer and for `ns-render`; training draws its own."""

    _target: type = field(default_factory=lambda: OrbitDataManager)
    num_eval_angles: int = 24
    """Cameras, once around the object."""


class OrbitDataManager(RandomCamerasDataManager):
    """nerfstudio's cameras without pictures, in a ring."""

    def __init__(self, config: OrbitDataManagerConfig, **kwargs: Any) -> None:
        super().__init__(config, **kwargs)
        self.train_dataset = TrivialDataset(nerfstudio_orbit(config.num_eval_angles, config.eval_resolution))
        self.eval_dataset = self.train_dataset
        self.eval_dataloader = RandIndicesEvalDataloader(self.eval_dataset, device=self.device)


@dataclass
class FieldPipelineConfig(VanillaPipelineConfig):
    """What a paper's pipeline config adds its settings to."""

    _target: type = field(default_factory=lambda: FieldPipeline)
    datamanager: OrbitDataManagerConfig = field(default_factory=OrbitDataManagerConfig)
    model: FieldModelConfig = field(default_factory=FieldModelConfig)

    def plan(self, device: torch.device) -> Plan:
        """The method that these settings ask for, on a device."""
        raise TypeError(f"{type(self).__name__} has no plan(device)")


class FieldPipeline(Pipeline):
    """Trains what its config plans: the same losses, and so the same object, as with `common.training.fit`."""

    def __init__(self, config: FieldPipelineConfig, device: str, test_mode: str = "val", world_size: int = 1,
                 local_rank: int = 0, grad_scaler: Any = None) -> None:  # fmt: skip
        super().__init__()
        if world_size > 1:
            raise ValueError(f"this trains on one device, not {world_size}: --machine.num-devices 1")
        self.config, self.world_size = config, world_size
        self.plan = config.plan(torch.device(device))
        method = self.plan.method
        self._model = config.model.setup(field=method.field, background=method.background).to(device)
        self.datamanager = config.datamanager.setup(device=device, test_mode=test_mode)

    def get_param_groups(self) -> dict[str, list[dict[str, Any]]]:
        """One group for nerfstudio, which holds the method's own with their learning rates."""
        groups = list(self.plan.parameters)
        if any("lr" not in group for group in groups):
            raise ValueError('every group of Plan.parameters needs its "lr": [{"params": ..., "lr": ...}]')
        return {GROUP: groups}

    def get_train_loss_dict(self, step: int) -> tuple[dict, dict[str, Tensor], dict[str, float]]:
        """Nothing rendered, the loss, and its parts."""
        method = self.plan.method
        loss = method.training_loss({"sample_keys": keys_of_step(step, self.plan.views_per_step), "step": step})
        return {}, {"loss": loss}, dict(method.losses)

    @torch.no_grad()
    def get_eval_loss_dict(self, step: int) -> tuple[dict, dict[str, Tensor], dict[str, float]]:
        """As for training: there is no other data."""
        return self.get_train_loss_dict(step)

    def get_eval_image_metrics_and_images(self, step: int) -> tuple[dict[str, float], dict[str, Tensor]]:
        """The object's sides in a row: colours, depth and normals, (H, 4 H, 3) in [0,1]."""
        method, resolution = self.plan.method, self.config.datamanager.eval_resolution
        views = side_views(method.field, method.background, SIDES, resolution=resolution)
        pictures = {"rgb": views.images(), "depth": depth_pictures(views), "normals": normal_pictures(views)}
        rows = {name: torch.cat(list(images), -1).permute(1, 2, 0) / 2 + 0.5 for name, images in pictures.items()}
        return {"num_rays": SIDES * resolution**2, "opacity": views.opacity.mean().item()}, rows

    def get_average_eval_image_metrics(
        self, step: int | None = None, output_path: Path | None = None, get_std: bool = False
    ) -> dict[str, float]:
        """How much of a picture the object fills, over a turntable, which is written to `output_path`."""
        config, method = self.config.datamanager, self.plan.method
        views = turntable(
            method.field, method.background, num_views=config.num_eval_angles, resolution=config.eval_resolution
        )
        if output_path is not None:
            save_turntable(views, output_path)
        shares = views.opacity.mean((1, 2, 3))
        spread = {"opacity_std": shares.std().item()} if get_std else {}
        return {"opacity": shares.mean().item()} | spread

    def get_training_callbacks(self, training_callback_attributes: TrainingCallbackAttributes) -> list:
        """Lets the trainer end after the plan's steps, and keep the artifact, turntable and mesh then."""
        trainer = training_callback_attributes.trainer
        left = self.plan.train_steps - trainer._start_step
        if left <= 0:
            raise ValueError(f"all {self.plan.train_steps} steps of this run are done; raise the method's train_steps")
        trainer.config.max_num_iterations = min(trainer.config.max_num_iterations, left)

        def keep(step: int) -> None:
            method = self.plan.method
            method.save(trainer.base_dir)
            save_object(method.field, method.background, trainer.base_dir)

        return [TrainingCallback([TrainingCallbackLocation.AFTER_TRAIN], keep)]

    def load_pipeline(self, loaded_state: dict[str, Tensor], step: int) -> None:
        """Put a checkpoint's field and background back. Raises: RuntimeError if they do not fit."""
        self.load_state_dict(loaded_state, strict=True)


def method_specification(name: str, pipeline: FieldPipelineConfig, description: str) -> MethodSpecification:
    """What an entry point of the group nerfstudio.method_configs names.   name: of the command, ns-train NAME."""
    config = TrainerConfig(
        method_name=name,
        pipeline=pipeline,
        optimizers={GROUP: {"optimizer": MethodOptimizerConfig(), "scheduler": None}},
        machine=MachineConfig(device_type="cuda" if torch.cuda.is_available() else "cpu"),
        vis="viewer+tensorboard",
        steps_per_save=160,
        steps_per_eval_batch=0,  # would be the training loss once more
        steps_per_eval_image=160,
        steps_per_eval_all_images=0,
    )
    return MethodSpecification(config=config, description=description)
