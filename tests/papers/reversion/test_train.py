"""The exemplar folder, training with a resume, the claims."""

import json

import pytest
import torch

from common.io import load_safetensors


@pytest.fixture
def exemplars(images):
    names = sorted(path.name for path in images.iterdir() if path.suffix == ".png")
    table = {name: [f"duck {{}} chair {i}", f"a red duck {{}} a blue chair {i}"] for i, name in enumerate(names)}
    (images / "text.json").write_text(json.dumps(table))
    return images


def test_the_official_folder_layout(paper, backbone, exemplars):
    """Pictures and text.json, as the release lays them out: several templates a picture, one is drawn a sample."""
    dataset = paper.exemplars.RelationDataset(exemplars, backbone, "<R>", seed=0)
    assert dataset[0]["prompt"] == "duck <R> chair 0" and dataset[0]["latents"].shape == (4, 8, 8)
    drawn = {dataset.sample(1, key)["prompt"] for key in range(20)}
    assert drawn == {"duck <R> chair 1", "a red duck <R> a blue chair 1"}
    first, again = dataset.sample(1, 5), dataset.sample(1, 5)
    assert first["prompt"] == again["prompt"] and torch.equal(first["latents"], again["latents"])
    assert not torch.equal(dataset.sample(1, 6)["latents"], first["latents"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"text.json is missing; write"),
        ("{", "text.json is no JSON"),
        ("{}", "must hold"),
        ('{"00.png": []}', "needs a list of texts"),
        ('{"00.png": ["duck on chair"]}', "hold {} once each"),
        ('{"00.png": ["duck {} chair {}"]}', "hold {} once each"),
        ('{"00.png": ["duck {} chair"], "gone.png": ["x {} y"]}', "differ in"),
    ],
)
def test_bad_text_files_are_named(paper, backbone, images, text, message):
    if text is not None:
        (images / "text.json").write_text(text)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        paper.exemplars.RelationDataset(images, backbone, "<R>", seed=0)


def test_train_stops_and_resumes(paper, exemplars, backbone_folder, tmp_path, monkeypatch, capsys):
    """Three steps at once, and with a stop after two: the same bits."""
    arguments = [
        *("--images", str(exemplars), "--backbone", backbone_folder, "--num-inference-steps", "1"),
        *("--validate-every", "0", "--checkpoint-every", "2", "--train-steps", "3", "--batch-size", "1"),
    ]
    paper.train.main([*arguments, "--output", str(tmp_path / "whole")])

    def training_loss(method, batch, whole=paper.method.ReVersion.training_loss):
        if batch["step"] == 2:
            raise MemoryError
        return whole(method, batch)

    with monkeypatch.context() as patched, pytest.raises(MemoryError):
        patched.setattr(paper.method.ReVersion, "training_loss", training_loss)
        paper.train.main([*arguments, "--output", str(tmp_path / "stopped")])
    paper.train.main([*arguments, "--output", str(tmp_path / "stopped"), "--resume"])
    found = [load_safetensors(tmp_path / run / "learned_embeds.safetensors")[0] for run in ("whole", "stopped")]
    assert torch.equal(found[0]["<R>"], found[1]["<R>"])
    assert "training <R>, 32 numbers" in capsys.readouterr().out


def made_up_scores(paper):
    """Five relations where every claim holds."""
    e = paper.experiments
    values = {
        "learned": {e.PROPOSAL: 0.9, e.NO_STEERING: 0.8, e.UNIFORM: 0.8, e.INVERSION: 0.7, e.FINE_TUNING: 0.6},
        "both": {e.PROPOSAL: 0.5, e.INVERSION: 0.3, e.FINE_TUNING: 0.2},
        "leakage": {e.PROPOSAL: 0.1, e.NO_STEERING: 0.2, e.INVERSION: 0.3},
        "held-out loss": {e.PROPOSAL: 0.101, e.NO_STEERING: 0.1},
        e.STEERING: {e.PROPOSAL: 0.3, e.NO_STEERING: 0.0},
        e.LOW_NOISE: {e.PROPOSAL: 0.3, e.UNIFORM: 0.2},
        e.HIGH_NOISE: {e.PROPOSAL: 0.01, e.UNIFORM: 0.02},
    }
    return {
        score: {name: {f"s{k}": value + 0.001 * k for k in range(5)} for name, value in methods.items()}
        for score, methods in values.items()
    }


def test_claims_compare_the_right_sides(paper):
    plan, scores = paper.experiments.Plan.full(), made_up_scores(paper)
    not_run, *rows = paper.reproduce.claims(scores, plan, "tiny-sd")
    assert not_run.holds == "not run" and {row.holds for row in rows} == {"yes"} and len(rows) == 12
    flipped = {
        score: {name: {s: -v for s, v in row.items()} for name, row in methods.items()}
        for score, methods in scores.items()
    }
    flipped["held-out loss"] = {paper.experiments.PROPOSAL: {"a": 0.12}, paper.experiments.NO_STEERING: {"a": 0.1}}
    assert {row.holds for row in paper.reproduce.claims(flipped, plan, "tiny-sd")[1:]} == {"no"}


def test_what_is_looked_into(paper, backbone):
    (task,) = paper.experiments.relation_tasks(1)
    method = paper.method.ReVersion(backbone, paper.config.ReVersionConfig.tiny())
    found = paper.experiments.looked_into(method, task)
    assert set(found) == {"steering", "low-noise loss", "high-noise loss"}
    with torch.no_grad():
        method.relation.copy_(method.word_table[method.prepositions].mean(0))
    assert paper.experiments.looked_into(method, task)["steering"] > found["steering"]
