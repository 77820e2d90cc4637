"""Scenes of held-out things, their labels, and the judge that learns them on top of what it knows."""

import pytest
import torch

from common.toyworld import benchmark
from common.toyworld.examples import LABELS as TRAINING_LABELS
from common.toyworld.examples import scene_labels
from common.toyworld.held_out import LABELS, render_held_out, sample_held_out_scene
from common.toyworld.judge import Judge
from common.toyworld.pretrain.held_out_judge import extended

EXTENDED = ("relation", "pose", "state", "style")


def test_labels_go_on_where_those_of_training_end():
    assert LABELS.keys() == TRAINING_LABELS.keys()
    for name, names in LABELS.items():
        own = TRAINING_LABELS[name]
        assert names[: len(own)] == own and (len(names) > len(own)) == (name in EXTENDED)
        assert len(set(names)) == len(names)


def test_every_scene_shows_one_held_out_thing():
    counts = dict.fromkeys(EXTENDED, 0)
    for seed in range(200):
        labels = scene_labels(sample_held_out_scene(seed), LABELS)
        shown = [name for name in EXTENDED if labels[name] >= len(TRAINING_LABELS[name])]
        assert len(shown) == 1
        counts[shown[0]] += 1
    assert min(counts.values()) > 15


def test_renders_depend_on_their_seed_alone_and_are_not_those_of_the_benchmark():
    data, again = render_held_out(range(4)), render_held_out([3])
    assert torch.equal(data.images[3:], again.images) and data.images.dtype == torch.uint8
    assert all(torch.equal(data.labels[name][3:], again.labels[name]) for name in LABELS)
    assert set(data.instances.tolist()) == {-1} and not any(values.any() for values in data.mentioned.values())
    exemplars = benchmark.relations(images_each=1)[0].images
    ours = data.images.permute(0, 3, 1, 2).float() / 127.5 - 1
    assert all((picture - exemplars[0]).abs().mean() > 0.01 for picture in ours)


@pytest.fixture(scope="module")
def judge():
    torch.manual_seed(0)
    return Judge({name: list(values) for name, values in TRAINING_LABELS.items()}).eval().requires_grad_(False)


def test_an_extended_judge_reads_the_old_names_as_before(judge):
    more = Judge(LABELS).eval()
    more.load_state_dict(extended(judge, LABELS))
    pictures = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        old, new = judge(pictures)[0], more(pictures)[0]
    for name, logits in old.items():
        torch.testing.assert_close(new[name][:, : logits.shape[1]], logits)
        assert (new[name][:, logits.shape[1] :] == 0).all()


def test_labels_in_another_order_are_refused(judge):
    with pytest.raises(ValueError, match="labels of 'pose' must begin with"):
        extended(judge, LABELS | {"pose": LABELS["pose"][::-1]})
