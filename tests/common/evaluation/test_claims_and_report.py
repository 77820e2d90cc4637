"""Verdicts, results.json, the card's table, figures, and a report that needs nothing but itself."""

import base64
import json
import re
from dataclasses import replace

import pytest
import torch
from PIL import Image

from common import papers_index
from common.evaluation import claims, figures, report
from common.evaluation.bootstrap import Interval
from common.evaluation.claims import (
    BenchmarkRow,
    Claim,
    Results,
    compare,
    load_results,
    not_run,
    save_results,
    verdict,
    write_card_table,
)
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


def test_comparison_over_subjects_by_hand():
    """Differences 0.1, 0.2, 0.3, with subjects in another order; every resampled mean lies in [0.1, 0.3]."""
    values = {"new": {"a": 0.4, "b": 0.6, "c": 0.8}, "old": {"c": 0.5, "b": 0.4, "a": 0.3}}
    claim = compare(values, "new", "old", "higher", text="t", how="h", place="Table 1", paper="+0.1")
    assert (claim.ours.mean, claim.ours.n, claim.holds) == (pytest.approx(0.2), 3, "yes")
    assert 0.1 - 1e-9 <= claim.ours.low < 0.2 < claim.ours.high <= 0.3 + 1e-9
    assert claim.detail == "0.6 (new) against 0.4 (old)"
    assert (claim.text, claim.place, claim.paper, claim.how) == ("t", "Table 1", "+0.1", "h")
    assert compare(values, "new", "old", "lower", text="t", how="h").holds == "no"
    turned = compare(values, "old", "new", "lower", text="t", how="h")
    assert turned.ours.mean == pytest.approx(-0.2) and turned.holds == "yes"
    with pytest.raises(ValueError, match=r"only one of the two has the subjects \['c'\]"):
        compare({**values, "few": {"a": 0.0, "b": 0.0}}, "new", "few", "higher", text="t", how="h")


@pytest.mark.parametrize(
    ("difference", "claimed", "margin", "expected"),
    [
        (0.2, "lower", 0.3, "yes"),  # at most 0.3 above
        (0.2, "lower", 0.1, "no"),
        (-0.2, "higher", 0.3, "yes"),  # at most 0.3 below
        (-0.2, "higher", 0.1, "no"),
        (-0.2, "lower", 0.3, "yes"),
        (-0.2, "lower", -0.1, "yes"),  # a negative margin asks for more
        (-0.2, "lower", -0.3, "no"),
    ],
)
def test_margin_moves_the_verdict_and_not_the_value(difference, claimed, margin, expected):
    subjects = "abc"
    values = {"one": dict.fromkeys(subjects, 0.5 + difference), "two": dict.fromkeys(subjects, 0.5)}
    claim = compare(values, "one", "two", claimed, margin=margin, text="t", how="h")
    assert claim.holds == expected and claim.ours.mean == pytest.approx(difference)


def test_full_scale_rows_have_no_value_of_ours():
    claim = not_run("PRES down", place="Table 3", paper="0.664 -> 0.493", how="Imagen")
    assert (claim.ours, claim.holds, claim.detail) == (None, "not run", "")
    assert claims.claim_table([claim]).split("\n")[2] == (
        "| PRES down (Table 3) | 0.664 -> 0.493 | not run | Imagen | not run |"
    )


def test_benchmark_row_makes_the_round_trip(results, tmp_path):
    path = tmp_path / "first_paper" / "results.json"
    with_row = replace(results, benchmark=benchmark_row(UP, Interval(0.4, 0.3, 0.6, 5)))
    save_results(with_row, path)
    assert load_results(path) == with_row
    row = json.loads(path.read_text())
    assert row["benchmark"]["compliance"] == {"mean": 0.4, "low": 0.3, "high": 0.6, "n": 5}
    path.write_text(json.dumps({name: value for name, value in row.items() if name != "benchmark"}))
    assert load_results(path) == results  # a file from before there was such a row
    damaged = {"setting": "s"}, {**row["benchmark"], "identity": 0.2}, {**row["benchmark"], "more": 1}
    for benchmark in damaged:
        path.write_text(json.dumps({**row, "benchmark": benchmark}))
        with pytest.raises(ValueError, match=r"results\.json is not what .*write it anew"):
            load_results(path)


def benchmark_row(identity: Interval, compliance: Interval, **changes) -> BenchmarkRow:
    values = {"study": "5f0c", "setting": "tiny-sd, 5 subjects", "artifact_bytes": 3140, "training_seconds": 61.6}
    return BenchmarkRow(**{**values, "identity": identity, "compliance": compliance, **changes})


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


