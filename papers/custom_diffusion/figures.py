"""Small counterparts of the paper's figures, from what experiments.py wrote; one pair of concepts is trained here."""

from dataclasses import replace
from pathlib import Path

import torch

from common.backbones import load_backbone
from common.data.image_folder import ImageFolder
from common.data.latent_cache import LatentCache
from common.data.subject_dataset import SubjectDataset
from common.evaluation.baselines import PLACEHOLDER, BaselineConfig, FullFineTuning
from common.evaluation.bootstrap import bootstrap_mean
from common.evaluation.claims import Figure
from common.evaluation.class_samples import read_samples
from common.evaluation.figures import bar_with_intervals, labelled_image_rows, lines_with_intervals, save_figure
from common.evaluation.study import PLAIN_PROMPT, Scores, folder_name, prompt_grid
from common.sampling.images import save_png
from common.toyworld.benchmark import Subject, subjects
from common.training.config import FitConfig
from common.training.loop import fit
from common.training.optimize import default_device

from .analysis import WORDS_ALONE
from .augmentation import PooledDataset
from .config import CustomDiffusionConfig
from .experiments import (
    FINE_TUNING,
    FINE_TUNING_LEARNING_RATE,
    INVERSION,
    NO_REGULARISATION,
    PROPOSAL,
    UNTUNED,
    Plan,
    artifact_folder,
    class_folder,
    train_concepts,
)
from .merge import merge_artifacts
from .world import captions

SHOWN, ROWS = 8, 3  # pictures in a row; subjects in the figure of class samples
PAIR_PROMPTS = ("a photo of a {} next to a {}", "a photo of a {} on top of a {}", "a photo of a {} behind a {}")
IDENTIFIERS = ("sks", "zwx")  # of DreamBooth


def draw_figures(backbone_name: str, plan: Plan, scores: Scores, runs: Path, output: Path) -> list[Figure]:
    """Write output/figures/*.png."""
    folder, toy_subjects = output / "figures", subjects(plan.study.num_subjects)
    kinds = sorted(scores["weight change"].items(), key=lambda kind: -sum(kind[1].values()))
    bars = {kind.replace(" ", "\n", 1): {"": bootstrap_mean(list(values.values()))} for kind, values in kinds}
    save_figure(bar_with_intervals(bars, "mean change ||W' - W|| / ||W||"), folder / "layer_change.png")
    words = {PROPOSAL: plan.config.placeholders[0] + " {class}", INVERSION: PLACEHOLDER, FINE_TUNING: "sks {class}"}
    save_png(prompt_grid(toy_subjects, words, plan.study, runs), folder / "prompts.png")
    draw_class_samples(plan, toy_subjects[:ROWS], runs, folder / "class_samples.png")
    draw_compression(scores, folder / "compression.png")
    draw_two_concepts(backbone_name, plan, runs, folder / "two_concepts.png")
    return [
        Figure("figures/layer_change.png", "How far each kind of layer moves when the whole U-Net is fine-tuned"),
        Figure("figures/prompts.png", "Subjects in prompts: Custom Diffusion, Textual Inversion, DreamBooth"),
        Figure("figures/class_samples.png", "The class before and after tuning, at equal seeds"),
        Figure("figures/compression.png", "Loss on held-out views against the size of the compressed artifact"),
        Figure("figures/two_concepts.png", "Two subjects in one picture: trained together, merged, DreamBooth"),
    ]


def draw_class_samples(plan: Plan, toy_subjects: list[Subject], runs: Path, path: Path) -> None:
    """ "a photo of a [class noun]" at equal seeds."""
    rows = {}
    for subject in toy_subjects:
        rows[f"training photos of {subject.name}"] = subject.images
        for method in (UNTUNED, FINE_TUNING, NO_REGULARISATION, PROPOSAL):
            rows[f"a {subject.class_noun}, {method}"] = read_samples(class_folder(runs, method) / subject.name)[:SHOWN]
    save_png(labelled_image_rows(rows), path)


def draw_compression(scores: Scores, path: Path) -> None:
    """Held-out loss over the mean size, from the word alone to all singular values."""
    losses, sizes = scores["compressed loss"], scores["compressed bytes"]
    points = {
        sum(s.values()) / len(s) / 1e6: bootstrap_mean(list(losses[share].values())) for share, s in sizes.items()
    }
    points[0.0] = bootstrap_mean(list(losses[WORDS_ALONE].values()))
    figure = lines_with_intervals({"": dict(sorted(points.items()))}, "artifact, MB", "loss on held-out views")
    save_figure(figure, path)


def draw_two_concepts(backbone_name: str, plan: Plan, runs: Path, path: Path) -> None:
    """The first pair of subjects in pictures of both; columns are prompts and seeds."""
    pair = plan.pairs()[0]
    photos = [runs / folder_name(PROPOSAL) / "photos" / subject.name for subject in pair]
    nouns = tuple(subject.class_noun for subject in pair)
    config = replace(plan.config, class_nouns=nouns, train_steps=2 * plan.config.train_steps)
    joint = train_concepts(backbone_name, config, photos, runs / "joint", runs)
    backbone = load_backbone(backbone_name, device=default_device())
    artifacts = [artifact_folder(runs, PROPOSAL, subject) for subject in pair]
    merged = merge_artifacts(backbone, artifacts, captions(plan.num_captions))
    both = fine_tune_both(backbone_name, config, photos, runs / "joint_dreambooth")
    ours, theirs = (
        [config.words(i) for i in range(2)],
        [f"{v} {noun}" for v, noun in zip(IDENTIFIERS, nouns, strict=True)],
    )
    rows = {"training photos": torch.cat([subject.images[:3] for subject in pair])}
    for name, method, words in (("together", joint, ours), ("merged", merged, ours), ("DreamBooth", both, theirs)):
        rows[name] = torch.cat([method.generate(p.format(*words), seeds=[0, 1]) for p in PAIR_PROMPTS])
    columns = [prompt.format(*nouns) for prompt in PAIR_PROMPTS for _ in range(2)]
    save_png(labelled_image_rows(rows, columns), path)


def fine_tune_both(backbone_name: str, config: CustomDiffusionConfig, photos: list[Path], run: Path) -> FullFineTuning:
    """DreamBooth without prior loss on the pictures of both subjects, with an identifier each."""
    settings = BaselineConfig(
        train_steps=config.train_steps,
        batch_size=config.batch_size,
        learning_rate=FINE_TUNING_LEARNING_RATE,
        num_inference_steps=config.num_inference_steps,
        guidance_scale=config.guidance_scale,
    )
    backbone = load_backbone(backbone_name, device=default_device())
    method = FullFineTuning(backbone, config.class_nouns[0], settings)
    parts = []
    for i, (folder, identifier) in enumerate(zip(photos, IDENTIFIERS, strict=True)):
        latents = LatentCache(ImageFolder(folder, resolution_px=backbone.resolution_px), backbone)
        parts.append(SubjectDataset(latents, [PLAIN_PROMPT.format(f"{identifier} {config.class_nouns[i]}")], seed=i))
    steps, rate = settings.train_steps, settings.learning_rate
    fit_settings = FitConfig(train_steps=steps, learning_rate=rate, batch_size=settings.batch_size, keep_checkpoints=1)
    fit(method, PooledDataset(parts), fit_settings, run, resume=True)
    return method
