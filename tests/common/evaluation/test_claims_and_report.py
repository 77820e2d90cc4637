"""Verdicts, results.json, the card's table, figures, and a report that needs nothing but itself."""

import base64
import json
import re

import pytest
import torch
from PIL import Image

from common import papers_index
from common.evaluation import claims, figures, report
from common.evaluation.bootstrap import Interval
from common.evaluation.claims import Claim, Results, load_results, save_results, verdict, write_card_table
from common.evaluation.records import Record, append_records

UP = Interval(0.2, 0.1, 0.3, 5)
CARD = """# First Paper

**Task:** subject-driven images.

Learns **one** *new* [word](https://example.org) `v*` & nothing: v* = c_* * 2.

Second paragraph.

## Claims
<!-- claims:begin -->
old
<!-- claims:end -->
after
"""


@pytest.fixture
def results() -> Results:
    small = {"place": "", "paper": "-", "how": "tiny-sd, 5 subjects, seeds 0-2, judge"}
    return Results(
        slug="first_paper",
        command="make reproduce PAPER=first_paper",
        backbone="tiny-sd",
        seeds=[0, 1, 2],
        steps=200,
        machine="2 CPU cores",
        seconds=312.4,
        claims=[
            Claim(
                text="drift falls", place="Table 3", paper="0.664 -> 0.493", ours=None, how="Imagen", holds="not run"
            ),
            Claim(text="same, toy world", ours=UP, detail="0.7 with | 0.5 without", holds="yes", **small),
            Claim(text="less is <more>", ours=Interval(0.1, -0.1, 0.2, 5), holds="direction only", **small),
            Claim(text="never", ours=Interval(-0.1, -0.2, 0.1, 5), holds="no", **small),
        ],
        figures=[claims.Figure("figures/rows.png", "Rows of images")],
    )


@pytest.fixture
def papers(tmp_path, results, monkeypatch):
    """A papers folder with one reproduced paper, one without results, and benchmark records."""
    folder = tmp_path / "papers" / "first_paper"
    (folder / "figures").mkdir(parents=True)
    (folder / "method.py").touch()
    (folder / "README.md").write_text(CARD)
    (tmp_path / "papers" / "unfinished").mkdir()
    (tmp_path / "papers" / "unfinished" / "method.py").touch()
    save_results(results, folder / "results.json")
    Image.new("RGB", (20, 10), "red").save(folder / "figures" / "rows.png")
    common = {"values": [], "prompt": "p", "seeds": [0], "n_images": 1, "preprocessing": "64 px", "config_hash": "0"}
    append_records(
        folder / "records.jsonl",
        [
            Record(
                metric=metric,
                value=value,
                method=method,
                subject=subject,
                backbone="toy",
                git_commit="abc",
                versions={},
                **common,
            )
            for method, offset in (("one", 0.0), ("two", 0.2))
            for subject in ("a", "b")
            for metric, value in (("clip_t", 0.3 + offset), ("dino", 0.6 - offset), ("attribute/color", 1.0))
        ],
    )
    monkeypatch.setattr(papers_index, "PAPERS", tmp_path / "papers")
    return tmp_path / "papers"


@pytest.mark.parametrize(
    ("interval", "claimed", "expected"),
    [
        (UP, "higher", "yes"),
        (UP, "lower", "no"),
        (Interval(-0.2, -0.3, -0.1, 5), "lower", "yes"),
        (Interval(0.1, -0.1, 0.2, 5), "higher", "direction only"),
        (Interval(0.1, 0.0, 0.2, 5), "higher", "direction only"),
        (Interval(-0.1, -0.2, 0.1, 5), "higher", "no"),
        (Interval(0.0, 0.0, 0.0, 5), "higher", "no"),
        (Interval(0.2, 0.2, 0.2, 2), "higher", "direction only"),  # two subjects prove nothing
    ],
)
def test_verdict(interval, claimed, expected):
    assert verdict(interval, claimed) == expected


def test_claims_refuse_values_that_were_not_run():
    row = {"text": "t", "place": "", "paper": "0.5", "how": "h"}
    for ours, holds in ((UP, "not run"), (None, "yes")):
        with pytest.raises(ValueError, match=f"the claim 't' is '{holds}'"):
            Claim(**row, ours=ours, holds=holds)
    with pytest.raises(ValueError, match="must be one of .* got 'maybe'"):
        Claim(**row, ours=UP, holds="maybe")


def test_results_round_trip_and_damage_is_named(results, tmp_path):
    path = tmp_path / "first_paper" / "results.json"
    save_results(results, path)
    assert load_results(path) == results
    assert papers_index._read_verdicts(path) == ["not run", "yes", "direction only", "no"]
    row = json.loads(path.read_text())
    for damaged in ('{"claims": [', json.dumps({**row, "seeds2": 1}), json.dumps({"claims": []})):
        path.write_text(damaged)
        with pytest.raises(ValueError, match=r"results\.json is not what .*write it anew: pcs reproduce first_paper"):
            load_results(path)
    with pytest.raises(FileNotFoundError, match="`pcs reproduce nowhere` writes it"):
        load_results(tmp_path / "nowhere" / "results.json")


