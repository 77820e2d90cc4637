"""What reproduce.py measures: MotionDirector, an ablation and baselines in the study of motions; mixing with a look."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from common.backbones import load_backbone
from common.backbones.video import VideoBackbone
from common.data.subject_dataset import ZipDataset
from common.evaluation.metrics import cosine_distance, diversity, image_similarity
from common.evaluation.motion_study import MotionCandidate, MotionStudy, clips_of, run_motion_study
from common.evaluation.trials import Scores, folder_name
from common.io import atomic_write_text
from common.sampling import sample_clips
from common.sampling.images import save_png, to_pil
from common.toyworld.benchmark import Subject, subjects
from common.toyworld.judge import Judge
from common.toyworld.motion_tasks import PATHS, MotionPrompt, MotionTask, motion_tasks
from common.training.config import flat_config
from common.training.loop import fit
from common.training.optimize import default_device

from .config import MotionDirectorConfig
from .method import Appearance, MotionDirector, load_method, sized
from .train import TrainOptions, clip_dataset, fit_config, picture_dataset
from .variants import JointLoRA, JointMixing, WithoutDebiasing

PROPOSAL, JOINT, NO_DEBIASING, UNTUNED = "MotionDirector", "joint LoRA", "without debiasing", "untuned"
MIXED, JOINT_MIXED = "MotionDirector, mixed", "joint LoRA, mixed"
TRAINED: dict[str, type[MotionDirector]] = {
    PROPOSAL: MotionDirector,
    JOINT: JointLoRA,
    NO_DEBIASING: WithoutDebiasing,
}
IDENTITY, DIVERSITY, MIXING = "identity", "diversity", "mixing "
IDENTIFIER = "sks"


@dataclass(frozen=True)
class Plan:
    """How much is measured."""

    config: MotionDirectorConfig
    appearance: MotionDirectorConfig
    study: MotionStudy
    mixing: MotionStudy  # with the look of a toy subject; one prompt a motion
    noise_prior: float = 0.5

    @classmethod
    def full(cls) -> "Plan":
        return cls(
            MotionDirectorConfig.tiny(),
            MotionDirectorConfig.tiny_appearance(),
            MotionStudy(num_prompts=2),
            MotionStudy(num_prompts=1),
        )

    @classmethod
    def quick(cls) -> "Plan":
        short: dict[str, Any] = {"train_steps": 2, "num_inference_steps": 2, "num_inversion_steps": 2}
        study = MotionStudy(num_tasks=1, num_prompts=1)
        config, appearance = MotionDirectorConfig.tiny(), MotionDirectorConfig.tiny_appearance()
        return cls(replace(config, **short), replace(appearance, **short), study, study)

    @property
    def prior_name(self) -> str:
        """Of the candidate whose initial noise remembers the clip."""
        return f"noise prior {self.noise_prior:g}"

    @property
    def tasks(self) -> tuple[MotionTask, ...]:
        return _tasks(self.study.num_tasks)

    @property
    def mixed_tasks(self) -> dict[str, MotionTask]:
        """The same motions with prompts about the subjects of `subject_of`; by name."""
        return {task.name: mixed_task(task) for task in _tasks(self.mixing.num_tasks)}


@lru_cache
def _tasks(count: int) -> tuple[MotionTask, ...]:
    return tuple(motion_tasks(count))  # rendered once


@lru_cache
def _subjects() -> tuple[Subject, ...]:
    return tuple(subjects(12))


def subject_of(task: MotionTask) -> Subject:
    """A toy subject of another class and colour than the clip's, another one for each motion."""
    pool, first = _subjects(), 3 * PATHS.index(task.name) % len(_subjects())
    order = [*pool[first:], *pool[:first]]
    seen = {(entity.noun, entity.color) for entity in task.entities}
    return next(s for s in order if all(s.class_noun != noun and s.entity.color != color for noun, color in seen))


