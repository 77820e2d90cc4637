"""Measure the claims of DreamBooth in the toy world: `python -m papers.dreambooth.reproduce --help`.

Trains every method on every subject (subjects that are finished are not done again), scores samples with the judge, and
writes results.json, figures/*.png and the card's table.
"""

import time
from dataclasses import dataclass, replace
from pathlib import Path

import tyro

from common.backbones import load_backbone
from common.evaluation.bootstrap import paired_difference
from common.evaluation.claims import Claim, Results, save_results, verdict, write_card_table
from common.evaluation.records import describe_machine
from common.fingerprint import weights_hash
from common.toyworld.benchmark import subjects
from common.training.optimize import default_device

from .experiments import INVERSION, NO_NOUN, NO_PRIOR, PROPOSAL, UNTUNED, WRONG_NOUN, Plan, Scores, measure
from .figures import draw_figures
from .method import SLUG

HERE = Path(__file__).resolve().parent
MARGIN = 0.05  # identity cosine: what "at most slightly higher" may mean


@dataclass(frozen=True, kw_only=True)
class ReproduceOptions:
    """Measure the paper's claims in the toy world."""

    quick: bool = False
    """One subject and four steps, to see that everything runs; it says nothing about the claims."""
    output: Path | None = None
    """Folder of results.json, figures/ and runs/. Default: results and figures go into the paper's folder, runs into
    runs/reproduce/, and the card's table is renewed; with --quick, everything goes into runs/quick/."""
    backbone: str = "tiny-sd"
    """A preset or a diffusers folder."""


def main(argv: list[str] | None = None) -> None:
    """Train, measure, draw, write."""
    options, started = tyro.cli(ReproduceOptions, args=argv), time.perf_counter()
    output = options.output or (Path("runs/quick") / SLUG if options.quick else HERE)
    is_card = output.resolve() == HERE
    if is_card and options.quick:
        raise ValueError("--quick does not write into the paper's folder: choose another --output")
    runs = Path("runs/reproduce") / SLUG if is_card else output / "runs"
    plan = Plan.quick() if options.quick else Plan.full()

    toy_subjects = subjects(plan.num_subjects)
    scores = measure(options.backbone, plan, toy_subjects, runs)
    figures = draw_figures(plan, toy_subjects, runs, output)

    backbone = load_backbone(options.backbone)
    backbone_name = Path(backbone.name).name
    results = Results(
        slug=SLUG,
        command=f"make reproduce PAPER={SLUG}",
        backbone=f"{backbone_name}, unet {weights_hash(backbone.unet)}",
        seeds=list(plan.seeds),
        steps=plan.config.train_steps,
        machine=describe_machine(str(default_device())),
        seconds=time.perf_counter() - started,
        claims=claims(scores, plan, backbone_name),
        figures=figures,
    )
    save_results(results, output / "results.json")
    if is_card:
        write_card_table(HERE / "README.md", results)
    for claim in results.claims:
        print(f"{claim.holds:>14}  {claim.text}: {claim.ours or '-'}")
    print(f"wrote {output / 'results.json'}")


