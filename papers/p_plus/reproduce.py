"""Measure the claims of P+ in the toy world: `python -m papers.p_plus.reproduce --help`.

Trains XTI and Textual Inversion on every subject (a run that was stopped is taken up again), mixes the learned words
layer by layer, scores samples with the judge, and writes results.json, figures/*.png and the card's table.
"""

from pathlib import Path

from common.evaluation.claims import Claim, compare, not_run
from common.evaluation.reproduction import Findings, Setup, reproduce
from common.evaluation.study import Scores, benchmark_row

from .experiments import (
    AVERAGE,
    COLOUR,
    COMPONENTS,
    EARLY,
    INNER,
    INVERSION,
    OUTER,
    PROPOSAL,
    RANDOM,
    SHAPE,
    TIED,
    Plan,
    measure,
)
from .figures import draw_figures

HERE = Path(__file__).resolve().parent
TOLERANCE = 1e-6  # denoising loss: numerical precision in float32


def main(argv: list[str] | None = None) -> None:
    """Train, mix, measure, draw, write."""
    reproduce(HERE, run, argv)


def run(setup: Setup) -> Findings:
    plan = Plan.quick() if setup.quick else Plan.full()
    scores = measure(setup.backbone, plan, setup.runs)
    return Findings(
        claims=claims(scores, plan, setup.backbone),
        figures=draw_figures(setup.backbone, plan, scores, setup.runs, setup.output),
        seeds=list(plan.study.seeds),
        steps=plan.config.train_steps,
        benchmark=benchmark_row(PROPOSAL, scores, plan.study, setup.backbone),
    )


def claims(scores: Scores, plan: Plan, backbone_name: str) -> list[Claim]:
    """The four small-scale claims and that of regular words, in parts, below the full-scale row that was not run."""
    setting, config = f"{Path(backbone_name).name}, {plan.study.num_subjects} subjects", plan.config
    steps = f"{config.train_steps} steps of {config.batch_size} samples"
    loss = f"{setting}, {steps}; denoising loss of {plan.study.held_out} held-out photos, fixed noise, 10 timesteps"
    mixed = f"{setting}, {len(plan.mixing_seeds)} seeds; another learned subject's words in some layers; judge"
    rows = [
        ("held-out loss", PROPOSAL, INVERSION, "lower", "XTI explains held-out photos better than Textual Inversion",
         loss),
        ("identity", PROPOSAL, INVERSION, "higher", "samples have the subject's identity more than Textual Inversion's",
         f"{plan.study.setting(backbone_name)}, {steps}; judge"),
        ("compliance", PROPOSAL, INVERSION, "higher", "prompts are followed more than with Textual Inversion",
         f"{plan.study.setting(backbone_name)}, {steps}; judge"),
        (SHAPE, INNER, RANDOM, "higher", "words in the inner layers bring their class more than in random ones", mixed),
        (SHAPE, INNER, OUTER, "higher", "words in the inner layers bring their class more than in the outermost",
         mixed),
        (COLOUR, OUTER, RANDOM, "higher", "words in the outermost layers bring their colour more than in random ones",
         mixed),
        (COLOUR, OUTER, INNER, "higher", "words in the outermost layers bring their colour more than in inner ones",
         mixed),
        ("mix", PROPOSAL, AVERAGE, "higher",
         "A inside and B outside has A's class and B's colour more than the average of two Textual Inversions", mixed),
        ("density", PROPOSAL, INVERSION, "higher", "words of XTI lie denser among real words than Textual Inversion's",
         f"{setting}, {steps}; log-density, Gaussian kernels on {COMPONENTS} components of the vocabulary"),
    ]  # fmt: skip
    measured = [compare(scores[s], a, b, side, text=text, how=how) for s, a, b, side, text, how in rows]
    losses = scores["held-out loss"]
    early = compare(
        losses, EARLY, INVERSION, "lower", how=f"{loss}; XTI at step {plan.early_step}",
        text="XTI at a tenth of the steps explains held-out photos better than Textual Inversion at all",
    )  # fmt: skip
    apart = {s: abs(losses[TIED][s] - losses[INVERSION][s]) for s in losses[TIED]}
    bound = f"{TOLERANCE:g}"
    tied = compare(
        {"difference": apart, bound: dict.fromkeys(apart, TOLERANCE)}, "difference", bound, "lower", how=loss,
        text="Textual Inversion's word in all layers has Textual Inversion's loss, to numerical precision",
    )  # fmt: skip
    return [full_scale(), early, *measured, tied]


def full_scale() -> Claim:
    """What the paper says of Stable Diffusion."""
    return not_run(
        "more expressive and precise than Textual Inversion, at 500 steps against 5000",
        place="Sec. 4",
        paper="text and subject similarity, user study: values not at hand",
        how="SD 1.4, concepts of Textual Inversion",
    )


if __name__ == "__main__":
    main()
