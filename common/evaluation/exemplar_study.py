"""One study for methods that learn what exemplars share: relations, actions, states. Entities change, so leakage shows.

Pictures are read by the judge of held-out things; its accuracy on renders is in the header of its file.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from common.backbones import load_backbone
from common.data.images import load_image, to_pixel_values
from common.evaluation.records import Record
from common.evaluation.subjects import SUBJECT_GAP, BenchmarkSubject
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
from common.toyworld.examples import scene_labels
from common.toyworld.exemplar_tasks import Task
from common.toyworld.judge import HELD_OUT_JUDGE, Judge


class LearnedTask(Learned, Protocol):
    """A method that has learned what exemplars share."""

    def validation_loss(self, latents: Tensor, prompts: Sequence[str]) -> float:
        """`fixed_noise_validation` of latents (B,4,h,w), each under its own prompt."""
        ...


@dataclass(frozen=True)
class ExemplarStudy:
    """How much is measured."""

    num_tasks: int = 5
    num_prompts: int = 8  # per task, at most NUM_PROMPTS
    seeds: tuple[int, ...] = (0, 1)  # one picture per prompt and seed

    @classmethod
    def quick(cls) -> "ExemplarStudy":
        """Everything runs; the numbers say nothing."""
        return cls(num_tasks=1, num_prompts=2, seeds=(0,))

    def setting(self, backbone_name: str) -> str:
        """For the column "how measured"."""
        name, seeds = Path(backbone_name).name, ", ".join(map(str, self.seeds))
        return f"{name}, {self.num_tasks} tasks, {self.num_prompts} prompts, seeds {seeds}; judge of held-out things"


def run_exemplar_study(
    backbone_name: str, candidates: Mapping[str, Candidate], tasks: Sequence[Task], study: ExemplarStudy, runs: Path
) -> Scores:
    """Train and score every candidate on every task; what is finished in `runs` is not done again.

    RUNS/CANDIDATE is laid out as `run_trials` says; `Candidate.train` gets the task, and a folder with its exemplars
    00.png and their captions 00.txt, in which the candidate's words stand.

    Returns: per candidate and task, as shares of pictures
        learned: what was to be learned is there.   entities: all else that the prompt asks for is there.
        both: both are.   leakage: something that the exemplars show stands where the prompt asks for something else.
        and: clip_t, mean over prompts, with the task's name for the learned words; held-out loss; seconds; bytes.
    Raises: ValueError if RUNS/CANDIDATE was begun with other settings, prompts, photos or weights.
    """
    judge = Judge.load(HELD_OUT_JUDGE)
    trials = [task_trial(task, study) for task in tasks]
    same_for_all = {"weights": backbone_hashes(load_backbone(backbone_name)), "num_prompts": study.num_prompts}
    scores: Scores = {}
    for name, candidate in candidates.items():
        folder = runs / folder_name(name)
        run_trials(name, candidate, trials, judge, {**candidate.settings, **same_for_all}, study.seeds, folder)
        for task in tasks:
            found = shares_right(records_of(folder, folder_name(task.name)), task.attribute)
            found["leakage"] = leakage(
                judge, task, [pictures(folder, task, k, study) for k in range(study.num_prompts)]
            )
            for score, value in (found | measured_of(folder, folder_name(task.name))).items():
                scores.setdefault(score, {}).setdefault(name, {})[task.name] = value
    return scores


def task_trial(task: Task, study: ExemplarStudy) -> Trial:
    """Learn a task from its exemplars; the loss is that of fresh ones under their captions."""
    prompts = task.prompts[: study.num_prompts]
    scored = BenchmarkSubject(
        name=folder_name(task.name),
        class_noun=task.name,
        pixel_values=task.held_out,
        prompts=[prompt.text.format(SUBJECT_GAP) for prompt in prompts],
        expected=[dict(prompt.expected) for prompt in prompts],
    )

    def held_out_loss(learned: LearnedTask, latents: Tensor, words: str) -> float:
        return learned.validation_loss(latents, [caption.format(words) for caption in task.held_out_captions])

    return Trial(task, task.images, scored, held_out_loss, task.captions)


def pictures(folder: Path, task: Task, index: int, study: ExemplarStudy) -> Tensor:
    """What a candidate made for one prompt of a task, one per seed, (S,3,64,64) in [-1,1].   folder: RUNS/CANDIDATE."""
    made = folder / "images" / folder_name(task.name)
    return torch.stack([to_pixel_values(load_image(made / f"{index:02d}-{seed}.png")) for seed in study.seeds])


def shares_right(records: Sequence[Record], attribute: str) -> dict[str, float]:
    """learned, entities, both and clip_t of one task, from its records; `attribute` is what was learned."""
    hits: dict[str, list[list[float]]] = {}  # prompt -> one row of 0 and 1 for each attribute
    learned: list[float] = []
    for row in records:
        if row.metric == f"attribute/{attribute}":
            learned += row.values
        elif row.metric.startswith("attribute/"):
            hits.setdefault(row.prompt, []).append(row.values)
    entities = [min(column) for rows in hits.values() for column in zip(*rows, strict=True)]
    both = [min(pair) for pair in zip(learned, entities, strict=True)]
    clip_t = [row.value for row in records if row.metric == "clip_t"]
    found = {"learned": learned, "entities": entities, "both": both, "clip_t": clip_t}
    return {name: sum(values) / len(values) for name, values in found.items()}


@torch.no_grad()
def leakage(judge: Judge, task: Task, images: Sequence[Tensor]) -> float:
    """Share of pictures in which something stands that the exemplars show and the prompt does not ask for.

    Args: images: for each prompt in order, (S,3,H,W) in [-1,1].
    """
    shown = [scene_labels(scene, judge.labels) for scene in task.scenes]
    leaked = []
    for prompt, made in zip(task.prompts, images, strict=False):
        read, asked = judge.read(made), set(prompt.expected.values())
        wrong = torch.zeros(len(made), dtype=torch.bool)
        for name in prompt.expected.keys() - {task.attribute}:
            strange = {row[name] for row in shown} - {
                judge.labels[name].index(x) for x in asked & {*judge.labels[name]}
            }
            wrong |= torch.isin(read[name].argmax(-1), torch.tensor(sorted(strange - {-1}), dtype=torch.long))
        leaked += wrong.tolist()
    return sum(leaked) / len(leaked)
