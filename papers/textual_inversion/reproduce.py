"""Measure the claims of Textual Inversion in the toy world: `python -m papers.textual_inversion.reproduce --help`.

Trains every variant on every subject (a run that was stopped is taken up again), scores samples with the judge, and
writes results.json, figures/*.png and the card's table.
"""

import time
from dataclasses import dataclass
from pathlib import Path

import tyro

from common.backbones import load_backbone
from common.evaluation.bootstrap import paired_difference
from common.evaluation.claims import Claim, Results, save_results, verdict, write_card_table
from common.evaluation.records import describe_machine
from common.fingerprint import weights_hash
from common.toyworld.benchmark import subjects
from common.training.optimize import default_device

from .experiments import CAPTION, INITIALIZER, ONE_VECTOR, Measured, Plan, measure
from .figures import draw_figures
from .method import SLUG

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True, kw_only=True)
class ReproduceOptions:
    """Measure the paper's claims in the toy world."""

    quick: bool = False
    """One subject and ten steps, to see that everything runs; it says nothing about the claims."""
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

    backbone = load_backbone(options.backbone, device=default_device()).freeze()
    toy_subjects = subjects(plan.num_subjects)
    measured = measure(backbone, plan, toy_subjects, runs)
    figures = draw_figures(backbone, plan, toy_subjects, measured, runs, output)

    results = Results(
        slug=SLUG,
        command=f"make reproduce PAPER={SLUG}",
        backbone=f"{Path(backbone.name).name}, unet {weights_hash(backbone.unet)}",
        seeds=list(plan.seeds),
        steps=plan.config.train_steps,
        machine=describe_machine(str(backbone.device)),
        seconds=time.perf_counter() - started,
        claims=claims(measured, plan, Path(backbone.name).name),
        figures=figures,
    )
    save_results(results, output / "results.json")
    if is_card:
        write_card_table(HERE / "README.md", results)
    for claim in results.claims:
        print(f"{claim.holds:>14}  {claim.text}: {claim.ours or '-'}")
    print(f"wrote {output / 'results.json'}")


def claims(measured: Measured, plan: Plan, backbone_name: str) -> list[Claim]:
    """The four small-scale claims, in parts, below the full-scale row that was not run."""
    setting = f"{backbone_name}, {plan.num_subjects} subjects, seeds {', '.join(map(str, plan.seeds))}"
    loss = f"{setting}; denoising loss of {plan.held_out} held-out pictures, fixed noise, 10 timesteps"
    judged = f"{setting}, {len(plan.seeds)} pictures a prompt, judge"
    product_how = f"{judged}; identity cosine x compliance"
    losses, early = measured.losses, measured.early_losses
    attributes, compliance, product = (
        {name: scores[score] for name, scores in measured.scores.items()}
        for score in ("attributes", "compliance", "product")
    )
    more = ("2 vectors", "4 vectors")
    product["the better of 2 and 4"] = {s: max(product[name][s] for name in more) for s in product[ONE_VECTOR]}
    one, four, ten = ONE_VECTOR, "4 vectors", "10x lr"
    step = max(1, plan.config.train_steps // 4)
    rows = [
        ("S* explains held-out pictures better than the initializer word", losses, one, INITIALIZER, "lower", loss),
        ("S* explains held-out pictures better than the best natural caption", losses, one, CAPTION, "lower", loss),
        ("class, colour, pattern, material are right more often than with the initializer word, in a photo of a S*",
         attributes, one, INITIALIZER, "higher", judged),
        ("more vectors reconstruct better", losses, four, one, "lower", loss),
        ("more vectors follow prompts less", compliance, four, one, "lower", judged),
        ("one vector has the best product of fidelity and compliance", product, one, "the better of 2 and 4", "higher",
         product_how),
        (f"10 times the learning rate reconstructs better early, at step {step}", early, ten, one, "lower", loss),
        ("10 times the learning rate follows prompts less in the end", compliance, ten, one, "lower", judged),
    ]  # fmt: skip
    not_run = Claim(
        text="DINO / CLIP-I / CLIP-T on the DreamBooth set",
        place="quoted by the HiFi Tuner paper",
        paper="0.569 / 0.780 / 0.255",
        ours=None,
        how="SD 1.x, 30 subjects, DINO ViT-S/16, CLIP ViT-B/32",
        holds="not run",
    )
    return [not_run, *(compare(*row) for row in rows)]


def compare(text: str, values: dict, first: str, second: str, claimed: str, how: str) -> Claim:
    """One row: the paired difference of two variants over the subjects."""
    ours = paired_difference(values[first], values[second])
    means = {name: sum(values[name].values()) / len(values[name]) for name in (first, second)}
    detail = f"{means[first]:.4f} ({first}) against {means[second]:.4f} ({second})"
    return Claim(text=text, place="", paper="-", ours=ours, detail=detail, how=how, holds=verdict(ours, claimed))


if __name__ == "__main__":
    main()
