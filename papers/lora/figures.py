"""The kinds of figure that the literature draws of LoRA, in the toy world, from what the study left in `runs`."""

from pathlib import Path

import torch
from torch import Tensor

from common.data.images import load_image, to_pixel_values
from common.evaluation.bootstrap import Interval, bootstrap_mean
from common.evaluation.claims import Figure
from common.evaluation.figures import labelled_image_rows, lines_with_intervals, save_figure, scatter_methods
from common.evaluation.study import Scores, folder_name
from common.sampling.images import save_png
from common.toyworld.benchmark import subjects

from .experiments import AVERAGE, FACTOR_SUM, FULL, INVERSION, PROPOSAL, SUM, Plan, rank_name, scale_name

FIDELITY, COMPLIANCE = "subject: identity cosine", "prompt: share of what it asks for"


def draw_figures(plan: Plan, scores: Scores, runs: Path, output: Path) -> list[Figure]:
    """Write output/figures/*.png."""
    folder = output / "figures"
    lines = {
        label: {s: mean(scores, f"scale {score}", scale_name(s)) for s in plan.strengths}
        for label, score in (("subject fidelity", "identity"), ("prompt fidelity", "compliance"))
    }
    sweep = lines_with_intervals(lines, "scale of Delta W", "identity cosine, share of the prompt")
    save_figure(sweep, folder / "scale.png")
    draw_scales(plan, runs / "scale", folder / "scale_samples.png")
    ranks = sorted((plan.config.rank, *plan.ranks))
    errors = {
        "LoRA": {rank: mean(scores, "identity error", rank_name(rank, plan)) for rank in ranks},
        FULL: dict.fromkeys(ranks, mean(scores, "identity error", FULL)),
        INVERSION: dict.fromkeys(ranks, mean(scores, "identity error", INVERSION)),
    }
    save_figure(lines_with_intervals(errors, "rank", "1 - identity cosine", log_x=True), folder / "rank.png")
    draw_merges(plan, runs, folder / "merge.png")
    points = {
        name: (mean(scores, "compliance", name), mean(scores, "identity", name)) for name in scores["identity"]
    }  # fmt: skip
    save_figure(scatter_methods(points, COMPLIANCE, FIDELITY), folder / "methods.png")
    return [
        Figure("figures/scale.png", "One LoRA at several scales: subject fidelity against prompt fidelity"),
        Figure("figures/scale_samples.png", "The same in pictures, at equal seeds"),
        Figure("figures/rank.png", "Subject error by rank, at equal steps"),
        Figure("figures/merge.png", "The pairs of two subjects in one adapter, asked for the first of them"),
        Figure("figures/methods.png", "Ranks, full fine-tuning and Textual Inversion at equal steps and data"),
    ]


def mean(scores: Scores, score: str, name: str) -> Interval:
    return bootstrap_mean(list(scores[score][name].values()))


def draw_scales(plan: Plan, runs: Path, path: Path) -> None:
    """A row for each subject: a training photo, then the plain prompt at each strength."""
    rows = {
        subject.name: torch.stack(
            [
                subject.images[0],
                *(plain_picture(runs / folder_name(scale_name(s)), subject.name) for s in plan.strengths),
            ]
        )
        for subject in subjects(plan.scale_study.num_subjects)
    }
    save_png(labelled_image_rows(rows, ["photo", *(f"scale {s:g}" for s in plan.strengths)]), path)


def draw_merges(plan: Plan, runs: Path, path: Path) -> None:
    """A row for each subject: a training photo, its own LoRA, and the three ways to merge it with the next one's."""
    folders = {PROPOSAL: runs / PROPOSAL} | {
        name: runs / "merge" / folder_name(name) for name in (SUM, FACTOR_SUM, AVERAGE)
    }
    rows = {
        subject.name: torch.stack(
            [subject.images[0], *(plain_picture(folder, subject.name) for folder in folders.values())]
        )
        for subject in subjects(plan.merge_study.num_subjects)
    }
    save_png(labelled_image_rows(rows, ["photo", *folders]), path)


def plain_picture(folder: Path, subject: str) -> Tensor:
    """The first picture of the plain prompt in a method's folder, (3,H,W) in [-1,1]."""
    return to_pixel_values(load_image(folder / "images" / subject / "00-0.png"))
