"""train.main on mp4 clips and pictures, a resume, mixing from the command line, variants, and the reproduction."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from common.backbones import load_backbone
from common.data.videos import read_frames, video_info
from common.evaluation.motion_study import MotionStudy
from common.io import load_safetensors
from common.sampling.clips import save_mp4
from common.toyworld.judge import Judge
from common.toyworld.motion_tasks import motion_tasks

from .conftest import randn

SHORT = [
    "--train-steps", "3", "--rank", "2", "--num-frames", "4", "--resolution-px", "32", "--num-inference-steps", "2",
    "--num-inversion-steps", "2", "--spatial-off-share", "0", "--dropout", "0.1",
]  # fmt: skip


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Two videos of six frames with captions."""
    folder = tmp_path_factory.mktemp("clips")
    for k in range(2):
        save_mp4(torch.tanh(randn(3, 6, 48, 40, seed=k)), folder / f"{k}.mp4", fps=8)
        (folder / f"{k}.txt").write_text(f"a video of a {('duck', 'cat')[k]} moving zigzag")
    return folder


@pytest.fixture
def command(clips, video_backbone_folder):
    return ["--backbone", video_backbone_folder, "--clips", str(clips), *SHORT]


def test_clips_to_artifacts_from_the_command_line(paper, command, tmp_path, capsys):
    """Numbers: rank 2, three transformers within frames of width 32, 16 and 16, and four across; see test_dual_path."""
    paper.train.main([*command, "--output", str(tmp_path / "run")])
    printed = capsys.readouterr().out
    method = paper.method.load_method(tmp_path / "run")
    for path, pairs in (("spatial_000", 18), ("spatial_001", 18), ("temporal", 40)):
        numbers = sum(parameter.numel() for _, parameter in method.paths.pairs(path))
        assert f"training {path}: {pairs} pairs, {numbers:,} numbers" in printed
    assert all(p.any() for name, p in method.parameters())  # U too: both clips were seen
    assert method.inverted.shape == (2, 4, 4, 8, 8) and method.config.train_steps == 3
    logged = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[0])
    assert {"spatial_loss", "temporal_loss"} <= logged.keys()
    assert Image.open(tmp_path / "run" / "samples" / "step-00000003.png").size[0] >= 4 * 32
    with pytest.raises(RuntimeError, match="--resume"):
        paper.train.main([*command, "--output", str(tmp_path / "run")])


def test_a_stopped_run_goes_on_with_the_same_bits(paper, command, tmp_path, monkeypatch):
    options = [*command, "--checkpoint-every", "2", "--no-invert"]
    paper.train.main([*options, "--output", str(tmp_path / "whole")])

    def training_loss(method, batch, whole=paper.method.MotionDirector.training_loss):
        if batch["step"] == 2:
            raise MemoryError
        return whole(method, batch)

    with monkeypatch.context() as patched, pytest.raises(MemoryError):
        patched.setattr(paper.method.MotionDirector, "training_loss", training_loss)
        paper.train.main([*options, "--output", str(tmp_path / "stopped")])
    paper.train.main([*options, "--output", str(tmp_path / "stopped"), "--resume"])
    assert not (tmp_path / "whole" / "inverted_noise.safetensors").exists()
    for name in ("temporal_lora", "spatial_000_lora", "spatial_001_lora"):
        found, expected = (load_safetensors(tmp_path / run / f"{name}.safetensors")[0] for run in ("stopped", "whole"))
        assert all(torch.equal(found[key], expected[key]) for key in expected), name


