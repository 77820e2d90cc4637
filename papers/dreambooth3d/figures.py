"""The paper's kinds of figure, in the toy world; all from what the measurement left in its folders."""

from pathlib import Path

import torch

from common.evaluation.bootstrap import bootstrap_mean
from common.evaluation.claims import Figure
from common.evaluation.figures import bar_with_intervals, labelled_image_rows, save_figure
from common.evaluation.trials import Scores
from common.sampling.images import save_png
from common.three_d.views import normal_pictures

from .experiments import (
    CLASS,
    COLOR,
    FIRST_FIELD,
    JANUS,
    NAIVE,
    PROPOSAL,
    SATURATION,
    SDS_ONLY,
    Plan,
    fields,
    method_of,
    samples,
)

BARS = (CLASS, JANUS, SATURATION, COLOR)
SHOWN_PSEUDO_VIEWS = 8


def draw_figures(backbone_name: str, plan: Plan, scores: Scores, runs: Path, output: Path) -> list[Figure]:
    """Write output/figures/*.png."""
    folder = output / "figures"
    turntables, stages, tuned = {}, {}, {}
    for item in plan.objects():
        noun, method = item.entity.noun, method_of(backbone_name, plan, item, runs)
        made = fields(method)
        truth = torch.where((item.held_out.masks > 0)[:, None], item.held_out.images * 2 - 1, 1.0)
        turntables[f"{noun}: photos"] = method.photos
        for name in (NAIVE, SDS_ONLY, FIRST_FIELD, PROPOSAL):
            turntables[f"{noun}: {name}"] = made[name].side_views(8).images()
        turntables[f"{noun}: truth"] = truth
        views = method.pseudo_views(made[FIRST_FIELD])
        stages[f"{noun}: renderings"] = views.renderings[:SHOWN_PSEUDO_VIEWS]
        stages[f"{noun}: pseudo views"] = views.pictures[:SHOWN_PSEUDO_VIEWS]
        stages[f"{noun}: final, normals"] = normal_pictures(made[PROPOSAL].side_views(8))
        for name, pictures in samples(method, 2).items():
            tuned[f"{noun}: {name}"] = pictures
    for name, rows in (("turntables", turntables), ("stages", stages), ("samples", tuned)):
        save_png(labelled_image_rows(rows), folder / f"{name}.png")
    bars = {score: {name: bootstrap_mean(list(of.values())) for name, of in scores[score].items()} for score in BARS}
    save_figure(bar_with_intervals(bars, "mean over objects"), folder / "scores.png")
    return [
        Figure("figures/turntables.png", "Five photos, and the objects made from them, from eight sides"),
        Figure("figures/stages.png", "Renderings of the first field, pseudo views of them, normals of the final field"),
        Figure("figures/samples.png", "The untuned, partially and fully tuned model asked for front, side and back"),
        Figure("figures/scores.png", "What the judge reads, and colours"),
    ]
