"""The paper's kinds of figure, in the toy world; all from what the study left in its folders."""

from pathlib import Path

import torch
from torch import Tensor

from common.data.images import load_image, to_pixel_values
from common.evaluation.bootstrap import bootstrap_mean, paired_difference
from common.evaluation.claims import Figure
from common.evaluation.figures import bar_with_intervals, labelled_image_rows, save_figure, scatter_methods
from common.evaluation.study import Scores, benchmark_subject, folder_name
from common.sampling.images import save_png
from common.toyworld.benchmark import subjects

from .experiments import INVERSION, PLACEHOLDER, PROPOSAL, VARIANTS, Plan, truncated
from .mapper import HIDDEN


def draw_figures(plan: Plan, scores: Scores, runs: Path, output: Path) -> list[Figure]:
    """Write output/figures/*.png."""
    folder = output / "figures"
    draw_truncations(plan, runs / "truncation", folder / "truncation.png")
    draw_samples(plan, runs, folder / "samples.png")
    points = {
        f"{name} {keep}": tuple(
            bootstrap_mean(list(scores[f"truncation {score}"][truncated(name, keep)].values()))
            for score in ("compliance", "identity")
        )
        for name, keeps in plan.keeps.items()
        for keep in keeps
    }
    tradeoff = scatter_methods(points, "editability: share of what prompts ask for", "fidelity: identity cosine")
    save_figure(tradeoff, folder / "tradeoff.png")
    losses = scores["held-out loss"]
    below = {name: {"": paired_difference(losses[name], losses[INVERSION])} for name in VARIANTS}
    save_figure(bar_with_intervals(below, "held-out loss minus Textual Inversion's"), folder / "losses.png")
    return [
        Figure("figures/truncation.png", "One trained mapper, equal seeds: fewer and fewer hidden units stay"),
        Figure(
            "figures/tradeoff.png",
            "Fidelity against editability as units go, trained with and without dropout",
        ),
        Figure("figures/losses.png", "Held-out loss at equal steps, against Textual Inversion's"),
        Figure("figures/samples.png", "Training photos, and a photo of a S* by NeTI and by Textual Inversion"),
    ]


def draw_truncations(plan: Plan, folder: Path, path: Path) -> None:
    """A row for each subject and prompt, up to two subjects; a column for each number of units that stay."""
    keeps, rows = plan.keeps[PROPOSAL], {}
    for subject in subjects(min(2, plan.truncation_study.num_subjects)):
        scored = benchmark_subject(subject, plan.truncation_study)
        for i in range(len(scored.prompts)):
            pictures = [
                read_picture(folder / folder_name(truncated(PROPOSAL, keep)) / "images" / subject.name, i, plan)
                for keep in keeps
            ]
            rows[scored.prompt(i, PLACEHOLDER)] = torch.stack(pictures)
    save_png(labelled_image_rows(rows, [f"{keep} of {HIDDEN}" for keep in keeps]), path)


def draw_samples(plan: Plan, runs: Path, path: Path) -> None:
    """Training photos beside the first picture of the plain prompt."""
    rows = {}
    for subject in subjects(plan.study.num_subjects):
        pictures = [
            read_picture(runs / folder_name(name) / "images" / subject.name, 0, plan) for name in (PROPOSAL, INVERSION)
        ]
        rows[subject.name] = torch.stack([*subject.images[:4], *pictures])
    save_png(labelled_image_rows(rows, [*["training"] * 4, PROPOSAL, INVERSION]), path)


def read_picture(folder: Path, prompt: int, plan: Plan) -> Tensor:
    """The study's picture of a prompt with its first seed, (3,H,W) in [-1,1]."""
    return to_pixel_values(load_image(folder / f"{prompt:02d}-{plan.study.seeds[0]}.png"))
