"""Named poses of the puppets (person, bear, robot): limb directions and how the figure is rooted.

Directions are for the figure's own frame: x outward from the body (mirrored for the right side), y up, z forward.
"""

from dataclasses import dataclass

import numpy as np

Vector = tuple[float, float, float]
DOWN, UP, FORWARD, OUT = (0.12, -1.0, 0.0), (0.1, 1.0, 0.0), (0.0, -0.1, 1.0), (1.0, 0.0, 0.0)


@dataclass(frozen=True)
class Pose:
    """Unit-free limb directions: (upper, lower) for each arm and leg; left is the figure's own left (+x)."""

    left_arm: tuple[Vector, Vector] = (DOWN, DOWN)
    right_arm: tuple[Vector, Vector] = (DOWN, DOWN)
    left_leg: tuple[Vector, Vector] = (DOWN, DOWN)
    right_leg: tuple[Vector, Vector] = (DOWN, DOWN)
    lean_deg: float = 0.0  # upper body forward about the hips
    roll_deg: float = 0.0  # whole figure about z: 180 = on the head, 90 = lying on its side
    lift: float = 0.0  # above the ground, in figure heights


_LEG = (0.08, -1.0, 0.0)
_RAISED = (0.35, 1.0, 0.0)
POSES: dict[str, Pose] = {
    "standing": Pose(),
    "waving": Pose(left_arm=((1.0, 0.25, 0.0), (0.25, 1.0, 0.0))),
    "arms raised": Pose(left_arm=(_RAISED, _RAISED), right_arm=(_RAISED, _RAISED)),
    "sitting": Pose(left_leg=((0.3, -0.05, 1.0), (0.1, -0.3, 1.0)), right_leg=((0.3, -0.05, 1.0), (0.1, -0.3, 1.0))),
    "running": Pose(
        left_arm=((0.15, -0.6, 0.8), (0.0, 0.7, 0.7)), right_arm=((0.15, -0.6, -0.8), (0.0, -0.7, 0.6)),
        left_leg=((0.0, -0.7, -0.75), (0.0, -0.4, -0.9)), right_leg=((0.0, -0.5, 0.9), (0.0, -1.0, -0.1)),
        lean_deg=15.0,
    ),
    "hands on hips": Pose(left_arm=((1.0, -0.6, 0.0), (-1.0, -0.5, 0.2)),
                          right_arm=((1.0, -0.6, 0.0), (-1.0, -0.5, 0.2))),
    "pointing": Pose(left_arm=((1.0, 0.05, 0.0), (1.0, 0.05, 0.0))),
    "kneeling": Pose(left_leg=((0.1, -1.0, 0.1), (0.0, -0.1, -1.0)), right_leg=((0.1, -0.1, 1.0), (0.0, -1.0, 0.0))),
    # held out: never in a training image
    "t-pose": Pose(left_arm=(OUT, OUT), right_arm=(OUT, OUT)),
    "high kick": Pose(left_leg=((0.9, 0.65, 0.1), (0.9, 0.65, 0.1)), left_arm=((0.8, -0.6, 0.0), (0.8, -0.6, 0.0)),
                      right_arm=(_RAISED, _RAISED)),
    "bow": Pose(lean_deg=80.0, left_arm=((0.1, -0.2, -1.0),) * 2, right_arm=((0.1, -0.2, -1.0),) * 2),
    "handstand": Pose(left_arm=(UP, UP), right_arm=(UP, UP), roll_deg=180.0),
    "splits": Pose(left_leg=((1.0, -0.05, 0.0),) * 2, right_leg=((1.0, -0.05, 0.0),) * 2, left_arm=(_RAISED, _RAISED),
                   right_arm=(_RAISED, _RAISED)),
    "star jump": Pose(left_arm=((1.0, 0.8, 0.0),) * 2, right_arm=((1.0, 0.8, 0.0),) * 2,
                      left_leg=((0.8, -1.0, 0.0),) * 2, right_leg=((0.8, -1.0, 0.0),) * 2, lift=0.22),
    "lying": Pose(roll_deg=90.0),
    "lunge": Pose(left_leg=((1.0, -0.45, 0.0), (0.15, -1.0, 0.0)), right_leg=((0.9, -0.7, 0.0),) * 2,
                  left_arm=((1.0, 0.0, 0.0),) * 2, right_arm=((0.3, 1.0, 0.0),) * 2),
    # used by relations: both hands hold something in front
    "holding": Pose(left_arm=((0.15, -0.75, 0.6), (-0.25, 0.0, 1.0)),
                    right_arm=((0.15, -0.75, 0.6), (-0.25, 0.0, 1.0))),
}  # fmt: skip


def limb(start, directions: tuple[Vector, Vector], lengths: tuple[float, float], side: int) -> list[np.ndarray]:
    """Joint positions of one limb, [start, middle, end]; side +1 = left (x outward is +x), -1 = right."""
    points = [np.asarray(start, float)]
    for direction, length in zip(directions, lengths, strict=True):
        vector = np.asarray(direction, float) * np.array([side, 1.0, 1.0])
        points.append(points[-1] + length * vector / np.linalg.norm(vector))
    return points


def blend(first: Pose, second: Pose, weight: float) -> Pose:
    """Linear blend of two poses, weight in [0, 1]; limb directions are normalised when used."""

    def mix(a, b):
        return tuple(
            tuple((1 - weight) * x + weight * y for x, y in zip(u, v, strict=True)) for u, v in zip(a, b, strict=True)
        )

    limbs = {
        name: mix(getattr(first, name), getattr(second, name))
        for name in ("left_arm", "right_arm", "left_leg", "right_leg")
    }
    angles = {
        name: (1 - weight) * getattr(first, name) + weight * getattr(second, name)
        for name in ("lean_deg", "roll_deg", "lift")
    }
    return Pose(**limbs, **angles)
