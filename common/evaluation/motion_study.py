"""One study for methods that learn a motion from clips: other objects shall move like that, and look like themselves.

Paths, motions and classes are read by the judge of clips, colours by the judge of pictures; the accuracy of both on
renders is in the headers of their files.
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from common.backbones import load_backbone
from common.backbones.video import VideoBackbone
from common.evaluation import metrics, motion
from common.evaluation.encoders import load_encoders
from common.evaluation.records import config_hash
from common.evaluation.trials import Scores, backbone_hashes, folder_name, keep_settings
from common.io import atomic_save_safetensors, atomic_write_text, load_safetensors
from common.toyworld.clip_shards import ALL_MOTIONS
from common.toyworld.judge import Judge
from common.toyworld.motion_judge import MotionJudge
from common.toyworld.motion_tasks import MotionTask
from common.toyworld.vocabulary import CLASSES


class LearnedMotion(Protocol):
    """A method that has learned a motion."""

    backbone: VideoBackbone

    def generate(self, prompt: str, *, seeds: list[int]) -> Tensor:
        """Clips for a prompt, one per seed, (B,3,F,H,W) in [-1,1]."""
        ...

    def save(self, folder: Path) -> None:
        """Write the artifact."""
        ...


@dataclass(frozen=True)
class MotionCandidate:
    """A method, an ablation or a baseline.

    settings: all that the result depends on besides task, seeds and backbone: `flat_config(config=...)`.
    train: learns a task in a folder for the run; called again after an interruption.
    """

    settings: Mapping[str, object]
    train: Callable[[MotionTask, Path], LearnedMotion]


@dataclass(frozen=True)
class MotionStudy:
    """How much is measured."""

    num_tasks: int = 4
    clips_each: int = 1  # to learn a motion from
    num_prompts: int = 3  # per task, at most motion_tasks.NUM_PROMPTS
    seeds: tuple[int, ...] = (0, 1)  # one clip per prompt and seed

    @classmethod
    def quick(cls) -> "MotionStudy":
        """Everything runs; the numbers say nothing."""
        return cls(num_tasks=1, num_prompts=1, seeds=(0,))

    def setting(self, backbone_name: str) -> str:
        """For the column "how measured"."""
        name, seeds = Path(backbone_name).name, ", ".join(map(str, self.seeds))
        return (
            f"{name}, {self.num_tasks} motions, {self.num_prompts} prompts, seeds {seeds}; judges of clips and pictures"
        )


def run_motion_study(
    backbone_name: str, candidates: Mapping[str, MotionCandidate], tasks: Sequence[MotionTask], study: MotionStudy,
    runs: Path,
) -> Scores:  # fmt: skip
    """Train and score every candidate on every task; what is finished in `runs` is not done again.

    RUNS/CANDIDATE holds clips/TASK/PROMPT-SEED.safetensors, settings.json, training/TASK/, artifacts/TASK/ and
    measured/TASK.json.

    Returns: per candidate and task, means over the clips
        trajectory error: pixels.   direction: cosine.   speed: ratio.   all against the first clip's true path.
        motion: share of clips with the learned motion.   object: share with the class that the prompt asks for.
        leakage: share with the class or the colour of a training object where the prompt asks for another.
        consistency: mean cosine of the judge's features of neighbouring frames.
        clip_t: of frames with the prompt.   seconds: of training, over all interruptions.   bytes: of the artifact.
    Raises: ValueError if RUNS/CANDIDATE was begun with other settings or weights.
    """
    weights = {**backbone_hashes(load_backbone(backbone_name)), "study": asdict(study)}
    scores: Scores = {}
    for name, candidate in candidates.items():
        folder = runs / folder_name(name)
        settings = {**candidate.settings, "weights": weights}
        keep_settings(folder / "settings.json", settings)
        for task in tasks:
            _make_clips(candidate, task, study, folder, config_hash(json.loads(json.dumps(settings))))
            found = score_clips(task, clips_of(folder, task, study), study)
            measured = folder / "measured" / f"{folder_name(task.name)}.json"
            for score, value in (found | json.loads(measured.read_text(encoding="utf-8"))).items():
                scores.setdefault(score, {}).setdefault(name, {})[task.name] = value
    return scores


def clips_of(folder: Path, task: MotionTask, study: MotionStudy) -> list[Tensor]:
    """What a candidate made: for each prompt (S,3,F,H,W) in [-1,1], one clip per seed.   folder: RUNS/CANDIDATE."""
    made = []
    for index in range(study.num_prompts):
        clips = [load_safetensors(_clip_path(folder, task, index, seed))[0]["frames"] for seed in study.seeds]
        made.append(torch.stack(clips).float() / 127.5 - 1)
    return made


@torch.no_grad()
def score_clips(task: MotionTask, made: Sequence[Tensor], study: MotionStudy) -> dict[str, float]:
    """The scores of one candidate on one task, without those of its training; arguments as `clips_of` returns them."""
    clip_judge, judge, encoders = MotionJudge.load(), Judge.load(), load_encoders()
    reference = task.trajectories[0]
    rows: dict[str, list[Tensor]] = {}

    def keep(name: str, values: Tensor) -> None:
        rows.setdefault(name, []).append(values.double())

    for prompt, clips in zip(task.prompts[: study.num_prompts], made, strict=True):
        found = clip_judge.read(clips)
        nouns = [CLASSES[i] for i in found.classes.argmax(-1)]
        frames = clips.transpose(1, 2).flatten(0, 1)
        per_frame = judge.read(frames)["color"].unflatten(0, (len(clips), -1)).mean(1)
        colors = [judge.labels["color"][i] for i in per_frame.argmax(-1)]
        keep("trajectory error", motion.trajectory_error(found.trajectories, reference))
        keep("direction", motion.direction_cosine(found.trajectories, reference))
        keep("speed", motion.speed_ratio(found.trajectories, reference))
        keep("motion", found.motions.argmax(-1) == ALL_MOTIONS.index(task.name))
        keep("object", torch.tensor([noun == prompt.noun for noun in nouns]))
        keep("leakage", torch.tensor([_leaks(task, pair) for pair in zip(nouns, colors, strict=True)]))
        features = judge.features(frames).unflatten(0, (len(clips), -1))
        keep("consistency", motion.neighbour_consistency(features))
        text = encoders.clip.embed_texts([prompt.text])
        keep("clip_t", metrics.text_similarity(encoders.clip.embed_images(frames), text))
    return {name: torch.cat(values).mean().item() for name, values in rows.items()}


def _leaks(task: MotionTask, read: tuple[str, str]) -> bool:
    """Whether class or colour are a training object's; prompts ask for neither."""
    return any(read[0] == entity.noun or read[1] == entity.color for entity in task.entities)


