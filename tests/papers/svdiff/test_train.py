"""The scripts, on made-up pictures and numbers: training with a resume, pairs, edits, the claims."""

import dataclasses
import json

import pytest
import torch

from common.backbones import load_backbone
from common.io import load_safetensors
from common.toyworld.benchmark import subjects
from common.toyworld.examples import LABELS

SHORT = ["--batch-size", "1", "--num-inference-steps", "1", "--checkpoint-every", "2", "--train-steps", "3"]


def test_two_subjects_stop_and_resume(paper, images, backbone_folder, tmp_path, monkeypatch, capsys):
    """Collages, prior and attention loss; three steps at once, and with a stop after two: the same bits."""
    arguments = [
        *("--images", *map(str, images), "--backbone", backbone_folder, "--class-nouns", "dog", "cat"),
        *("--identifiers", "sks", "zwx", "--prior-loss-weight", "1", "--num-class-images", "2"),
        *("--unmix-loss-weight", "1", "--unmix-resolutions", "8", "--num-samples", "1", *SHORT),
    ]
    paper.train.main([*arguments, "--output", str(tmp_path / "whole")])
    assert len(list((tmp_path / "whole" / "class_images" / "cat").glob("*.png"))) == 2
    arguments += ["--class-images", str(tmp_path / "whole" / "class_images")]

    def training_loss(method, batch, whole=paper.method.SVDiff.training_loss):
        if batch["step"] == 2:
            raise MemoryError
        return whole(method, batch)

    with monkeypatch.context() as patched, pytest.raises(MemoryError):
        patched.setattr(paper.method.SVDiff, "training_loss", training_loss)
        paper.train.main([*arguments, "--output", str(tmp_path / "stopped")])
    assert not (tmp_path / "stopped" / "spectral_shifts.safetensors").exists()
    paper.train.main([*arguments, "--output", str(tmp_path / "stopped"), "--resume"])
    (ours, header), (resumed, _) = (
        load_safetensors(tmp_path / run / "spectral_shifts.safetensors") for run in ("whole", "stopped")
    )
    assert all(torch.equal(shift, resumed[name]) for name, shift in ours.items())
    assert header["slug"] == paper.slug and header["identifier"] == "sks zwx"
    assert any(name.startswith("text_encoder.") for name in ours)  # the paper's defaults, away from tiny-sd
    rows = [json.loads(line) for line in (tmp_path / "whole" / "training" / "log.jsonl").read_text().splitlines()]
    assert {"loss", "validation_loss"} <= {name for row in rows for name in row}
    assert "photo of a zwx cat" in capsys.readouterr().out


def test_training_on_one_picture_follows_its_description(paper, images, backbone_folder, tmp_path, capsys):
    arguments = ["--images", str(images[0]), "--backbone", backbone_folder, "--description", "a red dog"]
    arguments += ["--output", str(tmp_path), "--num-samples", "0", *SHORT]
    with pytest.raises(SystemExit):
        paper.train.main(arguments)
    assert "prior_loss_weight=0" in capsys.readouterr().err
    paper.train.main([*arguments, "--prior-loss-weight", "0"])
    assert paper.method.load_method(tmp_path).config.instance_prompts() == ("a red dog",)


def test_folders_must_match_the_subjects(paper, images, backbone_folder, tmp_path):
    arguments = ["--images", *map(str, images), "--backbone", backbone_folder, "--output", str(tmp_path), *SHORT]
    for names in ([], ["--class-nouns", "dog"]):
        with pytest.raises(ValueError, match="2 folders of images for the prompts.*--class-nouns"):
            paper.train.main([*arguments, *names])


class ReadingJudge:
    """Reads the mean brightness of a crop: bright = first label, dark = second label of the two subjects."""

    labels = LABELS

    def read(self, pixel_values):
        def of(name, first, second):
            bright = pixel_values.mean((1, 2, 3)) > 0
            probabilities = torch.full((len(pixel_values), len(LABELS[name])), 1e-6)
            probabilities[bright, LABELS[name].index(first)] = 0.9
            probabilities[~bright, LABELS[name].index(second)] = 0.9
            return probabilities

        by_class = self.by_class(pixel_values)
        return {"class": by_class, "color": of("color", "red", "blue"), "pattern": of("pattern", "plain", "striped")}

    def by_class(self, pixel_values):
        """The class is in the sign of the first channel of the crop's first pixel."""
        dog = pixel_values[:, 0, 0, 0] > 0
        probabilities = torch.full((len(dog), len(LABELS["class"])), 1e-6)
        probabilities[dog, LABELS["class"].index("dog")] = 0.9
        probabilities[~dog, LABELS["class"].index("cat")] = 0.9
        return probabilities


def test_swap_rate_by_hand(paper):
    first = {"class": "dog", "color": "red", "pattern": "plain", "material": "matte"}
    second = {"class": "cat", "color": "blue", "pattern": "striped", "material": "matte"}

    def picture(left, right, dog_is_left=True):
        pixels = torch.empty(1, 3, 64, 64)
        pixels[..., :32], pixels[..., 32:] = left, right
        pixels[:, 0, 16, 0], pixels[:, 0, 16, 32] = (5, -5) if dog_is_left else (-5, 5)
        return pixels

    rate = paper.pairs.swap_rate
    right = picture(0.5, -0.5)  # a red plain dog at the left, a blue striped cat
    assert rate(ReadingJudge(), right, first, second) == 0
    assert rate(ReadingJudge(), picture(-0.5, 0.5, dog_is_left=False), first, second) == 0  # sides do not matter
    assert rate(ReadingJudge(), picture(-0.5, 0.5), first, second) == 1
    assert rate(ReadingJudge(), picture(0.5, 0.5), first, second) == 0.5  # both look like the dog
    assert rate(ReadingJudge(), torch.cat([right, picture(-0.5, 0.5)]), first, second) == 0.5


