"""Where two entities stand for each named relation. The first is small and the second large, so that a picture has
one reading: "a duck under a chair" and "a chair on top of a duck" look different."""

from dataclasses import replace

import numpy as np

from common.toyworld.geometry import bounds
from common.toyworld.scene import Entity, Placed
from common.toyworld.vocabulary import PUPPET_CLASSES

CONTAINERS = ("mug", "car", "house", "teapot")
_SMALL = 0.62


def _box(entity: Entity, scale: float = 1.0, yaw_deg: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    return bounds(Placed(entity, yaw_deg=yaw_deg, scale=scale).parts())


def place(
    relation: str, first: Entity, second: Entity, yaws_deg: tuple[float, float] = (0.0, 0.0)
) -> tuple[Placed, ...]:
    """Place ``first`` in the named relation to ``second``; the camera is expected near azimuth 0.

    Args: relation: one of vocabulary.RELATIONS or HELD_OUT_RELATIONS. yaws_deg: turn of each entity about its own axis.
    Raises: ValueError for an unknown relation, "inside" without a container, "carrying" without a puppet.
    """
    ya, yb = yaws_deg
    a_low, a_high = _box(first, _SMALL, ya)
    b_low, b_high = _box(second, 1.0, yb)
    a_width, b_width = a_high[0] - a_low[0], b_high[0] - b_low[0]
    a_height, b_height = a_high[1], b_high[1]
    large = Placed(second, yaw_deg=yb)

    def small(x=0.0, y=0.0, z=0.0, **more) -> Placed:
        return Placed(first, (x, y, z), more.pop("yaw_deg", ya), more.pop("scale", _SMALL), **more)

    if relation == "on top of":
        return small(y=b_height - 0.02), large
    if relation == "under":
        return small(), replace(large, offset=(0, a_height * 0.97, 0))
    if relation == "next to":
        gap = (a_width / _SMALL * 0.85 + b_width * 0.85) / 2 + 0.06
        return small(x=-gap / 2, scale=0.85), replace(large, offset=(gap / 2, 0, 0), scale=0.85)
    if relation == "inside":
        if second.noun not in CONTAINERS:
            raise ValueError(f"only {CONTAINERS} can hold something inside, got {second.noun!r}")
        return small(y=b_height - 0.5 * a_height), large
    if relation == "behind":
        return small(x=-0.32 * b_width - 0.2 * a_width, y=0.0, z=b_low[2] - 0.35, scale=0.85), replace(
            large, offset=(0.2, 0, 0)
        )
    if relation == "in front of":
        return small(x=-0.12 * b_width, z=b_high[2] - a_low[2] + 0.12, scale=0.55), large
    if relation == "carrying":
        if first.noun not in PUPPET_CLASSES:
            raise ValueError(f"only {sorted(PUPPET_CLASSES)} can carry, got {first.noun!r}")
        carrier = Placed(replace(first, pose="holding"), yaw_deg=ya)
        load = 0.42 / max(b_height, b_width)
        hands = 0.52 * bounds(carrier.parts())[1][1]
        return carrier, Placed(second, (0.0, hands - 0.15 * load, 0.40), yb, load)
    if relation == "hanging below":
        lifted = replace(large, offset=(0, a_height + 0.1, 0), scale=0.8)
        return small(y=0.08, roll_deg=180.0), lifted
    if relation == "leaning on":
        return small(x=-b_width / 2 - 0.28, y=0.02, roll_deg=-34.0, scale=0.8), large
    if relation == "riding":
        return small(y=b_height * 0.72, yaw_deg=90.0, scale=0.5), replace(large, yaw_deg=90.0)
    if relation == "balanced upside down on":
        return small(y=b_height - 0.02, roll_deg=180.0), large
    if relation == "surrounding":
        reach = max(b_width, b_high[2] - b_low[2]) / 2 + 0.28
        angles = np.radians([-70, -25, 25, 70])
        ring = [small(x=1.15 * reach * np.sin(t), z=reach * np.cos(t), scale=0.36) for t in angles]
        return (*ring, large)
    if relation == "back to back":
        gap = 0.38
        return small(x=-gap, scale=0.85, yaw_deg=-90.0), Placed(second, (gap, 0, 0), 90.0, 0.85)
    if relation == "face to face":
        gap = 0.52
        return small(x=-gap, scale=0.85, yaw_deg=90.0), Placed(second, (gap, 0, 0), -90.0, 0.85)
    if relation == "towering over":
        return Placed(first, (-0.15, 0, -0.5), ya, 1.7), Placed(second, (0.62, 0, 0.55), yb, 0.36)
    if relation == "sandwiched between":
        gap = (a_width + 0.62 * b_width) / 2 + 0.05
        sides = [Placed(second, (s * gap, 0, 0), yb, 0.62) for s in (-1, 1)]
        return small(), *sides
    if relation == "orbiting above":
        ring = [
            small(x=0.6 * np.sin(t), y=b_height + 0.22, z=0.35 * np.cos(t), scale=0.3) for t in np.radians([-90, 0, 90])
        ]
        return (*ring, large)
    raise ValueError(f"unknown relation {relation!r}")
