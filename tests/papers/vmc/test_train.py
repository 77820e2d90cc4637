"""The script on a video file, a resume, the claims, the study end to end."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from common.backbones import load_backbone
from common.data.videos import video_info
from common.evaluation.motion_study import MotionStudy
from common.io import load_safetensors
from common.training.seeding import keys_of_step

ARTIFACT = "temporal_attention.safetensors"


def arguments(video, backbone_folder, output, *more, steps=3):
    return [
        "--video", str(video), "--prompt", "a square moving right", "--backbone", backbone_folder,
        "--output", str(output), "--num-frames", "4", "--train-steps", str(steps), "--num-inference-steps", "1",
        "--learning-rate", "1e-3", *more,
    ]  # fmt: skip


def test_train_on_an_mp4_and_make_clips(paper, video, video_backbone_folder, tmp_path, capsys):
    more = ("--prompts", "a red car moving right", "a duck moving right", "--residual-loss", "official")
    paper.train.main(arguments(video, video_backbone_folder, tmp_path, *more))
    said = capsys.readouterr().out
    assert "training 18 matrices of temporal attention" in said
    made = [video_info(tmp_path / "clips" / f"{i}.mp4") for i in range(2)]
    assert [(info.num_frames, info.width_px, info.height_px, info.fps) for info in made] == [(4, 32, 32, 8.0)] * 2
    method = paper.method.load_method(tmp_path)
    assert method.config.residual_loss == "official" and method.config.rank == 0
    assert method.config.guidance_scale == 9.0  # a folder is not tiny-video: the paper's defaults
    assert method.prompt == "a square moving right"
    assert all(parameter.abs().max() > 0 for _, parameter in method.parameters())
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert log[-1]["step"] == 3 and "validation_loss" in log[-1]


def test_a_stopped_run_resumes_to_the_same_bits(paper, video, video_backbone_folder, tmp_path, monkeypatch):
    def training_loss(method, batch, whole=paper.method.VMC.training_loss):
        if batch["step"] == 3:
            raise MemoryError
        return whole(method, batch)

    paper.train.main(arguments(video, video_backbone_folder, tmp_path / "whole", steps=4))
    stopped = arguments(video, video_backbone_folder, tmp_path / "stopped", "--checkpoint-every", "2", steps=4)
    with monkeypatch.context() as patched, pytest.raises(MemoryError):
        patched.setattr(paper.method.VMC, "training_loss", training_loss)
        paper.train.main(stopped)
    assert not (tmp_path / "stopped" / ARTIFACT).exists()
    paper.train.main([*stopped, "--resume"])
    ours, expected = (load_safetensors(tmp_path / run / ARTIFACT)[0] for run in ("stopped", "whole"))
    assert ours.keys() == expected.keys() and all(torch.equal(ours[name], expected[name]) for name in expected)


def test_which_frames_are_the_clip(paper, video, video_backbone, tmp_path):
    config = replace(paper.config.VMCConfig.tiny(), num_frames=3)
    stored, spaced = (paper.train.load_clip(video, video_backbone, config, **how) for how in ({}, {"stride": 2}))
    assert stored.windows[0].tolist() == [[0, 1, 2]] and spaced.windows[0].tolist() == [[0, 2, 4]]
    assert stored.latents(0).shape == (4, 3, 8, 8)
    for name in ("a", "b"):
        shutil.copy(video, tmp_path / f"{name}.mp4")
    with pytest.raises(ValueError, match="VMC learns from one clip, but .* holds 2 videos"):
        paper.train.load_clip(tmp_path, video_backbone, config)
    with pytest.raises(ValueError, match="it has 6 frames; 8 with stride 1"):
        paper.train.load_clip(video, video_backbone, paper.config.VMCConfig.tiny())


def made_up_scores(paper):
    """Four motions where every claim holds."""
    e = paper.experiments
    values = {
        "trajectory error": {e.PROPOSAL: 3.0, e.DENOISING: 5.0, e.TUNE_A_VIDEO: 2.5, e.INVERSION: 3.5},
        "direction": {e.PROPOSAL: 0.9, e.DENOISING: 0.7, e.SIGNED: 0.6, e.ABSOLUTE: 0.2},
        "speed error": {e.PROPOSAL: 0.1, e.DENOISING: 0.3},
        "leakage": {e.PROPOSAL: 0.1, e.TUNE_A_VIDEO: 0.5, e.INVERSION: 0.6},
        "motion": {e.SIGNED: 0.6, e.ABSOLUTE: 0.3},
    }
    return {
        score: {name: {f"m{k}": value + 0.001 * k for k in range(4)} for name, value in methods.items()}
        for score, methods in values.items()
    }


def test_claims_compare_the_right_sides(paper):
    plan, scores = paper.experiments.Plan.full(), made_up_scores(paper)
    text_alignment, users, *rows = paper.reproduce.claims(scores, plan, "tiny-video")
    assert text_alignment.holds == users.holds == "not run"
    assert len(rows) == 9 and {row.holds for row in rows} == {"yes"}
    flipped = {
        score: {name: {motion: -2 * v for motion, v in row.items()} for name, row in methods.items()}
        for score, methods in scores.items()
    }
    flipped["trajectory error"][paper.experiments.INVERSION] = {f"m{k}": 9.0 for k in range(4)}
    flipped["trajectory error"][paper.experiments.TUNE_A_VIDEO] = {f"m{k}": -9.0 for k in range(4)}
    assert {row.holds for row in paper.reproduce.claims(flipped, plan, "tiny-video")[2:]} == {"no"}
    near = [row for row in rows if "or tied" in row.text]
    assert [row.detail.split(" (")[1].split(")")[0] for row in near] == ["VMC", "inversion alone"]


@pytest.fixture(scope="module")
def wide_backbone_folder(video_backbone_folder, tmp_path_factory) -> str:
    """The small network for pictures of 64 px, which the judges read."""
    folder = shutil.copytree(video_backbone_folder, tmp_path_factory.mktemp("models") / "small-video-64")
    for part in ("unet", "vae"):
        path = Path(folder) / part / "config.json"
        settings = json.loads(path.read_text())
        path.write_text(json.dumps(settings | {"sample_size": 2 * settings["sample_size"]}))
    return str(folder)


def test_the_reproduction_runs_and_is_taken_up_again(paper, wide_backbone_folder, tmp_path, monkeypatch):
    """Everything on one motion; the second call trains nothing; runs without inversion use the trained artifact."""
    monkeypatch.chdir(tmp_path)
    trained = []
    loss = paper.method.VMC.predict_noise
    monkeypatch.setattr(
        paper.method.VMC, "predict_noise", lambda self, batch: trained.append(type(self).__name__) or loss(self, batch)
    )
    call = ["--quick", "--backbone", wide_backbone_folder, "--output", "out"]
    paper.reproduce.main(call)
    results = json.loads(Path("out/results.json").read_text())
    assert len(results["claims"]) == 11 and results["slug"] == paper.slug and results["steps"] == 2
    assert all(Path("out", figure["file"]).is_file() for figure in results["figures"])
    assert trained == ["VMC"] * 2 + ["DenoisingTuning"] * 2 + ["TuneAVideoStyle"] * 2 + ["VMC"] * 2

    runs = Path("out/runs")
    e = paper.experiments
    (task,) = e.Plan.quick().tasks
    paths = [
        runs / e.folder_name(name) / "artifacts" / e.folder_name(task.name) / ARTIFACT
        for name in (e.PROPOSAL, e.SIGNED, e.ABSOLUTE, e.INVERSION)
    ]
    proposal, signed, absolute, untuned = (load_safetensors(path)[0] for path in paths)
    assert all(torch.equal(proposal[name], signed[name]) for name in proposal)
    assert any(not torch.equal(proposal[name], absolute[name]) for name in proposal)
    assert all(not value.any() for name, value in untuned.items() if name != "source_latents")

    paper.reproduce.main(call)
    assert len(trained) == 8 and json.loads(Path("out/results.json").read_text())["claims"] == results["claims"]


def test_full_plan_asks_for_four_motions(paper):
    plan = paper.experiments.Plan.full()
    assert plan.study == MotionStudy(num_tasks=4, clips_each=1, num_prompts=2, seeds=(0, 1))
    assert plan.config == paper.config.VMCConfig.tiny() and len(plan.tasks) == 4


def test_prompts_of_training_have_no_appearance(paper):
    """What VMC is told of a clip names its object and motion; the baseline after Tune-A-Video is told all."""
    for task in paper.experiments.Plan.full().tasks:
        assert task.entities[0].color in task.captions[0] and task.entities[0].color not in task.plain_captions[0]
        assert task.name in task.plain_captions[0] and task.entities[0].noun in task.plain_captions[0]
    variants = paper.experiments.VARIANTS
    assert [name for name, variant in variants.items() if variant.full_caption] == [paper.experiments.TUNE_A_VIDEO]


def test_timesteps_and_noise_belong_to_the_draw(paper, video_backbone):
    """The same sample key gives the same noise whatever the batch, so that a run can be shared and resumed."""
    config = replace(paper.config.VMCConfig.tiny(), num_frames=4)
    method = paper.method.VMC(load_backbone(video_backbone.name), config)
    latents = torch.zeros(2, 4, 4, 8, 8)
    whole = {"latents": latents, "prompt": ["a duck"] * 2, "sample_keys": keys_of_step(3, 2)}
    part = {"latents": latents[1:], "prompt": ["a duck"], "sample_keys": keys_of_step(3, 2)[1:]}
    with torch.no_grad():
        assert torch.equal(method.predict_noise(whole)[1][1:], method.predict_noise(part)[1])
