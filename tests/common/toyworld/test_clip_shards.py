"""Random clips, their truth and their shards; motions to learn; the judge that reads clips."""

import numpy as np
import pytest
import torch

from common.io import load_safetensors
from common.toyworld.captions import MOTION_PHRASES
from common.toyworld.clip_shards import (
    ALL_MOTIONS,
    NUM_FRAMES,
    ClipShardConfig,
    load_clip_shards,
    render_clips,
    sample_clip,
    write_clip_shard,
    write_clip_shards,
)
from common.toyworld.motion_judge import MotionJudge
from common.toyworld.motion_tasks import PATHS, motion_tasks
from common.toyworld.pretrain.motion_judge import MotionJudgeConfig, places, to_clips, train_motion_judge, worsened
from common.toyworld.tokenizer import load_tokenizer
from common.toyworld.vocabulary import CLASSES, HELD_OUT_MOTIONS, MOTIONS


def test_a_clip_depends_on_its_seed_alone():
    data, again = render_clips([3, 4, 5]), render_clips([4])
    assert data.frames.shape == (3, NUM_FRAMES, 64, 64, 3) and data.frames.dtype == torch.uint8
    assert torch.equal(data.frames[1], again.frames[0]) and data.captions[1] == again.captions[0]


def test_the_truth_is_that_of_the_picture():
    """The entity's mask is what differs from the clip without it; its area and middle are the labels."""
    data = render_clips([0, 7])
    for clip, path, areas, index in zip(data.frames, data.trajectories, data.areas, data.motions, strict=True):
        if ALL_MOTIONS[index] in ("moving left", "moving right"):
            background = clip.float().median(0).values  # the entity covers no pixel for most of the time
            moved = (clip.float() - background).abs().amax(-1) > 40
            for frame, (x, _), area in zip(moved, path, areas, strict=True):
                columns = frame.nonzero()[:, 1].float()
                assert abs(columns.mean() - x) < 6 and 0.02 < area < 0.5
            break
    else:
        pytest.fail("choose seeds with a clip that moves sideways")


def test_captions_name_motion_and_class_and_are_words_of_the_tokenizer():
    tokenizer = load_tokenizer()
    for seed in range(40):
        scene, motion = sample_clip(seed)
        assert motion in MOTIONS and sample_clip(seed, held_out=True)[1] in HELD_OUT_MOTIONS
    data = render_clips(list(range(4)))
    for captions, motion in zip(data.captions, data.motions, strict=True):
        assert all(any(phrase in text for phrase in MOTION_PHRASES[ALL_MOTIONS[motion]]) for text in captions)
        assert all(len(tokenizer.tokenize(word)) == 1 for text in captions for word in text.split())
    assert render_clips([0], held_out=True).captions == [[]]


def test_shards_are_kept_and_read_back_in_order(tmp_path):
    config = ClipShardConfig(output=tmp_path, num_clips=3, shard_size=2, workers=1)
    write_clip_shards(config)
    files = sorted(tmp_path.glob("*.safetensors"))
    before = [path.stat().st_mtime_ns for path in files]
    write_clip_shards(config)
    assert [path.stat().st_mtime_ns for path in files] == before
    data, expected = load_clip_shards(tmp_path), render_clips([0, 1, 2])
    assert torch.equal(data.frames, expected.frames) and data.captions == expected.captions
    assert len(load_clip_shards(tmp_path, 2)) == 2
    with pytest.raises(FileNotFoundError, match="no clips-"):
        load_clip_shards(tmp_path / "none")


def test_motions_to_learn_are_held_out_and_prompts_ask_for_other_objects():
    tasks = motion_tasks(len(PATHS), clips_each=2)
    assert [task.name for task in tasks] == list(PATHS) and set(PATHS) <= set(HELD_OUT_MOTIONS)
    for task in tasks:
        assert task.clips.shape == (2, 3, NUM_FRAMES, 64, 64) and task.clips.abs().max() <= 1
        shown = {(entity.noun, entity.color) for entity in task.entities}
        assert len({noun for noun, _ in shown}) == 2
        for prompt in task.prompts:
            assert task.name in prompt.text and prompt.noun in prompt.text
            assert prompt.noun not in {n for n, _ in shown} and prompt.color not in {c for _, c in shown}
        assert np.abs(task.trajectories.diff(dim=1).numpy()).max() > 2  # px a frame


@pytest.fixture(scope="module")
def judge():
    return MotionJudge.load()


def test_the_judge_reads_clips_that_it_has_not_seen(judge):
    data = render_clips(list(range(900_000, 900_060)))
    with torch.no_grad():
        found = judge.read(to_clips(data.frames))
    assert (found.motions.argmax(-1) == data.motions).float().mean() > 0.9
    assert (found.classes.argmax(-1) == data.classes).float().mean() > 0.9
    assert (found.trajectories - data.trajectories).norm(dim=-1).mean() < 2.5  # px
    assert judge.accuracy["motion"] > 0.95


def test_the_judge_takes_other_sizes_and_lengths(judge):
    clips = to_clips(render_clips([1]).frames)
    large = clips.repeat_interleave(2, 3).repeat_interleave(2, 4)
    slow = clips.repeat_interleave(2, 2)
    with torch.no_grad():
        found, bigger, longer = (judge.read(x) for x in (clips, large, slow))
    torch.testing.assert_close(bigger.trajectories, found.trajectories, atol=0.5, rtol=0)  # px
    assert longer.trajectories.shape == (1, 16, 2) and longer.classes.shape == (1, len(CLASSES))
    with pytest.raises(ValueError, match="F >= 2"):
        judge.read(clips[:, :, :1])


def test_the_recipe_trains_and_writes_a_judge(tmp_path):
    write_clip_shard(tmp_path / "a", 0, 12, False)
    write_clip_shard(tmp_path / "b", 0, 12, True)
    config = MotionJudgeConfig(
        data=tmp_path / "a", held_out=tmp_path / "b", output=tmp_path / "run", weights=tmp_path / "judge.safetensors",
        steps=2, minutes=5, batch_schedule="0:4", log_every=1,
    )  # fmt: skip
    train_motion_judge(config)
    assert set(MotionJudge.load(config.weights).accuracy) == {"motion", "class", "centre_error_px"}
    assert load_safetensors(config.weights)[0]["place.weight"].dtype == torch.float16


def test_worsened_clips_stay_clips():
    data = render_clips([2])
    clips = to_clips(data.frames)
    worse = worsened(clips, torch.Generator().manual_seed(0))
    assert worse.shape == clips.shape and worse.abs().max() <= 1 and not torch.equal(worse, clips)
    assert places(data).shape == (1, NUM_FRAMES, 3) and places(data).max() < 1.2
