"""The runner with a method that paints: hand-derived scores, resume after a kill, refusal to mix settings."""

import json
from dataclasses import asdict, replace

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from common.evaluation import benchmark
from common.evaluation.benchmark import run_benchmark
from common.evaluation.encoders import Encoders
from common.evaluation.records import append_records, config_hash, read_records
from common.evaluation.subjects import BenchmarkSubject, from_dreambooth_folder, from_toy_world
from common.toyworld.benchmark import subjects as toy_subjects

RED, GREEN, BLUE = (torch.tensor(rgb).view(3, 1, 1).expand(3, 8, 8) for rgb in ([1, -1, -1], [-1, 1, -1], [-1, -1, 1]))
COLORS = {"red": RED.float(), "green": GREEN.float(), "blue": BLUE.float()}


class ColorEncoder:
    """Pictures and colour words as points of the RGB cube: red is (1, 0, 0)."""

    preprocessing = "mean colour"

    def __init__(self, name: str) -> None:
        self.name = name

    def embed_images(self, pixel_values):
        return F.normalize(pixel_values.mean((2, 3)) / 2 + 0.5, dim=-1)

    def embed_texts(self, texts):
        named = [[float(color in text.split()) for color in COLORS] for text in texts]
        return F.normalize(torch.tensor(named), dim=-1)


class ColorJudge(nn.Module):
    """Reads the strongest channel as "color"; identity is the mean colour. "style" is always a photo."""

    labels = {"color": list(COLORS), "style": ["photo", "sketch"]}

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def read(self, pixel_values):
        photo = torch.tensor([[1.0, 0.0]]).repeat(len(pixel_values), 1)
        return {"color": (self.scale * 9 * pixel_values.mean((2, 3))).softmax(-1), "style": photo}

    def embed_identity(self, pixel_values):
        return ColorEncoder("").embed_images(pixel_values)


class Painter:
    """Paints the colour that the prompt names, else the subject's; odd seeds go wrong and paint blue."""

    trained: list[str] = []
    prompts: list[str] = []

    def __init__(self, subject: BenchmarkSubject) -> None:
        self.own = COLORS[subject.attributes["color"]]
        Painter.trained.append(subject.name)

    def generate(self, prompt, *, seeds):
        Painter.prompts.append(prompt)
        asked = next((COLORS[word] for word in prompt.split() if word in COLORS), self.own)
        return torch.stack([COLORS["blue"] if seed % 2 else asked for seed in seeds])


ENCODERS = Encoders(clip=ColorEncoder("clip"), dino=ColorEncoder("dino"))
SETTINGS = {"method": "painter", "subject_words": "sks {class}", "settings": {"steps": 3}, "seeds": [0, 1]}


@pytest.fixture(autouse=True)
def _forget():
    Painter.trained, Painter.prompts = [], []


@pytest.fixture
def subjects() -> list[BenchmarkSubject]:
    """A red and a green mug: one prompt that asks for green, one that changes the style."""
    prompts = ["a photo of a {token} {class} in green", "a sketch of a {token} {class}"]
    expected = [{"color": "green"}, {"style": "sketch"}]
    return [
        BenchmarkSubject(name, "mug", torch.stack([COLORS[color]] * 2), prompts, expected, {"color": color})
        for name, color in (("red_mug", "red"), ("green_mug", "green"))
    ]


