"""Small counterparts of the paper's figures, from what experiments.py wrote."""

from pathlib import Path

from common.evaluation.baselines import PLACEHOLDER
from common.evaluation.claims import Figure
from common.evaluation.class_samples import read_samples
from common.evaluation.figures import labelled_image_rows
from common.evaluation.study import prompt_grid
from common.sampling.images import save_png
from common.toyworld.benchmark import Subject, subjects

from .experiments import INVERSION, NO_PRIOR, PROPOSAL, UNTUNED, Plan, samples_folder
from .method import class_prompt, instance_prompt

SHOWN = 8  # samples in a row
ROWS = 3  # subjects in the figures that compare samples


def draw_figures(plan: Plan, runs: Path, output: Path) -> list[Figure]:
    """Write output/figures/*.png."""
    folder, toy_subjects = output / "figures", subjects(plan.study.num_subjects)
    words = {PROPOSAL: f"{plan.config.identifier} {{class}}", INVERSION: PLACEHOLDER}
    save_png(prompt_grid(toy_subjects, words, plan.study, runs), folder / "prompts.png")
    draw_class_samples(plan, toy_subjects[:ROWS], runs, folder / "class_samples.png")
    draw_diversity(plan, toy_subjects[:ROWS], runs, folder / "diversity.png")
    return [
        Figure("figures/prompts.png", "Subjects in prompts, DreamBooth above Textual Inversion (as Figure 4)"),
        Figure("figures/class_samples.png", "The class before tuning, without and with prior loss (as Figure 19)"),
        Figure("figures/diversity.png", "Samples of one prompt with and without prior loss (as Figure 6)"),
    ]


def draw_class_samples(plan: Plan, toy_subjects: list[Subject], runs: Path, path: Path) -> None:
    """ "a [class noun]" at equal seeds from the untuned, the naively tuned and the proposed model."""
    rows = {}
    for subject in toy_subjects:
        prompt = class_prompt(plan.subject_config(subject, PROPOSAL))
        rows[f"training photos of {subject.name}"] = subject.images
        for method in (UNTUNED, NO_PRIOR, PROPOSAL):
            rows[f"{prompt}, {method}"] = read_samples(samples_folder(runs, method, subject.name) / "class")[:SHOWN]
    save_png(labelled_image_rows(rows), path)


def draw_diversity(plan: Plan, toy_subjects: list[Subject], runs: Path, path: Path) -> None:
    """ "a [V] [class noun]" at equal seeds without and with the prior loss."""
    rows = {}
    for subject in toy_subjects:
        prompt = instance_prompt(plan.subject_config(subject, PROPOSAL))
        rows[f"training photos of {subject.name}"] = subject.images
        for method in (NO_PRIOR, PROPOSAL):
            rows[f"{prompt}, {method}"] = read_samples(samples_folder(runs, method, subject.name) / "subject")[:SHOWN]
    save_png(labelled_image_rows(rows), path)
