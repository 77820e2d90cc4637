"""What reproduce.py does with numbers; `make reproduce QUICK=1` runs the whole of it."""

import pytest

from common.evaluation.claims import claim_table
from common.toyworld.benchmark import subjects


def made_up_scores(paper, prior_cost):
    """Five subjects where every claim holds, with a price of the prior loss."""
    e = paper.experiments
    values = {
        "held-out loss": {e.PROPOSAL: 0.1, e.INVERSION: 0.2},
        "identity error": {
            e.PROPOSAL: 0.2 + prior_cost, e.NO_PRIOR: 0.2, e.INVERSION: 0.5, e.WRONG_NOUN: 0.4, e.NO_NOUN: 0.6,
        },
        "attribute error": {e.PROPOSAL: 0.1, e.INVERSION: 0.2},
        "compliance": {e.PROPOSAL: 0.9, e.INVERSION: 0.5},
        "class distance": {e.PROPOSAL: 1.0, e.NO_PRIOR: 3.0, e.UNTUNED: 0.5},
        "PRES": {e.PROPOSAL: 0.4, e.NO_PRIOR: 0.6, e.UNTUNED: 0.3},
        "diversity": {e.PROPOSAL: 0.4, e.NO_PRIOR: 0.3},
    }  # fmt: skip
    return {
        score: {method: {f"s{i}": value + 0.001 * i for i in range(5)} for method, value in methods.items()}
        for score, methods in values.items()
    }


@pytest.mark.parametrize("prior_cost, verdict", [(-0.1, "yes"), (0.04, "yes"), (0.06, "no")])
def test_claims(paper, prior_cost, verdict):
    rows = paper.reproduce.claims(made_up_scores(paper, prior_cost), paper.experiments.Plan.full(), "tiny-sd")
    by_text = {claim.text: claim.holds for claim in rows}
    assert by_text.pop("prior loss raises the subject error by less than 0.05 (1 - identity cosine)") == verdict
    assert list(by_text.values()) == ["not run"] * 5 + ["yes"] * 9
    assert "1.002 (DreamBooth) against 3.002 (no prior loss); 0.502 (untuned)" in claim_table(rows)


def test_ablations_change_what_they_say(paper):
    e, (subject,) = paper.experiments, subjects(1)
    plan = e.Plan.full()
    prompts = {name: paper.method.instance_prompt(plan.subject_config(subject, name)) for name in e.ABLATIONS}
    assert prompts == {
        e.PROPOSAL: "a photo of a sks bear", e.NO_PRIOR: "a photo of a sks bear",
        e.WRONG_NOUN: "a photo of a sks vase", e.NO_NOUN: "a photo of a sks",
    }  # fmt: skip
    weights = [plan.subject_config(subject, name).prior_loss_weight for name in e.ABLATIONS]
    assert weights == [1.0, 0.0, 0.0, 0.0]
    assert e.OTHER_NOUN not in {s.class_noun for s in subjects(plan.study.num_subjects)}


def test_quick_never_writes_into_the_papers_folder(paper):
    with pytest.raises(ValueError, match="--output"):
        paper.reproduce.main(["--quick", "--output", str(paper.reproduce.HERE)])