def test_attention_masses_know_whose_object_is_whose(paper, monkeypatch):
    """On tiny-sd, with attention made up: a token on the half of its own object, then on that of the other."""
    config = paper.config.SVDiffConfig.tiny("bear", "robot", subset="UNet-CA-KV")
    method = paper.method.SVDiff(load_backbone("tiny-sd", weights="random"), config)
    monkeypatch.setattr(paper.pairs, "TIMESTEPS", (400,))
    monkeypatch.setattr(paper.pairs, "BACKGROUNDS", ("snow",))

    def record(tokens):
        """Each token, at its number in "a photo of a sks bear next to a zwx robot", sees one half."""

        def probabilities(hook, call, real):
            height, width = call.layer.resolution
            made_up = torch.zeros(1, height, width, real.shape[-1])
            made_up[:, :, : width // 2, tokens[0]], made_up[:, :, width // 2 :, tokens[1]] = 1.0, 1.0
            hook.by_layer[call.layer] = made_up.flatten(1, 2)
            return real

        return probabilities

    masses = []
    for tokens in ((5, 10), (10, 5)):  # sks, zwx at their own object; at the other one
        monkeypatch.setattr(paper.pairs.RecordProbabilities, "probabilities", record(tokens))
        masses.append(paper.pairs.attention_masses(method, *subjects(2)))
    (own, foreign), swapped = masses
    assert own > 0.9 and foreign < 0.1
    assert swapped == pytest.approx((foreign, own))


def test_edits_change_one_attribute_of_the_true_description(paper):
    for number, subject in enumerate(subjects(5)):
        words, edits = paper.editing.description_and_edits(subject, number)
        color = subject.attributes["color"]
        assert words.startswith(f"{color} {subject.class_noun} ")
        place = words.removeprefix(f"{color} {subject.class_noun} ")
        assert len({label for _, _, label in edits}) == 4
        for new, attribute, label in edits:
            if attribute == "color":
                assert new == f"{label} {subject.class_noun} {place}" and label != color
            else:
                assert new.startswith(f"{color} {subject.class_noun} ") and not new.endswith(place)


def made_up_scores(paper):
    """Five subjects where every claim holds."""
    e, p = paper.experiments, paper.pairs
    values = {
        "identity error": {e.PROPOSAL: 0.24, e.FULL: 0.2},
        "held-out loss": {e.PROPOSAL: 0.101, e.FULL: 0.1},
        "numbers": {e.PROPOSAL: 100.0, e.FULL: 20_000.0},
        "class drift": {e.PROPOSAL: 0.1, e.FULL: 0.2},
        "swap rate": {p.PLAIN: 0.4, p.CUT_MIX: 0.2, p.UNMIX: 0.1},
        "foreign attention": {p.PLAIN: 0.05, p.CUT_MIX: 0.04, p.UNMIX: 0.02},
        "foreign share": {p.PLAIN: 0.5, p.CUT_MIX: 0.4, p.UNMIX: 0.3},
        "edit success": {e.PROPOSAL: 0.8, e.FULL: 0.6},
        "reconstruction": {e.PROPOSAL: 0.5, e.FULL: 0.5},
        "identity loss": {e.SUM: 0.3, e.FULL_SUM: 0.1},
        "held-out rise": {e.SUM: 0.03, e.FULL_SUM: 0.01},
    }
    return {
        score: {method: {f"s{i}": value + 0.001 * i for i in range(5)} for method, value in methods.items()}
        for score, methods in values.items()
    }


def test_claims_compare_the_right_sides(paper):
    plan, scores = paper.experiments.Plan.full(), made_up_scores(paper)
    rows = paper.reproduce.claims(scores, plan, "tiny-sd")
    assert [row.holds for row in rows] == ["not run"] * 3 + ["yes"] * 12
    swapped = {score: dict(zip(row, reversed(row.values()), strict=True)) for score, row in scores.items()}
    verdicts = [row.holds for row in paper.reproduce.claims(swapped, plan, "tiny-sd")][3:]
    assert verdicts == ["yes", "yes", *["no"] * 7, "yes", "no", "no"]  # three claims have margins


def test_plan_pairs_each_subject_with_the_next(paper):
    plan, tiny = paper.experiments.Plan.full(), paper.config.SVDiffConfig.tiny
    names = [plan.next_to(subject).class_noun for subject in plan.subjects()]
    assert names == ["robot", "duck", "dog", "cat", "bear"]
    configs = {v: paper.pairs.pair_config(plan, plan.subjects()[0], v) for v in paper.pairs.VARIANTS}
    assert {c.train_steps for c in configs.values()} == {plan.pair_steps}
    assert [c.cut_mix_probability for c in configs.values()] == [0.0, 0.6, 0.6]
    assert [c.unmix_loss_weight > 0 for c in configs.values()] == [False, False, True]
    assert paper.pairs.together(configs[paper.pairs.PLAIN]) == "a photo of a sks bear next to a zwx robot"
    baseline = plan.baseline()
    assert (baseline.train_steps, baseline.batch_size) == (tiny().train_steps, tiny().batch_size)
    assert plan.config == dataclasses.replace(tiny())


def test_quick_never_writes_into_the_papers_folder(paper):
    with pytest.raises(ValueError, match="--output"):
        paper.reproduce.main(["--quick", "--output", str(paper.reproduce.HERE)])
