"""Clips: a scene moved by a named motion of its first entity or of the camera, with the true trajectory."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from common.toyworld.render import render
from common.toyworld.scene import Camera, Scene
from common.toyworld.vocabulary import HELD_OUT_MOTIONS, MOTIONS


@dataclass(frozen=True)
class Change:
    """What a motion adds at one moment: the entity's shift (entity heights, camera's right / up / towards it), turns in
    degrees, scale; and the camera's azimuth and elevation in degrees and factor on its distance."""

    right: float = 0.0
    up: float = 0.0
    near: float = 0.0
    yaw_deg: float = 0.0
    roll_deg: float = 0.0
    pitch_deg: float = 0.0
    scale: float = 1.0
    azimuth_deg: float = 0.0
    elevation_deg: float = 0.0
    distance: float = 1.0


def _bump(t: float, times: int = 1) -> float:
    """|sin|: 0 at the start and end of each of ``times`` hops."""
    return abs(float(np.sin(np.pi * times * t)))


_WAVE = 2 * np.pi
_CHANGES: dict[str, Callable[[float], Change]] = {
    "still": lambda t: Change(),
    "moving left": lambda t: Change(right=0.5 - t),
    "moving right": lambda t: Change(right=t - 0.5),
    "jumping": lambda t: Change(up=0.5 * _bump(t, 2)),
    "spinning": lambda t: Change(yaw_deg=360 * t),
    "growing": lambda t: Change(scale=0.6 + 0.6 * t),
    "shrinking": lambda t: Change(scale=1.2 - 0.6 * t),
    "zooming in": lambda t: Change(distance=1.45 - 0.65 * t),
    "zooming out": lambda t: Change(distance=0.8 + 0.65 * t),
    "orbiting camera": lambda t: Change(azimuth_deg=100 * (t - 0.5)),
    "zigzag": lambda t: Change(right=t - 0.5, up=0.35 * (1 - abs((4 * t) % 2 - 1))),
    "figure eight": lambda t: Change(right=0.5 * np.sin(_WAVE * t), up=0.25 + 0.25 * np.sin(2 * _WAVE * t)),
    "somersault": lambda t: Change(right=0.8 * (t - 0.5), up=0.5 * _bump(t), roll_deg=-360 * t),
    "pendulum": lambda t: Change(roll_deg=40 * np.sin(_WAVE * t), right=-0.35 * np.sin(_WAVE * t), up=0.1),
    "spiral up": lambda t: Change(
        right=0.35 * np.sin(2 * _WAVE * t), near=0.35 * np.cos(2 * _WAVE * t), up=0.8 * t, yaw_deg=360 * t
    ),
    "shaking": lambda t: Change(right=0.12 * np.sin(4 * _WAVE * t), roll_deg=8 * np.sin(4 * _WAVE * t)),
    "bouncing across": lambda t: Change(right=1.1 * (t - 0.5), up=0.45 * _bump(t, 3)),
    "pulsing": lambda t: Change(scale=0.9 + 0.3 * np.sin(2 * _WAVE * t)),
    "dolly and rise": lambda t: Change(distance=1.4 - 0.5 * t, elevation_deg=35 * t),
    "hop and turn": lambda t: Change(up=0.4 * _bump(t, 2), yaw_deg=180 * t),
    "swoop": lambda t: Change(right=1.0 * (t - 0.5), up=0.9 * (2 * t - 1) ** 2),
    "tumble": lambda t: Change(right=1.0 * (t - 0.5), roll_deg=-540 * t, pitch_deg=120 * t),
}
assert tuple(_CHANGES) == (*MOTIONS, *HELD_OUT_MOTIONS)


def _moved(scene: Scene, change: Change) -> Scene:
    first = scene.placed[0]
    right, _, back = scene.camera.axes()
    shift = change.right * right + change.near * back + np.array([0.0, change.up, 0.0])
    placed = replace(
        first,
        offset=tuple(np.asarray(first.offset) + shift),
        yaw_deg=first.yaw_deg + change.yaw_deg,
        roll_deg=first.roll_deg + change.roll_deg,
        pitch_deg=first.pitch_deg + change.pitch_deg,
        scale=first.scale * change.scale,
    )
    camera = Camera(
        scene.camera.target, scene.camera.azimuth_deg + change.azimuth_deg,
        scene.camera.elevation_deg + change.elevation_deg, scene.camera.distance * change.distance,
        scene.camera.fov_deg,
    )  # fmt: skip
    return replace(scene, placed=(placed, *scene.placed[1:]), camera=camera)


@dataclass(frozen=True)
class Clip:
    """A film with its truth.

    frames: (F, 3, H, W) in [0, 1].   trajectory: (F, 2) the first entity's centre in pixels, x right, y down.
    areas: (F,) share of the picture that shows the first entity, in [0, 1].
    """

    frames: Tensor
    trajectory: np.ndarray
    areas: np.ndarray
    motion: str


def render_clip(scene: Scene, motion: str, *, num_frames: int = 8, resolution: int = 64) -> Clip:
    """Film a scene.

    Args: motion: one of vocabulary.MOTIONS or HELD_OUT_MOTIONS. num_frames: at least 2, evenly spaced in time.
    Raises: ValueError for an unknown motion or fewer than two frames.
    """
    if motion not in _CHANGES:
        raise ValueError(f"unknown motion {motion!r}; choose from {', '.join(_CHANGES)}")
    if num_frames < 2:
        raise ValueError(f"a clip needs at least 2 frames, got {num_frames}")
    scenes = [_moved(scene, _CHANGES[motion](k / (num_frames - 1))) for k in range(num_frames)]
    pictures = render(scenes, resolution=resolution)
    own = [[i for i, (entity, _) in enumerate(names) if entity == 0] for names in pictures.part_names]
    centers = [points[rows].mean(0) for points, rows in zip(pictures.keypoints, own, strict=True)]
    areas = (pictures.masks == 1).double().mean((1, 2)).numpy()
    return Clip(pictures.images, np.stack(centers), areas, motion)
