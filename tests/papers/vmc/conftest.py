"""A made-up clip."""

import pytest
import torch

from common.sampling.clips import save_mp4


@pytest.fixture(scope="session")
def video(tmp_path_factory):
    """An mp4 of 6 frames, 40 x 64 px: a bright square that moves to the right."""
    frames = torch.full((3, 6, 40, 64), -0.5)
    for i in range(6):
        frames[:, i, 12:28, 4 + 4 * i : 20 + 4 * i] = 0.8
    path = tmp_path_factory.mktemp("videos") / "square.mp4"
    save_mp4(frames, path, fps=8)
    return path
