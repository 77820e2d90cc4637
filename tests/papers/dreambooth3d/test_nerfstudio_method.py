"""`ns-train` on this paper: the same final field as our own loop makes."""

import importlib

import numpy as np
import pytest
import torch
from PIL import Image


@pytest.fixture(scope="module")
def specification(paper):
    try:
        importlib.import_module("nerfstudio.engine.trainer")
    except ModuleNotFoundError as error:
        pytest.skip(
            f"nerfstudio's trainer needs {error.name}, which is not installed: conda env create -f environment.yml"
        )
    return paper.nerfstudio_method.pcs_dreambooth3d


def test_ns_train_makes_the_final_field(specification, paper, config, backbone_folder, tmp_path, monkeypatch):
    bridge = importlib.import_module("common.three_d.nerfstudio_bridge")
    monkeypatch.setattr(bridge, "save_object", lambda *of: None)  # it takes seconds
    (tmp_path / "photos").mkdir()
    for k in range(3):
        pixels = np.random.default_rng(k).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{k}.png")
    settings = specification.config
    settings.pipeline.images, settings.pipeline.stages = tmp_path / "photos", tmp_path / "stages"
    settings.pipeline.backbone, settings.pipeline.config = backbone_folder, config
    settings.machine.device_type, settings.vis, settings.output_dir = "cpu", "tensorboard", tmp_path / "outputs"
    settings.timestamp, settings.logging.local_writer.enable = "now", False
    trainer = settings.setup()
    trainer.setup()
    trainer.train()
    made = trainer.pipeline.plan.method
    stages = paper.method.DreamBooth3D(
        lambda: paper.method.load_backbone(backbone_folder), config,
        paper.train.read_photos(tmp_path / "photos", None, 32), tmp_path / "stages",
    )  # fmt: skip
    ours = stages.run()
    torch.testing.assert_close(made.field.grid, ours.field.grid, rtol=1e-5, atol=1e-6)
    saved = paper.method.load_method(trainer.base_dir / "field.safetensors", backbone_folder)
    assert torch.equal(saved.field.grid, made.field.grid) and saved.config == config


def test_photos_are_asked_for(specification, config):
    settings = type(specification.config.pipeline)(config=config)
    with pytest.raises(ValueError, match="--pipeline.images FOLDER"):
        settings.plan(torch.device("cpu"))
