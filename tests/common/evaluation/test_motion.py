"""Metrics of motion against hand-worked values."""

import pytest
import torch

from common.evaluation import motion

RIGHT = torch.tensor([[0.0, 0.0], [3.0, 0.0], [6.0, 0.0]])


def test_trajectory_error_does_not_mind_the_place():
    moved, halved = RIGHT + torch.tensor([10.0, -4.0]), RIGHT / 2
    errors = motion.trajectory_error(torch.stack([moved, halved]), RIGHT)
    torch.testing.assert_close(errors, torch.tensor([0.0, 1.0]))  # off by 1.5, 0, 1.5 px


def test_direction_and_speed():
    up, back = torch.tensor([[0.0, 0.0], [0.0, -3.0], [0.0, -6.0]]), -2 * RIGHT
    still = torch.zeros(3, 2)
    paths = torch.stack([RIGHT, up, back, still])
    torch.testing.assert_close(motion.direction_cosine(paths, RIGHT), torch.tensor([1.0, 0.0, -1.0, 0.0]))
    torch.testing.assert_close(motion.speed_ratio(paths, RIGHT), torch.tensor([1.0, 1.0, 2.0, 0.0]))


def test_steps_in_which_the_reference_rests_have_no_direction():
    reference = torch.tensor([[0.0, 0.0], [0.5, 0.0], [4.5, 0.0]])
    path = torch.tensor([[[0.0, 0.0], [-5.0, 0.0], [0.0, 0.0]]])
    assert motion.direction_cosine(path, reference).item() == pytest.approx(1.0)
    with pytest.raises(ValueError, match="no direction"):
        motion.direction_cosine(path, torch.zeros(3, 2))


def test_consistency_by_hand():
    features = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [0.0, 2.0]]])
    assert motion.neighbour_consistency(features).item() == pytest.approx(0.5)  # 1 and 0
    assert motion.pairwise_consistency(features).item() == pytest.approx(1 / 3)  # 1, 0 and 0
    with pytest.raises(ValueError, match="F >= 2"):
        motion.neighbour_consistency(features[:, :1])


def test_paths_of_another_length_are_refused():
    with pytest.raises(ValueError, match="paths must be"):
        motion.trajectory_error(torch.zeros(1, 4, 2), RIGHT)
