"""The scripts: training from folders of pictures with a stop and a resume, and the reproduction's arithmetic."""

import json

import pytest
import torch

from common.io import load_safetensors

WEIGHTS = "pytorch_custom_diffusion_weights.safetensors"


def arguments(photos, backbone_folder, output, *more, concepts=("dog",), steps=3):
    return [
        "--images", *[str(photos)] * len(concepts), "--class-nouns", *concepts, "--output", str(output),
        "--backbone", backbone_folder, "--initializer-tokens", "sks", "zwx", "--train-steps", str(steps),
        "--batch-size", "2", "--num-inference-steps", "1", "--num-samples", "0", "--no-scale-augmentation", *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def regularisation(paper, tmp_path_factory):
    """Two pictures with captions, as a folder of real ones."""
    folder = tmp_path_factory.mktemp("regularisation")
    images = torch.rand(2, 3, 40, 40, generator=torch.Generator().manual_seed(0)) * 2 - 1
    paper.regularisation.write_set(images, ["a red dog in the snow", "a dog at night"], folder)
    return folder


def test_train_on_two_concepts_with_generated_images(paper, photos, backbone_folder, tmp_path, capsys):
    more = ("--num-regularisation-images", "2", "--flip", "--learning-rate", "1e-3")
    paper.train.main(arguments(photos, backbone_folder, tmp_path / "run", *more, concepts=("dog", "cat")))
    said = capsys.readouterr().out
    assert "['<new1> dog', '<new2> cat'] on 6 pictures" in said
    assert sorted(path.name for path in (tmp_path / "run" / "regularisation").iterdir()) == ["0", "1"]
    method = paper.method.load_method(tmp_path / "run")
    assert method.config.placeholders == ["<new1>", "<new2>"] and method.config.prompt_template == "photo of a {}"
    assert all(residual.change.abs().max() > 0 for residual in method.changes.values())
    log = [json.loads(line) for line in (tmp_path / "run" / "training" / "log.jsonl").read_text().splitlines()]
    assert log[-1]["step"] == 3 and "validation_loss" in log[-1]


def test_a_stopped_run_resumes_to_the_same_bits(paper, photos, backbone_folder, regularisation, tmp_path, monkeypatch):
    def training_loss(method, batch, whole=paper.method.CustomDiffusion.training_loss):
        if batch["step"] == 3:
            raise MemoryError
        return whole(method, batch)

    more = ("--regularisation", str(regularisation))
    paper.train.main(arguments(photos, backbone_folder, tmp_path / "whole", *more, steps=4))
    stopped = arguments(photos, backbone_folder, tmp_path / "stopped", *more, "--checkpoint-every", "2", steps=4)
    with monkeypatch.context() as patched, pytest.raises(MemoryError):
        patched.setattr(paper.method.CustomDiffusion, "training_loss", training_loss)
        paper.train.main(stopped)
    assert not (tmp_path / "stopped" / "artifact.json").exists()
    paper.train.main([*stopped, "--resume"])
    for name in (WEIGHTS, "<new1>.safetensors"):
        ours, expected = (load_safetensors(tmp_path / run / name)[0] for run in ("stopped", "whole"))
        assert all(torch.equal(ours[key], expected[key]) for key in expected)


def test_numbers_of_folders_must_fit(paper, photos, backbone_folder, regularisation, tmp_path):
    with pytest.raises(ValueError, match="--images has 1 folders for class_nouns"):
        paper.train.main(
            ["--images", str(photos), "--class-nouns", "dog", "cat", "--output", str(tmp_path), "--backbone", "tiny-sd"]
        )
    with pytest.raises(ValueError, match="--regularisation has 2 folders"):
        paper.train.main(
            arguments(photos, backbone_folder, tmp_path, "--regularisation", str(regularisation), str(regularisation))
        )


def made_up_scores(paper):
    """Five subjects where every claim holds."""
    e, a = paper.experiments, paper.analysis
    values = {
        "identity error": {e.PROPOSAL: 0.2, e.INVERSION: 0.5},
        "held-out loss": {e.PROPOSAL: 0.1, e.INVERSION: 0.2},
        "compliance": {e.PROPOSAL: 0.9, e.INVERSION: 0.5},
        "class distance": {e.PROPOSAL: 1.0, e.FINE_TUNING: 3.0, e.NO_REGULARISATION: 2.0, e.UNTUNED: 0.5},
        "weight change": {"cross-attention K, V": 0.3, "self-attention": 0.1, "convolutions": 0.1},
        "constraint error": {a.MERGED: 1e-6, a.AVERAGED: 0.1, a.SUMMED: 0.1},
        "held-out change": {a.MERGED: 0.1, a.AVERAGED: 0.2, a.SUMMED: 0.4},
        "compressed loss": {a.WORDS_ALONE: 0.3, "100%": 0.1, "60%": 0.11},
    }
    return {
        score: {
            name: {f"s{i}": value + (0.0 if score == "constraint error" else 0.001 * i) for i in range(5)}
            for name, value in rows.items()
        }
        for score, rows in values.items()
    }


def test_claims(paper):
    plan, scores = paper.experiments.Plan.full(), made_up_scores(paper)
    rows = paper.reproduce.claims(scores, plan, "tiny-sd")
    assert [claim.holds for claim in rows] == ["not run"] * 6 + ["yes"] * 11
    scores["compressed loss"]["60%"] = dict.fromkeys(scores["compressed loss"]["60%"], 0.2)
    scores["constraint error"][paper.analysis.MERGED] = dict.fromkeys([f"s{i}" for i in range(5)], 0.01)
    holds = {claim.text: claim.holds for claim in paper.reproduce.claims(scores, plan, "tiny-sd")}
    assert [text for text, verdict in holds.items() if verdict == "no"] == [
        "the merged matrices meet W C^T = V^T to a relative 0.0001",
        "60% of the singular values keep nine tenths of what the matrices gain over the word alone",
    ]


def test_quick_never_writes_into_the_papers_folder(paper):
    with pytest.raises(ValueError, match="--output"):
        paper.reproduce.main(["--quick", "--output", str(paper.reproduce.HERE)])
