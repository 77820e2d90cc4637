"""Pictures of a field: sides, turntables, depth and normal maps; and all that is kept of an object."""

from pathlib import Path

import torch
from torch import Tensor, nn

from common.sampling.clips import save_gif, save_mp4
from common.three_d.cameras import CENTER, UP, orbit_cameras
from common.three_d.fields import PointField
from common.three_d.mesh import extract_mesh, save_mesh
from common.three_d.render import Rendering, render
from common.three_d.shading import Light, ShadingMode
from common.three_d.viewer import save_viewer

FPS = 12.0
SIDE_ELEVATION, SIDE_DISTANCE = 15.0, 2.5  # of `side_views`: degrees, object heights


@torch.no_grad()
def side_views(
    field: PointField, background: nn.Module, count: int, *, light: ShadingMode = "albedo", resolution: int = 64,
    num_samples: int = 64,
) -> Rendering:  # fmt: skip
    """From evenly spaced sides, the front first, with normals, seen as in training.

    Args: light: "albedo", or "lit" or "textureless" with a light above the camera.
    """
    azimuths = torch.arange(count) * 360 / count
    cameras = orbit_cameras(azimuths, SIDE_ELEVATION, SIDE_DISTANCE, resolution=resolution).to(field.aabb.device)
    positions = cameras.camera_to_worlds[..., 3] + torch.tensor(UP, device=field.aabb.device)
    return render(
        field, cameras, background=background, num_samples=num_samples, light=Light(positions, light),
        with_normals=True,
    )  # fmt: skip


@torch.no_grad()
def turntable(
    field: PointField, background: nn.Module, *, num_views: int = 24, elevation_deg: float = 15.0,
    distance: float = 2.9, resolution: int = 64, num_samples: int = 64,
) -> Rendering:  # fmt: skip
    """Once around the object from its front, with normals, as light as the field's colours are."""
    azimuths = torch.arange(num_views) * 360 / num_views
    views = []
    for azimuth in azimuths:  # one at a time, for the memory
        camera = orbit_cameras(azimuth[None], elevation_deg, distance, resolution=resolution, target=CENTER)
        camera = camera.to(field.aabb.device)
        views.append(render(field, camera, background=background, num_samples=num_samples, with_normals=True))
    parts = ("rgb", "opacity", "depth", "normals", "orientation", "weights")
    joined = {name: torch.cat([getattr(view, name) for view in views]) for name in parts}
    return Rendering(**joined, samples=views[0].samples)


def depth_pictures(rendering: Rendering) -> Tensor:
    """Near is light, far is dark, what is empty is black; (B,3,H,W) in [-1,1]."""
    seen = rendering.opacity > 0.5
    if not seen.any():
        return -torch.ones_like(rendering.images())
    depths = rendering.depth[seen]
    near, far = depths.min(), depths.max()
    light = 1 - 0.8 * (rendering.depth - near) / (far - near).clamp(min=1e-6)
    picture = torch.where(seen, light * 2 - 1, -1.0)
    return picture.permute(0, 3, 1, 2).expand(-1, 3, -1, -1)


def normal_pictures(rendering: Rendering) -> Tensor:
    """x, y, z of world normals as red, green, blue; empty is grey; (B,3,H,W) in [-1,1]."""
    return rendering.normals.permute(0, 3, 1, 2)


def save_turntable(rendering: Rendering, folder: str | Path, *, upscale: int = 2) -> None:
    """Write turntable.mp4 and turntable.gif of the colours, and depth.gif and normals.gif."""
    folder = Path(folder)
    clips = {
        "turntable": rendering.images(), "depth": depth_pictures(rendering), "normals": normal_pictures(rendering)
    }  # fmt: skip
    for name, pictures in clips.items():
        save_gif(pictures.transpose(0, 1), folder / f"{name}.gif", FPS, upscale=upscale)
    save_mp4(rendering.images().transpose(0, 1), folder / "turntable.mp4", FPS, upscale=upscale)


def save_object(field: PointField, background: nn.Module, folder: str | Path) -> None:
    """Turntable, mesh.glb and viewer.html. A field without a surface has no mesh, which is said."""
    folder = Path(folder)
    save_turntable(turntable(field, background), folder)
    try:
        mesh = extract_mesh(field)
    except ValueError as error:
        print(f"no mesh.glb and viewer.html: {error}")
        return
    save_mesh(mesh, folder / "mesh.glb")
    save_viewer(mesh, folder / "viewer.html")
