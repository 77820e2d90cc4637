"""Measure the claims about LoRA in the toy world: `python -m papers.lora.reproduce --help`.

Trains every method on every subject (what is finished is not done again), scores samples with the judge, and writes
results.json, figures/*.png and the card's table.
"""

from dataclasses import replace
from pathlib import Path

from common.evaluation.bootstrap import bootstrap_mean
from common.evaluation.claims import Claim, compare, not_run
from common.evaluation.reproduction import Findings, Setup, reproduce
from common.evaluation.study import Scores, benchmark_row

from .experiments import AVERAGE, FACTOR_SUM, FULL, INVERSION, PROPOSAL, SUM, UNTUNED, Plan, measure, rank_name
from .figures import draw_figures

HERE = Path(__file__).resolve().parent
MARGIN = 0.05  # identity cosine: what "as good as" may mean
ROUNDING = 1e-5  # of the largest predicted value: what "to numerical precision" may mean


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
    """The full-scale claims, which were not run, and the small-scale ones in parts."""
    setting = f"{plan.study.setting(backbone_name)}, {plan.config.train_steps} steps, rank {plan.config.rank}"
    merging = f"{plan.merge_study.setting(backbone_name)}; each subject merged with the next one"
    judged, asked = "judge, against held-out views", "judge: what the prompt asks for beyond the class"
    loss = f"{setting}; denoising loss of {plan.study.held_out} held-out views, fixed noise, 10 timesteps"
    drift = f'{setting}; {len(plan.class_seeds)} samples of "a photo of a [class noun]", judge features'
    low, high = rank_name(min(plan.ranks), plan), rank_name(max(plan.ranks), plan)
    error, of_subject = scores["identity error"], f"{setting}; {judged}"
    megabytes = {name: {s: size / 1e6 for s, size in row.items()} for name, row in scores["bytes"].items()}
    rows = [
        (f"rank {plan.config.rank} has a lower subject error than {low} (1 - identity cosine)",
         error, PROPOSAL, low, "lower", 0.0, of_subject),
        (f"rank {plan.config.rank} explains held-out views better than {low}",
         scores["held-out loss"], PROPOSAL, low, "lower", 0.0, loss),
        (f"the error saturates: rank {plan.config.rank} is less than {MARGIN} above {high} (1 - identity cosine)",
         error, PROPOSAL, high, "lower", MARGIN, of_subject),
        (f"the subject error is less than {MARGIN} above that of full fine-tuning (1 - identity cosine)",
         error, PROPOSAL, FULL, "lower", MARGIN, of_subject),
        ("the artifact is smaller than that of full fine-tuning (MB)",
         megabytes, PROPOSAL, FULL, "lower", 0.0, setting),
        ("training is faster than full fine-tuning (s)", scores["seconds"], PROPOSAL, FULL, "lower", 0.0, setting),
        ("the class drifts less than with full fine-tuning, without prior loss",
         scores["class drift"], PROPOSAL, FULL, "lower", 0.0, f"{drift}: distance to the untuned model's, equal seeds"),
        ("the class stays less like the subject than with full fine-tuning (PRES)",
         scores["PRES"], PROPOSAL, FULL, "lower", 0.0, f"{drift}: cosine with the training photos"),
        ("the subject error is lower than with Textual Inversion (1 - identity cosine)",
         error, PROPOSAL, INVERSION, "lower", 0.0, of_subject),
        ("prompts are followed more than with full fine-tuning",
         scores["compliance"], PROPOSAL, FULL, "higher", 0.0, f"{setting}; {asked}"),
        ("merging two subjects: the sum of deltas keeps more identity than the average of factors",
         scores["merge identity"], SUM, AVERAGE, "higher", 0.0, f"{merging}; {judged}"),
        ("merging two subjects: the sum of deltas keeps more identity than the sum of factors",
         scores["merge identity"], SUM, FACTOR_SUM, "higher", 0.0, f"{merging}; {judged}"),
        ("merging two subjects: the sum of deltas explains held-out views better than the average of factors",
         scores["merge held-out loss"], SUM, AVERAGE, "lower", 0.0, f"{merging}; denoising loss of held-out views"),
    ]  # fmt: skip
    measured = [
        compare(values, first, second, claimed, margin=margin, text=text, how=how)
        for text, values, first, second, claimed, margin, how in rows
    ]
    untuned = mean(scores["PRES"][UNTUNED])
    measured = [
        replace(claim, detail=f"{claim.detail}; {untuned:.4g} ({UNTUNED})") if "(PRES)" in claim.text else claim
        for claim in measured
    ]
    return [*full_scale(), *measured, *numerical(scores, plan, backbone_name)]


def numerical(scores: Scores, plan: Plan, backbone_name: str) -> list[Claim]:
    """Merged weights and strength 0; the value is the largest difference, so it must not pass its limit anywhere."""
    rows = [
        ("the merged weight predicts what the adapter predicts, to numerical precision", "merged", ROUNDING),
        ("unmerging restores the prediction bit for bit", "unmerged", 0.0),
        ("strength 0 is the base model, bit for bit", "strength 0", 0.0),
    ]
    how = f"{plan.study.setting(backbone_name)}; largest difference of the predicted noise over its largest value"
    found = []
    for text, name, limit in rows:
        gaps = scores["gap"][name].values()
        holds = "yes" if max(gaps) <= limit else "no"
        ours, detail = bootstrap_mean(list(gaps)), f"largest {max(gaps):.2g}, allowed {limit:g}"
        found.append(Claim(text=text, place="Sec. 4.1", paper="exact", ours=ours, detail=detail, how=how, holds=holds))
    return found


def full_scale() -> list[Claim]:
    """The paper's own numbers, and those that are quoted of its use in diffusion."""
    rows = [
        ("trainable parameters, against Adam fine-tuning of GPT-3 175B", "abstract", "10,000x fewer", "GPT-3 175B"),
        ("GPU memory of training, against Adam fine-tuning", "abstract", "3x less", "GPT-3 175B"),
        ("training time, against DreamBooth", "README of cloneofsimo/lora", "about 2x faster", "Stable Diffusion 1.5"),
    ]
    return [not_run(text, place=place, paper=paper, how=how) for text, place, paper, how in rows]


def mean(values: dict[str, float]) -> float:
    return sum(values.values()) / len(values)


if __name__ == "__main__":
    main()
