"""Measure the claims of ProSpect in the toy world: `python -m papers.prospect.reproduce --help`.

Trains ProSpect and the baselines on every subject (a run that was stopped is taken up again), scores samples with the
judge, and writes results.json, figures/*.png and the card's table.
"""

from pathlib import Path

from common.evaluation.claims import Claim, compare, not_run
from common.evaluation.reproduction import Findings, Setup, reproduce
from common.evaluation.study import Scores, benchmark_row

from .experiments import COLOUR, EARLY, FINE_TUNING, INVERSION, LATE, LAYOUT, PROPOSAL, SINGLE, STAGES, Plan, measure
from .figures import draw_figures, gain

HERE = Path(__file__).resolve().parent
BOUND = 0.8  # rank correlation: what "grows" and "in order" mean here
MARGIN = 0.05  # identity cosine: what "within noise" means here


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
    """The four small-scale claims, in parts, below the full-scale rows that were not run."""
    full_scale = [
        ("text similarity higher than DreamBooth's and Textual Inversion's", "0.3444 against 0.3334 and 0.3115",
         "SD 1.4, CLIP"),
        ("image similarity near DreamBooth's, higher than Textual Inversion's", "0.7927 against 0.7987 and 0.7274",
         "SD 1.4, CLIP"),
        ("people prefer it for content over DreamBooth and Textual Inversion", "52 against 38 and 10 percent",
         "user study, 66 people"),
        ("people prefer it for material over DreamBooth", "66 against 34 percent", "user study, 66 people"),
        ("people prefer it for style over InST", "62 against 38 percent", "user study, 66 people"),
    ]  # fmt: skip
    rows = [not_run(text, place="reading note", paper=paper, how=how) for text, paper, how in full_scale]
    setting = plan.study.setting(backbone_name)
    return [
        *rows,
        *loss_claims(scores, plan, setting),
        *transfer_claims(scores, plan, backbone_name),
        *spectrum_claims(scores, setting),
        *single_photo_claims(scores, plan, backbone_name),
    ]


def loss_claims(scores: Scores, plan: Plan, setting: str) -> list[Claim]:
    """Claim 1 of the sheet: held-out loss per stage at equal steps and data."""
    stages = {key: gain(scores[key])[PROPOSAL] for key in scores if key.startswith("loss of stage")}
    worst = min(stages, key=lambda key: sum(stages[key].values()))
    last = f"loss of stage {plan.config.num_stages - 1}"
    outer = {s: (stages["loss of stage 0"][s] + stages[last][s]) / 2 for s in stages[last]}
    middle = [values for key, values in stages.items() if key not in ("loss of stage 0", last)]
    inner = {s: sum(values[s] for values in middle) / len(middle) for s in outer}
    steps = f"{plan.config.train_steps} steps of {plan.config.batch_size} samples"
    how = f"{setting}, {steps}; denoising loss of {plan.study.held_out} held-out photos, fixed noise"
    return [
        compare(scores["held-out loss"], PROPOSAL, INVERSION, "lower", how=how,
                text="explains held-out photos better than Textual Inversion, mean over the stages"),
        compare(scores[worst], PROPOSAL, INVERSION, "lower", how=f"{how}; the stage with the smallest relative gain",
                text=f"explains them better in every stage; shown: {worst.removeprefix('loss of ')}, the least"),
        compare({"extreme stages": outer, "stages between": inner}, "extreme stages", "stages between", "higher",
                how=f"{how}; share of Textual Inversion's loss that is saved",
                text="the gain is largest at the extreme stages, 0 and 9"),
    ]  # fmt: skip


def transfer_claims(scores: Scores, plan: Plan, backbone_name: str) -> list[Claim]:
    """Claim 2 of the sheet: what S* takes over where it stands in some stages only."""
    values = scores["transfer"]
    where = {key: f"{stages[0]}-{stages[-1]}" for key, stages in STAGES.items()}
    how = (
        f"{Path(backbone_name).name}, {plan.single_study.num_subjects} subjects, one photo, {plan.single_steps} steps; "
        f"S* in stages {where[EARLY]} (early) or {where[LATE]} (late), the class noun elsewhere; judge, "
        f"{len(plan.swap_seeds)} pictures: share of the way to the photo's mask, and to its colour, pattern, material"
    )
    early, late = (
        [f"{PROPOSAL} {half} {attribute}" for attribute in (LAYOUT, COLOUR)] for half in (EARLY, LATE)
    )  # fmt: skip
    return [
        compare(values, early[0], early[1], "higher", how=how, text="S* early takes over layout more than colour"),
        compare(values, late[1], late[0], "higher", how=how, text="S* late takes over colour more than layout"),
        compare(values, PROPOSAL, INVERSION, "higher", how=f"{how}; sum of both leads",
                text="layout and colour come apart more than with the word of Textual Inversion in the same stages"),
    ]  # fmt: skip


def spectrum_claims(scores: Scores, setting: str) -> list[Claim]:
    """Claim 3 of the sheet: generation goes from low to high frequencies."""
    how = f'{setting}; "a photo of a S*"; predicted clean pictures, Spearman\'s rho'
    rows = [
        ("growth of detail", f"high-frequency power of the predicted picture grows with the step: rho above {BOUND}"),
        ("order of frequencies", f"each stage adds higher frequencies than the one before: rho above {BOUND}"),
    ]
    return [
        compare({"rho": scores[key][PROPOSAL], f"{BOUND:g}": dict.fromkeys(scores[key][PROPOSAL], BOUND)},
                "rho", f"{BOUND:g}", "higher", text=text, how=how)
        for key, text in rows
    ]  # fmt: skip


def single_photo_claims(scores: Scores, plan: Plan, backbone_name: str) -> list[Claim]:
    """Claim 4 of the sheet: one photo, against DreamBooth."""
    how = f"{plan.single_study.setting(backbone_name)}, one photo, {plan.single_steps} steps of both; judge"
    identity, compliance = scores[f"{SINGLE} identity"], scores[f"{SINGLE} compliance"]
    return [
        compare(identity, PROPOSAL, FINE_TUNING, "higher", margin=MARGIN, how=f"{how}: identity cosine",
                text=f"from one photo, fidelity is less than {MARGIN} below DreamBooth's"),
        compare(compliance, PROPOSAL, FINE_TUNING, "higher", how=f"{how}: what prompts ask for",
                text="from one photo, prompts are followed more than with DreamBooth"),
    ]  # fmt: skip


if __name__ == "__main__":
    main()
