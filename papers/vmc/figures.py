"""The paper's kinds of figure, in the toy world; all from what the study left in its folders."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure as Plot
from torch import Tensor

from common.evaluation.bootstrap import bootstrap_mean
from common.evaluation.claims import Figure
from common.evaluation.figures import bar_with_intervals, labelled_image_rows, save_figure
from common.evaluation.motion_study import clips_of
from common.evaluation.trials import Scores, folder_name
from common.sampling.images import save_png
from common.toyworld.motion_tasks import MotionTask

from .experiments import ABSOLUTE, DENOISING, INVERSION, PROPOSAL, SIGNED, TUNE_A_VIDEO, VARIANTS, Plan

INVERTED, FRESH = (PROPOSAL, DENOISING, TUNE_A_VIDEO, INVERSION), (SIGNED, ABSOLUTE)
SHARES = ("motion", "object", "leakage")


def draw_figures(plan: Plan, scores: Scores, runs: Path, output: Path) -> list[Figure]:
    """Write output/figures/*.png."""
    folder = output / "figures"
    draw_strips(plan, plan.tasks, INVERTED, runs, folder / "clips.png")
    draw_strips(plan, plan.tasks, FRESH, runs, folder / "losses.png")
    save_figure(bars(scores, ["trajectory error"], "px"), folder / "trajectory.png")
    save_figure(bars(scores, SHARES, "share of clips"), folder / "shares.png")
    return [
        Figure("figures/clips.png", "A clip of each motion, and the first prompt's clips that begin at its inversion"),
        Figure("figures/losses.png", "Both forms of the loss from fresh noise, without inversion"),
        Figure("figures/trajectory.png", "Distance of the path from that of the clip"),
        Figure("figures/shares.png", "Shares of clips: motion learned, object of the prompt, class or colour leaked"),
    ]


def draw_strips(plan: Plan, tasks: Sequence[MotionTask], names: Sequence[str], runs: Path, path: Path) -> None:
    """For each motion a film strip of the clip, then one of each method."""
    rows: dict[str, Tensor] = {}
    for task in tasks:
        rows[f"clip: {task.name}"] = task.clips[0].transpose(0, 1)
        for name in names:
            made = clips_of(runs / folder_name(name), task, plan.study)[0][0]
            rows[f"{name}: {task.prompts[0].noun}, {task.name}"] = made.transpose(0, 1)
    save_png(labelled_image_rows(rows, upscale=1, font_px=11), path)


def bars(scores: Scores, names: Sequence[str], ylabel: str) -> Plot:
    """Groups: scores. Bars: methods, means over the motions."""
    groups = {score: {name: bootstrap_mean(list(scores[score][name].values())) for name in VARIANTS} for score in names}
    return bar_with_intervals(groups, ylabel)