def test_scores_by_hand_and_records(subjects, tmp_path):
    """Seed 0 paints what is asked, seed 1 blue. Red mug: prompt 0 shows green and blue, prompt 1 red and blue."""
    result = run_benchmark(Painter, subjects, ENCODERS, ColorJudge(), output_dir=tmp_path, **SETTINGS)
    assert Painter.prompts[:2] == ["a photo of a sks mug in green", "a sketch of a sks mug"]
    by_subject = result.by_subject
    assert by_subject["dino"] == {"red_mug": pytest.approx((0 + 0.5) / 2), "green_mug": pytest.approx(0.5)}
    assert by_subject["clip_i"] == by_subject["dino"] and by_subject["identity"] == by_subject["dino"]
    assert by_subject["attribute/color"] == {"red_mug": 0.5, "green_mug": 0.5}
    assert by_subject["prompt_attributes"] == {"red_mug": 0.25, "green_mug": 0.25}  # never a sketch
    assert "subject_attributes" not in by_subject  # one prompt changes the colour, the other the style
    assert by_subject["diversity"] == {"red_mug": pytest.approx(1), "green_mug": pytest.approx(1)}
    assert result.metrics["dino"].mean == pytest.approx(0.375) and result.metrics["dino"].n == 2

    records = read_records(tmp_path / "records.jsonl")
    clip_t = next(row for row in records if row.metric == "clip_t" and "green" in row.prompt)
    assert clip_t.values == pytest.approx([1.0, 0.0]) and clip_t.value == pytest.approx(0.5)
    assert (clip_t.n_images, clip_t.seeds, clip_t.backbone) == (2, [0, 1], "clip")
    assert (clip_t.preprocessing, clip_t.method, clip_t.subject) == ("mean colour", "painter", "red_mug")
    assert clip_t.versions["torch"] == torch.__version__ and clip_t.git_commit
    judged = next(row for row in records if row.metric == "identity")
    assert judged.backbone.startswith("judge@")
    with Image.open(tmp_path / "images/red_mug/00-0.png") as picture:
        assert picture.getpixel((0, 0)) == (0, 255, 0) and picture.text["seed"] == "0"


def test_finished_subjects_are_skipped_and_pictures_reused(subjects, tmp_path):
    """A stop after the first subject's records, and one after the second's pictures: nothing is trained twice."""
    run_benchmark(Painter, subjects[:1], ENCODERS, None, output_dir=tmp_path, **SETTINGS)
    first = run_benchmark(Painter, subjects, ENCODERS, None, output_dir=tmp_path, **SETTINGS)
    assert Painter.trained == ["red_mug", "green_mug"]
    path = tmp_path / "records.jsonl"
    path.unlink()
    again = run_benchmark(Painter, subjects, ENCODERS, None, output_dir=tmp_path, **SETTINGS)
    assert Painter.trained == ["red_mug", "green_mug"] and again.metrics == first.metrics
    (tmp_path / "images/green_mug/01-1.png").unlink()
    path.unlink()
    run_benchmark(Painter, subjects, ENCODERS, None, output_dir=tmp_path, **SETTINGS)
    assert Painter.trained == ["red_mug", "green_mug", "green_mug"]


@pytest.mark.parametrize(
    "change", [{"seeds": [0, 2]}, {"settings": {"steps": 4}}, {"subject_words": "<x>"}, {"method": "other"}]
)
def test_other_settings_are_not_mixed_into_one_folder(subjects, tmp_path, change):
    run_benchmark(Painter, subjects[:1], ENCODERS, None, output_dir=tmp_path, **SETTINGS)
    with pytest.raises(ValueError, match="choose another output folder"):
        run_benchmark(Painter, subjects, ENCODERS, None, output_dir=tmp_path, **{**SETTINGS, **change})


def test_other_encoders_are_not_mixed_into_one_file(subjects, tmp_path):
    run_benchmark(Painter, subjects[:1], ENCODERS, None, output_dir=tmp_path, **SETTINGS)
    others = Encoders(clip=ENCODERS.clip, dino=ColorEncoder("dinov2"))
    with pytest.raises(ValueError, match="other settings, seeds or encoders"):
        run_benchmark(Painter, subjects, others, None, output_dir=tmp_path, **SETTINGS)


def test_a_judge_trained_anew_is_not_mixed_in(subjects, tmp_path):
    judge = ColorJudge()
    run_benchmark(Painter, subjects[:1], ENCODERS, judge, output_dir=tmp_path, **SETTINGS)
    judge.scale.data *= 2
    with pytest.raises(ValueError, match="other settings, seeds or encoders"):
        run_benchmark(Painter, subjects, ENCODERS, judge, output_dir=tmp_path, **SETTINGS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "a/b"}, "'a/b' cannot be the name of a folder"),
        ({"pixel_values": torch.zeros(0, 3, 8, 8)}, r"\(0, 3, 8, 8\)"),
        ({"prompts": ["a photo", "a {token} {class}"]}, r"\['a photo'\]"),
        ({"expected": [{}]}, "1 expected attributes for 2 prompts"),
    ],
)
def test_bad_subjects_are_named(subjects, change, message):
    with pytest.raises(ValueError, match=message):
        replace(subjects[0], **change)


