"""The frame of reproduce.py: where things are written, what is said about them, and what --quick may not do."""

import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from common.evaluation import reproduction
from common.evaluation.bootstrap import Interval
from common.evaluation.claims import BenchmarkRow, Claim, Figure, load_results
from common.evaluation.reproduction import Findings, Setup, reproduce
from common.fingerprint import weights_hash

VALUE = Interval(0.2, 0.1, 0.3, 5)
ROW = BenchmarkRow(study="0", setting="s", identity=VALUE, compliance=VALUE, artifact_bytes=9, training_seconds=2.5)
CARD = "# A Paper\n<!-- claims:begin -->\nold\n<!-- claims:end -->\n"


class Measure:
    """What a paper passes: notes its set-ups, takes 60 seconds."""

    def __init__(self):
        self.now, self.setups, self.interruptions = 7.0, [], []

    def perf_counter(self):
        return self.now

    def __call__(self, setup: Setup) -> Findings:
        self.setups.append(setup)
        self.now += 60
        if self.interruptions:
            self.interruptions.pop()()
        (claim,) = [Claim(text="better", place="", paper="-", ours=VALUE, how="h", holds="yes")]
        return Findings(claims=[claim], figures=[Figure("figures/a.png", "A")], seeds=[0, 1], steps=9, benchmark=ROW)


@pytest.fixture
def backbone(monkeypatch):
    torch.manual_seed(0)
    unet = nn.Linear(2, 2)
    monkeypatch.setattr(reproduction, "load_backbone", lambda name: SimpleNamespace(name=name, unet=unet))
    return unet


@pytest.fixture
def measure(monkeypatch, tmp_path, backbone) -> Measure:
    measure = Measure()
    monkeypatch.setattr(reproduction, "time", measure)
    monkeypatch.chdir(tmp_path)
    return measure


@pytest.fixture
def paper(tmp_path) -> Path:
    folder = tmp_path / "papers" / "some_paper"
    folder.mkdir(parents=True)
    (folder / "README.md").write_text(CARD)
    return folder


def test_full_run_fills_the_papers_folder_and_its_card(paper, measure, backbone, capsys):
    reproduce(paper, measure, [])
    assert measure.setups == [Setup("tiny-sd", False, Path("runs/reproduce/some_paper"), paper)]
    results = load_results(paper / "results.json")
    assert (results.slug, results.command) == ("some_paper", "make reproduce PAPER=some_paper")
    assert (results.seeds, results.steps, results.seconds) == ([0, 1], 9, 60.0)
    assert results.backbone == f"tiny-sd, unet {weights_hash(backbone)}" and "CPU core" in results.machine
    assert results.benchmark == ROW and results.figures == [Figure("figures/a.png", "A")]
    card = (paper / "README.md").read_text()
    assert "| better | - | 0.200 [0.100, 0.300] (n=5) | h | yes |" in card and "\nold\n" not in card
    assert "yes  better: 0.200 [0.100, 0.300]" in capsys.readouterr().out


def test_quick_and_other_outputs_leave_the_paper_alone(paper, measure, tmp_path):
    reproduce(paper, measure, ["--quick"])
    quick = Path("runs/quick/some_paper")
    assert measure.setups[-1] == Setup("tiny-sd", True, quick / "runs", quick)
    assert load_results(quick / "results.json").command == "pcs reproduce some_paper --quick --backbone tiny-sd"
    reproduce(paper, measure, ["--output", "out", "--backbone", str(tmp_path / "mine")])
    assert measure.setups[-1] == Setup(str(tmp_path / "mine"), False, Path("out/runs"), Path("out"))
    results = load_results("out/results.json")
    assert results.command == "pcs reproduce some_paper --backbone mine" and results.backbone.startswith("mine, unet ")
    assert str(tmp_path) not in Path("out/results.json").read_text()
    assert [path.name for path in paper.iterdir()] == ["README.md"] and (paper / "README.md").read_text() == CARD


def test_quick_never_writes_into_the_papers_folder(paper, measure):
    with pytest.raises(ValueError, match="choose another --output"):
        reproduce(paper, measure, ["--quick", "--output", "papers/some_paper"])
    assert not measure.setups
    reproduce(paper, measure, ["--output", "papers/some_paper"])  # by name, it is the paper's folder too
    assert measure.setups[-1].runs == Path("runs/reproduce/some_paper")
    assert "better" in (paper / "README.md").read_text()


def ctrl_c():
    raise KeyboardInterrupt


def sigterm():
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("interruption, error", [(ctrl_c, KeyboardInterrupt), (sigterm, SystemExit)])
def test_time_of_a_stopped_run_counts_and_it_leaves_no_results(paper, measure, interruption, error):
    measure.interruptions.append(interruption)
    with pytest.raises(error):
        reproduce(paper, measure, ["--output", "out"])
    assert not Path("out/results.json").exists()
    reproduce(paper, measure, ["--output", "out"])
    assert json.loads(Path("out/results.json").read_text())["seconds"] == 120.0
