"""Cameras against the toy world's renderer and key points, and both ways between conventions."""

import numpy as np
import pytest
import torch

from common.three_d.cameras import (
    CENTER,
    CameraRange,
    angles_of,
    from_threestudio,
    from_toyworld,
    orbit_cameras,
    random_cameras,
    to_threestudio,
    to_toyworld,
)
from common.three_d.render import camera_rays
from common.toyworld.benchmark import objects_3d
from common.toyworld.render import _rays
from common.toyworld.scene import Placed, Scene


def test_points_are_seen_where_the_toy_world_sees_them():
    """Centres of parts, projected by our cameras' matrices, against the renderer's key points."""
    item = objects_3d(1)[0]
    cameras = from_toyworld(item.held_out.cameras)
    centers = torch.tensor(np.stack([part.center for part in Placed(item.entity).parts()]), dtype=torch.float32)
    for camera_to_world, focal, expected in zip(
        cameras.camera_to_worlds, cameras.fx[:, 0], item.held_out.keypoints, strict=True
    ):
        seen = (centers - camera_to_world[:, 3]) @ camera_to_world[:, :3]  # x right, y up, z back
        pixels = torch.stack([32 + focal * seen[:, 0] / -seen[:, 2], 32 - focal * seen[:, 1] / -seen[:, 2]], -1)
        np.testing.assert_allclose(pixels.numpy(), expected, atol=2e-3)


def test_rays_are_the_toy_worlds():
    item = objects_3d(1)[0]
    scenes = [Scene((Placed(item.entity),), camera=camera) for camera in item.held_out.cameras[:3]]
    eyes, directions = _rays(scenes, 64, "cpu")
    rays = camera_rays(from_toyworld(item.held_out.cameras[:3]))
    torch.testing.assert_close(rays.directions.view(3, -1, 3), directions, rtol=0, atol=2e-6)
    torch.testing.assert_close(rays.origins.view(3, -1, 3)[:, 0], eyes, rtol=0, atol=1e-6)


def test_angles_come_back():
    azimuths, elevations = torch.tensor([0.0, 90.0, 200.0, 359.0]), torch.tensor([0.0, 14.0, -30.0, 80.0])
    cameras = orbit_cameras(azimuths, elevations, 2.5, resolution=32)
    found = angles_of(cameras)
    for values, expected in zip(found, (azimuths, elevations, torch.full((4,), 2.5)), strict=True):
        torch.testing.assert_close(values, expected, rtol=0, atol=1e-3)
    assert cameras.camera_to_worlds[0, :, 3].tolist() == pytest.approx([0, 0.5, 2.5])  # the front is +z
    assert cameras.camera_to_worlds[1, 0, 3] > 2.4  # 90 degrees: the +x side


def test_toy_world_cameras_there_and_back():
    cameras = orbit_cameras([10.0, 130.0], [5.0, 40.0], [2.0, 3.0], 40.0, resolution=48)
    again = from_toyworld(to_toyworld(cameras), resolution=48)
    torch.testing.assert_close(again.camera_to_worlds, cameras.camera_to_worlds, rtol=0, atol=1e-5)
    torch.testing.assert_close(again.fx, cameras.fx)


def test_threestudio_convention():
    """z up, front along +x: azimuth 0 stands at +x; elevation goes to z. Matrices go there and back."""
    ours = orbit_cameras([0.0, 90.0], [0.0, 30.0], 2.0, target=(0, 0, 0)).camera_to_worlds
    theirs = to_threestudio(ours)
    torch.testing.assert_close(theirs[0, :3, 3], torch.tensor([2.0, 0.0, 0.0]), rtol=0, atol=1e-6)
    torch.testing.assert_close(theirs[1, :3, 3], torch.tensor([0.0, 3**0.5, 1.0]), rtol=0, atol=1e-6)
    assert torch.linalg.det(theirs[:, :3, :3]).tolist() == pytest.approx([1, 1], abs=1e-5)
    torch.testing.assert_close(from_threestudio(theirs), ours)


def test_random_cameras_keep_to_their_range():
    ranges = CameraRange(jitter=0.0)
    cameras = random_cameras(400, ranges, torch.Generator().manual_seed(0))
    azimuths, elevations, distances = angles_of(cameras, CENTER)
    assert elevations.min() >= -10.01 and elevations.max() <= 60.01
    assert distances.min() >= 2.59 and distances.max() <= 3.21
    assert torch.histc(azimuths, 4, 0, 360).min() > 60
    again = random_cameras(400, ranges, torch.Generator().manual_seed(0))
    assert torch.equal(again.camera_to_worlds, cameras.camera_to_worlds)
