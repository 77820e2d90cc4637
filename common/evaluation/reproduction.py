"""The frame of every papers/SLUG/reproduce.py: options, folders, results.json, the card's table."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import tyro

from common.backbones import load_backbone
from common.evaluation.claims import BenchmarkRow, Claim, Figure, Results, save_results, write_card_table
from common.evaluation.records import describe_machine
from common.fingerprint import weights_hash
from common.io import atomic_write_text
from common.training.interrupt import exit_on_sigterm
from common.training.optimize import default_device


@dataclass(frozen=True, kw_only=True)
class ReproduceOptions:
    """Measure the paper's claims in the toy world."""

    quick: bool = False
    """A few steps, to see that everything runs; it says nothing about the claims."""
    output: Path | None = None
    """Folder of results.json, figures/ and runs/. Default: results and figures go into the paper's folder, runs into
    runs/reproduce/, and the card's table is renewed; with --quick, everything goes into runs/quick/."""
    backbone: str = tyro.MISSING
    """A preset or a diffusers folder."""


@dataclass(frozen=True)
class Setup:
    """What a reproduction gets."""

    backbone: str  # name for load_backbone
    quick: bool
    runs: Path  # for what is trained and sampled; a run that was stopped finds it again
    output: Path  # for figures/


@dataclass(frozen=True, kw_only=True)
class Findings:
    """What a reproduction returns."""

    claims: list[Claim]
    figures: list[Figure]
    seeds: list[int]
    steps: int  # optimiser steps of each training run
    benchmark: BenchmarkRow | None = None  # of the paper's own method, where it ran the study of objects


def reproduce(
    folder: Path, measure: Callable[[Setup], Findings], argv: list[str] | None = None, *, backbone: str = "tiny-sd"
) -> None:
    """Measure, draw, write results.json, and renew the card if the output is the paper's own folder.

    Args: folder: of the paper.   backbone: the one that its results are for, unless --backbone says another.
    """
    started = time.perf_counter()
    options = tyro.cli(ReproduceOptions, args=argv, default=ReproduceOptions(backbone=backbone))
    folder = folder.resolve()
    slug = folder.name
    output = options.output or (Path("runs/quick") / slug if options.quick else folder)
    is_card = output.resolve() == folder
    if is_card and options.quick:
        raise ValueError("--quick does not write into the paper's folder: choose another --output")
    runs = Path("runs/reproduce") / slug if is_card else output / "runs"
    spent = runs / "seconds.txt"  # by earlier calls whose finished runs are found again
    before = float(spent.read_text(encoding="utf-8")) if spent.is_file() else 0.0
    try:
        with exit_on_sigterm():
            found = measure(Setup(options.backbone, options.quick, runs, output))
    finally:
        seconds = before + time.perf_counter() - started
        atomic_write_text(spent, f"{seconds:.1f}\n")
    network = load_backbone(options.backbone)
    results = Results(
        slug=slug,
        command=_command(slug, options, is_default=options.backbone == backbone),
        backbone=f"{Path(network.name).name}, unet {weights_hash(network.unet)}",
        seeds=found.seeds,
        steps=found.steps,
        machine=describe_machine(str(default_device())),
        seconds=seconds,
        claims=found.claims,
        figures=found.figures,
        benchmark=found.benchmark,
    )
    save_results(results, output / "results.json")
    if is_card:
        write_card_table(folder / "README.md", results)
    for claim in results.claims:
        print(f"{claim.holds:>14}  {claim.text}: {claim.ours or '-'}")
    print(f"wrote {output / 'results.json'}")


def _command(slug: str, options: ReproduceOptions, *, is_default: bool) -> str:
    """What to type for the same numbers; the output folder does not matter."""
    if not options.quick and is_default:
        return f"make reproduce PAPER={slug}"
    return f"pcs reproduce {slug}{' --quick' if options.quick else ''} --backbone {Path(options.backbone).name}"