def _make_clips(candidate: MotionCandidate, task: MotionTask, study: MotionStudy, folder: Path, run: str) -> None:
    """Train and write all clips of a task, unless all are there."""
    paths = [_clip_path(folder, task, index, seed) for index in range(study.num_prompts) for seed in study.seeds]
    measured = folder / "measured" / f"{folder_name(task.name)}.json"
    if all(path.is_file() for path in paths) and measured.is_file():
        return
    times = json.loads(measured.read_text(encoding="utf-8")) if measured.is_file() else {"seconds": 0.0}
    started = time.perf_counter()
    try:
        learned = candidate.train(task, folder / "training" / folder_name(task.name))
    finally:
        if "bytes" not in times:  # else it had been trained, and only clips are missing
            times["seconds"] += time.perf_counter() - started
            atomic_write_text(measured, json.dumps(times))
    artifact = folder / "artifacts" / folder_name(task.name)
    learned.save(artifact)
    size = sum(path.stat().st_size for path in artifact.rglob("*") if path.is_file())
    for index, prompt in enumerate(task.prompts[: study.num_prompts]):
        clips = learned.generate(prompt.text, seeds=list(study.seeds))
        levels = ((clips.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        for seed, frames in zip(study.seeds, levels, strict=True):
            header = {"prompt": prompt.text, "seed": str(seed), "run": run}
            atomic_save_safetensors({"frames": frames.contiguous()}, _clip_path(folder, task, index, seed), header)
    atomic_write_text(measured, json.dumps(times | {"bytes": size}))


def _clip_path(folder: Path, task: MotionTask, index: int, seed: int) -> Path:
    return folder / "clips" / folder_name(task.name) / f"{index:02d}-{seed}.safetensors"
