"""The benchmark sets have the promised sizes, are always the same, and hold ground truth."""

import numpy as np
import pytest
import torch

from common.toyworld import benchmark
from common.toyworld.clips import render_clip
from common.toyworld.sampling import NUM_OBJECT_INSTANCES, compose, sample_object
from common.toyworld.scene import Placed
from common.toyworld.vocabulary import HELD_OUT_MOTIONS, HELD_OUT_RELATIONS, LIVE_CLASSES, MOTIONS


def test_thirty_subjects_with_twenty_five_prompts():
    subjects = benchmark.subjects(images_each=1)
    assert len({subject.name for subject in subjects}) == 30
    for subject in subjects:
        assert len(subject.prompts) == 25 and all(prompt.text.count("{}") == 1 for prompt in subject.prompts)
        accessories = sum("accessory" in prompt.expected for prompt in subject.prompts)
        assert accessories == (10 if subject.class_noun in LIVE_CLASSES - {"fish"} else 0)
    assert torch.equal(subjects[3].images, benchmark.subjects(4, images_each=1)[3].images)
    with pytest.raises(ValueError, match="1..30"):
        benchmark.subjects(31)


def test_subjects_are_not_in_the_training_set():
    trained = {sample_object(np.random.default_rng([79, i])).proportions for i in range(NUM_OBJECT_INSTANCES)}
    assert not trained & {subject.entity.proportions for subject in benchmark.subjects(images_each=1)}


def test_sizes_of_the_other_sets():
    assert len(benchmark.faces(images_each=1)) == 20
    assert len(benchmark.styles(1)) == 10
    relations = benchmark.relations(2)
    assert [r.name for r in relations] == list(HELD_OUT_RELATIONS) and relations[0].images.shape == (2, 3, 64, 64)
    assert len(benchmark.actions(1)) == 8 and len(benchmark.concepts(1)) == 6
    assert len(benchmark.objects_3d(photos_each=1, views_each=2)) == 10
    assert [clip.motion for clip in benchmark.clips(2)] == list(HELD_OUT_MOTIONS)


def test_try_on_changes_the_garment_and_little_else():
    pair = benchmark.try_on_pairs(3)[2]
    changed = (pair.person - pair.worn).abs().amax(0) > 0.1
    assert pair.garment_mask.any() and changed[pair.garment_mask].float().mean() > 0.5
    assert changed.float().mean() < 0.4


def test_trajectories_follow_the_picture():
    rng = np.random.default_rng(0)
    scene = compose(rng, (Placed(sample_object(rng, "mug")),), background="snow", fill=0.4, spread_deg=1.0)
    right = render_clip(scene, "moving right", num_frames=5)
    steps = np.diff(right.trajectory, axis=0)
    assert (steps[:, 0] > 2).all() and np.abs(steps[:, 1]).max() < 1
    assert np.diff(render_clip(scene, "moving left", num_frames=5).trajectory[:, 0]).max() < -2
    jump = render_clip(scene, "jumping", num_frames=5).trajectory
    assert jump[1, 1] < jump[0, 1] - 3 and jump[2, 1] == pytest.approx(jump[0, 1], abs=0.1)
    for motion in (*MOTIONS[1:], *HELD_OUT_MOTIONS):
        frames = render_clip(scene, motion, num_frames=4).frames
        assert (frames[1:] - frames[:-1]).abs().max() > 0.1, motion
    with pytest.raises(ValueError, match="unknown motion"):
        render_clip(scene, "teleporting")
    with pytest.raises(ValueError, match="at least 2"):
        render_clip(scene, "still", num_frames=1)
