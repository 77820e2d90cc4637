"""A mesh as one HTML file to turn around with the mouse, which opens offline."""

from pathlib import Path

import trimesh
from trimesh.viewer.notebook import scene_to_html

from common.io import atomic_write_text


def save_viewer(mesh: trimesh.Trimesh, path: str | Path) -> None:
    """Write the page, with viewer and mesh inside, whole or not at all."""
    scene = trimesh.Scene(mesh)
    # The camera of our azimuth 20, elevation 15: in front of the object, which looks along +z.
    scene.set_camera(angles=(-0.26, 0.35, 0.0), distance=2.2 * mesh.scale / 2, center=mesh.bounds.mean(0))
    atomic_write_text(Path(path), scene_to_html(scene))