def mixed_task(task: MotionTask) -> MotionTask:
    """ "a video of a sks vase moving zigzag": the motion of the clip, the look of the subject's pictures."""
    subject = subject_of(task)
    text = f"a video of a {IDENTIFIER} {subject.class_noun} moving {task.name}"
    return replace(task, prompts=(MotionPrompt(text, subject.class_noun, subject.entity.color),))


class Untuned:
    """The backbone as it is."""

    def __init__(self, backbone: VideoBackbone, config: MotionDirectorConfig) -> None:
        self.backbone, self.config = sized(backbone.freeze(), config.num_frames, config.resolution_px), config

    def generate(self, prompt: str, *, seeds: list[int]) -> Tensor:
        settings = {name: getattr(self.config, name) for name in ("num_inference_steps", "guidance_scale")}
        return sample_clips(self.backbone, prompt, seeds=seeds, **settings)

    def save(self, folder: Path) -> None:
        """There is nothing to write."""


def measure(backbone_name: str, plan: Plan, runs: Path) -> Scores:
    """Scores of the study, DIVERSITY, and under MIXING + ... those of the mixing study with IDENTITY."""
    candidates = {name: trained(backbone_name, plan, method) for name, method in TRAINED.items()}
    candidates[plan.prior_name] = with_noise_prior(backbone_name, plan, runs)
    candidates[UNTUNED] = untuned(backbone_name, plan)
    scores = run_motion_study(backbone_name, candidates, plan.tasks, plan.study, runs)
    judge = Judge.load()
    scores[DIVERSITY] = {
        name: {task.name: spread(judge, clips_of(runs / folder_name(name), task, plan.study)) for task in plan.tasks}
        for name in candidates
    }
    mixing = {
        MIXED: mixed(backbone_name, plan, runs),
        JOINT_MIXED: jointly_mixed(backbone_name, plan),
        UNTUNED: untuned(backbone_name, plan),
    }
    tasks, folder = list(plan.mixed_tasks.values()), runs / "mixing"
    for score, values in run_motion_study(backbone_name, mixing, tasks, plan.mixing, folder).items():
        scores[MIXING + score] = values
    scores[MIXING + IDENTITY] = {
        name: {
            task.name: likeness(judge, clips_of(folder / folder_name(name), task, plan.mixing), task) for task in tasks
        }
        for name in mixing
    }
    return scores


def trained(backbone_name: str, plan: Plan, method_class: type[MotionDirector]) -> MotionCandidate:
    """A method that learns a motion from the clip of its task."""

    def learn(task: MotionTask, run: Path) -> MotionDirector:
        dataset, backbone = clip_of(backbone_name, plan, task, run)
        method = method_class(backbone, plan.config)
        fit(method, dataset, fit_config(plan.config, keep_checkpoints=1, checkpoint_every=50), run / "fit", resume=True)
        if method_class is MotionDirector:
            method.invert(dataset[0]["latents"][None].to(backbone.device))
        return method

    return MotionCandidate(settings=flat_config(config=plan.config, method=method_class), train=learn)


def with_noise_prior(backbone_name: str, plan: Plan, runs: Path) -> MotionCandidate:
    """What the proposal learned, from initial noise that remembers the clip; nothing is trained again."""
    config = replace(plan.config, noise_prior=plan.noise_prior)

    def find(task: MotionTask, run: Path) -> MotionDirector:
        method = learned(backbone_name, runs, task)
        method.config = config
        return method

    return MotionCandidate(settings=flat_config(config=config), train=find)


def untuned(backbone_name: str, plan: Plan) -> MotionCandidate:
    """The backbone without any pairs."""

    def find(task: MotionTask, run: Path) -> Untuned:
        return Untuned(load_backbone(backbone_name, device=default_device()), plan.config)

    sampling = {name: getattr(plan.config, name) for name in ("num_inference_steps", "guidance_scale")}
    return MotionCandidate(settings=flat_config(sampling=sampling), train=find)