def test_kept_attributes_leave_out_what_the_prompt_changes():
    own = {"color": "red", "pattern": "plain"}
    expected = [{"color": "blue"}, {"style": "neon"}, {"style": "photo", "background": "snow"}, {"relation": "under"}]
    subject = BenchmarkSubject("s", "mug", torch.zeros(1, 3, 8, 8), ["{token} {class}"] * 4, expected, own)
    assert [subject.kept_attributes(i) for i in range(4)] == [{"pattern": "plain"}, {}, own, {}]


def test_toy_subjects_keep_their_prompts_and_ground_truth():
    (toy,) = toy_subjects(1, 2)
    (subject,) = from_toy_world([toy])
    assert len(subject.prompts) == 25 and subject.pixel_values.shape == (2, 3, 64, 64)
    assert subject.plain_prompt(0) == toy.prompts[0].text.format(toy.class_noun)
    assert subject.prompt(0, "<thing>") == toy.prompts[0].text.format("<thing>")
    assert subject.expected[0] == toy.prompts[0].expected and subject.attributes["class"] == toy.class_noun
    (few,) = from_toy_world([toy], num_prompts=5)
    assert few.prompts == subject.prompts[::5]
    with pytest.raises(ValueError, match="1..25, got 0"):
        from_toy_world([toy], num_prompts=0)


def test_dreambooth_folder(tmp_path):
    text = """subject_name,class
dog9,dog
Object Prompts
'a {0} {1} on a rug'.format(unique_token, class_token),
Live Subject Prompts
'a {0} {1} in the jungle'.format(unique_token, class_token),
"""
    (tmp_path / "prompts_and_classes.txt").write_text(text)
    (tmp_path / "dog9").mkdir()
    Image.new("RGB", (40, 30), "red").save(tmp_path / "dog9" / "00.jpg")
    (subject,) = from_dreambooth_folder(tmp_path, resolution_px=16)
    assert (subject.name, subject.class_noun, subject.pixel_values.shape) == ("dog9", "dog", (1, 3, 16, 16))
    assert subject.prompts == ["a {token} {class} in the jungle"] and subject.expected == [{}]
    assert subject.plain_prompt(0) == "a dog in the jungle"
    assert subject.prompt(0, "sks {class}") == "a sks dog in the jungle"


def test_damaged_records_name_file_and_line(subjects, tmp_path):
    run_benchmark(Painter, subjects[:1], ENCODERS, None, output_dir=tmp_path, **SETTINGS)
    path = tmp_path / "records.jsonl"
    rows = read_records(path)
    append_records(path, rows[:1])
    assert len(read_records(path)) == len(rows) + 1
    line = json.dumps({**asdict(rows[0]), "extra": 1})
    for damage, message in ((line, r"missing or unknown: \['extra'\]"), ('{"metric": ', "is not JSON")):
        path.write_text(json.dumps(asdict(rows[0])) + "\n\n" + damage + "\n")
        with pytest.raises(ValueError, match=rf"records\.jsonl, line 3, {message}|records\.jsonl, line 3, .*{message}"):
            read_records(path)


def test_config_hash_ignores_the_order_of_keys_only():
    assert config_hash({"a": 1, "b": [1, 2]}) == config_hash({"b": [1, 2], "a": 1})
    assert len({config_hash(value) for value in ({"a": 1}, {"a": 2}, {"a": "1"}, {"a": [1]})}) == 4


def test_evaluate_scores_two_folders_of_mixed_sizes(tmp_path, monkeypatch, capsys):
    for folder, sizes in (("made", [(8, 8), (12, 9)]), ("real", [(10, 10)])):
        (tmp_path / folder).mkdir()
        for i, size in enumerate(sizes):
            Image.new("RGB", size, (255, 0, 0) if i == 0 else (0, 0, 255)).save(tmp_path / folder / f"{i}.png")
    monkeypatch.setattr(benchmark, "load_encoders", lambda *_: ENCODERS)
    output = tmp_path / "records.jsonl"
    folders = ["--images", str(tmp_path / "made"), "--reference", str(tmp_path / "real")]
    benchmark.main([*folders, "--prompt", "a red mug", "--output", str(output)])
    scores = {row.metric: row.value for row in read_records(output)}
    assert scores == pytest.approx({"clip_i": 0.5, "dino": 0.5, "clip_t": 0.5, "diversity": 1.0})
    assert "clip_t" in capsys.readouterr().out
    assert str(tmp_path) not in output.read_text()
