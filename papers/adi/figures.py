"""The paper's kinds of figure, in the toy world; all from what the study left in its folders."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure as Plot
from torch import Tensor

from common.evaluation.bootstrap import bootstrap_mean
from common.evaluation.claims import Figure
from common.evaluation.exemplar_study import pictures
from common.evaluation.figures import bar_with_intervals, labelled_image_rows, save_figure
from common.evaluation.trials import Scores, folder_name
from common.sampling.images import save_png
from common.toyworld.exemplar_tasks import Task

from .experiments import (
    ACTION,
    CONTEXT,
    FINE_TUNING,
    INTERSECTION,
    INVERSION,
    LONGER,
    PROPOSAL,
    RANDOM,
    UNMASKED,
    Plan,
    mask_overlap,
    of_tasks,
)

COMPARED = (PROPOSAL, UNMASKED, INVERSION, FINE_TUNING)
ABLATED = (PROPOSAL, INTERSECTION, CONTEXT, ACTION, RANDOM, UNMASKED, LONGER)
BARS = {"learned": "action", "entities": "subject and place", "both": "both", "leakage": "leakage"}
SUBJECTS = (0, 2)  # prompts of the grid: a bear and a man


def draw_figures(backbone_name: str, plan: Plan, scores: Scores, runs: Path, output: Path) -> list[Figure]:
    """Write output/figures/*.png."""
    folder, tasks = output / "figures", plan.tasks
    draw_grid(plan, tasks, runs, folder / "grid.png")
    save_figure(accuracy_bars(scores, COMPARED, tasks), folder / "accuracy.png")
    save_figure(accuracy_bars(scores, ABLATED, tasks[: plan.num_ablation_tasks]), folder / "ablations.png")
    overlaps = {task.name: mask_overlap(backbone_name, plan, runs, task) for task in tasks}
    save_figure(overlap_map(overlaps, chance=plan.config.kept_share**2), folder / "masks.png")
    return [
        Figure("figures/grid.png", "Actions by subjects: two exemplars, and pictures for prompts about other subjects"),
        Figure("figures/accuracy.png", "Shares of pictures: action right, subject and place right, both; leakage"),
        Figure("figures/ablations.png", "The same without masks, with one of them, and with random ones"),
        Figure("figures/masks.png", "Share of channels that both masks keep, by layer, for the learned identifiers"),
    ]


def draw_grid(plan: Plan, tasks: Sequence[Task], runs: Path, path: Path) -> None:
    """A row for each action and subject: two exemplars, then the first picture of each method."""
    rows = {}
    for task in tasks:
        for k in [k for k in SUBJECTS if k < plan.study.num_prompts] or [0]:
            made = [pictures(runs / folder_name(name), task, k, plan.study)[0] for name in COMPARED]
            prompt = task.prompts[k].text.removeprefix("a photo of ").format(plan.config.placeholder)
            rows[f"{task.name}: {prompt}"] = torch.stack([*task.images[:2], *made])
    save_png(labelled_image_rows(rows, ["exemplar", "exemplar", *COMPARED]), path)


def accuracy_bars(scores: Scores, names: Sequence[str], tasks: Sequence[Task]) -> Plot:
    """Groups: what the judge found. Bars: candidates."""
    bars = {
        label: {name: bootstrap_mean(list(of_tasks(scores, score, tasks)[name].values())) for name in names}
        for score, label in BARS.items()
    }
    return bar_with_intervals(bars, "share of pictures")


def overlap_map(overlaps: Mapping[str, Tensor], chance: float) -> Plot:
    """A heat map, actions by layers.   overlaps: task -> (L,).   chance: the overlap of two unrelated masks."""
    values = torch.stack(list(overlaps.values()))
    plot = Plot(figsize=(6.5, 1.6 + 0.25 * len(values)), layout="constrained")
    axes = plot.subplots()
    panel = axes.imshow(values.numpy(), aspect="auto", cmap="viridis")
    plot.colorbar(panel, ax=axes, label="share of channels")
    axes.set_yticks(range(len(values)), list(overlaps))
    axes.set_xticks(range(values.shape[1]))
    axes.set(xlabel="cross-attention layer, in the order of the forward pass", title=f"by chance: {chance:.2f}")
    return plot
