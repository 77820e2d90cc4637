"""Meshes, the viewer, turntables: a ball comes back from its files."""

import math

import pytest
import torch
import trimesh

from common.data.videos import video_info
from common.three_d.background import SolidBackground
from common.three_d.fields import VoxelField
from common.three_d.mesh import extract_mesh, save_mesh
from common.three_d.viewer import save_viewer
from common.three_d.views import depth_pictures, normal_pictures, save_turntable, turntable


def test_the_mesh_of_a_ball(ball):
    mesh = extract_mesh(ball, resolution=48)
    assert mesh.is_watertight and mesh.volume == pytest.approx(4 / 3 * math.pi * 0.4**3, rel=0.1)  # faces point out
    assert mesh.bounds.mean(0) == pytest.approx([0, 0.5, 0], abs=0.02)
    colors, right = mesh.visual.vertex_colors, mesh.vertices[:, 0] > 0.05
    assert (colors[right, 0] > 250).all() and (colors[right, 2] < 5).all()


@pytest.mark.parametrize("suffix", (".glb", ".obj", ".ply"))
def test_files_hold_the_mesh(ball, tmp_path, suffix):
    mesh = extract_mesh(ball, resolution=24)
    save_mesh(mesh, tmp_path / f"ball{suffix}")
    again = trimesh.load_mesh(tmp_path / f"ball{suffix}", process=False)
    assert len(again.faces) == len(mesh.faces)
    assert again.visual.vertex_colors[:, :3].max() > 250
    with pytest.raises(ValueError, match=r"ball.stl: meshes are written as .glb"):
        save_mesh(mesh, tmp_path / "ball.stl")


def test_no_surface_is_said(ball):
    field = VoxelField(8)
    torch.nn.init.constant_(field.grid, -20.0)
    with pytest.raises(ValueError, match="no surface at density 10"):
        extract_mesh(field, resolution=16)


def test_the_viewer_needs_no_network(ball, tmp_path):
    save_viewer(extract_mesh(ball, resolution=24), tmp_path / "ball.html")
    page = (tmp_path / "ball.html").read_text()
    assert "<script src=" not in page and "three.js" in page and len(page) > 500_000


def test_a_turntable_goes_around(ball, tmp_path):
    views = turntable(ball, SolidBackground(), num_views=4, resolution=32)
    from_behind, from_front = views.rgb[2, 15], views.rgb[0, 15]
    middle = from_front[13:19]
    torch.testing.assert_close(middle.flip(0), from_behind[13:19], rtol=0, atol=0.1)  # red and blue change sides
    depths = depth_pictures(views)
    assert depths[0, 0, 0, 0] == -1 and depths[0, 0, 16, 16] > 0.5
    assert normal_pictures(views).shape == (4, 3, 32, 32)
    save_turntable(views, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "depth.gif", "normals.gif", "turntable.gif", "turntable.mp4",
    ]  # fmt: skip
    assert video_info(tmp_path / "turntable.mp4").num_frames == 4
