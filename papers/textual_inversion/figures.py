"""The paper's four kinds of figure, in the toy world."""

from dataclasses import replace
from pathlib import Path

import torch

from common.backbones import load_backbone
from common.evaluation.bootstrap import bootstrap_mean
from common.evaluation.claims import Figure
from common.evaluation.figures import labelled_image_rows, save_figure, scatter_methods
from common.evaluation.study import Scores
from common.sampling.images import image_grid, save_png, to_pil
from common.toyworld.benchmark import Subject, styles, subjects
from common.training.optimize import default_device

from .experiments import ONE_VECTOR, VARIANTS, Plan, artifact_folder, train_concept
from .method import ARTIFACT, TextualInversion, load_method

SEEDS = [0, 1, 2, 3]
NOUNS = ("house", "car", "cat", "mug")  # shown in the learned styles


def draw_figures(backbone_name: str, plan: Plan, scores: Scores, runs: Path, output: Path) -> list[Figure]:
    """Write output/figures/*.png from what the study left in `runs`; the styles are trained here."""
    folder, toy_subjects = output / "figures", subjects(plan.study.num_subjects)
    draw_samples(toy_subjects, runs, folder / "samples.png")
    points = {
        name: tuple(bootstrap_mean(list(scores[axis][name].values())) for axis in ("compliance", "identity"))
        for name in scores["identity"]
    }
    scatter = scatter_methods(points, "editability: share of what prompts ask for", "fidelity: identity cosine")
    save_figure(scatter, folder / "scatter.png")
    method = draw_styles(backbone_name, plan, runs, folder / "styles.png")
    draw_two_concepts(method, toy_subjects[:2], runs, folder / "two_concepts.png")
    return [
        Figure("figures/samples.png", "Training pictures, the learned word, and the initializer word at equal seeds"),
        Figure("figures/scatter.png", "Fidelity against editability of all variants and of ordinary words"),
        Figure("figures/styles.png", "Styles that no caption of the training set names, learned as words"),
        Figure("figures/two_concepts.png", "Two learned words in one prompt"),
    ]


def draw_samples(toy_subjects: list[Subject], runs: Path, path: Path) -> None:
    """Training pictures against "a photo of a S*", and against the initializer word."""
    rows = {}
    for subject in toy_subjects:
        method = load_method(artifact_folder(runs, ONE_VECTOR, subject.name), device=default_device())
        prompt = method.config.plain_prompt()
        rows[f"{subject.name}, training"] = subject.images[:4]
        rows[prompt] = method.generate(prompt, seeds=SEEDS)
        words = f"a photo of a {subject.class_noun}"
        rows[words] = method.generate(words, seeds=SEEDS)
    save_png(labelled_image_rows(rows), path)


def draw_styles(backbone_name: str, plan: Plan, runs: Path, path: Path) -> TextualInversion:
    """Held-out styles, and nouns painted in them. Returns: the method of the last style."""
    pictures, labels = [], []
    for style in styles()[: plan.num_styles]:
        name = style.name.replace(" ", "-")
        photos, backbone = runs / "styles" / name / "photos", load_backbone(backbone_name, device=default_device())
        for i, image in enumerate(to_pil(style.images)):
            save_png(image, photos / f"{i:02d}.png")
        config = replace(plan.config, kind="style", initializer_token="painting", placeholder_token=f"<{name}>")
        with torch.no_grad():
            latents = backbone.freeze().encode_images(style.images)
        run = runs / "styles" / name / "training"
        method = train_concept(backbone, config, VARIANTS[ONE_VECTOR], photos, latents, run)
        prompts = [f"a painting of a {noun} in the style of {config.placeholder}" for noun in NOUNS]
        pictures += [style.images[: len(NOUNS)], *(method.generate(prompt, seeds=[0]) for prompt in prompts)]
        labels += [f"{style.name}, training"] * len(NOUNS) + prompts
    save_png(image_grid(torch.cat(pictures), len(NOUNS), labels, upscale=2, font_px=11), path)
    return method


def draw_two_concepts(method: TextualInversion, toy_subjects: list[Subject], runs: Path, path: Path) -> None:
    """Subjects beside the style that `method` knows, and beside each other."""
    for subject in toy_subjects:
        method.tokens.load_learned_embeds(artifact_folder(runs, ONE_VECTOR, subject.name) / ARTIFACT)
    objects = [f"<{subject.class_noun}>" for subject in toy_subjects]
    prompts = [f"a painting of a {name} in the style of {method.config.placeholder}" for name in objects]
    if len(objects) > 1:
        prompts.append(f"a photo of a {objects[0]} next to a {objects[1]}")
    save_png(labelled_image_rows({prompt: method.generate(prompt, seeds=SEEDS) for prompt in prompts}), path)
