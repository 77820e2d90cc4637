"""Measure the claims of ADI in the toy world: `python -m papers.adi.reproduce --help`.

Trains ADI, its ablations and baselines on held-out actions (a run that was stopped is taken up again), has the judge
read what they make of other subjects, and writes results.json, figures/*.png and the card's table.
"""

from pathlib import Path

from common.evaluation.claims import Claim, compare, not_run
from common.evaluation.exemplar_study import ExemplarStudy
from common.evaluation.reproduction import Findings, Setup, reproduce
from common.evaluation.trials import Scores

from .experiments import (
    ACTION,
    CONTEXT,
    EXEMPLAR_LOSS,
    FINE_TUNING,
    INTERSECTION,
    INVERSION,
    LONGER,
    PROPOSAL,
    RANDOM,
    UNMASKED,
    Plan,
    measure,
    of_tasks,
)
from .figures import draw_figures

HERE = Path(__file__).resolve().parent
MARGIN = 0.0625  # share of pictures: what "tied" may mean, one picture of sixteen


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
    )


def claims(scores: Scores, plan: Plan, backbone_name: str) -> list[Claim]:
    """The four small-scale claims, in parts, below the full-scale row that was not run."""
    full_scale = not_run(
        "higher total accuracy, action and subject both right, than subject-driven and inversion methods",
        place="abstract",
        paper="human judgement: values not at hand",
        how="ActionBench, SD 2.1-base",
    )
    return [full_scale, *accuracy_claims(scores, plan, backbone_name), *mask_claims(scores, plan, backbone_name),
            *loss_claims(scores, plan, backbone_name)]  # fmt: skip


def steps_text(plan: Plan) -> str:
    config = plan.config
    return f"{config.train_steps} steps of {config.batch_size} anchor{'s' if config.batch_size > 1 else ''}"


def accuracy_claims(scores: Scores, plan: Plan, backbone_name: str) -> list[Claim]:
    """Claim 1 of the sheet: action and subject both right, equal steps and data."""
    how = (
        f"{plan.study.setting(backbone_name)}; {steps_text(plan)}; share of pictures with action, subject, place right"
    )
    rows = [
        (PROPOSAL, UNMASKED, "ADI has more pictures right than layer-wise inversion without masks"),
        (UNMASKED, INVERSION, "layer-wise inversion has more right than Textual Inversion"),
        (PROPOSAL, INVERSION, "ADI has more right than Textual Inversion"),
        (PROPOSAL, FINE_TUNING, "ADI has more right than DreamBooth"),
    ]
    return [compare(scores["both"], one, two, "higher", text=text, how=how) for one, two, text in rows]


def mask_claims(scores: Scores, plan: Plan, backbone_name: str) -> list[Claim]:
    """Claims 2 and 3 of the sheet: leakage against random masks; each mask alone, and merged. And equal compute."""
    tasks = plan.tasks[: plan.num_ablation_tasks]
    study = ExemplarStudy(len(tasks), plan.study.num_prompts, plan.study.seeds)
    both, how = of_tasks(scores, "both", tasks), f"{study.setting(backbone_name)}; {steps_text(plan)}"
    tied = f"{how}; less than {MARGIN:g} below counts as tied"
    right = "share of pictures with action, subject, place right"
    leaked = compare(
        of_tasks(scores, "leakage", tasks), PROPOSAL, RANDOM, "lower",
        text="the exemplars' subjects, colours and places leak less than with random masks of equal density", how=how,
    )  # fmt: skip
    alone = [
        compare(both, name, UNMASKED, "higher", text=f"the {name} helps: {right}, against no mask", how=how)
        for name in (CONTEXT, ACTION)
    ]
    merged = [
        compare(both, rule, name, "higher", text=f"{label} is better than the {name}, or tied", how=tied, margin=MARGIN)
        for rule, label in ((PROPOSAL, "the union of both masks"), (INTERSECTION, "their intersection"))
        for name in (CONTEXT, ACTION)
    ]
    compute = compare(
        both, PROPOSAL, LONGER, "higher", how=f"{how}, layer-wise inversion three times as many",
        text="ADI has more pictures right than layer-wise inversion at equal passes through the U-Net",
    )  # fmt: skip
    return [compute, leaked, *alone, *merged]


def loss_claims(scores: Scores, plan: Plan, backbone_name: str) -> list[Claim]:
    """Claim 4 of the sheet: capacity of layer-wise identifiers, with and without masks."""
    name = Path(backbone_name).name
    setting = f"{name}, {plan.study.num_tasks} tasks, {steps_text(plan)}; denoising loss, fixed noise, 10 timesteps"
    rows = [
        (UNMASKED, "layer-wise identifiers explain the exemplars better than one vector, without masks"),
        (PROPOSAL, "and with masks"),
    ]
    seen = [
        compare(scores[EXEMPLAR_LOSS], one, INVERSION, "lower", text=text, how=f"{setting}, the exemplars")
        for one, text in rows
    ]
    unseen = compare(
        scores["held-out loss"], PROPOSAL, UNMASKED, "lower", how=f"{setting}, fresh exemplars",
        text="with masks, fresh exemplars of the action are explained better than without",
    )  # fmt: skip
    return [*seen, unseen]


if __name__ == "__main__":
    main()
