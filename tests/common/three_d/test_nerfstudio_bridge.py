"""Our fields in nerfstudio: its model here, its trainer where all that it imports is installed."""

import ast
import importlib
import math
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import pytest
import torch

from common.papers_index import REPOSITORY
from common.three_d.background import LearnedBackground, SolidBackground
from common.three_d.cameras import orbit_cameras
from common.three_d.fields import VoxelField, scene_box
from common.three_d.nerfstudio_model import FieldModel, FieldModelConfig, nerfstudio_orbit
from common.three_d.render import render
from common.three_d.views import side_views
from common.training.seeding import keys_of_step, seeded_generator

pytestmark = pytest.mark.filterwarnings("ignore:Using a non-tuple sequence:UserWarning")  # nerfstudio on torch >= 2.9


def model_of(ball, background=None, **settings) -> FieldModel:
    config = FieldModelConfig(**settings)
    return config.setup(field=ball, background=background or SolidBackground((0.2, 0.4, 0.6))).eval()


def test_nerfstudios_world_is_z_up_with_the_front_along_x():
    cameras = nerfstudio_orbit(4, resolution=8)
    flat, height = 2.5 * math.cos(math.radians(15)), 2.5 * math.sin(math.radians(15))
    expected = torch.tensor([[flat, 0, height], [0, flat, height], [-flat, 0, height], [0, -flat, height]])
    torch.testing.assert_close(cameras.camera_to_worlds[..., 3], expected, rtol=0, atol=1e-5)
    assert (cameras.camera_to_worlds[:, 2, 1] > 0.9).all()  # pictures are upright


@pytest.mark.parametrize("background", (None, LearnedBackground()))
def test_the_model_shows_what_our_renderer_shows(ball, background):
    """Also with a background that depends on the direction, and a box that is somewhere else."""
    ball.aabb.add_(torch.tensor([0.3, -0.2, 0.1]))
    model = model_of(ball, background)
    middle = ball.aabb.mean(0)
    ours = render(
        ball, orbit_cameras([0.0, 90.0, 180.0, 270.0], 15.0, 2.5, resolution=16, target=middle),
        background=model.background, num_samples=64,
    )  # fmt: skip
    for index, camera in enumerate(nerfstudio_orbit(4, resolution=16)[:, None]):
        seen = model.get_outputs_for_camera(camera)
        torch.testing.assert_close(seen["rgb"], ours.rgb[index], rtol=0, atol=2e-3)
        torch.testing.assert_close(seen["accumulation"], ours.opacity[index], rtol=0, atol=2e-3)
        full = ours.opacity[index] > 0.99
        torch.testing.assert_close(seen["depth"][full], ours.depth[index][full], rtol=0, atol=2e-3)
        assert full.sum() > 20


def test_the_model_of_a_ball(ball):
    """Red to the right of the front, blue to the left, 2.1 away in the middle; behind it the background."""
    front = model_of(ball).get_outputs_for_camera(nerfstudio_orbit(4, resolution=33)[0:1])
    rgb = front["rgb"]
    torch.testing.assert_close(rgb[0, 0], torch.tensor([0.2, 0.4, 0.6]))
    assert rgb[16, 20, 0] > 0.99 > 0.01 > rgb[16, 20, 2] and rgb[16, 12, 2] > 0.99 > 0.01 > rgb[16, 12, 0]
    assert front["depth"][16, 16].item() == pytest.approx(2.1, abs=0.03)


def test_the_models_state_is_the_object(ball):
    saved = model_of(ball).state_dict()
    assert set(saved) == {"field.aabb", "background.color", "device_indicator_param"}


