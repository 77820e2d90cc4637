"""Measure the claims of DreamFusion in the toy world: `python -m papers.dreamfusion.reproduce --help`.

Makes toy objects from their names with the paper's settings and without (what is finished is not done again), has the
judge look at them from all sides, and writes results.json, figures/*.png and the card's table.
"""

from pathlib import Path

from common.evaluation.claims import Claim, compare, not_run
from common.evaluation.reproduction import Findings, Setup, reproduce
from common.evaluation.trials import Scores

from .experiments import (
    AGREEMENT,
    ALBEDO,
    CLASS,
    DIVERSITY,
    FIXED,
    JANUS,
    PROPOSAL,
    SATURATION,
    SDS,
    SIDES,
    STRONG,
    TEXTURELESS,
    VARIANCE,
    VIEWS,
    WEAK,
    WITHOUT_NOISE,
    Plan,
    measure,
)
from .figures import draw_figures

HERE = Path(__file__).resolve().parent
BOUND = "bound"


def main(argv: list[str] | None = None) -> None:
    """Make objects, look at them, draw, write."""
    reproduce(HERE, run, argv)


def run(setup: Setup) -> Findings:
    plan = Plan.quick() if setup.quick else Plan.full()
    scores = measure(setup.backbone, plan, setup.runs)
    return Findings(
        claims=claims(scores, plan, setup.backbone),
        figures=draw_figures(setup.backbone, plan, scores, setup.runs, setup.output),
        seeds=list(plan.seeds),
        steps=plan.config.train_steps,
    )


def claims(scores: Scores, plan: Plan, backbone_name: str) -> list[Claim]:
    """The four small-scale claims in parts, below the full-scale row that was not run."""
    config = plan.config
    setting = f"{Path(backbone_name).name}, {len(plan.nouns)} objects, {config.train_steps} steps"
    seed = f"{setting}, seed {plan.seeds[0]}"
    seeds = f"{setting}, seeds {', '.join(map(str, plan.seeds))}"
    sides, draws = f"judge, {VIEWS} sides", f"{seed}; one picture, {plan.num_draws} draws of timestep and noise"
    bounds = {SIDES: 2.5, AGREEMENT: 2.0}
    values = {score: dict(scores[score]) | {BOUND: dict.fromkeys(plan.nouns, bound)} for score, bound in bounds.items()}
    rows = [
        (scores[JANUS], PROPOSAL, FIXED, "lower",
         "prompts that name the view lower the Janus rate, against one prompt for all views",
         f"{seed}; share of 3 back views that the judge calls front"),
        (scores[TEXTURELESS], PROPOSAL, ALBEDO, "higher",
         "light and textureless pictures give better shapes than albedo alone",
         f"{seed}; probability of the class without texture, {sides}"),
        (scores[VARIANCE], SDS, WITHOUT_NOISE, "lower", "subtracting the noise lowers the gradient's variance",
         f"{draws}; sum over the latents' numbers"),
        (values[AGREEMENT], SDS, BOUND, "lower", "and leaves its mean as it is",
         f"{draws}; root mean square difference of the means in standard errors, against {bounds[AGREEMENT]:g}"),
        (scores[CLASS], STRONG, WEAK, "higher", "omega 100 shows the class better than omega 7.5",
         f"{seeds}; probability of the class, {sides}"),
        (scores[SATURATION], STRONG, WEAK, "higher", "omega 100 saturates colours more than omega 7.5",
         f"{seeds}; (max - min) / max of the object's pixels"),
        (scores[DIVERSITY], STRONG, WEAK, "lower", "omega 100 makes seeds more alike than omega 7.5",
         f"{seeds}; 1 - cosine of the judge's features, side by side"),
        (values[SIDES], PROPOSAL, BOUND, "higher", "the class is right from at least 3 of 4 sides",
         f"{seed}; number of sides, against {bounds[SIDES]:g}"),
    ]  # fmt: skip
    full_scale = not_run(
        "CLIP R-Precision of renderings, with color and without texture", place="Table 1",
        paper="B/32 75.1 / 42.5, B/16 77.5 / 46.6, L/14 79.7 / 58.5",
        how="Imagen, 153 prompts of COCO, 2 seeds, 15,000 steps",
    )  # fmt: skip
    return [full_scale, *(compare(of, a, b, side, text=text, how=how) for of, a, b, side, text, how in rows)]


if __name__ == "__main__":
    main()