def claims(scores: Scores, plan: Plan, backbone_name: str) -> list[Claim]:
    """The full-scale claims, which were not run, and the four small-scale ones in parts."""
    setting = f"{backbone_name}, {plan.num_subjects} subjects, {plan.config.train_steps} steps"
    seeds = f"seeds {plan.seeds[0]}-{plan.seeds[-1]}"
    of_subject = f"{setting}, {seeds}; judge, against {plan.held_out} held-out views"
    of_class = f'{setting}; {len(plan.class_seeds)} samples of "a photo of a [class noun]"'
    asked = f"{setting}, {plan.num_prompts} prompts, {seeds}; judge: what the prompt asks for beyond the class"
    loss = f"{setting}; denoising loss of {plan.held_out} held-out views, fixed noise, 10 timesteps"
    drift = f"{of_class}, Frechet distance of judge features to {plan.class_renders} renders of the class"
    pres = f"{of_class}, cosine of judge features with the training photos"
    spread = f"{setting}; {len(plan.subject_seeds)} samples, mean distance of judge features"
    nouns = f"{of_subject}; all without prior loss"
    rows = [
        ("held-out views of the subject are explained better than by Textual Inversion",
         "held-out loss", PROPOSAL, INVERSION, "lower", loss),
        ("samples have the subject's identity more than with Textual Inversion (1 - identity cosine)",
         "identity error", PROPOSAL, INVERSION, "lower", of_subject),
        ("class, colour, pattern, material are wrong less often than with Textual Inversion",
         "attribute error", PROPOSAL, INVERSION, "lower", of_subject),
        ("prompts are followed more than with Textual Inversion",
         "compliance", PROPOSAL, INVERSION, "higher", asked),
        ("prior loss keeps the class near its distribution", "class distance", PROPOSAL, NO_PRIOR, "lower", drift),
        ("prior loss keeps the class unlike the subject (PRES)", "PRES", PROPOSAL, NO_PRIOR, "lower", pres),
        ("prior loss raises the diversity of samples of the subject (DIV)",
         "diversity", PROPOSAL, NO_PRIOR, "higher", spread),
        ("the correct class noun has a lower subject error than a wrong one (1 - identity cosine)",
         "identity error", NO_PRIOR, WRONG_NOUN, "lower", nouns),
        ("the correct class noun has a lower subject error than none (1 - identity cosine)",
         "identity error", NO_PRIOR, NO_NOUN, "lower", nouns),
    ]  # fmt: skip
    measured = [compare(scores, *row) for row in rows]
    measured.insert(6, slightly_higher(scores, of_subject))
    return [*not_run(), *measured]


def compare(scores: Scores, text: str, score: str, first: str, second: str, claimed: str, how: str) -> Claim:
    """One row: the paired difference of two methods over the subjects."""
    values = scores[score]
    ours = paired_difference(values[first], values[second])
    names = [name for name in (first, second, UNTUNED) if name in values]
    means = [f"{sum(values[name].values()) / len(values[name]):.4f} ({name})" for name in names]
    detail = " against ".join(means[:2]) + "".join(f"; {mean}" for mean in means[2:])
    return Claim(text=text, place="", paper="-", ours=ours, detail=detail, how=how, holds=verdict(ours, claimed))


def slightly_higher(scores: Scores, how: str) -> Claim:
    """The price of the prior loss in subject error: its whole interval has to lie below the margin."""
    text = f"prior loss raises the subject error by less than {MARGIN} (1 - identity cosine)"
    claim = compare(scores, text, "identity error", PROPOSAL, NO_PRIOR, "lower", how)
    ours = claim.ours
    beyond = replace(ours, mean=ours.mean - MARGIN, low=ours.low - MARGIN, high=ours.high - MARGIN)
    return replace(claim, holds=verdict(beyond, "lower"))


def not_run() -> list[Claim]:
    """The paper's own numbers."""
    rows = [
        ("subject fidelity (DINO) higher than Textual Inversion's", "Table 1", "0.668 against 0.569",
         "Stable Diffusion, 30 subjects, 25 prompts, DINO ViT-S/16"),
        ("prompt fidelity (CLIP-T) higher than Textual Inversion's", "Table 1", "0.305 against 0.255",
         "Stable Diffusion, 30 subjects, 25 prompts, CLIP ViT-B/32"),
        ("prior loss: PRES down", "Table 3", "0.664 -> 0.493", "Imagen, 15 subjects, DINO ViT-S/16"),
        ("prior loss: DIV up", "Table 3", "0.371 -> 0.391", "Imagen, 15 subjects, LPIPS"),
        ("correct class noun, wrong, none: DINO", "Table 4", "0.744, 0.454, 0.303", "Imagen, 5 subjects"),
    ]  # fmt: skip
    return [Claim(text=t, place=p, paper=v, ours=None, how=how, holds="not run") for t, p, v, how in rows]


if __name__ == "__main__":
    main()
