"""Small counterparts of the paper's figures, from what experiments.py, pairs.py and editing.py wrote."""

from pathlib import Path

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as Plot

from common.evaluation.bootstrap import bootstrap_mean
from common.evaluation.claims import Figure
from common.evaluation.class_samples import read_samples
from common.evaluation.figures import bar_with_intervals, labelled_image_rows, save_figure
from common.evaluation.study import Scores, folder_name, prompt_grid
from common.sampling.images import save_png
from common.training.optimize import default_device

from .editing import description_and_edits
from .experiments import FULL, PROPOSAL, Plan, artifact_folder, read_shifts
from .method import interpolate_shifts, load_method, shift_correlation
from .pairs import VARIANTS, pair_config, pair_folder, together

ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0)
SHOWN = 3  # subjects, pairs or photos in a figure


def draw_figures(scores: Scores, plan: Plan, runs: Path, output: Path) -> list[Figure]:
    """Write output/figures/*.png."""
    folder = output / "figures"
    words = {PROPOSAL: "S*", FULL: "S*"}
    save_png(prompt_grid(plan.subjects()[:SHOWN], words, plan.study, runs), folder / "prompts.png")
    draw_pairs(plan, runs, folder / "pairs.png")
    bars = {
        score: {variant: bootstrap_mean(list(row.values())) for variant, row in scores[score].items()}
        for score in ("swap rate", "foreign share")
    }
    save_figure(bar_with_intervals(bars, "share"), folder / "unmix.png")
    draw_interpolation(plan, runs, folder / "interpolation.png")
    draw_edits(plan, runs, folder / "edits.png")
    draw_correlations(plan, runs, folder / "correlations.png")
    return [
        Figure("figures/prompts.png", "Subjects in prompts, shifts above full fine-tuning (as Figure 5)"),
        Figure("figures/pairs.png", "Two subjects, without and with Cut-Mix-Unmix, with attention loss (as Figure 6)"),
        Figure(
            "figures/unmix.png",
            "Swapped attributes, and how much of a special token's attention is on the other",
        ),
        Figure("figures/interpolation.png", "Eq. 5 between two subjects' shifts, equal seed in a row (as Figure 11)"),
        Figure("figures/edits.png", "A photo and its edits, shifts above full fine-tuning (as Figure 7)"),
        Figure("figures/correlations.png", "Correlation of the shifts of two subjects (as Figure 9a)"),
    ]


def draw_pairs(plan: Plan, runs: Path, path: Path) -> None:
    """Pictures of both at equal seeds, a row for each variant."""
    rows = {}
    for subject in plan.subjects()[:SHOWN]:
        prompt = ""
        for variant in VARIANTS:
            prompt = together(pair_config(plan, subject, variant))
            rows[f"{prompt}: {variant}"] = read_samples(pair_folder(runs, variant, subject) / "samples")
        photos = torch.stack([subject.images[0], plan.next_to(subject).images[0]])
        rows[f"{prompt}: photos"] = photos
    save_png(labelled_image_rows(rows), path)


def draw_interpolation(plan: Plan, runs: Path, path: Path) -> None:
    """Weight mixing of each subject with the next one, under the prompt of the first."""
    rows = {}
    for subject in plan.subjects()[:SHOWN]:
        other = plan.next_to(subject)
        method = load_method(artifact_folder(runs, PROPOSAL, subject), device=default_device())
        first, second, pictures = read_shifts(runs, subject), read_shifts(runs, other), []
        for alpha in ALPHAS:
            method.load_shifts(interpolate_shifts(first, second, alpha))
            pictures.append(method.generate(seeds=[0])[0])
        rows[f"{other.name} to {subject.name}"] = torch.stack(pictures)
    save_png(labelled_image_rows(rows, [f"alpha = {alpha:g}" for alpha in ALPHAS]), path)


def draw_edits(plan: Plan, runs: Path, path: Path) -> None:
    """The photo, then its edits; a row for each method."""
    rows = {}
    for number, subject in enumerate(plan.subjects()[:SHOWN]):
        words, edits = description_and_edits(subject, number)
        labels = ", ".join(label for _, _, label in edits)
        for name in (PROPOSAL, FULL):
            pictures = read_samples(runs / "edits" / folder_name(name) / subject.name)
            rows[f"{name}: {words} -> {labels}"] = torch.cat([subject.images[:1], pictures])
    save_png(labelled_image_rows(rows), path)


def draw_correlations(plan: Plan, runs: Path, path: Path) -> None:
    """The matrix, with its values written in."""
    names = [subject.name for subject in plan.subjects()]
    shifts = [read_shifts(runs, subject) for subject in plan.subjects()]
    values = [[shift_correlation(first, second) for second in shifts] for first in shifts]
    figure = Plot(figsize=(4.2, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    shown = axes.imshow(values, vmin=0, vmax=1, cmap="viridis")
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right")
    axes.set_yticks(range(len(names)), names)
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            axes.text(j, i, f"{value:.2f}", ha="center", va="center", color="black" if value > 0.6 else "white")
    figure.colorbar(shown, label="mean cosine of the shifts of a weight")
    save_figure(figure, path)