def test_motion_and_look_are_mixed_from_the_command_line(paper, command, photos, tmp_path, capsys):
    paper.train.main([*command[:2], *SHORT, "--images", str(photos), "--prompt", "a photo of a sks cat",
                      "--flip", "--output", str(tmp_path / "look")])  # fmt: skip
    assert "training spatial_000: 18 pairs" in capsys.readouterr().out
    assert not (tmp_path / "look" / "temporal_lora.safetensors").exists()
    paper.train.main([*command, "--prompt", "a video of a thing moving zigzag", "--output", str(tmp_path / "motion")])
    options = ["--motion", str(tmp_path / "motion"), "--prompt", "a video of a cat moving zigzag", "--seeds", "0", "1"]
    paper.generate.main([*options, "--appearance", str(tmp_path / "look"), "--noise-prior", "0.5", "--upscale", "2",
                         "--output", str(tmp_path / "cat.mp4")])  # fmt: skip
    for seed in (0, 1):
        info = video_info(tmp_path / f"cat-{seed}.mp4")
        assert read_frames(info, [0, 3]).shape == (2, 64, 64, 3) and len(info.times_s) == 4
    with pytest.raises(ValueError, match=r"must end in .mp4"):
        paper.generate.main([*options, "--output", str(tmp_path / "cat.gif")])


def test_either_clips_or_images(paper, tmp_path):
    for given in ({}, {"clips": tmp_path, "images": tmp_path}):
        with pytest.raises(ValueError, match="give either clips"):
            paper.train.TrainOptions(output=tmp_path, **given)


# Variants


def test_ablation_and_baseline_losses(paper, video_backbone, small, batch, train_a_little):
    """Without debiasing the loss is smaller by L_ad; jointly, all pairs learn from all frames."""
    whole, plain, joint = (
        train_a_little(kind(load_backbone(video_backbone.name), small(spatial_off_share=0.0)))
        for kind in (paper.method.MotionDirector, paper.variants.WithoutDebiasing, paper.variants.JointLoRA)
    )
    losses = {method: method.training_loss(batch(3)) for method in (whole, plain, joint)}
    assert whole.last_losses["spatial_loss"] == plain.last_losses["spatial_loss"]
    assert 0 < plain.last_losses["temporal_loss"] < whole.last_losses["temporal_loss"]
    assert losses[joint].item() == pytest.approx(plain.last_losses["temporal_loss"], rel=1e-5)
    losses[joint].backward()
    assert all(parameter.grad is not None for _, parameter in joint.parameters())


def test_joint_mixing_learns_clip_and_pictures_at_once(paper, video_backbone, small, batch, train_a_little):
    method = train_a_little(paper.variants.JointMixing(video_backbone, small()))
    clip = batch(3)
    shared = {name: clip.pop(name) for name in ("sample_keys", "step")}
    image = {"latents": randn(1, 4, 8, 8), "prompt": ["a photo of a sks cat"]}
    loss = method.training_loss({"clip": clip, "image": image, **shared})
    of_clip = paper.variants.JointLoRA.training_loss(method, {**clip, **shared})
    assert loss.item() == pytest.approx((of_clip + method._picture_loss(image, shared["sample_keys"])).item(), rel=1e-5)
    assert loss.item() > of_clip.item()
    loss.backward()
    assert all(parameter.grad is not None for _, parameter in method.parameters())


# What reproduce.py measures


def test_mixing_asks_for_things_that_the_clip_does_not_show(paper):
    tasks = motion_tasks(4)
    chosen = [paper.experiments.subject_of(task) for task in tasks]
    for task, subject in zip(tasks, chosen, strict=True):
        (entity,) = task.entities
        assert subject.class_noun != entity.noun and subject.entity.color != entity.color
        (prompt,) = paper.experiments.mixed_task(task).prompts
        assert prompt.text == f"a video of a sks {subject.class_noun} moving {task.name}"
    assert len({subject.name for subject in chosen}) == 4