def test_card_table_is_as_styled_and_written_again_the_same(results, tmp_path):
    card = tmp_path / "README.md"
    card.write_text(CARD)
    write_card_table(card, results)
    once = card.read_text()
    write_card_table(card, results)
    assert card.read_text() == once
    assert once.startswith(CARD[: CARD.index("old")]) and once.endswith("<!-- claims:end -->\nafter\n")
    lines = once.split("<!-- claims:begin -->\n")[1].split("\n")
    assert lines[0] == "| claim (place) | paper | ours | how measured | holds? |"
    assert lines[2] == "| drift falls (Table 3) | 0.664 -> 0.493 | not run | Imagen | not run |"
    assert lines[3].startswith("| same, toy world | - | 0.200 [0.100, 0.300] (n=5): 0.7 with \\| 0.5 without | tiny-sd")
    assert "on 2 CPU cores in 5 min" in once
    card.write_text("# no markers")
    with pytest.raises(ValueError, match="README.md needs one line <!-- claims:begin -->"):
        write_card_table(card, results)


def test_report_is_self_contained(papers, tmp_path, capsys):
    output = tmp_path / "report.html"
    report.main(["--output", str(output)])
    assert capsys.readouterr().out == f"{output}\n"
    page = output.read_text(encoding="utf-8")
    sources = re.findall(r'src="([^"]{0,40})', page)
    assert len(sources) == 2 and all(source.startswith("data:image/") for source in sources)
    assert not re.search(r"https?:|<script|<link|@import|url\(|@font-face", page)
    picture = (papers / "first_paper" / "figures" / "rows.png").read_bytes()
    assert base64.b64encode(picture).decode() in page
    assert "Learns one new word v* &amp; nothing: v* = c_* * 2." in page and "Second paragraph" not in page
    assert "less is &lt;more&gt;" in page
    assert "unfinished" not in page and str(tmp_path) not in page
    for name, mark in report.MARKS.items():
        assert f"{mark} {name}</span>" in page
    assert "attribute/color" not in page and "CLIP-T" in page


def test_report_of_chosen_papers_and_its_errors(papers, tmp_path):
    output = tmp_path / "report.html"
    report.main(["first_paper", "--output", str(output)])
    assert output.is_file()
    with pytest.raises(FileNotFoundError, match="`pcs reproduce unfinished` writes it"):
        report.main(["unfinished", "--output", str(output)])
    (papers / "first_paper" / "figures" / "rows.png").unlink()
    with pytest.raises(FileNotFoundError, match="rows.png is named in results.json but is not there"):
        report.main(["--output", str(output)])
    (papers / "first_paper" / "results.json").unlink()
    with pytest.raises(ValueError, match="nothing to report"):
        report.main(["--output", str(output)])


def test_bars_stand_at_their_means():
    bars = {"CLIP-T": {"one": UP, "two": Interval(0.4, 0.3, 0.6, 5)}, "DINO": {"two": UP}}
    figure = figures.bar_with_intervals(bars, "score")
    patches = figure.axes[0].patches
    assert [patch.get_height() for patch in patches] == [0.2, 0.4, 0.2]
    left, right = (patch.get_x() + patch.get_width() / 2 for patch in patches[:2])
    assert (left, right) == (pytest.approx(-0.2), pytest.approx(0.2))
    assert patches[2].get_facecolor() == patches[1].get_facecolor() != patches[0].get_facecolor()
    with pytest.raises(ValueError, match="no bar"):
        figures.bar_with_intervals({}, "score")


def test_figures_are_written_the_same_each_time_and_leave_nothing_global(tmp_path):
    import sys

    points = {"one": (UP, UP), "two": (Interval(0.1, 0.0, 0.2, 5), UP)}
    figure = figures.scatter_methods(points, "x", "y")
    assert figures.figure_bytes(figure, "svg") == figures.figure_bytes(figures.scatter_methods(points, "x", "y"), "svg")
    figures.save_figure(figure, tmp_path / "deep" / "scatter.png")
    with Image.open(tmp_path / "deep" / "scatter.png") as image:
        assert image.size == (690, 510)
    assert "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()


def test_image_rows_show_each_image_under_its_column():
    red, blue = torch.tensor([1.0, -1, -1]).view(3, 1, 1), torch.tensor([-1.0, -1, 1]).view(3, 1, 1)
    rows = {"photos": torch.stack([red, blue]).expand(2, 3, 10, 10), "ours": blue.expand(1, 3, 10, 10)}
    figure = figures.labelled_image_rows(rows, ["a", "b"], upscale=3)
    width, height = figure.size
    assert figure.getpixel((width - 20, height - 20 - 34)) == (0, 0, 255)
    assert figure.getpixel((width - 20 - 34, height - 20 - 34)) == (255, 0, 0)
    assert figure.getpixel((width - 20 - 34, height - 20)) == (0, 0, 255)
    assert figure.getpixel((width - 20, height - 20)) == (255, 255, 255)  # the short row's gap
    with pytest.raises(ValueError, match="3 column names for 2 columns"):
        figures.labelled_image_rows(rows, ["a", "b", "c"])
    with pytest.raises(ValueError, match="all of one size"):
        figures.labelled_image_rows({"a": torch.zeros(1, 3, 4, 4), "b": torch.zeros(1, 3, 5, 4)})
