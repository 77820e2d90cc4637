"""Small counterparts of the paper's figures, from what the study left in its folders."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure as Plot

from common.backbones import load_backbone
from common.evaluation.bootstrap import bootstrap_mean
from common.evaluation.claims import Figure
from common.evaluation.exemplar_study import pictures
from common.evaluation.figures import bar_with_intervals, labelled_image_rows, save_figure
from common.evaluation.trials import Scores, folder_name
from common.sampling.images import save_png
from common.toyworld.exemplar_tasks import Task
from common.toyworld.vocabulary import OBJECT_CLASSES

from .experiments import FINE_TUNING, INVERSION, NO_STEERING, PROPOSAL, UNIFORM, Plan, load_learned
from .method import relation_focal_density
from .words import PREPOSITIONS, single_tokens

COMPARED = (PROPOSAL, NO_STEERING, UNIFORM, INVERSION, FINE_TUNING)
BARS = {"learned": "relation", "entities": "entities", "both": "both", "leakage": "leakage"}
SHOWN = 2  # prompts of each relation
SKEWS = (0.0, 0.5, 1.0)


def draw_figures(backbone_name: str, plan: Plan, scores: Scores, runs: Path, output: Path) -> list[Figure]:
    """Write output/figures/*.png."""
    folder, tasks = output / "figures", plan.tasks
    draw_grid(plan, tasks, runs, folder / "grid.png")
    bars = {label: {name: _mean(scores, score, name) for name in COMPARED} for score, label in BARS.items()}
    save_figure(bar_with_intervals(bars, "share of pictures"), folder / "accuracy.png")
    save_figure(density_plot(), folder / "sampling.png")
    save_figure(word_map(backbone_name, tasks[0], runs), folder / "words.png")
    return [
        Figure("figures/grid.png", "Relations between pairs that no exemplar shows; two exemplars on the left"),
        Figure("figures/accuracy.png", "Shares of pictures: relation right, both entities right, both; leakage"),
        Figure("figures/sampling.png", "f(t), the density of timesteps, for three values of alpha"),
        Figure("figures/words.png", f"Words of the vocabulary, and <R> of {tasks[0].name!r}: two principal components"),
    ]


def _mean(scores: Scores, score: str, name: str):
    return bootstrap_mean(list(scores[score][name].values()))


def draw_grid(plan: Plan, tasks: Sequence[Task], runs: Path, path: Path) -> None:
    """A row for each relation and prompt: two exemplars, then the first picture of each method."""
    rows = {}
    for task in tasks:
        for k in range(min(SHOWN, plan.study.num_prompts)):
            made = [pictures(runs / folder_name(name), task, k, plan.study)[0] for name in COMPARED]
            prompt = task.prompts[k].text.removeprefix("a photo of ").format("<R>")
            rows[f"{task.name}: {prompt}"] = torch.stack([*task.images[2 * k : 2 * k + 2], *made])
    save_png(labelled_image_rows(rows, ["exemplar", "exemplar", *COMPARED]), path)


def density_plot() -> Plot:
    """f(t) times T, so that 1 is uniform."""
    plot = Plot(figsize=(4.5, 2.6), layout="constrained")
    axes = plot.subplots()
    for skew in SKEWS:
        axes.plot(1000 * relation_focal_density(1000, skew), label=f"alpha = {skew:g}")
    axes.set(xlabel="timestep t", ylabel="T f(t)", ylim=(0, None))
    axes.legend(frameon=False)
    return plot


def word_map(backbone_name: str, task: Task, runs: Path) -> Plot:
    """Nouns, prepositions, other words; the initial word, and <R> with and without steering."""
    learned = {name: load_learned(backbone_name, runs, name, task) for name in (PROPOSAL, NO_STEERING)}
    backbone = load_backbone(backbone_name)
    table = torch.nn.functional.normalize(backbone.text_encoder.get_input_embeddings().weight.detach(), dim=-1).numpy()
    known = set(backbone.tokenizer.get_vocab().values())
    groups = {
        "prepositions": list(single_tokens(backbone.tokenizer, PREPOSITIONS).values()),
        "class nouns": list(single_tokens(backbone.tokenizer, OBJECT_CLASSES).values()),
    }
    groups = {"other words": sorted(known - {i for ids in groups.values() for i in ids}), **groups}
    mean = table.mean(0)
    axes_2d = np.linalg.svd(table[groups["prepositions"] + groups["class nouns"]] - mean, full_matrices=False)[2][:2]

    plot = Plot(figsize=(5, 3.6), layout="constrained")
    axes = plot.subplots()
    for (name, ids), color, size in zip(groups.items(), ("0.8", "#0072B2", "#D55E00"), (6, 18, 18), strict=True):
        axes.scatter(*((table[ids] - mean) @ axes_2d.T).T, s=size, color=color, label=name, linewidths=0)
    start = single_tokens(backbone.tokenizer, [learned[PROPOSAL].config.initializer_token]).values()
    points = {"initial word": table[list(start)[0]]}
    for name, method in learned.items():
        points[f"<R>, {name}"] = torch.nn.functional.normalize(method.relation.detach()[0].cpu(), dim=0).numpy()
    for (name, point), marker in zip(points.items(), ("o", "*", "X"), strict=True):
        axes.scatter(*((point - mean) @ axes_2d.T), s=90, marker=marker, color="black", label=name)
    axes.legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    axes.set(xticks=[], yticks=[])
    return plot
