"""What reproduce.py measures: VMC, its two losses without inversion, and baselines in the study of motions."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from common.backbones import load_backbone
from common.data.clip_dataset import ClipDataset
from common.evaluation.motion_study import MotionCandidate, MotionStudy, run_motion_study
from common.evaluation.trials import Scores, folder_name
from common.sampling.images import save_png, to_pil
from common.toyworld.motion_tasks import MotionTask, motion_tasks
from common.training.config import flat_config
from common.training.loop import fit
from common.training.optimize import default_device

from .config import VMCConfig
from .method import VMC
from .train import fit_config, load_clip
from .variants import DenoisingTuning, TuneAVideoStyle

PROPOSAL, DENOISING, TUNE_A_VIDEO, INVERSION = "VMC", "denoising loss", "Tune-A-Video style", "inversion alone"
SIGNED, ABSOLUTE = "signed loss without inversion", "absolute loss without inversion"
FRAMES_FPS = 8.0  # of the clips' pictures; all frames are taken, so it changes nothing


@dataclass(frozen=True)
class Variant:
    """One line of the comparison: changed fields of the config, the class, and what it learns from.

    full_caption: learn under the caption with colour and place, not under the appearance-invariant one.
    tuned: False = inversion and sampling alone.
    learned_by: the line above that has trained the same network; its artifact is used again.
    """

    changes: Mapping[str, Any] = field(default_factory=dict)
    method: type[VMC] = VMC
    full_caption: bool = False
    tuned: bool = True
    learned_by: str | None = None


VARIANTS = {
    PROPOSAL: Variant(),
    DENOISING: Variant(method=DenoisingTuning),
    TUNE_A_VIDEO: Variant(method=TuneAVideoStyle, full_caption=True),
    INVERSION: Variant(tuned=False),
    SIGNED: Variant({"inverted_share": 0.0}, learned_by=PROPOSAL),
    ABSOLUTE: Variant({"inverted_share": 0.0, "residual_loss": "official"}),
}


@dataclass(frozen=True)
class Plan:
    """How much is measured."""

    study: MotionStudy
    config: VMCConfig

    @classmethod
    def full(cls) -> "Plan":
        return cls(MotionStudy(num_prompts=2), VMCConfig.tiny())

    @classmethod
    def quick(cls) -> "Plan":
        return cls(MotionStudy.quick(), replace(VMCConfig.tiny(), train_steps=2, num_inference_steps=2))

    @property
    def tasks(self) -> tuple[MotionTask, ...]:
        return _tasks(self.study.num_tasks)


@lru_cache
def _tasks(count: int) -> tuple[MotionTask, ...]:
    return tuple(motion_tasks(count))  # rendered once


def measure(backbone_name: str, plan: Plan, runs: Path) -> Scores:
    """The study's scores of all variants, and "speed error": how far the mean speed is from that of the clip."""
    candidates = {name: candidate(backbone_name, plan.config, variant, runs) for name, variant in VARIANTS.items()}
    scores = run_motion_study(backbone_name, candidates, plan.tasks, plan.study, runs)
    scores["speed error"] = {
        name: {task: abs(ratio - 1) for task, ratio in ratios.items()} for name, ratios in scores["speed"].items()
    }
    return scores


def candidate(backbone_name: str, config: VMCConfig, variant: Variant, runs: Path) -> MotionCandidate:
    """A variant as a candidate of the study."""
    config = replace(config, **variant.changes)

    def learn(task: MotionTask, run: Path) -> VMC:
        method = variant.method(load_backbone(backbone_name, device=default_device()), config)
        if variant.learned_by is not None:
            method.load(runs / folder_name(variant.learned_by) / "artifacts" / folder_name(task.name))
            return method
        clip = load_clip(frames_of(task, run), method.backbone, config, frames_fps=FRAMES_FPS)
        prompt = (task.captions if variant.full_caption else task.plain_captions)[0]
        method.set_source(clip.latents(0), prompt)
        if variant.tuned:
            dataset = ClipDataset(clip, [prompt], seed=config.seed)
            fit(method, dataset, fit_config(config, checkpoint_every=40, keep_checkpoints=1), run, resume=True)
        return method

    settings = flat_config(config=config, variant=variant)
    return MotionCandidate(settings=settings, train=learn)


def frames_of(task: MotionTask, run: Path) -> Path:
    """A folder beside the runs with the clip to learn from, as pictures."""
    folder = run.parents[1] / "frames" / run.name
    for i, frame in enumerate(to_pil(task.clips[0].transpose(0, 1))):
        save_png(frame, folder / f"{i:02d}.png")
    return folder
