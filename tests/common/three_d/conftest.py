"""One thread, and a field whose truth is known."""

import pytest
import torch
import torch.nn.functional as F

from common.three_d.fields import DENSITY_SCALE, PointField


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Ball(PointField):
    """A ball of radius 0.4 in the middle of the box, red where x > 0 and blue elsewhere."""

    def raw_at(self, points):
        half = (self.aabb[1] - self.aabb[0])[0] / 2
        inside = 0.4 - (points * half).norm(dim=-1, keepdim=True)
        red = torch.where(points[:, :1] > 0, 9.0, -9.0)
        return torch.cat([400 * inside, red, torch.full_like(red, -9.0), -red], -1)


@pytest.fixture
def ball() -> Ball:
    assert DENSITY_SCALE * F.softplus(torch.tensor(400 * 0.1)) > 100  # 0.1 within, it is opaque
    return Ball()
