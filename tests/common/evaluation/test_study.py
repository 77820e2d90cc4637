"""The study of object methods with a method that paints: hand-derived scores, resumption, refusal to mix settings."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from common.data.images import load_image, to_pixel_values
from common.evaluation import study as module
from common.evaluation import trials
from common.evaluation.encoders import Encoders
from common.evaluation.study import Candidate, Study, benchmark_row, benchmark_subject, folder_name, run_study
from common.toyworld.benchmark import Prompt, Subject, held_out_views, subjects

COLORS = {
    name: torch.tensor(rgb).view(3, 1, 1).expand(3, 8, 8)
    for name, rgb in {"red": [1.0, -1, -1], "green": [-1.0, 1, -1], "blue": [-1.0, -1, 1]}.items()
}
STUDY = Study(num_subjects=2, num_prompts=2, seeds=(0, 1), held_out=3)


class ColorEncoder:
    """Pictures and colour words as points of the RGB cube: red is (1, 0, 0)."""

    name, preprocessing = "colours", "mean colour"

    def embed_images(self, pixel_values):
        return F.normalize(pixel_values.mean((2, 3)) / 2 + 0.5, dim=-1)

    def embed_texts(self, texts):
        return F.normalize(torch.tensor([[float(c in text.split()) for c in COLORS] for text in texts]), dim=-1)


class ColorJudge(nn.Module):
    """Reads the strongest channel; every picture is a photo. It does not know classes, so none may be asked for."""

    labels = {"color": list(COLORS), "style": ["photo", "sketch"]}

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def read(self, pixel_values):
        photo = torch.tensor([[1.0, 0.0]]).repeat(len(pixel_values), 1)
        return {"color": (self.scale * 9 * pixel_values.mean((2, 3))).softmax(-1), "style": photo}

    def embed_identity(self, pixel_values):
        return ColorEncoder().embed_images(pixel_values)


class Painter:
    """Paints the colour that the prompt names, else that of its photos; odd seeds go wrong and paint blue."""

    def __init__(self, photos: Path):
        self.own = to_pixel_values(load_image(min(photos.glob("*.png"))))
        self.backbone = SimpleNamespace(resolution_px=16, encode_images=lambda pixel_values: pixel_values)

    def generate(self, prompt, *, seeds):
        asked = next((COLORS[word] for word in prompt.split() if word in COLORS), self.own)
        return torch.stack([COLORS["blue"] if seed % 2 else asked for seed in seeds])

    def validation_loss(self, latents):
        assert latents.shape == (STUDY.held_out, 3, 16, 16)  # 8 px photos in the backbone's size
        return latents[:, 0].mean().item()  # how red

    def save(self, folder):
        (folder / "deep").mkdir(parents=True, exist_ok=True)
        (folder / "header").write_bytes(bytes(24))
        (folder / "deep" / "weights").write_bytes(bytes(1000))


class Trainer:
    """Takes 10 seconds of a clock that only it moves; fails as often as it is told to."""

    def __init__(self):
        self.now, self.failures, self.calls = 100.0, 0, []

    def perf_counter(self):
        return self.now

    def __call__(self, subject: Subject, photos: Path, run: Path) -> Painter:
        self.calls.append((subject.name, len(list(photos.glob("*.png"))), run.name))
        self.now += 10
        if self.failures:
            self.failures -= 1
            raise KeyboardInterrupt
        return Painter(photos)


@pytest.fixture
def trainer(monkeypatch) -> Trainer:
    """A red and a blue mug with two photos each, in a world of colours."""
    prompts = (
        Prompt("a photo of a {} in green", {"class": "mug", "color": "green"}),
        Prompt("a sketch of a {}", {"class": "mug", "style": "sketch"}),
    )
    mugs = [
        Subject(f"{color}_mug", "mug", color, COLORS[color].repeat(2, 1, 1, 1), None, {"color": color}, prompts)
        for color in ("red", "blue")
    ]
    trainer, encoder = Trainer(), ColorEncoder()
    torch.manual_seed(0)
    parts = {"unet": nn.Linear(2, 2), "vae": nn.Linear(1, 1), "text_encoders": (nn.Linear(3, 1),)}
    monkeypatch.setattr(module, "load_backbone", lambda name: SimpleNamespace(**parts))
    monkeypatch.setattr(trials, "load_encoders", lambda: Encoders(encoder, encoder))
    monkeypatch.setattr(module, "Judge", SimpleNamespace(load=ColorJudge))
    monkeypatch.setattr(module, "subjects", lambda count: mugs[:count])
    monkeypatch.setattr(module, "held_out_views", lambda entity, count: COLORS[entity].repeat(count, 1, 1, 1))
    monkeypatch.setattr(trials, "time", trainer)
    return trainer


def candidate(train: Trainer, **settings) -> Candidate:
    return Candidate(words="sks {class}", settings={"steps": 3, "betas": (0.9, 0.99), **settings}, train=train)


def test_scores_by_hand(trainer, tmp_path):
    """Seed 0 paints what is asked, seed 1 blue.

    plain: red mug red and blue, so half is right; blue mug blue twice.   in green: green and blue, half is right.
    sketch: never.   clip_t: the plain prompt and the sketch name no colour; "in green" 1 and 0; so (0 + 1/2 + 0) / 3.
    """
    scores = run_study("name", {"10x lr": candidate(trainer)}, STUDY, tmp_path)
    expected = {
        "identity": (0.5, 1.0),
        "attributes": (0.5, 1.0),
        "identity error": (0.5, 0.0),
        "attribute error": (0.5, 0.0),
        "compliance": (0.25, 0.25),
        "product": (0.125, 0.25),
        "clip_t": (1 / 6, 1 / 6),
        "held-out loss": (1.0, -1.0),
        "seconds": (10.0, 10.0),
        "bytes": (1024, 1024),
    }
    assert scores.keys() == expected.keys()
    for score, (red, blue) in expected.items():
        assert scores[score] == {"10x lr": pytest.approx({"red_mug": red, "blue_mug": blue})}, score
    assert trainer.calls == [("red_mug", 2, "red_mug"), ("blue_mug", 2, "blue_mug")]
    assert (tmp_path / "10x_lr" / "images" / "red_mug" / "02-1.png").is_file()

    assert run_study("name", {"10x lr": candidate(trainer)}, STUDY, tmp_path) == scores
    assert len(trainer.calls) == 2  # nothing is done twice
    both = run_study("name", {"10x lr": candidate(trainer), "other": candidate(trainer)}, STUDY, tmp_path)
    assert both["identity"].keys() == {"10x lr", "other"} and len(trainer.calls) == 4


def test_negative_identity_makes_no_product(trainer, tmp_path, monkeypatch):
    """The three photos look to the right, the two pictures to the left."""
    sides = {STUDY.held_out: 1.0, len(STUDY.seeds): -1.0}
    monkeypatch.setattr(ColorJudge, "embed_identity", lambda self, x: torch.full((len(x), 1), sides[len(x)]))
    scores = run_study("name", {"m": candidate(trainer)}, replace(STUDY, num_subjects=1), tmp_path)
    found = [scores[score]["m"]["red_mug"] for score in ("identity", "compliance", "product")]
    assert found == [-1.0, 0.25, 0.0]


def test_training_time_counts_every_interruption_once(trainer, tmp_path, monkeypatch):
    trainer.failures, study = 2, replace(STUDY, num_subjects=1)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run_study("name", {"m": candidate(trainer)}, study, tmp_path)
    with monkeypatch.context() as patch:  # trained, but stopped in the pictures
        patch.setattr(Painter, "generate", lambda self, prompt, seeds: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run_study("name", {"m": candidate(trainer)}, study, tmp_path)
    scores = run_study("name", {"m": candidate(trainer)}, study, tmp_path)
    assert len(trainer.calls) == 4
    assert scores["seconds"] == {"m": {"red_mug": 30.0}}  # 10 + 10 stopped + 10 done; loading it again is no training


def test_other_settings_prompts_photos_or_weights_are_refused_before_training(trainer, tmp_path, monkeypatch):
    trainer.failures = 1
    with pytest.raises(KeyboardInterrupt):  # no record is written yet
        run_study("name", {"m": candidate(trainer)}, STUDY, tmp_path)
    changes = [
        (candidate(trainer, steps=4), STUDY, "steps"),
        (candidate(trainer, rank=1), STUDY, "rank"),
        (candidate(trainer), replace(STUDY, num_prompts=1), "study"),
        (candidate(trainer), replace(STUDY, held_out=2), "study"),
    ]
    for changed, study, named in changes:
        with pytest.raises(ValueError, match=rf"m was begun with other settings \({named}\); remove the folder"):
            run_study("name", {"m": changed}, study, tmp_path)
    other = {"unet": nn.Linear(2, 2), "vae": nn.Linear(1, 1), "text_encoders": ()}
    with monkeypatch.context() as patch:
        patch.setattr(module, "load_backbone", lambda name: SimpleNamespace(**other))
        with pytest.raises(ValueError, match=r"other settings \(weights\)"):
            run_study("name", {"m": candidate(trainer)}, STUDY, tmp_path)
    assert len(trainer.calls) == 1
    run_study("name", {"m": candidate(trainer)}, replace(STUDY, num_subjects=1), tmp_path)
    run_study("name", {"m": candidate(trainer)}, STUDY, tmp_path)  # more subjects are welcome
    with pytest.raises(ValueError, match="other settings, seeds"):
        run_study("name", {"m": candidate(trainer)}, replace(STUDY, seeds=(0,)), tmp_path)


def test_benchmark_row_is_the_mean_and_its_hash_that_of_everything_compared(trainer, monkeypatch):
    per_subject = {"identity": (0.2, 0.6), "compliance": (0.5, 0.5), "bytes": (1000, 1003), "seconds": (10.0, 20.0)}
    scores = {
        score: {"m": dict(zip(("red_mug", "blue_mug"), values, strict=True)), "other": {"red_mug": 9.0}}
        for score, values in per_subject.items()
    }
    row = benchmark_row("m", scores, STUDY, "/somewhere/tiny")
    assert row.setting == "tiny, 2 subjects, 2 prompts, seeds 0, 1"
    assert (row.identity.mean, row.identity.low, row.identity.high, row.identity.n) == pytest.approx((0.4, 0.2, 0.6, 2))
    assert asdict(row.compliance) == {"mean": 0.5, "low": 0.5, "high": 0.5, "n": 2}
    assert (row.artifact_bytes, row.training_seconds) == (1002, 15.0)  # 1001.5 rounds to even
    assert json.loads(json.dumps(asdict(row)))["study"] == row.study
    assert benchmark_row("other", scores, STUDY, "elsewhere").study == row.study
    hashes = {row.study}
    for changed in (replace(STUDY, seeds=(0,)), replace(STUDY, held_out=2), replace(STUDY, num_subjects=1)):
        hashes.add(benchmark_row("m", scores, changed, "tiny").study)
    backbone = module.load_backbone("tiny")
    for part, value in {"unet": nn.Linear(2, 2), "vae": nn.Linear(1, 1), "text_encoders": ()}.items():
        with monkeypatch.context() as patch:
            other = SimpleNamespace(**{**vars(backbone), part: value})
            patch.setattr(module, "load_backbone", lambda name, other=other: other)
            hashes.add(benchmark_row("m", scores, STUDY, "tiny").study)
    monkeypatch.setattr(module.Judge, "load", lambda: nn.Linear(1, 1))
    hashes.add(benchmark_row("m", scores, STUDY, "tiny").study)
    assert len(hashes) == 8


def test_subject_of_the_toy_world_is_asked_for_more_than_its_class_and_seen_anew():
    (subject,) = subjects(1)
    scored = benchmark_subject(subject, Study(num_prompts=6, held_out=4))
    assert scored.prompt(0, "sks {class}") == f"a photo of a sks {subject.class_noun}"
    assert scored.expected[0] == {} and scored.kept_attributes(0) == subject.attributes
    every = {prompt.text: prompt.expected for prompt in subject.prompts}
    assert len(scored.prompts) == len(set(scored.prompts)) == 7
    for text, asked in zip(scored.prompts[1:], scored.expected[1:], strict=True):
        full = every[text.replace("{token} {class}", "{}")]
        assert asked == {name: label for name, label in full.items() if name != "class"} and asked
    assert torch.equal(scored.pixel_values, held_out_views(subject.entity, 4))
    gaps = (scored.pixel_values[:, None] - subject.images[None]).abs().amax((2, 3, 4))
    assert gaps.min() > 0.1  # no photo of the training


def test_names_and_settings_in_words():
    assert folder_name("10x lr") == "10x_lr"
    assert Study().setting("tiny-sd") == "tiny-sd, 5 subjects, 6 prompts, seeds 0, 1"
    assert Study.quick().setting("/a/b/mine") == "mine, 1 subjects, 1 prompts, seeds 0"