def test_spread_and_likeness(paper):
    """Two equal clips are not apart; clips of the subject's own pictures are more like it than noise is."""
    judge, (task,) = Judge.load(), motion_tasks(1)
    subject = paper.experiments.subject_of(task)
    own = subject.images[:4].transpose(0, 1)[None]
    other = torch.from_numpy(np.random.default_rng(0).uniform(-1, 1, own.shape)).float()
    assert paper.experiments.spread(judge, [torch.cat([own, own])]) == pytest.approx(0, abs=1e-6)
    assert paper.experiments.spread(judge, [torch.cat([own, other])]) > 0.1
    likeness = [paper.experiments.likeness(judge, [clip], task) for clip in (own, other)]
    assert likeness[0] > likeness[1] + 0.3


def test_a_clip_is_learned_and_found_again(paper, video_backbone_folder, tmp_path):
    """The candidates of the study: training writes a run that is taken up again, the noise prior trains nothing."""
    plan, (task,) = paper.experiments.Plan.quick(), motion_tasks(1)
    proposal = paper.experiments.trained(video_backbone_folder, plan, paper.method.MotionDirector)
    method = proposal.train(task, tmp_path / "training")
    assert method.inverted.shape == (1, 4, 8, 16, 16)
    again = proposal.train(task, tmp_path / "training")
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(method.parameters(), again.parameters(), strict=True))
    method.save(tmp_path / "MotionDirector" / "artifacts" / task.name)
    prior = paper.experiments.with_noise_prior(video_backbone_folder, plan, tmp_path)
    assert not prior.settings == proposal.settings
    found = prior.train(task, tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists() and found.config.noise_prior == 0.5
    prompt = task.prompts[0].text
    assert torch.equal(found.generate(prompt, seeds=[0]), method.generate(prompt, seeds=[0], noise_prior=0.5))


def made_up_scores(paper, plan):
    """Four motions where every claim holds."""
    e, prior = paper.experiments, plan.prior_name
    values = {
        "direction": {e.PROPOSAL: 0.8, e.UNTUNED: 0.1},
        "trajectory error": {e.PROPOSAL: 4.0, e.JOINT: 3.5, prior: 3.0},
        "leakage": {e.PROPOSAL: 0.1, e.JOINT: 0.5, e.NO_DEBIASING: 0.3},
        e.DIVERSITY: {e.PROPOSAL: 0.4, prior: 0.2},
        e.MIXING + "direction": {e.MIXED: 0.7, e.JOINT_MIXED: 0.5, e.UNTUNED: 0.1},
        e.MIXING + e.IDENTITY: {e.MIXED: 0.8, e.JOINT_MIXED: 0.7, e.UNTUNED: 0.4},
    }
    return {
        score: {name: {f"m{k}": value + 0.001 * k for k in range(4)} for name, value in methods.items()}
        for score, methods in values.items()
    }


def test_claims_compare_the_right_sides(paper):
    plan = paper.experiments.Plan.full()
    scores = made_up_scores(paper, plan)
    rows = paper.reproduce.claims(scores, plan, "tiny-video")
    assert [row.holds for row in rows] == ["not run"] * 3 + ["yes"] * 10
    assert all("tiny-video, 4 motions" in row.how for row in rows[3:])
    flipped = {
        score: {name: {s: -5 * v for s, v in row.items()} for name, row in methods.items()}
        for score, methods in scores.items()
    }
    flipped["trajectory error"][paper.experiments.JOINT] = {f"m{k}": -30.0 for k in range(4)}
    assert {row.holds for row in paper.reproduce.claims(flipped, plan, "tiny-video")[3:]} == {"no"}


def test_the_plan_is_what_the_card_says(paper):
    plan = paper.experiments.Plan.full()
    assert plan.study == MotionStudy(num_tasks=4, num_prompts=2, seeds=(0, 1)) and plan.mixing.num_tasks == 4
    assert plan.prior_name == "noise prior 0.5" and plan.config == paper.config.MotionDirectorConfig.tiny()


def test_quick_never_writes_into_the_papers_folder(paper):
    with pytest.raises(ValueError, match="--output"):
        paper.reproduce.main(["--quick", "--output", str(paper.reproduce.HERE)])