def mixed(backbone_name: str, plan: Plan, runs: Path) -> MotionCandidate:
    """The temporal path that the proposal learned, with a spatial path from pictures of a subject."""

    def learn(task: MotionTask, run: Path) -> MotionDirector:
        dataset, backbone = pictures_of(backbone_name, plan, task, run)
        look = Appearance(backbone, plan.appearance)
        settings = fit_config(plan.appearance, keep_checkpoints=1, checkpoint_every=50)
        fit(look, dataset, settings, run / "fit", resume=True)
        look.save(run / "appearance")
        method = learned(backbone_name, runs, task)
        method.load_appearance(run / "appearance")
        return method

    return MotionCandidate(settings=flat_config(config=plan.config, appearance=plan.appearance), train=learn)


def jointly_mixed(backbone_name: str, plan: Plan) -> MotionCandidate:
    """One set of pairs that learns clip and pictures at once, a clip and a picture in each step."""
    config = replace(plan.config, spatial_scale=1.0)

    def learn(task: MotionTask, run: Path) -> MotionDirector:
        clips, backbone = clip_of(backbone_name, plan, task, run)
        pictures, _ = pictures_of(backbone_name, plan, task, run)
        method = JointMixing(backbone, config)
        settings = fit_config(config, keep_checkpoints=1, checkpoint_every=50)
        fit(method, ZipDataset(clip=clips, image=pictures), settings, run / "fit", resume=True)
        return method

    return MotionCandidate(settings=flat_config(config=config, method=JointMixing), train=learn)


def learned(backbone_name: str, runs: Path, task: MotionTask) -> MotionDirector:
    """What the proposal learned of a motion."""
    folder = runs / folder_name(PROPOSAL) / "artifacts" / folder_name(task.name)
    return load_method(folder, backbone_name, default_device())


def clip_of(backbone_name: str, plan: Plan, task: MotionTask, run: Path) -> tuple[Dataset, VideoBackbone]:
    """The clips of a task, written as folders of frames with their short captions, and a backbone for them."""
    folder = run / "clips"
    for number, (clip, caption) in enumerate(zip(task.clips, task.plain_captions, strict=True)):
        for i, frame in enumerate(to_pil(clip.transpose(0, 1))):
            save_png(frame, folder / f"{number:02d}" / f"{i:02d}.png")
        atomic_write_text(folder / f"{number:02d}.txt", caption + "\n")
    return _dataset(clip_dataset, backbone_name, TrainOptions(clips=folder, output=run, config=plan.config))


def pictures_of(backbone_name: str, plan: Plan, task: MotionTask, run: Path) -> tuple[Dataset, VideoBackbone]:
    """The pictures of the subject that a motion is mixed with."""
    folder, subject = run / "pictures", subject_of(task)
    for i, image in enumerate(to_pil(subject.images)):
        save_png(image, folder / f"{i:02d}.png")
    prompt = f"a photo of a {IDENTIFIER} {subject.class_noun}"
    options = TrainOptions(images=folder, prompt=prompt, output=run, config=plan.appearance)
    return _dataset(picture_dataset, backbone_name, options)


def _dataset(
    make: Callable[[TrainOptions, VideoBackbone], Dataset], backbone_name: str, options: TrainOptions
) -> tuple[Dataset, VideoBackbone]:
    backbone = load_backbone(backbone_name, device=default_device())
    return make(options, backbone), backbone


@torch.no_grad()
def spread(judge: Judge, made: list[Tensor]) -> float:
    """Mean distance between the clips of one prompt, by the judge's features of their frames; over prompts."""
    features = [judge.features(clips.transpose(1, 2).flatten(0, 1)).unflatten(0, (len(clips), -1)) for clips in made]
    return sum(diversity(of_prompt.flatten(1), cosine_distance) for of_prompt in features) / len(features)


@torch.no_grad()
def likeness(judge: Judge, made: list[Tensor], task: MotionTask) -> float:
    """Mean cosine of the judge's identity embeddings of frames and of the subject's pictures."""
    frames = torch.cat([clips.transpose(1, 2).flatten(0, 1) for clips in made])
    pictures = judge.embed_identity(subject_of(task).images)
    return image_similarity(judge.embed_identity(frames), pictures).mean().item()
