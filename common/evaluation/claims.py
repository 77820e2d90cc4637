"""results.json, the one file in which a paper's reproduction says what it found, and the table that its card shows.

The verdict comes from the paired difference over subjects (`verdict`), never from looking at two means.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from common.evaluation.bootstrap import Interval, paired_difference
from common.io import atomic_write_text

Verdict = Literal["yes", "direction only", "no", "not run"]
VERDICTS: tuple[str, ...] = get_args(Verdict)
BEGIN_MARKER, END_MARKER = "<!-- claims:begin -->", "<!-- claims:end -->"
MIN_SUBJECTS = 3


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One row of the table; full-scale and small-scale claims are separate rows.

    Raises: ValueError if the verdict is unknown, or if a claim that was not run has a value, or one that was has none.
    """

    text: str  # "prior loss lowers drift, PRES down"
    place: str  # in the paper: "Table 3"; "" for a claim that only the toy world can show
    paper: str  # the paper's own value: "0.664 -> 0.493"; "-" if it gives none
    ours: Interval | None  # the measured difference (or value) over subjects; None = not run
    detail: str = ""  # what the difference is between: "0.42 with, 0.61 without"
    how: str  # "tiny-sd, 5 subjects, seeds 0-2, judge"
    holds: Verdict

    def __post_init__(self) -> None:
        if self.holds not in VERDICTS:
            raise ValueError(f"holds must be one of {list(VERDICTS)}, got '{self.holds}' for the claim '{self.text}'")
        if (self.ours is None) != (self.holds == "not run"):
            raise ValueError(f"the claim '{self.text}' is '{self.holds}', but its value is {self.ours}")


@dataclass(frozen=True)
class Figure:
    """A picture beside results.json."""

    file: str  # relative path: "figures/samples.png"
    caption: str


@dataclass(frozen=True, kw_only=True)
class BenchmarkRow:
    """A method in the comparison of all object methods; rows with the same `study` hash can stand in one figure."""

    study: str  # hash of subjects, prompts, seeds, backbone and judge
    setting: str  # the same in words
    identity: Interval  # subject fidelity
    compliance: Interval  # prompt fidelity
    artifact_bytes: int
    training_seconds: float  # per subject, on the machine of the results


@dataclass(frozen=True, kw_only=True)
class Results:
    """Everything that `pcs reproduce SLUG` found, and how to find it again."""

    slug: str
    command: str  # "make reproduce PAPER=textual_inversion"
    backbone: str  # name, and what identifies its weights
    seeds: list[int]
    steps: int  # optimiser steps of each training run
    machine: str  # "2 CPU cores"; see records.describe_machine
    seconds: float  # wall time of everything, over all interruptions
    claims: list[Claim]
    figures: list[Figure] = field(default_factory=list)
    benchmark: BenchmarkRow | None = None  # of papers about objects


def compare(
    values: Mapping[str, Mapping[str, float]],
    first: str,
    second: str,
    claimed: Literal["higher", "lower"],
    *,
    text: str,
    how: str,
    place: str = "",
    paper: str = "-",
    margin: float = 0.0,
) -> Claim:
    """A claim "first is higher (lower) than second", from the paired difference over subjects.

    Args:
        values: method -> subject -> value.
        margin: for "first is lower than second + margin" (or higher than second - margin), which says "hardly worse".
    """
    ours = paired_difference(values[first], values[second])
    means = {name: sum(values[name].values()) / len(values[name]) for name in (first, second)}
    detail = " against ".join(f"{mean:.4g} ({name})" for name, mean in means.items())
    shift = margin if claimed == "higher" else -margin
    shifted = dataclasses.replace(ours, mean=ours.mean + shift, low=ours.low + shift, high=ours.high + shift)
    holds = verdict(shifted, claimed)
    return Claim(text=text, place=place, paper=paper, ours=ours, detail=detail, how=how, holds=holds)


