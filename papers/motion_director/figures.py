"""Small counterparts of the paper's figures, from what the study left in its folders."""

from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure as Plot
from torch import Tensor

from common.evaluation.bootstrap import bootstrap_mean
from common.evaluation.claims import Figure
from common.evaluation.figures import COLORS, bar_with_intervals, labelled_image_rows, save_figure
from common.evaluation.motion_study import MotionStudy, clips_of
from common.evaluation.trials import Scores, folder_name
from common.sampling.images import save_png
from common.toyworld.motion_judge import MotionJudge
from common.toyworld.motion_tasks import MotionTask

from .experiments import JOINT, JOINT_MIXED, MIXED, MIXING, NO_DEBIASING, PROPOSAL, UNTUNED, Plan, subject_of

SHOWN = (0, 2, 4, 6)  # frames
BARS = {"motion": "motion", "object": "object", "leakage": "leakage"}


def draw_figures(plan: Plan, scores: Scores, runs: Path, output: Path) -> list[Figure]:
    """Write output/figures/*.png."""
    folder, names = output / "figures", (PROPOSAL, JOINT, NO_DEBIASING, plan.prior_name, UNTUNED)
    draw_clips(plan, names[:-1], runs, folder / "clips.png")
    draw_mixing(plan, runs / "mixing", folder / "mixing.png")
    bars = {
        label: {name: bootstrap_mean(list(scores[score][name].values())) for name in names}
        for score, label in BARS.items()
    }
    save_figure(bar_with_intervals(bars, "share of clips"), folder / "scores.png")
    save_figure(paths_plot(plan.tasks, plan.study, (PROPOSAL, JOINT, plan.prior_name), runs), folder / "paths.png")
    save_figure(mixing_bars(scores), folder / "mixing_scores.png")
    return [
        Figure("figures/clips.png", "The clip that was learned from, and clips for a prompt about another object"),
        Figure("figures/paths.png", "True path of each clip, and those of other objects as the judge reads them"),
        Figure("figures/scores.png", "Shares of clips: motion right, class right; leakage of the training object"),
        Figure("figures/mixing.png", "Motion of a clip with the look of a subject: pictures of it, and clips"),
        Figure("figures/mixing_scores.png", "Mixing: direction of motion, and likeness to the subject's pictures"),
    ]


def frames_shown(clip: Tensor) -> list[Tensor]:
    """Some frames (3,H,W) of a clip (3,F,H,W)."""
    return list(clip[:, SHOWN].unbind(1))


def draw_clips(plan: Plan, names: Sequence[str], runs: Path, path: Path) -> None:
    """For each motion a row with the training clip, and one for each candidate; the first prompt and seed."""
    rows = {}
    for task in plan.tasks:
        rows[f"{task.name}: learned from"] = torch.stack(frames_shown(task.clips[0]))
        for name in names:
            clip = clips_of(runs / folder_name(name), task, plan.study)[0][0]
            rows[f"{task.prompts[0].noun}, {name}" + " " * len(rows)] = torch.stack(frames_shown(clip))
    save_png(labelled_image_rows(rows, upscale=1, font_px=11), path)


def draw_mixing(plan: Plan, folder: Path, path: Path) -> None:
    """For each motion the subject's pictures, and what the candidates make of them."""
    rows = {}
    for task in plan.mixed_tasks.values():
        rows[f"{subject_of(task).class_noun}, pictures" + " " * len(rows)] = subject_of(task).images[: len(SHOWN)]
        for name in (MIXED, JOINT_MIXED, UNTUNED):
            clip = clips_of(folder / folder_name(name), task, plan.mixing)[0][0]
            rows[f"{task.name}, {name.removesuffix(', mixed')}"] = torch.stack(frames_shown(clip))
    save_png(labelled_image_rows(rows, upscale=1, font_px=11), path)


@torch.no_grad()
def paths_plot(tasks: Sequence[MotionTask], study: MotionStudy, names: Sequence[str], runs: Path) -> Plot:
    """A panel for each motion: centred paths in pixels."""
    judge = MotionJudge.load()
    plot = Plot(figsize=(max(4.8, 2.4 * len(tasks)), 2.4), layout="constrained")
    panels = plot.subplots(1, len(tasks), squeeze=False, sharex=True, sharey=True)[0]
    panels[0].invert_yaxis()
    for panel, task in zip(panels, tasks, strict=True):
        for name, color in zip(names, COLORS, strict=False):
            made = torch.cat(clips_of(runs / folder_name(name), task, study))
            for i, track in enumerate(judge.read(made).trajectories):
                panel.plot(*(track - track.mean(0)).T, color=color, alpha=0.6, label=name if i == 0 else None)
        truth = task.trajectories[0]
        panel.plot(*(truth - truth.mean(0)).T, "o-", color="black", markersize=3, label="true")
        panel.set(title=task.name, xlabel="px", aspect="equal")
    handles, labels = panel.get_legend_handles_labels()
    plot.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)
    return plot


def mixing_bars(scores: Scores) -> Plot:
    """Groups: motion and look. Bars: candidates."""
    bars = {
        score: {
            name: bootstrap_mean(list(scores[MIXING + score][name].values())) for name in (MIXED, JOINT_MIXED, UNTUNED)
        }
        for score in ("direction", "identity")
    }
    return bar_with_intervals(bars, "cosine")
