"""The paper's four kinds of figure, in the toy world."""

from dataclasses import replace
from pathlib import Path

import torch

from common.backbones import Backbone
from common.evaluation.bootstrap import bootstrap_mean
from common.evaluation.claims import Figure
from common.evaluation.figures import labelled_image_rows, save_figure, scatter_methods
from common.sampling.images import image_grid, save_png
from common.toyworld.benchmark import Subject, styles

from .experiments import (
    ONE_VECTOR,
    VARIANTS,
    Measured,
    OrdinaryWords,
    Plan,
    run_folder,
    train_concept,
)
from .method import ARTIFACT, TextualInversion

SEEDS = [0, 1, 2, 3]
NOUNS = ("house", "car", "cat", "mug")  # shown in the learned styles


def draw_figures(
    backbone: Backbone, plan: Plan, subjects: list[Subject], measured: Measured, runs: Path, output: Path
) -> list[Figure]:
    """Write output/figures/*.png; the subjects' runs must be there, the styles are trained here."""
    folder = output / "figures"
    draw_samples(backbone, plan, subjects, runs, folder / "samples.png")
    points = {
        name: tuple(bootstrap_mean(list(scores[axis].values())) for axis in ("compliance", "identity"))
        for name, scores in measured.scores.items()
    }
    scatter = scatter_methods(points, "editability: share of what prompts ask for", "fidelity: identity cosine")
    save_figure(scatter, folder / "scatter.png")
    method = draw_styles(backbone, plan, runs, folder / "styles.png")
    draw_two_concepts(method, subjects[:2], runs, folder / "two_concepts.png")
    return [
        Figure("figures/samples.png", "Training pictures, the learned word, and the initializer word at equal seeds"),
        Figure("figures/scatter.png", "Fidelity against editability of all variants and of ordinary words"),
        Figure("figures/styles.png", "Styles that no caption of the training set names, learned as words"),
        Figure("figures/two_concepts.png", "Two learned words in one prompt"),
    ]


def draw_samples(backbone: Backbone, plan: Plan, subjects: list[Subject], runs: Path, path: Path) -> None:
    """Training pictures against "a photo of a S*", and against the initializer word."""
    rows = {}
    for subject in subjects:
        if backbone.placeholders is not None:
            backbone.placeholders.remove()
        method = TextualInversion(backbone, replace(plan.config, initializer_token=subject.class_noun))
        method.load(run_folder(runs, subject.name, ONE_VECTOR))
        prompt = method.config.plain_prompt()
        rows[f"{subject.name}, training"] = subject.images[:4]
        rows[prompt] = method.generate(prompt, seeds=SEEDS)
        words = OrdinaryWords(backbone, method.config, subject.class_noun)
        rows[f"a photo of a {subject.class_noun}"] = words.generate(prompt, seeds=SEEDS)
    save_png(labelled_image_rows(rows), path)


def draw_styles(backbone: Backbone, plan: Plan, runs: Path, path: Path) -> TextualInversion:
    """Held-out styles, and nouns painted in them. Returns: the method of the last style."""
    pictures, labels = [], []
    for style in styles()[: plan.num_styles]:
        placeholder = f"<{style.name.replace(' ', '-')}>"
        config = replace(plan.config, kind="style", initializer_token="painting", placeholder_token=placeholder)
        with torch.no_grad():
            latents = backbone.encode_images(style.images)
        run = run_folder(runs, f"style {style.name}", ONE_VECTOR)
        method = train_concept(backbone, config, VARIANTS[ONE_VECTOR], style.images, latents, run)
        prompts = [f"a painting of a {noun} in the style of {placeholder}" for noun in NOUNS]
        pictures += [style.images[: len(NOUNS)], *(method.generate(prompt, seeds=[0]) for prompt in prompts)]
        labels += [f"{style.name}, training"] * len(NOUNS) + prompts
    save_png(image_grid(torch.cat(pictures), len(NOUNS), labels, upscale=2, font_px=11), path)
    return method


def draw_two_concepts(method: TextualInversion, subjects: list[Subject], runs: Path, path: Path) -> None:
    """Subjects beside the style that `method` knows, and beside each other."""
    for subject in subjects:
        method.tokens.load_learned_embeds(run_folder(runs, subject.name, ONE_VECTOR) / ARTIFACT)
    objects = [f"<{subject.class_noun}>" for subject in subjects]
    prompts = [f"a painting of a {name} in the style of {method.config.placeholder}" for name in objects]
    if len(objects) > 1:
        prompts.append(f"a photo of a {objects[0]} next to a {objects[1]}")
    save_png(labelled_image_rows({prompt: method.generate(prompt, seeds=SEEDS) for prompt in prompts}), path)
