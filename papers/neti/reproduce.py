"""Measure the claims of NeTI in the toy world: `python -m papers.neti.reproduce --help`.

Trains every variant on every subject (a run that was stopped is taken up again), scores samples with the judge, and
writes results.json, figures/*.png and the card's table.
"""

from pathlib import Path

from common.evaluation.claims import Claim, compare, not_run
from common.evaluation.reproduction import Findings, Setup, reproduce
from common.evaluation.study import Scores, benchmark_row

from .experiments import (
    INVERSION,
    LAYER,
    NO_BYPASS,
    NO_DROPOUT,
    PROPOSAL,
    TIME,
    XTI,
    Plan,
    measure,
    truncation_scores,
)
from .figures import draw_figures

HERE = Path(__file__).resolve().parent
MARGIN = 0.0005  # denoising loss: what "near" may mean, about 1%
RHO, BOUND = "Spearman's rho", -0.8


def main(argv: list[str] | None = None) -> None:
    """Train, measure, draw, write."""
    reproduce(HERE, run, argv)


def run(setup: Setup) -> Findings:
    plan = Plan.quick() if setup.quick else Plan.full()
    scores = measure(setup.backbone, plan, setup.runs)
    return Findings(
        claims=claims(scores, plan, setup.backbone),
        figures=draw_figures(plan, scores, setup.runs, setup.output),
        seeds=list(plan.study.seeds),
        steps=plan.config.train_steps,
        benchmark=benchmark_row(PROPOSAL, scores, plan.study, setup.backbone),
    )


def claims(scores: Scores, plan: Plan, backbone_name: str) -> list[Claim]:
    """The four small-scale claims, in parts, below the full-scale row that was not run."""
    full_scale = not_run(
        "higher CLIP image and text similarity than Textual Inversion, XTI and DreamBooth",
        place="scatter plot",
        paper="a figure without numbers",
        how="SD 1.4, concepts of Textual Inversion and Custom Diffusion, 15 prompts",
    )
    return [full_scale, *loss_claims(scores, plan, backbone_name), *truncation_claims(scores, plan, backbone_name)]


def loss_claims(scores: Scores, plan: Plan, backbone_name: str) -> list[Claim]:
    """Claims 1 and 2 of the sheet: held-out loss at equal steps and data."""
    setting = f"{Path(backbone_name).name}, {plan.study.num_subjects} subjects"
    steps = f"{plan.config.train_steps} steps of {plan.config.batch_size} samples"
    how = f"{setting}, {steps}; denoising loss of {plan.study.held_out} held-out photos, fixed noise, 10 timesteps"
    rows = [
        ("NeTI explains held-out photos better than XTI", PROPOSAL, XTI, 0.0),
        ("XTI explains them better than Textual Inversion", XTI, INVERSION, 0.0),
        ("NeTI explains them better than Textual Inversion", PROPOSAL, INVERSION, 0.0),
        ("NeTI explains them better than without the textual bypass", PROPOSAL, NO_BYPASS, 0.0),
        (f"NeTI without bypass is below or near XTI, less than {MARGIN} above", NO_BYPASS, XTI, MARGIN),
        ("the layer helps: NeTI explains them better than a mapper that sees the time alone", PROPOSAL, TIME, 0.0),
        ("the time helps: NeTI explains them better than a mapper that sees the layer alone", PROPOSAL, LAYER, 0.0),
    ]
    losses = scores["held-out loss"]
    return [compare(losses, one, two, "lower", margin=margin, text=text, how=how) for text, one, two, margin in rows]


def truncation_claims(scores: Scores, plan: Plan, backbone_name: str) -> list[Claim]:
    """Claims 3 and 4 of the sheet: nested dropout."""
    found, setting = truncation_scores(scores, plan), plan.truncation_study.setting(backbone_name)
    kept = {name: ", ".join(map(str, plan.keeps[name])) for name in (PROPOSAL, NO_DROPOUT)}
    judged = f"{setting}, {plan.truncation_steps} DDIM steps; judge"
    one_mapper = f"{judged}; one mapper, {kept[PROPOSAL]} hidden units stay; rho with the order of truncation"

    def correlation(score: str, bound: float) -> dict[str, dict[str, float]]:
        values = found["rank correlation"][score]
        return {RHO: values, f"{bound:g}": dict.fromkeys(values, bound)}

    return [
        compare(
            correlation("attributes", BOUND), RHO, f"{BOUND:g}", "lower", how=one_mapper,
            text="truncation lowers the share of the subject's attributes that are right: rho below -0.8",
        ),
        compare(
            correlation("compliance", 0.0), RHO, "0", "higher", how=one_mapper,
            text="truncation raises the compliance with prompts: rho above 0",
        ),
        compare(
            found["equal identity"], PROPOSAL, NO_DROPOUT, "higher",
            how=f"{judged}; mean over identity cosines that both reach; {kept[NO_DROPOUT]} units stay without dropout",
            text="truncated to equal identity, training with nested dropout follows prompts more than without",
        ),
    ]  # fmt: skip


if __name__ == "__main__":
    main()
