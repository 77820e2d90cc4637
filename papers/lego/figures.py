"""The paper's kinds of figure, in the toy world; all from what the study left in its folders."""

from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure as Plot

from common.evaluation.bootstrap import bootstrap_mean
from common.evaluation.claims import Figure
from common.evaluation.exemplar_study import pictures
from common.evaluation.figures import bar_with_intervals, labelled_image_rows, save_figure
from common.evaluation.trials import Scores, folder_name
from common.sampling.images import save_png
from common.toyworld.exemplar_tasks import Task

from .experiments import (
    FINE_TUNING,
    GAP,
    INVERSION,
    JOINT,
    LOSS,
    NO_CONTEXT,
    ONE_VECTOR,
    PLAIN_WORDS,
    PROPOSAL,
    STRONG_CONTEXT,
    SUBJECT,
    UNSEPARATED,
    Plan,
    of_tasks,
)

COMPARED = (PROPOSAL, UNSEPARATED, INVERSION, FINE_TUNING, PLAIN_WORDS)
TRANSFER = (PLAIN_WORDS, INVERSION, UNSEPARATED, PROPOSAL)
BARS = {"learned": "state", "entities": "class", "both": "both", SUBJECT: "training subject"}
CONTEXT_BARS = {"learned": "state", "both": "state and class", GAP: "cosine gap", LOSS: "loss of set C"}
NEW_SUBJECTS = (0, 1)  # prompts of the grids


def draw_figures(plan: Plan, scores: Scores, runs: Path, output: Path) -> list[Figure]:
    """Write output/figures/*.png."""
    folder, pairs = output / "figures", (PROPOSAL, ONE_VECTOR)
    draw_grid(plan, plan.tasks, TRANSFER, runs, folder / "transfer.png")
    draw_grid(plan, plan.pairs, pairs, runs / "pairs", folder / "two_words.png")
    save_figure(bars(scores, BARS, COMPARED, plan.tasks), folder / "accuracy.png")
    context = (NO_CONTEXT, PROPOSAL, STRONG_CONTEXT)
    save_figure(bars(scores, CONTEXT_BARS, context, plan.ablation_tasks), folder / "context.png")
    factors = {JOINT: "state and place", "learned": "state", "both": "state, place, class"}
    save_figure(bars(scores, factors, pairs, plan.pairs), folder / "vectors.png")
    return [
        Figure("figures/transfer.png", "Concept transfer: sets S and C, and pictures for prompts about new subjects"),
        Figure(
            "figures/accuracy.png", "What the judge sees for new subjects; last, the training subject's probability"
        ),
        Figure("figures/context.png", "The Context Loss: lambda 0, 0.01 and 0.1"),
        Figure("figures/two_words.png", "Concepts of two words, with a vector for each and with one for both"),
        Figure("figures/vectors.png", "The same, read by the judge"),
    ]


def draw_grid(plan: Plan, tasks: Sequence[Task], names: Sequence[str], runs: Path, path: Path) -> None:
    """A row for each concept and new subject: one picture of S, two of C, then the first one of each candidate."""
    rows = {}
    for task in tasks:
        for k in [k for k in NEW_SUBJECTS if k < plan.study.num_prompts]:
            made = [pictures(runs / folder_name(name), task, k, plan.study)[0] for name in names]
            rows[f"{task.name} {task.prompts[k].expected['class']}"] = torch.stack(
                [task.others[0], *task.images[:2], *made]
            )
    save_png(labelled_image_rows(rows, ["set S", "set C", "set C", *names]), path)


def bars(scores: Scores, groups: dict[str, str], names: Sequence[str], tasks: Sequence[Task]) -> Plot:
    """Groups: scores under their labels. Bars: means over tasks of the candidates."""
    values = {
        label: {name: bootstrap_mean(list(of_tasks(scores, score, tasks)[name].values())) for name in names}
        for score, label in groups.items()
    }
    return bar_with_intervals(values, "mean over concepts")
