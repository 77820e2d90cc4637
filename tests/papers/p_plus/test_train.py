"""The scripts, on made-up pictures and numbers: training with a resume, the study's parts, the claims."""

import json
from dataclasses import replace

import pytest
import torch

from common.io import load_safetensors
from common.toyworld.benchmark import subjects


def test_train_stops_and_resumes(paper, images, backbone_folder, tmp_path, monkeypatch, capsys):
    """Three steps at once, and with a stop after two: the same bits."""
    arguments = [
        *("--images", str(images), "--backbone", backbone_folder, "--initializer-token", "duck"),
        *("--num-inference-steps", "1", "--validate-every", "0", "--checkpoint-every", "2", "--train-steps", "3"),
        *("--batch-size", "1", "--kind", "plain"),
    ]
    paper.train.main([*arguments, "--output", str(tmp_path / "whole")])

    def training_loss(method, batch, whole=paper.method.PPlus.training_loss):
        if batch["step"] == 2:
            raise MemoryError
        return whole(method, batch)

    with monkeypatch.context() as patched, pytest.raises(MemoryError):
        patched.setattr(paper.method.PPlus, "training_loss", training_loss)
        paper.train.main([*arguments, "--output", str(tmp_path / "stopped")])
    paper.train.main([*arguments, "--output", str(tmp_path / "stopped"), "--resume"])
    found = [load_safetensors(tmp_path / run / "layer_words.safetensors")[0] for run in ("whole", "stopped")]
    assert torch.equal(found[0]["words"], found[1]["words"])
    rows = [json.loads(line) for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
    assert {"loss", "validation_loss"} <= {name for row in rows for name in row}
    assert (tmp_path / "whole" / "samples" / "step-00000003.png").is_file()
    assert "training 4 words, 128 numbers" in capsys.readouterr().out


def test_the_study_keeps_the_loss_of_a_tenth_of_the_steps(paper, images, backbone_folder, tmp_path):
    e, (subject,) = paper.experiments, subjects(1)
    plan = e.Plan.quick()
    plan = replace(plan, config=replace(plan.config, train_steps=20, batch_size=1))
    assert plan.early_step == 2
    run = e.training_folder(tmp_path, subject.name)
    method = e.train_on_subject(backbone_folder, plan, subject, images, run)
    losses = e.validation_losses(run)
    assert sorted(losses) == list(range(2, 21, 2)) and len(set(losses.values())) == 10
    assert method.config.placeholder == f"<{subject.class_noun}>"


def test_donors_differ_in_class_and_colour(paper):
    every = subjects(5)
    for subject in every:
        donor = paper.experiments.donor_of(subject, every)
        assert all(donor.attributes[name] != subject.attributes[name] for name in ("class", "color"))
    assert paper.experiments.donor_of(every[0], every[:1]) is every[0]


def made_up_scores(paper):
    """Five subjects where every claim holds."""
    e = paper.experiments
    values = {
        "held-out loss": {e.PROPOSAL: 0.1, e.INVERSION: 0.2, e.EARLY: 0.15, e.TIED: 0.2},
        "identity": {e.PROPOSAL: 0.9, e.INVERSION: 0.8},
        "compliance": {e.PROPOSAL: 0.7, e.INVERSION: 0.6},
        e.SHAPE: {e.INNER: 0.8, e.OUTER: 0.1, e.RANDOM: 0.3},
        e.COLOUR: {e.INNER: 0.2, e.OUTER: 0.7, e.RANDOM: 0.4},
        "mix": {e.PROPOSAL: 0.8, e.AVERAGE: 0.5},
        "density": {e.PROPOSAL: -10.0, e.INVERSION: -20.0},
    }
    return {
        score: {name: {f"s{k}": value + 0.001 * k for k in range(5)} for name, value in methods.items()}
        for score, methods in values.items()
    }


def test_claims_compare_the_right_sides(paper):
    e, plan, scores = paper.experiments, paper.experiments.Plan.full(), made_up_scores(paper)
    not_run, *rows = paper.reproduce.claims(scores, plan, "tiny-sd")
    assert not_run.holds == "not run" and not_run.ours is None
    assert [row.holds for row in rows] == ["yes"] * 11
    assert rows[0].ours.mean == pytest.approx(-0.05) and rows[4].ours.mean == pytest.approx(0.5)
    assert rows[7].ours.mean == pytest.approx(0.5)
    scores["held-out loss"][e.TIED]["s0"] += 1e-4
    assert paper.reproduce.claims(scores, plan, "tiny-sd")[-1].holds == "no"
    swapped = scores | {e.SHAPE: scores[e.COLOUR], e.COLOUR: scores[e.SHAPE]}
    assert [row.holds for row in paper.reproduce.claims(swapped, plan, "tiny-sd")[5:10]] == ["no"] * 4 + ["yes"]


def test_quick_never_writes_into_the_papers_folder(paper):
    with pytest.raises(ValueError, match="--output"):
        paper.reproduce.main(["--quick", "--output", str(paper.reproduce.HERE)])
