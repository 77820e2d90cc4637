"""Measure the claims of Textual Inversion in the toy world: `python -m papers.textual_inversion.reproduce --help`.

Trains every variant on every subject (a run that was stopped is taken up again), scores samples with the judge, and
writes results.json, figures/*.png and the card's table.
"""

from pathlib import Path

from common.evaluation.claims import Claim, compare, not_run
from common.evaluation.reproduction import Findings, Setup, reproduce
from common.evaluation.study import Scores, benchmark_row

from .experiments import CAPTION, EARLY, INITIALIZER, ONE_VECTOR, Plan, measure
from .figures import draw_figures

HERE = Path(__file__).resolve().parent


def main(argv: list[str] | None = None) -> None:
    """Train, measure, draw, write."""
    reproduce(HERE, run, argv)


def run(setup: Setup) -> Findings:
    plan = Plan.quick() if setup.quick else Plan.full()
    scores = measure(setup.backbone, plan, setup.runs)
    return Findings(
        claims=claims(scores, plan, setup.backbone),
        figures=draw_figures(setup.backbone, plan, scores, setup.runs, setup.output),
        seeds=list(plan.study.seeds),
        steps=plan.config.train_steps,
        benchmark=benchmark_row(ONE_VECTOR, scores, plan.study, setup.backbone),
    )


def claims(scores: Scores, plan: Plan, backbone_name: str) -> list[Claim]:
    """The four small-scale claims, in parts, below the full-scale row that was not run."""
    setting = plan.study.setting(backbone_name)
    loss = f"{setting}; denoising loss of {plan.study.held_out} held-out pictures, fixed noise, 10 timesteps"
    judged, product_how = f"{setting}; judge", f"{setting}; judge: identity cosine x compliance"
    one, four, ten, more = ONE_VECTOR, "4 vectors", "10x lr", "the better of 2 and 4"
    product = dict(scores["product"])
    product[more] = {s: max(product[name][s] for name in ("2 vectors", four)) for s in product[one]}
    step = max(1, plan.config.train_steps // 4)
    rows = [
        ("S* explains held-out pictures better than the initializer word",
         scores["held-out loss"], one, INITIALIZER, "lower", loss),
        ("S* explains held-out pictures better than the best natural caption",
         scores["held-out loss"], one, CAPTION, "lower", loss),
        ("class, colour, pattern, material are right more often than with the initializer word, in a photo of a S*",
         scores["attributes"], one, INITIALIZER, "higher", judged),
        ("more vectors reconstruct better", scores["held-out loss"], four, one, "lower", loss),
        ("more vectors follow prompts less", scores["compliance"], four, one, "lower", judged),
        ("one vector has the best product of fidelity and compliance", product, one, more, "higher", product_how),
        (f"10 times the learning rate reconstructs better early, at step {step}",
         scores[EARLY], ten, one, "lower", loss),
        ("10 times the learning rate follows prompts less in the end", scores["compliance"], ten, one, "lower", judged),
    ]  # fmt: skip
    full_scale = not_run(
        "DINO / CLIP-I / CLIP-T on the DreamBooth set",
        place="quoted by the HiFi Tuner paper",
        paper="0.569 / 0.780 / 0.255",
        how="SD 1.x, 30 subjects, DINO ViT-S/16, CLIP ViT-B/32",
    )
    return [full_scale, *(compare(*row, text=text, how=how) for text, *row, how in rows)]


if __name__ == "__main__":
    main()
