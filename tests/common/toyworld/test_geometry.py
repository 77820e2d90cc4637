"""Ray and primitive intersections against values derived by hand and against dense marching with the implicit shape."""

import numpy as np
import pytest
import torch

from common.toyworld.geometry import (
    BOX,
    CAPSULE,
    ELLIPSOID,
    FAR,
    FRUSTUM,
    Part,
    bounds,
    intersect,
    rod,
    rotation_matrix,
)


def hit(kind, origin, direction, size, taper=1.0):
    t, normal = intersect(
        kind,
        torch.tensor([origin], dtype=torch.float64),
        torch.tensor([direction], dtype=torch.float64),
        torch.tensor([size], dtype=torch.float64),
        torch.tensor([taper], dtype=torch.float64),
    )
    return t.item(), normal[0].tolist()


@pytest.mark.parametrize(
    ("kind", "origin", "direction", "size", "taper", "t", "normal"),
    [
        (ELLIPSOID, (0, 0, 5), (0, 0, -1), (1, 1, 2), 1.0, 3.0, (0, 0, 1)),
        (ELLIPSOID, (-6, 0, 0), (2, 0, 0), (2, 1, 1), 1.0, 2.0, (-1, 0, 0)),  # t counts in lengths of the direction
        (BOX, (3, 0.5, 0), (-1, 0, 0), (1, 2, 1), 1.0, 2.0, (1, 0, 0)),
        (BOX, (0, 10, 0), (0, -1, 0), (1, 2, 1), 1.0, 8.0, (0, 1, 0)),
        (FRUSTUM, (0, 5, 0.2), (0, -1, 0), (1, 1, 1), 0.5, 4.0, (0, 1, 0)),  # the small cap at the top
        (FRUSTUM, (0.9, -5, 0), (0, 1, 0), (1, 1, 1), 0.5, 4.0, (0, -1, 0)),  # the large cap at the bottom
        (FRUSTUM, (0, 0, 5), (0, 0, -1), (1, 1, 1), 1.0, 4.0, (0, 0, 1)),  # a cylinder
        # a cone: radius 1/2 at half height; its side rises 2 for 1 inwards, so the normal is (0, 1, 2) / sqrt 5
        (FRUSTUM, (0, 0, 5), (0, 0, -1), (1, 1, 1), 0.0, 4.5, (0, 5**-0.5, 2 * 5**-0.5)),
        (CAPSULE, (5, 0.5, 0), (-1, 0, 0), (1, 2, 1), 1.0, 4.0, (1, 0, 0)),
        (CAPSULE, (0, 9, 0), (0, -1, 0), (1, 2, 1), 1.0, 6.0, (0, 1, 0)),  # the round end
    ],
)
def test_hits_derived_by_hand(kind, origin, direction, size, taper, t, normal):
    found_t, found_normal = hit(kind, origin, direction, size, taper)
    assert found_t == pytest.approx(t, abs=1e-9)
    assert found_normal == pytest.approx(normal, abs=1e-9)


@pytest.mark.parametrize("kind", [ELLIPSOID, BOX, FRUSTUM, CAPSULE])
def test_a_ray_that_passes_by_or_points_away_misses(kind):
    assert hit(kind, (3, 0, 5), (0, 0, -1), (1, 1, 1))[0] == FAR
    assert hit(kind, (0, 0, 5), (0, 0, 1), (1, 1, 1))[0] == FAR


def inside(kind, points, size, taper):
    """Whether points are in the shape, from its definition."""
    x, y, z = np.moveaxis(points, -1, 0)
    if kind == ELLIPSOID:
        return (x / size[0]) ** 2 + (y / size[1]) ** 2 + (z / size[2]) ** 2 <= 1
    if kind == BOX:
        return (abs(x) <= size[0]) & (abs(y) <= size[1]) & (abs(z) <= size[2])
    if kind == FRUSTUM:
        share = (y / size[1] + 1) / 2
        radius = 1 + (taper - 1) * share
        return (abs(y) <= size[1]) & ((x / size[0]) ** 2 + (z / size[2]) ** 2 <= radius**2)
    return x**2 + (y - np.clip(y, -size[1], size[1])) ** 2 + z**2 <= size[0] ** 2


@pytest.mark.parametrize(
    ("kind", "taper"),
    [(ELLIPSOID, 1), (BOX, 1), (FRUSTUM, 1), (FRUSTUM, 0.3), (FRUSTUM, 0), (FRUSTUM, 1.6), (CAPSULE, 1)],
)
def test_first_hits_agree_with_marching_through_the_implicit_shape(kind, taper):
    rng = np.random.default_rng(0)
    count, size = 60, np.array([0.8, 1.1, 0.6])
    origins = rng.normal(size=(count, 3))
    origins *= 4 / np.linalg.norm(origins, axis=1, keepdims=True)
    directions = rng.uniform(-0.9, 0.9, (count, 3)) - origins
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    t, normal = intersect(
        kind, torch.tensor(origins), torch.tensor(directions), torch.tensor(size).expand(count, 3),
        torch.full((count,), float(taper), dtype=torch.float64),
    )  # fmt: skip
    steps = np.arange(0, 8, 1e-3)
    within = inside(kind, origins[:, None] + steps[:, None] * directions[:, None], size, taper)
    marched = np.where(within.any(1), steps[within.argmax(1)], FAR)
    grazing = within.sum(1) < 5  # the march may step over a corner
    assert np.abs(t.numpy() - marched)[~grazing & (marched < FAR)].max() < 2e-3
    assert (t.numpy()[~within.any(1)] > 7).mean() > 0.9
    facing = (normal.numpy() * directions).sum(1)[within.any(1)]
    assert (facing < 1e-6).all()


def test_rotations_are_right_handed_and_bounds_are_tight():
    assert rotation_matrix(y_deg=90.0) @ np.array([0, 0, 1.0]) == pytest.approx([1, 0, 0])
    assert rotation_matrix(z_deg=90.0) @ np.array([1.0, 0, 0]) == pytest.approx([0, 1, 0])
    low, high = bounds([Part(ELLIPSOID, (1, 2, 3), (1, 2, 3), rotation=rotation_matrix(y_deg=90.0))])
    assert low == pytest.approx([-2, 0, 2]) and high == pytest.approx([4, 4, 4])
    low, high = bounds([rod((0, 0, 0), (2, 0, 0), 0.5, "main", "arm")])
    assert low == pytest.approx([-0.5, -0.5, -0.5]) and high == pytest.approx([2.5, 0.5, 0.5])