def test_entry_points_name_objects_that_exist():
    """In the source, so that it is seen where the modules cannot be imported."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    methods = project["entry-points"]["nerfstudio.method_configs"]
    assert methods
    for name, target in methods.items():
        module, _, attribute = target.partition(":")
        path = REPOSITORY / (module.replace(".", "/") + ".py")
        tree = ast.parse(path.read_text(encoding="utf-8"))
        calls = {n.targets[0].id: n.value for n in tree.body if isinstance(n, ast.Assign)}
        assert calls[attribute].args[0].value == name == attribute.replace("_", "-")


def test_nothing_in_common_needs_the_trainer():
    named = [
        str(path.relative_to(REPOSITORY))
        for path in (REPOSITORY / "common").rglob("*.py")
        if path.name != "nerfstudio_bridge.py" and "nerfstudio_bridge" in path.read_text(encoding="utf-8")
    ]
    assert named == []


@pytest.fixture(scope="module")
def bridge() -> ModuleType:
    try:
        importlib.import_module("nerfstudio.engine.trainer")
    except ModuleNotFoundError as error:
        pytest.skip(
            f"nerfstudio's trainer needs {error.name}, which is not installed: conda env create -f environment.yml"
        )
    return importlib.import_module("common.three_d.nerfstudio_bridge")


class Painter:
    """Renders from a random side and wants it green; no prior, no data."""

    def __init__(self) -> None:
        self.field, self.background, self.losses = VoxelField(8, scene_box()), LearnedBackground(), {}
        torch.nn.init.constant_(self.background.network[0].weight, 0.1)
        torch.nn.init.constant_(self.background.network[2].weight, 0.1)
        torch.nn.init.constant_(self.background.network[4].weight, 0.1)

    def parameters(self):
        return [
            {"params": [(f"field.{n}", p) for n, p in self.field.named_parameters()], "lr": 0.05},
            {"params": [(f"background.{n}", p) for n, p in self.background.named_parameters()], "lr": 0.01},
        ]

    def training_loss(self, batch):
        generator = seeded_generator(0, "sides", *batch["sample_keys"].tolist())
        azimuths = 360 * torch.rand(len(batch["sample_keys"]), generator=generator)
        cameras = orbit_cameras(azimuths, 15.0, 2.5, resolution=6)
        wanted = torch.tensor([0.0, 1.0, 0.0])
        made = render(self.field, cameras, background=self.background, num_samples=8, generator=generator)
        loss = (made.rgb - wanted).square().mean()
        self.losses = {"green": loss.item()}
        return loss

    def save(self, folder: Path) -> None:
        (folder / "field.txt").write_text(str(self.field.grid.sum().item()))


@pytest.fixture
def make_trainer(bridge, tmp_path, monkeypatch):
    """nerfstudio's own Trainer on a Painter; `parameters` and `steps` change the plan."""
    monkeypatch.setattr(bridge, "save_object", lambda *of: None)  # tested elsewhere; it takes seconds

    def make(run: str, steps: int = 5, parameters=Painter.parameters, **settings):
        @dataclass
        class Config(bridge.FieldPipelineConfig):
            _target: type = field(default_factory=lambda: bridge.FieldPipeline)

            def plan(self, device):
                method = Painter()
                return bridge.Plan(
                    method=method, parameters=parameters(method), train_steps=steps, views_per_step=2
                )  # fmt: skip

        config = bridge.method_specification("pcs-painter", Config(), "green").config
        config.pipeline.datamanager.eval_resolution = 6
        config.pipeline.datamanager.num_eval_angles = 3
        config.machine.device_type, config.vis = "cpu", "tensorboard"
        config.output_dir, config.experiment_name, config.timestamp = tmp_path, run, "now"
        config.logging.local_writer.enable = False
        for name, value in settings.items():
            setattr(config, name, value)
        return config.setup()

    return make


def trained(trainer):
    trainer.setup()
    trainer.train()
    return trainer.pipeline.plan.method


def test_ns_train_takes_the_steps_that_a_plain_loop_takes(make_trainer):
    by_hand = Painter()
    optimizer = torch.optim.AdamW(by_hand.parameters(), lr=9.0, betas=(0.9, 0.99), weight_decay=0.0)
    for step in range(5):
        optimizer.zero_grad()
        by_hand.training_loss({"sample_keys": keys_of_step(step, 2), "step": step}).backward()
        optimizer.step()
    trainer = make_trainer("whole", steps_per_eval_image=1, steps_per_eval_batch=2, steps_per_eval_all_images=2)
    made = trained(trainer)
    assert trainer.step == 4  # the plan's steps, though nerfstudio would go on
    assert torch.equal(made.field.grid, by_hand.field.grid)
    assert all(map(torch.equal, made.background.parameters(), by_hand.background.parameters()))
    assert float((trainer.base_dir / "field.txt").read_text()) == made.field.grid.sum().item()


def test_ns_train_resumes(make_trainer):
    whole = trained(make_trainer("whole"))
    first = make_trainer("first", max_num_iterations=3)
    assert trained(first).field.grid.ne(whole.field.grid).any()
    rest = make_trainer("rest", load_dir=first.checkpoint_dir)
    assert torch.equal(trained(rest).field.grid, whole.field.grid)
    with pytest.raises(ValueError, match="all 5 steps of this run are done"):
        make_trainer("more", load_dir=rest.checkpoint_dir).setup()


def test_what_nerfstudio_is_shown(make_trainer, tmp_path):
    trainer = make_trainer("shown")
    trainer.setup()
    pipeline = trainer.pipeline
    metrics, rows = pipeline.get_eval_image_metrics_and_images(0)
    assert set(rows) == {"rgb", "depth", "normals"} and all(row.shape == (6, 24, 3) for row in rows.values())
    assert all(0 <= row.min() and row.max() <= 1 for row in rows.values())
    method = pipeline.plan.method
    views = side_views(method.field, method.background, 4, resolution=6)
    torch.testing.assert_close(rows["rgb"][:, 6:12], views.rgb[1])
    assert metrics == {"num_rays": 144, "opacity": pytest.approx(views.opacity.mean().item())}
    found = pipeline.get_average_eval_image_metrics(output_path=tmp_path / "pictures", get_std=True)
    assert found.keys() == {"opacity", "opacity_std"} and 0 < found["opacity"] < 1
    assert (tmp_path / "pictures" / "turntable.gif").is_file()
    camera, _ = pipeline.datamanager.next_eval_image(0)
    assert pipeline.model.get_outputs_for_camera(camera)["rgb"].shape == (6, 6, 3)


def test_groups_without_a_learning_rate_are_refused(make_trainer):
    trainer = make_trainer("wrong", parameters=lambda method: [{"params": method.field.parameters()}])
    with pytest.raises(ValueError, match='needs its "lr"'):
        trainer.setup()


def test_one_device_only(make_trainer):
    trainer = make_trainer("wide")
    with pytest.raises(ValueError, match="one device, not 2"):
        trainer.config.pipeline.setup(device="cpu", world_size=2)
