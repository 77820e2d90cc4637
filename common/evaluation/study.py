"""One study for all methods that learn an object: the same toy subjects, photos, prompts, seeds and scores.

Every method that is measured this way can stand beside every other in one figure.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Protocol

from PIL import Image
from torch import Tensor

from common.backbones import load_backbone
from common.data.images import load_image
from common.evaluation.bootstrap import bootstrap_mean
from common.evaluation.claims import BenchmarkRow
from common.evaluation.records import config_hash
from common.evaluation.scoring import judge_name
from common.evaluation.subjects import SUBJECT_GAP, BenchmarkSubject, from_toy_world
from common.evaluation.trials import (
    Candidate,
    Learned,
    Scores,
    Trial,
    backbone_hashes,
    folder_name,
    measured_of,
    records_of,
    run_trials,
)
from common.sampling.images import image_grid, to_pil
from common.toyworld.benchmark import Subject, held_out_views, subjects
from common.toyworld.judge import Judge

PLAIN_PROMPT = "a photo of a {}"


class LearnedSubject(Learned, Protocol):
    """A method that has learned an object."""

    def validation_loss(self, latents: Tensor) -> float:
        """`fixed_noise_validation` of latents (B,4,h,w) under the method's "a photo of a [subject]"."""
        ...


@dataclass(frozen=True)
class Study:
    """How much is measured."""

    num_subjects: int = 5
    num_prompts: int = 6  # per subject, besides the plain one
    seeds: tuple[int, ...] = (0, 1)  # one picture per prompt and seed
    held_out: int = 8  # photos of the subject that training does not see

    @classmethod
    def quick(cls) -> "Study":
        """Everything runs; the numbers say nothing."""
        return cls(num_subjects=1, num_prompts=1, seeds=(0,), held_out=2)

    def setting(self, backbone_name: str) -> str:
        """For the column "how measured"."""
        name, seeds = Path(backbone_name).name, ", ".join(map(str, self.seeds))
        return f"{name}, {self.num_subjects} subjects, {self.num_prompts} prompts, seeds {seeds}"


def run_study(backbone_name: str, candidates: Mapping[str, Candidate], study: Study, runs: Path) -> Scores:
    """Train and score every candidate on every subject; what is finished in `runs` is not done again.

    RUNS/METHOD is laid out as `run_trials` says.

    Returns: per candidate and subject
        identity, attributes: of the plain prompt: cosine of the judge's identity embedding with held-out photos; share
            of class, colour, pattern, material that are right.   identity error, attribute error: 1 - these.
        compliance: of the other prompts: share of what they ask for beyond the class that is right.
        product: max(0, identity) x compliance.
        clip_t: mean over all prompts.
        held-out loss: `LearnedSubject.validation_loss` of the held-out photos.
        seconds: of training, over all interruptions.   bytes: of the artifact.
    Raises: ValueError if RUNS/METHOD was begun with other settings, prompts, photos or weights.
    """
    judge = Judge.load()
    trials = [subject_trial(subject, study) for subject in subjects(study.num_subjects)]
    same_for_all = {
        "study": {"num_prompts": study.num_prompts, "held_out": study.held_out},
        "weights": backbone_hashes(load_backbone(backbone_name)),
    }
    scores: Scores = {}
    for name, candidate in candidates.items():
        folder = runs / folder_name(name)
        run_trials(name, candidate, trials, judge, {**candidate.settings, **same_for_all}, study.seeds, folder)
        for trial in trials:
            for score, value in _read_scores(folder, trial.scored, candidate.words).items():
                scores.setdefault(score, {}).setdefault(name, {})[trial.scored.name] = value
    return scores


def subject_trial(subject: Subject, study: Study) -> Trial:
    """Learn a subject from its photos; the loss is that of photos that training does not see."""

    def held_out_loss(learned: LearnedSubject, latents: Tensor, words: str) -> float:
        return learned.validation_loss(latents)

    return Trial(subject, subject.images, benchmark_subject(subject, study), held_out_loss)


def benchmark_subject(subject: Subject, study: Study) -> BenchmarkSubject:
    """The subject with "a photo of a [subject]" first, which shows fidelity; the other prompts show compliance.

    Compliance is what a prompt asks for beyond the class. The reference photos are views that training does not see,
    so copying the training photos earns nothing.
    """
    (spread,) = from_toy_world([subject], study.num_prompts)
    asked = [{name: label for name, label in wanted.items() if name != "class"} for wanted in spread.expected]
    return replace(
        spread,
        prompts=[PLAIN_PROMPT.format(SUBJECT_GAP), *spread.prompts],
        expected=[{}, *asked],
        pixel_values=held_out_views(subject.entity, study.held_out),
    )


def prompt_grid(toy_subjects: Sequence[Subject], words: Mapping[str, str], study: Study, runs: Path) -> Image.Image:
    """A row for each subject and method: a training photo, then the first picture of each prompt.

    Args: words: method -> what stands for the subject in the labels.   runs: as in `run_study`.
    """
    cells, labels = [], []
    for subject in toy_subjects:
        scored = benchmark_subject(subject, study)
        for method, in_prompt in words.items():
            pictures = runs / folder_name(method) / "images" / subject.name
            cells += to_pil(subject.images[:1])
            labels.append(f"{method}: photo of {subject.name}")
            for i in range(len(scored.prompts)):
                cells.append(load_image(pictures / f"{i:02d}-{study.seeds[0]}.png"))
                labels.append(scored.prompt(i, in_prompt))
    return image_grid(cells, 2 + study.num_prompts, labels, upscale=2)


def benchmark_row(method: str, scores: Scores, study: Study, backbone_name: str) -> BenchmarkRow:
    """The method's place in the comparison of all methods that ran the same study on the same backbone and judge."""
    scored = [benchmark_subject(subject, study) for subject in subjects(study.num_subjects)]
    asked = [[subject.name, subject.prompts, subject.expected] for subject in scored]
    origin = [asdict(study), asked, backbone_hashes(load_backbone(backbone_name)), judge_name(Judge.load())]

    def mean(score: str) -> float:
        values = scores[score][method].values()
        return sum(values) / len(values)

    return BenchmarkRow(
        study=config_hash(origin),
        setting=study.setting(backbone_name),
        identity=bootstrap_mean(list(scores["identity"][method].values())),
        compliance=bootstrap_mean(list(scores["compliance"][method].values())),
        artifact_bytes=round(mean("bytes")),
        training_seconds=mean("seconds"),
    )


def _read_scores(folder: Path, subject: BenchmarkSubject, words: str) -> dict[str, float]:
    rows = records_of(folder, subject.name)
    plain, *others = [subject.prompt(i, words) for i in range(len(subject.prompts))]

    def mean(metric: str, prompts: list[str]) -> float:
        values = [row.value for row in rows if row.metric == metric and row.prompt in prompts]
        return sum(values) / len(values)

    found = {
        "identity": mean("identity", [plain]),
        "attributes": mean("subject_attributes", [plain]),
        "compliance": mean("prompt_attributes", others),
        "clip_t": mean("clip_t", [plain, *others]),
    }
    found |= {"identity error": 1 - found["identity"], "attribute error": 1 - found["attributes"]}
    found["product"] = max(0.0, found["identity"]) * found["compliance"]
    return found | measured_of(folder, subject.name)
