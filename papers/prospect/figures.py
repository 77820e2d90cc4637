"""The paper's kinds of figure, in the toy world; all from what the studies left in their folders."""

from collections.abc import Mapping
from pathlib import Path

import torch

from common.evaluation.bootstrap import Interval, bootstrap_mean
from common.evaluation.claims import Figure
from common.evaluation.figures import bar_with_intervals, labelled_image_rows, save_figure
from common.evaluation.study import Scores
from common.sampling.images import save_png
from common.toyworld.benchmark import Subject, subjects
from common.training.optimize import default_device

from .experiments import COLOUR, INVERSION, LAYOUT, PHOTO, PROPOSAL, SINGLE, STAGES, Plan, artifact_folder
from .method import ProSpect, load_method
from .stages import ATTRIBUTE_STAGES, stage_fills

SEEDS = [0, 1, 2, 3]
# Three attributes from three concepts. 64x64 latents show the same layout through 16 times more noise power than 16x16
# ones, so what happens at t = 900 and 500 on Stable Diffusion happens at t = 574 and 127 on tiny-sd.
GROUPS = {
    "stages of the code": {"layout": range(9, 10), "content": range(5, 9), "material": range(5)},
    "moved to equal noise": {"layout": range(6, 10), "content": range(2, 6), "material": range(2)},
}


def draw_figures(plan: Plan, scores: Scores, runs: Path, output: Path) -> list[Figure]:
    """Write output/figures/*.png."""
    folder, learned = output / "figures", subjects(plan.study.num_subjects)
    draw_stage_swap(learned, runs / SINGLE, folder / "stage_swap.png")
    draw_attributes(learned[0], runs / SINGLE, folder / "attributes.png")
    save_figure(bar_with_intervals(relative_gains(scores), "loss saved, share of TI's"), folder / "stage_losses.png")
    save_figure(bar_with_intervals(transfer_bars(scores), "share of the way to a match"), folder / "transfer.png")
    frequencies = {key.removeprefix("frequency of "): scores[key] for key in scores if key.startswith("frequency of")}
    bars = {stage: intervals(values) for stage, values in frequencies.items()}
    save_figure(bar_with_intervals(bars, "cycles per picture of what it adds"), folder / "frequencies.png")
    return [
        Figure("figures/stage_swap.png", "Layout, content and material of three pictures, by groups of stages"),
        Figure("figures/attributes.png", "The code's three uses: where S* stands, and plain words elsewhere"),
        Figure("figures/stage_losses.png", "Held-out loss that ProSpect saves against Textual Inversion, by stage"),
        Figure("figures/transfer.png", "What S* in one half of the stages takes over from its picture"),
        Figure("figures/frequencies.png", "Mean frequency of what each stage adds to the picture; stage 9 comes first"),
    ]


def joint_fills(words: Mapping[str, str], groups: Mapping[str, range]) -> list[str]:
    """One concept for each attribute.   words, groups: attribute -> the concept's words, and its stages."""
    stages: dict[str, list[int]] = {}
    for attribute, chosen in groups.items():
        stages.setdefault(words[attribute], []).extend(chosen)
    return stage_fills(stages, elsewhere="")


def draw_stage_swap(learned: list[Subject], runs: Path, path: Path) -> None:
    """Three concepts (fewer where fewer were learned), each in each role."""
    chosen = [learned[i % len(learned)] for i in range(3)]
    method = load_concepts(chosen, runs)
    names = [f"<{subject.class_noun}>" for subject in chosen]
    rows = {"the pictures": torch.stack([subject.images[PHOTO] for subject in chosen])}
    for title, groups in GROUPS.items():
        for k in range(3):
            words = {attribute: names[(k + i) % 3] for i, attribute in enumerate(groups)}
            label = " ".join(f"{attribute} {name}" for attribute, name in words.items())
            rows[f"{label} {title}"] = generate(method, joint_fills(words, groups))
    save_png(labelled_image_rows(rows), path)


def load_concepts(chosen: list[Subject], runs: Path) -> ProSpect:
    """One method that knows all the concepts; its own is the first."""
    first, *others = {subject.name: artifact_folder(runs, PROPOSAL, subject) for subject in chosen}.values()
    method = load_method(first, device=default_device())
    for artifact in others:
        method.add_concept(artifact)
    return method


def draw_attributes(subject: Subject, runs: Path, path: Path) -> None:
    """S* in the stages of each attribute, for another noun."""
    method, noun = load_concepts([subject], runs), "car" if subject.class_noun != "car" else "dog"
    placeholder = method.config.placeholder
    rows = {
        "the picture": subject.images[[PHOTO]],
        f"{placeholder} in all stages": generate(method, [placeholder] * 10),
    }
    for attribute, stages in ATTRIBUTE_STAGES.items():
        rows[f"{attribute} of {placeholder}, else {noun}"] = generate(method, stage_fills({placeholder: stages}, noun))
    save_png(labelled_image_rows(rows | {noun: generate(method, [noun] * 10)}), path)


def generate(method: ProSpect, fills: list[str]) -> torch.Tensor:
    """Pictures of the plain prompt at the same seeds."""
    return method.generate(method.config.plain_prompt(), seeds=SEEDS, fills=fills)


def relative_gains(scores: Scores) -> dict[str, dict[str, Interval]]:
    """Per stage: 1 - loss of ProSpect / loss of Textual Inversion."""
    stages = [key for key in scores if key.startswith("loss of stage")]
    return {key.removeprefix("loss of "): intervals(gain(scores[key])) for key in stages}


def gain(losses: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """method -> subject -> loss in, the share that ProSpect saves out."""
    own, other = losses[PROPOSAL], losses[INVERSION]
    return {PROPOSAL: {subject: 1 - own[subject] / other[subject] for subject in own}}


def transfer_bars(scores: Scores) -> dict[str, dict[str, Interval]]:
    """Groups "early layout", ...; a bar for each method."""
    groups = [f"{where} {attribute}" for where in STAGES for attribute in (LAYOUT, COLOUR)]
    methods = (PROPOSAL, INVERSION)
    values = scores["transfer"]
    return {group: intervals({name: values[f"{name} {group}"] for name in methods}) for group in groups}


def intervals(values: dict[str, dict[str, float]]) -> dict[str, Interval]:
    """method -> subject -> value in, method -> interval out."""
    return {name: bootstrap_mean(list(by_subject.values())) for name, by_subject in values.items()}
