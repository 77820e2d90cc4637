"""The study of motions with a method that shows renders: scores of the truth, resumption, refusal of other settings."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from common.evaluation import motion_study
from common.evaluation.motion_study import MotionCandidate, MotionStudy, clips_of, run_motion_study, score_clips
from common.toyworld.clips import render_clip
from common.toyworld.motion_tasks import motion_tasks
from common.toyworld.sampling import compose, sample_object
from common.toyworld.scene import Placed

STUDY = MotionStudy(num_tasks=1, num_prompts=2, seeds=(0, 1))


@pytest.fixture(scope="module")
def task():
    return motion_tasks(1)[0]


class Painter:
    """Makes the clip that a prompt asks for, by rendering it; counts how often it is trained and asked."""

    backbone = None

    def __init__(self, task, motion):
        self.task, self.motion, self.asked = task, motion, 0

    def generate(self, prompt, *, seeds):
        self.asked += 1
        import numpy as np

        (wanted,) = [p for p in self.task.prompts if p.text == prompt]
        clips = []
        for seed in seeds:
            rng = np.random.default_rng([7, seed])
            entity = next(e for e in (sample_object(rng, wanted.noun) for _ in range(500)) if e.color == wanted.color)
            scene = compose(rng, (Placed(replace(entity, pattern="plain")),), background="snow", fill=0.5)
            clips.append(render_clip(scene, self.motion).frames.transpose(0, 1) * 2 - 1)
        return torch.stack(clips)

    def save(self, folder):
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / "weights").write_bytes(bytes(100))


def candidate(motion, made, settings=None):
    def train(task, run):
        made.append(Painter(task, motion))
        return made[-1]

    return MotionCandidate(settings=settings or {"motion": motion}, train=train)


@pytest.fixture(autouse=True)
def no_backbone(monkeypatch):
    monkeypatch.setattr(motion_study, "load_backbone", lambda name: SimpleNamespace())
    monkeypatch.setattr(motion_study, "backbone_hashes", lambda backbone: {"unet": "0"})


def test_the_truth_scores_well_and_another_motion_does_not(tmp_path, task):
    right, still = [], []
    candidates = {"right": candidate(task.name, right), "still": candidate("still", still)}
    scores = run_motion_study("tiny", candidates, [task], STUDY, tmp_path)
    value = {score: {name: of[task.name] for name, of in by.items()} for score, by in scores.items()}
    assert value["motion"]["right"] >= 0.75 and value["motion"]["still"] == 0
    assert value["trajectory error"]["right"] < 3 < value["trajectory error"]["still"]
    assert value["direction"]["right"] > 0.8 > value["direction"]["still"]
    assert 0.7 < value["speed"]["right"] < 1.3 and value["speed"]["still"] < 0.4
    assert value["object"]["right"] >= 0.75 and value["leakage"]["right"] <= 0.25
    assert value["bytes"] == {"right": 100, "still": 100}
    assert (len(right), right[0].asked) == (1, STUDY.num_prompts)

    again = run_motion_study("tiny", candidates, [task], STUDY, tmp_path)
    assert again["direction"] == scores["direction"] and (len(right), right[0].asked) == (1, STUDY.num_prompts)
    assert [clips.shape for clips in clips_of(tmp_path / "right", task, STUDY)] == [(2, 3, 8, 64, 64)] * 2


def test_clips_of_a_training_object_leak(task):
    own = task.clips.expand(2, -1, -1, -1, -1)
    found = score_clips(task, [own, own], STUDY)
    assert found["leakage"] == 1 and found["object"] == 0 and found["trajectory error"] < 2


def test_other_settings_are_refused(tmp_path, task):
    run_motion_study("tiny", {"a": candidate("still", [], {"rate": 1})}, [task], MotionStudy.quick(), tmp_path)
    with pytest.raises(ValueError, match="other settings"):
        run_motion_study("tiny", {"a": candidate("still", [], {"rate": 2})}, [task], MotionStudy.quick(), tmp_path)
