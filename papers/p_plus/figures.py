"""The paper's kinds of figure, in the toy world; all from what the study left in its folders."""

from pathlib import Path

import torch
from matplotlib.figure import Figure as Plot

from common.backbones import load_backbone
from common.data.images import load_image, to_pixel_values
from common.evaluation.bootstrap import bootstrap_mean
from common.evaluation.claims import Figure
from common.evaluation.figures import bar_with_intervals, labelled_image_rows, save_figure
from common.evaluation.study import Scores, folder_name
from common.sampling.images import save_png
from common.toyworld.benchmark import subjects
from common.training.optimize import default_device

from .bands import fill_layers, inner_band, layer_grids, widened
from .experiments import (
    COLOUR,
    INVERSION,
    PROPOSAL,
    SHAPE,
    Plan,
    donor_of,
    load_pair,
    training_folder,
    validation_losses,
)
from .method import PPlus

SWAPS = (("red mug", "red chair"), ("red car", "blue car"), ("green vase", "yellow fish"))
WIDENINGS = (-2, 0, 2, 4, 6)  # of the inner band, layers at each end


def draw_figures(backbone_name: str, plan: Plan, scores: Scores, runs: Path, output: Path) -> list[Figure]:
    """Write output/figures/*.png."""
    folder = output / "figures"
    draw_prompt_swaps(backbone_name, plan, folder / "prompt_swap.png")
    draw_mixing(backbone_name, plan, runs, folder / "mixing.png")
    draw_samples(plan, runs, folder / "samples.png")
    save_figure(loss_curves(scores, plan, runs), folder / "losses.png")
    roles = {
        score: {band: bootstrap_mean(list(values.values())) for band, values in scores[score].items()}
        for score in (SHAPE, COLOUR)
    }
    save_figure(bar_with_intervals(roles, "probability of what the donor has"), folder / "layer_roles.png")
    return [
        Figure("figures/prompt_swap.png", "Two prompts: the second in more and more layers, from the middle outwards"),
        Figure("figures/mixing.png", "Two concepts: the first in more and more layers, from the middle outwards"),
        Figure("figures/layer_roles.png", "What a donor's words bring along from inner, outer and random layers"),
        Figure("figures/losses.png", "Held-out loss while XTI trains, and of Textual Inversion at the end"),
        Figure("figures/samples.png", "Training photos, and a photo of a S* by XTI and by Textual Inversion"),
    ]


def growing_bands(method: PPlus) -> dict[str, list[int]]:
    """Labels and layers: none, ever wider bands around the coarse layers, all."""
    grids = layer_grids(method.backbone.unet)
    bands = [widened(inner_band(grids), by, len(grids)) for by in WIDENINGS]
    middle = {f"{band[0]}-{band[-1]}": band for band in bands if 0 < len(band) < len(grids)}
    return {"none": [], **middle, "all": list(range(len(grids)))}


def draw_prompt_swaps(backbone_name: str, plan: Plan, path: Path) -> None:
    """A row for each pair of plain words; no training."""
    method = PPlus(load_backbone(backbone_name, device=default_device()), plan.config)
    bands, rows = growing_bands(method), {}
    for first, second in SWAPS:
        rows[f"{first} {second}"] = torch.cat(
            [
                method.generate(
                    method.config.plain_prompt(), seeds=[0], fills=fill_layers(second, band, first, method.num_layers)
                )
                for band in bands.values()
            ]
        )
    save_png(labelled_image_rows(rows, list(bands)), path)


def draw_mixing(backbone_name: str, plan: Plan, runs: Path, path: Path) -> None:
    """A row for each subject with its donor: a photo of either, and the subject's words in growing bands."""
    every, rows, labels = subjects(plan.study.num_subjects), {}, []
    for subject in every:
        donor = donor_of(subject, every)
        method, given = load_pair(backbone_name, runs, subject, donor)
        own, bands = method.config.placeholder, growing_bands(method)
        pictures = [
            method.generate(
                method.config.plain_prompt(), seeds=[0], fills=fill_layers(own, band, given, method.num_layers)
            )
            for band in bands.values()
        ]
        rows[f"{subject.name} {donor.name}"] = torch.cat([donor.images[:1], *pictures, subject.images[:1]])
        labels = ["donor", *bands, "subject"]
    save_png(labelled_image_rows(rows, labels), path)


def draw_samples(plan: Plan, runs: Path, path: Path) -> None:
    """Training photos beside the first picture of the plain prompt."""
    rows = {}
    for subject in subjects(plan.study.num_subjects):
        pictures = [
            to_pixel_values(load_image(runs / folder_name(name) / "images" / subject.name / f"00-{seed}.png"))
            for name in (PROPOSAL, INVERSION)
            for seed in plan.study.seeds[:1]
        ]
        rows[subject.name] = torch.stack([*subject.images[:4], *pictures])
    save_png(labelled_image_rows(rows, [*["training"] * 4, PROPOSAL, INVERSION]), path)


def loss_curves(scores: Scores, plan: Plan, runs: Path) -> Plot:
    """Mean over subjects of the held-out loss at each step."""
    curves = [validation_losses(training_folder(runs, s.name)) for s in subjects(plan.study.num_subjects)]
    steps = sorted(curves[0])
    plot = Plot(figsize=(6, 3.5), layout="constrained")
    axes = plot.subplots()
    axes.plot(steps, [sum(c[step] for c in curves) / len(curves) for step in steps], marker=".", label=PROPOSAL)
    final = scores["held-out loss"][INVERSION].values()
    axes.axhline(
        sum(final) / len(final), color="gray", linestyle="--", label=f"{INVERSION}, {plan.config.train_steps} steps"
    )
    axes.set(xlabel="step", ylabel="held-out denoising loss")
    axes.legend()
    return plot