def not_run(text: str, *, place: str, paper: str, how: str) -> Claim:
    """The row of one of the paper's own numbers at full scale."""
    return Claim(text=text, place=place, paper=paper, ours=None, how=how, holds="not run")


def verdict(difference: Interval, claimed: Literal["higher", "lower"]) -> Verdict:
    """Whether a claim holds, by the interval of the paired differences.

    yes: the interval lies wholly on the claimed side of 0, over at least 3 subjects.
    direction only: the mean lies there, but not the interval, or there are fewer subjects.   no: otherwise.
    """
    if claimed not in ("higher", "lower"):
        raise ValueError(f"claimed must be 'higher' or 'lower', got '{claimed}'")
    sign = 1 if claimed == "higher" else -1
    if sign * difference.mean <= 0:
        return "no"
    sure = min(sign * difference.low, sign * difference.high) > 0
    return "yes" if sure and difference.n >= MIN_SUBJECTS else "direction only"


def save_results(results: Results, path: str | Path) -> None:
    """Write results.json, whole or not at all."""
    text = json.dumps(dataclasses.asdict(results), indent=2, ensure_ascii=False, allow_nan=False)
    atomic_write_text(path, text + "\n")


def load_results(path: str | Path) -> Results:
    """Read results.json. Raises: FileNotFoundError, or ValueError naming the file and what in it does not fit."""
    path = Path(path)
    try:
        row: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        row["claims"] = [_claim(claim) for claim in row["claims"]]
        row["figures"] = [Figure(**figure) for figure in row["figures"]]
        if (benchmark := row.get("benchmark")) is not None:
            intervals = {name: Interval(**benchmark[name]) for name in ("identity", "compliance")}
            row["benchmark"] = BenchmarkRow(**{**benchmark, **intervals})
        return Results(**row)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"there is no {path}; `pcs reproduce {path.parent.name}` writes it") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is not what `pcs reproduce` writes ({error}); write it anew: pcs reproduce {path.parent.name}"
        ) from error


def _claim(row: dict[str, Any]) -> Claim:
    ours = row["ours"]
    return Claim(**{**row, "ours": None if ours is None else Interval(**ours)})


def claim_table(claims: Sequence[Claim]) -> str:
    """The card's table, as style.md draws it."""
    rows = ["| claim (place) | paper | ours | how measured | holds? |", "|---|---|---|---|---|"]
    for claim in claims:
        cells = (claim_title(claim), claim.paper, ours_text(claim), claim.how, claim.holds)
        rows.append("| " + " | ".join(_cell(cell) for cell in cells) + " |")
    return "\n".join(rows)


def claim_title(claim: Claim) -> str:
    """Text and place: "PRES down (Table 3)"."""
    return f"{claim.text} ({claim.place})" if claim.place else claim.text


def ours_text(claim: Claim) -> str:
    """The measured value with its interval, number of subjects and detail, or "not run"."""
    if claim.ours is None:
        return "not run"
    text = f"{claim.ours} (n={claim.ours.n})"
    return f"{text}: {claim.detail}" if claim.detail else text


def write_card_table(readme_path: str | Path, results: Results) -> None:
    """Replace what stands between the claims markers of a card; writing the same results again changes nothing.

    Raises: ValueError unless the card has each marker once, in order.
    """
    path = Path(readme_path)
    page = path.read_text(encoding="utf-8")
    begin, end = page.find(BEGIN_MARKER), page.find(END_MARKER)
    if page.count(BEGIN_MARKER) != 1 or page.count(END_MARKER) != 1 or end < begin:
        raise ValueError(f"{path} needs one line {BEGIN_MARKER} and, below it, one line {END_MARKER}")
    source = f"Written by `{results.command}` on {results.machine} in {duration(results.seconds)}."
    table = f"{claim_table(results.claims)}\n\n{source}"
    atomic_write_text(path, f"{page[: begin + len(BEGIN_MARKER)]}\n{table}\n{page[end:]}")


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


def duration(seconds: float) -> str:
    """Seconds for people: "42 s", "12 min"."""
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