def test_report_compares_the_papers_of_one_study(results, tmp_path, monkeypatch):
    """Two papers of one study, one of another, one without a row, and a copied paper that kept its title."""
    rows = {
        "first": benchmark_row(UP, Interval(0.4, 0.3, 0.6, 5)),
        "second": benchmark_row(Interval(0.7, 0.6, 0.8, 5), UP, artifact_bytes=71_600_000, training_seconds=200.0),
        "other": benchmark_row(UP, UP, study="77aa", setting="sd15, 5 subjects"),
        "none": None,
        "copy": benchmark_row(UP, UP),
    }
    folders = []
    for slug, row in rows.items():
        folders.append(tmp_path / slug)
        (tmp_path / slug).mkdir()
        (tmp_path / slug / "README.md").write_text(f"# Method {'second' if slug == 'copy' else slug}: a long title\n")
        save_results(replace(results, slug=slug, figures=[], benchmark=row), tmp_path / slug / "results.json")
    drawn, draw = [], figures.scatter_methods
    monkeypatch.setattr(figures, "scatter_methods", lambda *values: drawn.append(values) or draw(*values))
    output = tmp_path / "report.html"
    report.write_report(folders, [], output)
    page = output.read_text(encoding="utf-8")
    found = page.split("All object methods")[1].split('<section id="first">')[0]
    assert found.count("<figure>") == 2 and found.count("data:image/svg+xml") == 2
    assert found.index("tiny-sd, 5 subjects") < found.index("sd15, 5 subjects")  # the largest group first
    assert "fidelity of Method first, Method second (second), Method second (copy)" in found
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", found))
    assert "Method first 0.200 [0.100, 0.300] 0.400 [0.300, 0.600] 3.1 kB 62 s" in text
    assert "Method second (second) 0.700 [0.600, 0.800] 0.200 [0.100, 0.300] 72 MB 3 min" in text
    assert "Method none" not in text and "Study 77aa" in text

    points, *labels = drawn[0]
    assert labels == ["prompt fidelity", "subject fidelity"]
    assert points["Method first"] == (rows["first"].compliance, rows["first"].identity)

    first, _ = report.compare_methods([report.read_section(folder) for folder in folders])
    assert list(first.methods) == ["first", "second", "copy"]
    report.write_report([tmp_path / "none"], [], output)
    assert "All object methods" not in output.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("num_bytes", "expected"),
    [(0, "0 B"), (840, "840 B"), (999, "999 B"), (1000, "1.0 kB"), (3140, "3.1 kB"), (9949, "9.9 kB"), (9951, "10 kB")]
    + [(999_499, "999 kB"), (999_500, "1.0 MB"), (71_600_000, "72 MB"), (3_438_167_534, "3.4 GB")],
)
def test_file_sizes_for_people(num_bytes, expected):
    assert report._file_size(num_bytes) == expected


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


def test_bars_of_one_group_name_all_methods_inside_the_figure():
    names = ["VMC", "denoising loss", "Tune-A-Video style", "signed loss without inversion", "absolute loss, the same"]
    figure = figures.bar_with_intervals({"error": dict.fromkeys(names, UP)}, "px")
    figure.canvas.draw()
    box = figure.legends[0].get_window_extent()
    assert box.x0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1
    assert figure.axes[0].get_window_extent().height > 150


def test_lines_go_through_their_means():
    lines = {"one": {1: UP, 16: Interval(0.4, 0.3, 0.6, 5)}, "two": {1: UP}}
    figure = figures.lines_with_intervals(lines, "rank", "error", log_x=True)
    (axes,) = figure.axes
    line = axes.containers[0].lines[0]
    assert (line.get_xdata().tolist(), line.get_ydata().tolist()) == ([1, 16], [0.2, 0.4])
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["1", "16"]
    with pytest.raises(ValueError, match="no point"):
        figures.lines_with_intervals({"one": {}}, "rank", "error")


def test_scatter_of_ten_methods_names_each_inside_the_figure():
    names = [f"Method number {k} of ten" for k in range(9)] + ["One with a much longer name than those"]
    points = {name: (Interval(k / 10, k / 10 - 0.1, k / 10 + 0.2, 5), UP) for k, name in enumerate(names)}
    figure = figures.scatter_methods(points, "x", "y")
    (axes,), (legend,) = figure.axes, figure.legends
    figure.canvas.draw()
    for text in legend.get_texts():
        box = text.get_window_extent()
        assert box.x0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1, text.get_text()
    assert [text.get_text() for text in legend.get_texts()] == names
    assert legend.get_window_extent().y0 >= axes.get_window_extent().y1 and axes.get_window_extent().height > 200
    marks = [line for line in axes.lines if line.get_label() in names]
    assert [line.get_xdata()[0] for line in marks] == [k / 10 for k in range(10)]
    assert len({(line.get_color(), line.get_marker()) for line in marks}) == 10


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


@pytest.mark.parametrize(
    ("numbers", "text"),
    [((0.2, 0.1, 0.3), "0.200 [0.100, 0.300]"), ((-0.00173, -0.0021, -0.0012), "-0.00173 [-0.00210, -0.00120]"),
     ((-11.34, -168.2, 127.8), "-11 [-168, 128]"), ((0.0, 0.0, 0.0), "0.00 [0.00, 0.00]")],
)  # fmt: skip
def test_an_interval_shows_three_digits(numbers, text):
    assert str(Interval(*numbers, n=5)) == text
