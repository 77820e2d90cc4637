"""`ns-train` on this paper: the command line, and the same object as our own loop makes."""

import importlib
from dataclasses import replace

import pytest
import torch
import tyro
import yaml

from common.backbones import load_backbone


@pytest.fixture(scope="module")
def specification(paper):
    try:
        trainer = importlib.import_module("nerfstudio.engine.trainer")
    except ModuleNotFoundError as error:
        pytest.skip(
            f"nerfstudio's trainer needs {error.name}, which is not installed: conda env create -f environment.yml"
        )
    specification = paper.nerfstudio_method.pcs_dreamfusion
    assert isinstance(specification.config, trainer.TrainerConfig)
    return specification


def parsed(specification, *arguments: str):
    """As ns-train reads them."""
    as_nerfstudio = (tyro.conf.SuppressFixed, tyro.conf.FlagConversionOff)
    default = specification.config
    return tyro.cli(type(default), default=default, args=arguments, config=as_nerfstudio)


@pytest.fixture
def flags(backbone_folder, tmp_path):
    return [
        *("--pipeline.prompt", "a bear", "--pipeline.backbone", backbone_folder, "--pipeline.config.train-steps", "4"),
        *("--pipeline.config.field-resolution", "8", "--pipeline.config.render-px", "8", "--vis", "tensorboard"),
        *("--pipeline.config.num-samples", "6", "--pipeline.config.background", "learned"),
        *("--machine.device-type", "cpu", "--logging.local-writer.enable", "False"),
        *("--output-dir", str(tmp_path / "outputs"), "--timestamp", "now"),
    ]


def test_settings_of_the_command(specification, paper):
    config = parsed(specification, "--pipeline.prompt", "a bear", "--pipeline.config.guidance-scale", "7.5")
    assert config.pipeline.prompt == "a bear" and config.pipeline.backbone == "tiny-sd"
    assert config.pipeline.config == replace(paper.config.DreamFusionConfig.tiny(), guidance_scale=7.5)
    paper_settings = paper.nerfstudio_method.pcs_dreamfusion_sd.config.pipeline
    assert paper_settings.backbone == "sd21" and paper_settings.config == paper.config.DreamFusionConfig()


def test_help_shows_the_settings(specification, capsys):
    with pytest.raises(SystemExit):
        parsed(specification, "--help")
    shown = capsys.readouterr().out
    for flag in ("--pipeline.prompt", "--pipeline.backbone", "--pipeline.config.guidance-scale"):
        assert flag in shown
    assert "--optimizers.method.optimizer.lr" not in shown  # the method's own decide


def test_a_prompt_is_asked_for(specification):
    with pytest.raises(ValueError, match='--pipeline.prompt "a bear"'):
        parsed(specification).pipeline.plan(torch.device("cpu"))


def test_ns_train_makes_the_object_that_our_loop_makes(specification, paper, flags, tmp_path, monkeypatch):
    bridge = importlib.import_module("common.three_d.nerfstudio_bridge")
    monkeypatch.setattr(bridge, "save_object", lambda *of: None)  # it takes seconds
    config = parsed(specification, *flags)
    trainer = config.setup()
    trainer.setup()
    trainer.train()
    backbone = load_backbone(config.pipeline.backbone)
    ours = paper.method.DreamFusion(backbone, config.pipeline.config, "a bear")
    paper.train.learn(ours, tmp_path / "ours")
    made = trainer.pipeline.plan.method
    for module, other in ((made.field, ours.field), (made.background, ours.background)):
        for (name, value), (_, expected) in zip(module.named_parameters(), other.named_parameters(), strict=True):
            torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6, msg=name)
    saved = paper.method.load_method(trainer.base_dir / "field.safetensors")
    assert torch.equal(saved.field.grid, made.field.grid) and saved.prompt == "a bear"


def test_a_saved_config_comes_back(specification, flags):
    """ns-render, ns-eval and ns-viewer read it."""
    config = parsed(specification, *flags)
    again = yaml.load(yaml.dump(config), Loader=yaml.Loader)
    assert again.pipeline.config == config.pipeline.config and again.pipeline.prompt == "a bear"
    assert again.pipeline.plan(torch.device("cpu")).train_steps == 4
