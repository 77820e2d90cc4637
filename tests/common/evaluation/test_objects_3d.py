"""Measures of objects in 3D: by hand, and on renderings of a toy object, which are their own truth."""

import math

import pytest
import torch

from common.evaluation.objects_3d import (
    color_histogram,
    depth_error,
    frame_views,
    histogram_distance,
    janus_rate,
    psnr,
    saturation,
    view_entropy,
)
from common.toyworld.benchmark import objects_3d
from common.toyworld.judge import Judge


@pytest.fixture(scope="module")
def judge():
    return Judge.load()


@pytest.fixture(scope="module")
def dog():
    """From eight sides, front first."""
    return objects_3d(3)[2].held_out.images * 2 - 1


def test_framed_views_forget_size_and_place():
    """A square of 20 pixels and one of 10 elsewhere look alike; one of another colour does not."""
    large, small = torch.ones(2, 3, 64, 64), torch.ones(2, 3, 64, 64)
    large[:, :, 10:30, 20:40], small[:, :, 40:50, 5:15] = -1.0, -1.0
    masks = [pictures[:, 0] < 0 for pictures in (large, small)]
    framed = [frame_views(pictures, mask) for pictures, mask in zip((large, small), masks, strict=True)]
    assert framed[0].shape == (2, 3, 48, 48)
    assert psnr(*framed) > 20 > 5 > psnr(framed[0], -framed[1])
    assert framed[0][0, 0, 24, 24] == -1 and framed[0][0, 0, 1, 1] == 1


def test_one_frame_holds_all_views():
    """The frame is that of all views together, so a view that is narrower stays narrower."""
    pictures = torch.ones(2, 1, 64, 64)
    pictures[0, :, 12:52, 12:52], pictures[1, :, 12:52, 27:37] = 0.0, 0.0
    framed = frame_views(pictures, pictures[:, 0] == 0, side=64)
    widths = [(view[0, 32] < 0.5).sum().item() for view in framed]
    assert widths[0] == pytest.approx(64 / 1.15, abs=1.5) and widths[1] == pytest.approx(widths[0] / 4, abs=1.5)


def test_psnr_by_hand():
    truth = torch.zeros(1, 3, 4, 4)
    assert psnr(truth + 0.2, truth) == pytest.approx(20.0, abs=1e-3)  # an error of 0.1 in [0, 1]


def test_depth_error_by_hand():
    """Depths 1, 2, 3 against 5, 6, 8: less the median 4 of the differences they are 0, 0 and 1 apart."""
    seen = torch.ones(1, 1, 3, dtype=torch.bool)
    own, truth = torch.tensor([[[5.0, 6.0, 8.0]]]), torch.tensor([[[1.0, 2.0, 3.0]]])
    assert depth_error(own, seen, truth, seen) == pytest.approx(1 / 3)
    with pytest.raises(ValueError, match="in no view"):
        depth_error(own, seen, truth, ~seen)


def test_saturation_by_hand():
    rgb = torch.tensor([[[[0.5, 0.5, 0.5], [1.0, 0.5, 0.0], [0.2, 0.4, 0.4]]]])
    masks = torch.tensor([[[True, True, False]]])
    assert saturation(rgb, masks) == pytest.approx(0.5)  # 0 and 1; the third is not seen
    assert saturation(rgb, ~masks & masks) == 0.0


def test_histograms_by_hand():
    rgb = torch.tensor([[[[0.1, 0.1, 0.1], [1.0, 1.0, 1.0], [0.9, 0.9, 0.9], [0.1, 0.9, 0.1]]]])
    masks = torch.tensor([[[True, True, True, False]]])
    histogram = color_histogram(rgb, masks)
    assert histogram[0] == pytest.approx(1 / 3) and histogram[-1] == pytest.approx(2 / 3) and histogram.sum() == 1
    only_dark = color_histogram(rgb, torch.tensor([[[True, False, False, False]]]))
    assert histogram_distance(histogram, only_dark) == pytest.approx(2 / 3)
    assert histogram_distance(histogram, histogram) == 0


def test_a_dog_has_one_face_and_its_front_all_around_has_more(judge, dog):
    assert janus_rate(judge, dog) == 0
    assert janus_rate(judge, dog[:1].expand(24, -1, -1, -1)) == 1


def test_view_entropy(judge, dog):
    assert view_entropy(judge, dog[[0, 0, 0]]) == 0
    assert view_entropy(judge, dog[[0, 2, 4]]) == pytest.approx(math.log2(3), abs=1e-6)  # front, side, back
