"""The scripts, on made-up pictures and numbers: training with a resume, the study's parts, the claims."""

import json
from dataclasses import replace

import pytest
import torch

from common.io import load_safetensors
from common.sampling.images import save_png, to_pil
from common.toyworld.benchmark import subjects


def test_train_stops_and_resumes(paper, images, backbone_folder, tmp_path, monkeypatch, capsys):
    """Three steps at once, and with a stop after two: the same bits, dropout included."""
    arguments = [
        *("--images", str(images), "--backbone", backbone_folder, "--initializer-token", "duck"),
        *("--num-inference-steps", "1", "--validate-every", "0", "--checkpoint-every", "2", "--train-steps", "3"),
        *("--batch-size", "2", "--save-network"),
    ]
    paper.train.main([*arguments, "--output", str(tmp_path / "whole")])

    def training_loss(method, batch, whole=paper.method.ProSpect.training_loss):
        if batch["step"] == 2:
            raise MemoryError
        return whole(method, batch)

    with monkeypatch.context() as patched, pytest.raises(MemoryError):
        patched.setattr(paper.method.ProSpect, "training_loss", training_loss)
        paper.train.main([*arguments, "--output", str(tmp_path / "stopped")])
    paper.train.main([*arguments, "--output", str(tmp_path / "stopped"), "--resume"])
    for file in ("stage_words.safetensors", "stage_network.safetensors"):
        whole, stopped = (load_safetensors(tmp_path / run / file) for run in ("whole", "stopped"))
        assert all(torch.equal(value, stopped[0][name]) for name, value in whole[0].items())
        assert whole[1]["slug"] == paper.slug
    rows = [json.loads(line) for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
    assert {"loss", "validation_loss"} <= {name for row in rows for name in row}
    assert (tmp_path / "whole" / "samples" / "step-00000003.png").is_file()
    assert "training ff.net.2.weight: (320, 128), 40,960 numbers" in capsys.readouterr().out


def test_a_method_of_one_photo_sees_one_photo(paper, tmp_path):
    """Whichever the candidate; its settings say so, and the rest of it stays."""
    seen, photos = [], tmp_path / "photos" / "bear_00"
    for i in range(4):
        save_png(to_pil(torch.full((1, 3, 8, 8), i / 4))[0], photos / f"{i:02d}.png")
    candidate = paper.experiments.Candidate(
        words="<{class}>", settings={"a": 2}, train=lambda subject, folder, run: seen.append(sorted(folder.iterdir()))
    )
    alone = paper.experiments.single_photo(candidate)
    alone.train(None, photos, tmp_path / "run")
    assert [[path.name for path in folder] for folder in seen] == [["02.png"]]
    assert alone.settings == {"a": 2, "photos": 1} and alone.words == candidate.words


def test_methods_are_compared_at_equal_steps_and_data(paper):
    e, config = paper.experiments, paper.config.ProSpectConfig.tiny()
    every = e.candidates("tiny-sd", config)
    assert list(every) == [e.PROPOSAL, e.INVERSION, e.FINE_TUNING]
    for name in ("train_steps", "batch_size", "num_inference_steps", "guidance_scale", "seed"):
        found = {
            settings.get(name, settings.get(f"config.{name}")) for settings in (c.settings for c in every.values())
        }
        assert found == {getattr(config, name)}
    assert not config.flip  # as in the baselines


def test_layout_match_by_hand(paper):
    """A judge that sees one whole cell and half of another, against a mask over two cells: IoU (1 + 0.5) / 2.

    It takes the picture for a side view with 0.25: (0.75 + 0.25) / 2.
    """

    class Judge:
        labels = {"view": ["front", "side"]}

        def read(self, images):
            return {"view": torch.tensor([[0.75, 0.25]] * len(images))}

        def features_and_entities(self, images):
            background = torch.full((len(images), 8, 8), 30.0)
            background[:, 0, 0], background[:, 0, 1] = -30.0, torch.tensor(2.0).log()  # two others at 0: p = 2 / 4
            return None, torch.stack([background, *torch.zeros(2, len(images), 8, 8)], 1)

    mask = torch.zeros(64, 64, dtype=torch.bool)
    mask[:8, :16] = True
    found = paper.experiments.layout_match(Judge(), torch.zeros(2, 3, 64, 64), mask, "side")
    assert found == pytest.approx(0.5)


def test_colour_match_by_hand(paper):
    """(0.9 + 0.5 + 0.2) / 3 of one picture, (0.1 + 0.5 + 0.2) / 3 of the other."""

    class Judge:
        labels = {"color": ["red", "blue"], "pattern": ["plain", "dotted"], "material": ["matte", "glossy"]}

        def read(self, images):
            pairs = {"color": [[0.1, 0.9], [0.9, 0.1]], "pattern": [[0.5, 0.5]] * 2, "material": [[0.2, 0.8]] * 2}
            return {name: torch.tensor(rows) for name, rows in pairs.items()}

    own = {"class": "bear", "color": "blue", "pattern": "plain", "material": "matte"}
    found = paper.experiments.colour_match(Judge(), torch.zeros(2, 3, 64, 64), own)
    assert found == pytest.approx((1.6 + 0.8) / 6)


def made_up_matches(paper):
    """Two subjects; without S* 0.2 and 0.6 of layout (mean 0.4), 0.5 of colour."""
    e = paper.experiments
    rows = {
        "nowhere layout": (0.2, 0.6), f"nowhere {e.COLOUR}": (0.5, 0.5),
        "early layout": (0.5, 0.9), f"early {e.COLOUR}": (0.5, 0.6),
        "late layout": (0.2, 0.6), f"late {e.COLOUR}": (1.0, 0.9),
    }  # fmt: skip
    base = {key: rows[key.replace("early", "nowhere").replace("late", "nowhere")] for key in rows}
    named = {f"{e.PROPOSAL} {key}": pair for key, pair in rows.items()}
    named |= {f"{e.INVERSION} {key}": pair for key, pair in base.items()}
    return {key: dict(zip(("a", "b"), pair, strict=True)) for key, pair in named.items()}


def test_transfers_by_hand(paper):
    """Layout (0.5 - 0.2) / (1 - 0.4) = 0.5; colour late (1 - 0.5) / 0.5 = 1; separation 0.5 - 0 + 1 - 0."""
    e = paper.experiments
    found = e.transfers(made_up_matches(paper))
    assert found[f"{e.PROPOSAL} early layout"] == pytest.approx({"a": 0.5, "b": 0.5})
    assert found[f"{e.PROPOSAL} late {e.COLOUR}"] == pytest.approx({"a": 1.0, "b": 0.8})
    assert found[e.PROPOSAL] == pytest.approx({"a": 1.5, "b": 0.5 - 0.2 + 0.8})
    assert found[e.INVERSION] == {"a": 0, "b": 0}


def test_rank_correlation_by_hand(paper):
    """1 - 6 sum d^2 / (n (n^2 - 1)): ranks 1 3 2 4 against 1 2 3 4 give d^2 = 2, rho = 1 - 12 / 60."""
    assert paper.experiments.rank_correlation([1.0, 3.0, 2.0, 9.0]) == pytest.approx(0.8)


def made_up_scores(paper):
    """Five subjects where every claim holds."""
    e = paper.experiments
    values = {
        "held-out loss": {e.PROPOSAL: 0.1, e.INVERSION: 0.2},
        "match": {},
        "growth of detail": {e.PROPOSAL: 0.95},
        "order of frequencies": {e.PROPOSAL: 0.9},
        "single photo identity": {e.PROPOSAL: 0.7, e.FINE_TUNING: 0.74},
        "single photo compliance": {e.PROPOSAL: 0.7, e.FINE_TUNING: 0.5},
        "transfer": {
            f"{e.PROPOSAL} early layout": 0.5, f"{e.PROPOSAL} early {e.COLOUR}": 0.2,
            f"{e.PROPOSAL} late layout": 0.1, f"{e.PROPOSAL} late {e.COLOUR}": 0.6,
            e.PROPOSAL: 0.8, e.INVERSION: 0.3,
        },
    }  # fmt: skip
    for stage in range(10):
        own = 0.05 if stage in (0, 9) else 0.08 + 0.001 * stage
        values[f"loss of stage {stage}"] = {e.PROPOSAL: own, e.INVERSION: 0.1}
    return {
        score: {name: {f"s{k}": value + 0.0001 * k for k in range(5)} for name, value in methods.items()}
        for score, methods in values.items()
    }


def test_claims_compare_the_right_sides(paper):
    e, scores = paper.experiments, made_up_scores(paper)

    def found():
        rows = paper.reproduce.claims(scores, e.Plan.full(), "tiny-sd")
        assert [row.holds for row in rows[:5]] == ["not run"] * 5
        return rows[5:]

    rows = found()
    assert [row.holds for row in rows] == ["yes"] * 10
    assert rows[0].ours.mean == pytest.approx(-0.1) and "shown: stage 8, the least" in rows[1].text
    assert rows[1].ours.mean == pytest.approx(-0.012) and rows[2].ours.mean > 0.3
    assert [row.ours.mean for row in rows[3:6]] == pytest.approx([0.3, 0.5, 0.5])
    assert rows[8].ours.mean == pytest.approx(-0.04)  # within the margin of DreamBooth
    scores["loss of stage 4"][e.PROPOSAL] = {s: 0.11 for s in scores["loss of stage 4"][e.INVERSION]}
    scores["growth of detail"][e.PROPOSAL] = dict.fromkeys(scores["growth of detail"][e.PROPOSAL], 0.5)
    scores["single photo identity"][e.PROPOSAL] = dict.fromkeys(scores["single photo identity"][e.PROPOSAL], 0.6)
    rows = found()
    assert [rows[k].holds for k in (1, 6, 8)] == ["no"] * 3 and "stage 4" in rows[1].text


def test_roles_of_the_swap(paper):
    """Index 0 = end of generation: material 0-4, content 5-8, layout 9; a concept may have two roles."""
    joint, groups = paper.figures.joint_fills, paper.figures.GROUPS["stages of the code"]
    words = {"layout": "L", "content": "C", "material": "M"}
    assert joint(words, groups) == ["M"] * 5 + ["C"] * 4 + ["L"]
    assert joint(words | {"material": "L"}, groups) == ["L"] * 5 + ["C"] * 4 + ["L"]


def test_groups_of_stages_are_moved_to_equal_noise(paper):
    """SNR(574) = 16 SNR(900), SNR(127) = 16 SNR(500), from diffusers' schedule; both round to whole stages."""
    from diffusers import DDPMScheduler

    alpha_bar = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").alphas_cumprod
    snr = alpha_bar / (1 - alpha_bar)
    moved = [int((snr - 16 * snr[t]).abs().argmin()) for t in (900, 500)]
    groups = paper.figures.GROUPS["moved to equal noise"]
    assert moved == [574, 127]
    assert round(574 / 100) == groups["layout"].start == groups["content"].stop
    assert -(-127 // 100) == groups["material"].stop == groups["content"].start


def test_quick_is_small_and_needs_its_own_folder(paper):
    plan, (subject,) = paper.experiments.Plan.quick(), subjects(1)
    assert plan.config.train_steps == plan.single_steps == 2 and subject.masks.shape == (5, 64, 64)
    assert replace(plan.config, train_steps=300).learning_rate == paper.config.ProSpectConfig.tiny().learning_rate
    with pytest.raises(ValueError, match="--output"):
        paper.reproduce.main(["--quick", "--output", str(paper.reproduce.HERE)])
