"""The paper's kinds of figure, in the toy world; all from what the study left in its folders."""

from pathlib import Path

from torch import Tensor

from common.evaluation.bootstrap import bootstrap_mean
from common.evaluation.claims import Figure
from common.evaluation.figures import bar_with_intervals, labelled_image_rows, save_figure
from common.evaluation.trials import Scores, folder_name
from common.sampling.images import save_png
from common.three_d.views import normal_pictures
from common.training.optimize import default_device

from .experiments import (
    ALBEDO,
    CLASS,
    FIXED,
    JANUS,
    PROPOSAL,
    SATURATION,
    STRONG,
    TEXTURELESS,
    VIEWS,
    WEAK,
    Plan,
    artifact_folder,
)
from .method import DreamFusion, load_method

BARS = (CLASS, TEXTURELESS, JANUS, SATURATION)


def draw_figures(backbone_name: str, plan: Plan, scores: Scores, runs: Path, output: Path) -> list[Figure]:
    """Write output/figures/*.png."""
    folder = output / "figures"

    def method_of(name: str, noun: str, seed: int) -> DreamFusion:
        artifact = artifact_folder(runs / folder_name(name), noun, seed)
        return load_method(artifact, backbone_name, default_device())

    objects, shapes, guidance = {}, {}, {}
    first = plan.seeds[0]
    for noun in plan.nouns:
        made = {name: method_of(name, noun, first) for name in (PROPOSAL, FIXED, ALBEDO)}
        for name in (PROPOSAL, FIXED):
            objects[f"{noun}: {name}"] = made[name].views(VIEWS).images()
        for name in (PROPOSAL, ALBEDO):
            shapes[f"{noun}: {name}"] = textureless(made[name])
        shapes[f"{noun}: normals"] = normal_pictures(made[PROPOSAL].views(VIEWS))
        for name in (WEAK, STRONG):
            for seed in plan.seeds:
                guidance[f"{noun}: {name}, seed {seed}"] = method_of(name, noun, seed).views(4).images()
    for name, rows in (("objects", objects), ("shapes", shapes), ("guidance", guidance)):
        save_png(labelled_image_rows(rows), folder / f"{name}.png")
    bars = {score: {name: bootstrap_mean(list(of.values())) for name, of in scores[score].items()} for score in BARS}
    save_figure(bar_with_intervals(bars, "mean over objects"), folder / "scores.png")
    return [
        Figure("figures/objects.png", "Objects from their names, from eight sides; with and without the views' names"),
        Figure("figures/shapes.png", "Without texture, lit from above the camera; trained with light and without"),
        Figure("figures/guidance.png", "Guidance weights and seeds (as Fig. 9)"),
        Figure("figures/scores.png", "What the judge reads, and saturation"),
    ]


def textureless(method: DreamFusion) -> Tensor:
    """The shape from eight sides."""
    return method.views(VIEWS, light="textureless").images()
