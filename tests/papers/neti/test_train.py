"""The scripts, on made-up pictures and numbers: training with a resume, the study's trainings, the claims."""

import json
from dataclasses import replace

import pytest
import torch

from common.io import load_safetensors
from common.toyworld.benchmark import subjects


def test_train_stops_and_resumes(paper, images, backbone_folder, tmp_path, monkeypatch, capsys):
    """Three steps at once, and with a stop after two: the same bits."""
    arguments = [
        *("--images", str(images), "--backbone", backbone_folder, "--super-category-token", "duck"),
        *("--num-inference-steps", "1", "--validate-every", "0", "--checkpoint-every", "2", "--train-steps", "3"),
        *("--batch-size", "1"),
    ]
    paper.train.main([*arguments, "--output", str(tmp_path / "whole")])

    def training_loss(method, batch, whole=paper.method.NeTI.training_loss):
        if batch["step"] == 2:
            raise MemoryError
        return whole(method, batch)

    with monkeypatch.context() as patched, pytest.raises(MemoryError):
        patched.setattr(paper.method.NeTI, "training_loss", training_loss)
        paper.train.main([*arguments, "--output", str(tmp_path / "stopped")])
    paper.train.main([*arguments, "--output", str(tmp_path / "stopped"), "--resume"])
    mappers = [load_safetensors(tmp_path / run / "mapper.safetensors") for run in ("whole", "stopped")]
    assert all(torch.equal(value, mappers[1][0][name]) for name, value in mappers[0][0].items())
    assert mappers[0][1]["slug"] == paper.slug
    rows = [json.loads(line) for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
    assert {"loss", "validation_loss"} <= {name for row in rows for name in row}
    assert (tmp_path / "whole" / "samples" / "step-00000003.png").is_file()
    assert "training input_layer.weight: (40, 2048), 81,920 numbers" in capsys.readouterr().out


def test_truncations_of_the_study_share_one_training(paper, images, backbone_folder, tmp_path, monkeypatch):
    e, (subject,), steps = paper.experiments, subjects(1), []
    config = replace(paper.config.NeTIConfig.tiny(), train_steps=1, batch_size=1)

    def training_loss(method, batch, whole=paper.method.NeTI.training_loss):
        steps.append(batch["step"])
        return whole(method, batch)

    monkeypatch.setattr(paper.method.NeTI, "training_loss", training_loss)
    whole, cut = (e.candidate(backbone_folder, config, e.PROPOSAL, tmp_path, keep=keep, steps=1) for keep in (128, 0))
    learned = [part.train(subject, images, tmp_path / "unused") for part in (whole, cut)]
    assert steps == [0]
    assert whole.settings != cut.settings and whole.words == "<{class}>"
    pictures = [one.generate(f"a photo of a <{subject.class_noun}>", seeds=[0]) for one in learned]
    assert not torch.equal(*pictures)
    latents = torch.zeros(1, 4, 8, 8)
    assert learned[0].validation_loss(latents) == learned[0].method.validation_loss(latents)
    assert learned[0].validation_loss(latents) != learned[1].validation_loss(latents)


def test_variants_are_what_they_say(paper):
    e, tiny = paper.experiments, paper.config.NeTIConfig.tiny()
    configs = {name: replace(tiny, **variant.changes) for name, variant in e.VARIANTS.items()}
    assert configs[e.PROPOSAL] == configs[e.TIME] == configs[e.LAYER] == tiny
    assert not configs[e.NO_BYPASS].bypass and configs[e.NO_DROPOUT].nested_dropout == 0
    assert {c.train_steps for c in configs.values()} == {tiny.train_steps}
    assert {c.batch_size for c in configs.values()} == {tiny.batch_size}
    assert e.VARIANTS[e.XTI].method is paper.variants.ExtendedTextualInversion


def test_rank_correlation_by_hand(paper):
    """1 - 6 sum d^2 / (n (n^2 - 1)): ranks 4 3 1 2 against 1 2 3 4 give d^2 = 9 + 1 + 4 + 4, rho = 1 - 108 / 60."""
    assert paper.experiments.rank_correlation([0.9, 0.8, 0.1, 0.3]) == pytest.approx(-0.8)
    assert paper.experiments.rank_correlation([0.5, 0.5, 0.5]) == 0


def test_compliance_at_equal_identity_by_hand(paper):
    """Common identities 0.4..0.8: the first falls from 0.7 to 0.5 there, the second from 0.4 to 0.2."""
    compared = paper.experiments.compliance_at_equal_identity([(0.8, 0.5), (0.2, 0.8)], [(0.4, 0.4), (1.0, 0.1)])
    assert compared == pytest.approx((0.6, 0.3))
    apart = paper.experiments.compliance_at_equal_identity([(0.2, 0.8), (0.3, 0.7)], [(0.6, 0.4), (0.9, 0.1)])
    assert apart == pytest.approx((0.7, 0.4))  # nothing in common: the nearest ends


def made_up_scores(paper):
    """Five subjects where every claim holds."""
    e = paper.experiments
    plan, values = e.Plan.full(), {}
    values["held-out loss"] = {
        e.PROPOSAL: 0.1, e.NO_BYPASS: 0.12, e.XTI: 0.13, e.INVERSION: 0.2, e.TIME: 0.15, e.LAYER: 0.11,
    }  # fmt: skip
    for i, keep in enumerate(plan.keeps[e.PROPOSAL]):
        for name, level in ((e.PROPOSAL, 0.3), (e.NO_DROPOUT, 0.1)):
            if keep in plan.keeps[name]:
                scores = {"identity": 0.9 - 0.1 * i, "attributes": 1.0 - 0.2 * i, "compliance": level + 0.1 * i}
                for score, value in scores.items():
                    values.setdefault(f"truncation {score}", {})[e.truncated(name, keep)] = value
    return plan, {
        score: {name: {f"s{k}": value + 0.001 * k for k in range(5)} for name, value in methods.items()}
        for score, methods in values.items()
    }


def test_claims_compare_the_right_sides(paper):
    plan, scores = made_up_scores(paper)
    not_run, *rows = paper.reproduce.claims(scores, plan, "tiny-sd")
    assert not_run.holds == "not run" and not_run.ours is None
    assert [row.holds for row in rows] == ["yes"] * 10
    assert rows[0].ours.mean == pytest.approx(-0.03) and rows[7].ours.mean == pytest.approx(-0.2)
    assert rows[9].ours.mean == pytest.approx(0.2) and "16, 4 units stay without dropout" in rows[9].how
    e = paper.experiments
    scores["held-out loss"][e.NO_BYPASS] = {s: v + 0.0003 for s, v in scores["held-out loss"][e.XTI].items()}
    assert paper.reproduce.claims(scores, plan, "tiny-sd")[5].holds == "yes"  # near XTI
    scores["held-out loss"][e.NO_BYPASS] = {s: v + 0.0008 for s, v in scores["held-out loss"][e.XTI].items()}
    assert paper.reproduce.claims(scores, plan, "tiny-sd")[5].holds == "no"
    constant = scores["truncation attributes"]
    scores["truncation attributes"] = dict.fromkeys(constant, constant[e.truncated(e.PROPOSAL, 128)])
    assert paper.reproduce.claims(scores, plan, "tiny-sd")[8].holds == "no"


def test_quick_never_writes_into_the_papers_folder(paper):
    with pytest.raises(ValueError, match="--output"):
        paper.reproduce.main(["--quick", "--output", str(paper.reproduce.HERE)])
