"""Class images and train.main, from a folder of pictures to an artifact."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from common.backbones import load_backbone
from common.io import load_safetensors
from common.training.optimize import make_accelerator

REPOSITORY = Path(__file__).resolve().parents[3]
SHORT = [
    "--train-steps", "3", "--batch-size", "2", "--num-class-images", "3", "--num-inference-steps", "2",
    "--learning-rate", "1e-4", "--num-samples", "0",
]  # fmt: skip


@pytest.fixture
def config(paper):
    return dataclasses.replace(paper.config.DreamBoothConfig.tiny("dog"), num_class_images=3, num_inference_steps=2)


@pytest.fixture
def make(paper, backbone):
    """Class images in a folder, as train.py asks for them."""
    accelerator = make_accelerator(torch.device("cpu"))
    return lambda config, folder: paper.class_images.class_image_latents(backbone, config, folder, accelerator)


def files(folder):
    return {path.name: path.read_bytes() for path in sorted((folder / "images").iterdir())}


def unet_of(folder):
    return load_safetensors(folder / "unet" / "diffusion_pytorch_model.safetensors")[0]


def test_class_images_are_made_once_and_completed_after_a_stop(make, config, tmp_path):
    latents = make(config, tmp_path)
    first = files(tmp_path)
    assert len(latents) == len(first) == 3
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "images").iterdir()}
    (tmp_path / "images" / "00001.png").unlink()  # a run that was stopped
    make(config, tmp_path)
    assert files(tmp_path) == first
    untouched = [path for path, when in made.items() if path.stat().st_mtime_ns == when]
    assert [path.name for path in untouched] == ["00000.png", "00002.png"] or len(untouched) == 2


def test_class_images_of_other_weights_or_settings_are_refused(make, config, backbone, tmp_path):
    make(config, tmp_path)
    before = files(tmp_path)
    with pytest.raises(ValueError, match="prompt: a photo of a dog -> a photo of a cat"):
        make(dataclasses.replace(config, class_noun="cat"), tmp_path)
    with torch.no_grad():
        backbone.unet.conv_out.bias.add_(1e-3)  # one step of training
    with pytest.raises(ValueError, match="weights.*before it is tuned"):
        make(config, tmp_path)
    assert files(tmp_path) == before


def test_pictures_of_unknown_origin_are_no_class_images(make, config, photos):
    with pytest.raises(ValueError, match="origin.json"):
        make(config, photos)


def test_train_from_the_command_line_and_again_with_resume(paper, photos, model_folder, tmp_path, capsys):
    output = tmp_path / "run"
    command = ["--backbone", str(model_folder), "--images", str(photos), "--class-noun", "dog", "--output", str(output)]
    paper.train.main([*command, *SHORT])
    base = load_backbone(model_folder).unet.state_dict()
    assert f"training unet: {sum(weight.numel() for weight in base.values()):,} numbers" in capsys.readouterr().out
    assert json.loads((output / "artifact.json").read_text())["prompt"] == "a sks dog"
    log = [json.loads(line) for line in (output / "training" / "log.jsonl").read_text().splitlines()]
    assert log[-1]["step"] == 3
    tuned = unet_of(output)
    assert all(not torch.equal(tuned[name], base[name]) for name in ("conv_in.weight", "conv_out.weight"))
    assert tuned.keys() == base.keys()

    with pytest.raises(RuntimeError, match="--resume"):
        paper.train.main([*command, *SHORT])
    with pytest.raises(RuntimeError, match="class_noun: 'dog' -> 'cat'"):
        paper.train.main(
            [*command, *SHORT, "--resume", "--class-noun", "cat", "--class-images", str(tmp_path / "cats")]
        )


def test_killed_and_resumed_run_equals_one_that_was_not(paper, photos, model_folder, tmp_path):
    """SIGKILL after the first checkpoint; the text encoder is trained too."""
    options = [
        "--backbone", str(model_folder), "--images", str(photos), "--class-noun", "dog", "--train-steps", "40",
        "--prior-loss-weight", "0", "--train-text-encoder", "--num-samples", "0",
    ]  # fmt: skip
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen(
        [
            sys.executable, "-m", f"papers.{paper.slug}.train", *options,
            "--output", str(killed), "--checkpoint-every", "5",
        ],
        cwd=REPOSITORY, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not list(killed.glob("training/checkpoints/step-*")) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (killed / "artifact.json").exists()
    paper.train.main([*options, "--output", str(killed), "--resume"])
    paper.train.main([*options, "--output", str(whole)])
    ours, expected = unet_of(killed), unet_of(whole)
    assert all(torch.equal(ours[name], expected[name]) for name in expected)
