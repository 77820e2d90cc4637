"""Articulated puppets: person, bear, robot. One skeleton; limbs are capsules (boxes for the robot's trunk)."""

from dataclasses import dataclass

import numpy as np

from common.toyworld.geometry import BOX, CAPSULE, ELLIPSOID, FRUSTUM, Part, bounds, rod, rotation_matrix
from common.toyworld.poses import Pose, limb
from common.toyworld.vocabulary import EXPRESSIONS, HAIR_STYLES


@dataclass(frozen=True)
class Face:
    """A face identity; what captions can say (hair style, glasses, beard) and what they cannot (the numbers)."""

    skin: tuple[float, float, float]
    hair: tuple[float, float, float]
    hair_style: str = "short"
    eye: tuple[float, float, float] = (0.2, 0.35, 0.6)
    glasses: bool = False
    beard: bool = False
    width: float = 0.5  # all in [0, 1]
    nose: float = 0.5
    eye_spacing: float = 0.5
    brow: float = 0.5

    def __post_init__(self) -> None:
        if self.hair_style not in HAIR_STYLES:
            raise ValueError(f"hair_style must be one of {HAIR_STYLES}, got {self.hair_style!r}")


@dataclass(frozen=True)
class Skeleton:
    """Lengths of a puppet in units of its standing height before scaling."""

    leg: float
    trunk: float
    arm: float
    limb_radius: float
    shoulder: float
    hip: float
    head: float


def _rooted(parts: list[Part], pose: Pose) -> list[Part]:
    """Turn the figure about its middle and stand it on the ground."""
    if pose.roll_deg:
        parts = [part.moved(rotation=rotation_matrix(z_deg=pose.roll_deg)) for part in parts]
    low, _ = bounds(parts)
    return [part.moved((0, pose.lift - low[1], 0)) for part in parts]


def assemble(skeleton: Skeleton, pose: Pose, trunk: list[Part], head: list[Part], slots: dict[str, str]) -> list[Part]:
    """Legs, arms and a given trunk and head around the hips at the origin.

    Args:
        trunk: parts relative to the hip centre, upright. head: parts relative to the head centre.
        slots: colour slots of "arm", "hand", "leg", "foot".
    """
    parts: list[Part] = []
    for side, directions in ((1, pose.left_leg), (-1, pose.right_leg)):
        hip, knee, foot = limb((side * skeleton.hip, 0, 0), directions, (skeleton.leg / 2, skeleton.leg / 2), side)
        parts += [
            rod(hip, knee, skeleton.limb_radius * 1.15, slots["leg"], "leg"),
            rod(knee, foot, skeleton.limb_radius * 1.1, slots["leg"], "leg"),
        ]
        parts.append(
            Part(
                ELLIPSOID, foot + [0, 0, 0.04], np.array([1.25, 0.9, 1.9]) * skeleton.limb_radius, slots["foot"], "foot"
            )
        )
    upper = list(trunk)
    for side, directions in ((1, pose.left_arm), (-1, pose.right_arm)):
        start = (side * skeleton.shoulder, skeleton.trunk * 0.9, 0)
        shoulder, elbow, hand = limb(start, directions, (skeleton.arm / 2, skeleton.arm / 2), side)
        upper += [
            rod(shoulder, elbow, skeleton.limb_radius, slots["arm"], "arm"),
            rod(elbow, hand, skeleton.limb_radius * 0.9, slots["arm"], "arm"),
        ]
        upper.append(Part(ELLIPSOID, hand, np.full(3, skeleton.limb_radius * 1.25), slots["hand"], "hand"))
    neck = skeleton.trunk + skeleton.head * 0.95
    upper += [part.moved((0, neck, 0)) for part in head]
    lean = rotation_matrix(x_deg=pose.lean_deg)
    return _rooted(parts + [part.moved(rotation=lean) for part in upper], pose)


def bear(p: np.ndarray, pose: Pose) -> list[Part]:
    head, fat = 0.185 + 0.04 * p[0], 0.18 + 0.05 * p[1]
    skeleton = Skeleton(0.26 + 0.06 * p[2], 0.36, 0.30 + 0.06 * p[3], 0.075, fat * 0.85, 0.11, head)
    trunk = [
        Part(ELLIPSOID, (0, 0.17, 0), (fat, 0.24, fat * 0.9), "main", "body", None, 1.0, True),
        Part(ELLIPSOID, (0, 0.15, fat * 0.55), (fat * 0.6, 0.15, fat * 0.45), "second", "belly"),
    ]
    ear = 0.07 + 0.03 * p[4]
    face = [
        Part(ELLIPSOID, (0, 0, 0), (head * 1.05, head, head), "main", "head"),
        *[Part(ELLIPSOID, (s * head * 0.75, head * 0.8, 0), (ear, ear, 0.05), "second", "ear") for s in (-1, 1)],
        Part(ELLIPSOID, (0, -head * 0.25, head * 0.85), (head * 0.45, head * 0.35, head * 0.35), "second", "snout"),
        Part(ELLIPSOID, (0, -head * 0.1, head * 1.2), (0.04, 0.03, 0.03), "ink", "nose"),
        *[Part(ELLIPSOID, (s * head * 0.4, head * 0.2, head * 0.88), np.full(3, 0.035), "ink", "eye") for s in (-1, 1)],
    ]
    return assemble(skeleton, pose, trunk, face, {"arm": "main", "hand": "second", "leg": "main", "foot": "second"})


def robot(p: np.ndarray, pose: Pose) -> list[Part]:
    head, wide = 0.15 + 0.04 * p[0], 0.19 + 0.05 * p[1]
    skeleton = Skeleton(0.32 + 0.06 * p[2], 0.40, 0.36 + 0.06 * p[3], 0.055, wide + 0.05, 0.11, head)
    trunk = [
        Part(BOX, (0, 0.20, 0), (wide, 0.21, 0.15), "main", "body", None, 1.0, True),
        Part(BOX, (0, 0.24, 0.15), (wide * 0.55, 0.09, 0.02), "second", "panel"),
        Part(ELLIPSOID, (0, 0.08, 0.15), (0.05, 0.05, 0.03), "accent", "button"),
    ]
    antenna = 0.10 + 0.08 * p[4]
    face = [
        Part(BOX, (0, 0, 0), (head * 1.15, head * 0.9, head * 0.95), "second", "head"),
        *[
            Part(ELLIPSOID, (s * head * 0.5, head * 0.15, head * 0.95), (0.055, 0.055, 0.03), "accent", "eye")
            for s in (-1, 1)
        ],
        Part(BOX, (0, -head * 0.5, head * 0.95), (head * 0.6, 0.02, 0.02), "ink", "mouth"),
        rod((0, head * 0.9, 0), (0, head * 0.9 + antenna, 0), 0.025, "ink", "antenna"),
        Part(ELLIPSOID, (0, head * 0.9 + antenna, 0), np.full(3, 0.055), "accent", "antenna"),
    ]
    return assemble(skeleton, pose, trunk, face, {"arm": "second", "hand": "ink", "leg": "second", "foot": "ink"})


def head_parts(face: Face, radius: float, expression: str = "neutral") -> list[Part]:
    """A head of half height ``radius`` around the origin, facing +z; slots skin, hair, eye, ink, ivory, mouth."""
    if expression not in EXPRESSIONS:
        raise ValueError(f"expression must be one of {EXPRESSIONS}, got {expression!r}")
    wide, r = radius * (0.70 + 0.22 * face.width), radius
    apart = wide * (0.34 + 0.16 * face.eye_spacing)
    eye_y, front = 0.10 * r, 0.84 * r
    parts = [
        Part(ELLIPSOID, (0, 0, 0), (wide, r, r * 0.88), "skin", "head"),
        *[Part(ELLIPSOID, (s * wide, 0, 0), (0.08 * r, 0.16 * r, 0.10 * r), "skin", "ear") for s in (-1, 1)],
        Part(
            ELLIPSOID,
            (0, -0.14 * r, front + 0.04 * r),
            ((0.07 + 0.06 * face.nose) * r, (0.12 + 0.08 * face.nose) * r, 0.12 * r),
            "nose",
            "nose",
        ),
    ]
    tilt = {"angry": -24.0, "sad": 22.0}.get(expression, 0.0)
    lift = {"surprised": 0.14, "angry": -0.05}.get(expression, 0.0)
    for s in (-1, 1):
        eye = (s * apart, eye_y, front - 0.10 * r)
        opened = 1.35 if expression == "surprised" else 1.0
        if face.glasses:
            parts.append(
                Part(ELLIPSOID, (s * apart, eye_y, front - 0.07 * r), (0.26 * r, 0.23 * r, 0.10 * r), "ink", "glasses")
            )
            parts.append(
                Part(
                    ELLIPSOID, (s * apart, eye_y, front - 0.04 * r), (0.20 * r, 0.17 * r, 0.10 * r), "ivory", "glasses"
                )
            )
        parts.append(Part(ELLIPSOID, eye, (0.15 * r, 0.11 * opened * r, 0.14 * r), "ivory", "eye"))
        parts.append(
            Part(ELLIPSOID, (s * apart, eye_y, front + 0.03 * r), (0.08 * r, 0.085 * r, 0.06 * r), "eye", "eye")
        )
        turn = rotation_matrix(z_deg=-s * tilt)
        brow_y = eye_y + (0.26 + lift) * r
        thick = (0.03 + 0.03 * face.brow) * r
        parts.append(
            Part(BOX, (s * apart, brow_y, front - 0.02 * r), (0.15 * r, thick, 0.06 * r), "hair", "brow", turn)
        )
    if face.beard:
        parts.append(Part(ELLIPSOID, (0, -0.62 * r, 0.18 * r), (wide * 0.86, 0.46 * r, 0.72 * r), "hair", "beard"))
    return parts + _mouth(expression, r, face.beard) + _hair(face.hair_style, wide, r)


def _mouth(expression: str, r: float, beard: bool) -> list[Part]:
    y, z = -0.50 * r, (0.78 if not beard else 0.86) * r
    if expression == "surprised":
        return [Part(ELLIPSOID, (0, y, z), (0.12 * r, 0.17 * r, 0.08 * r), "mouth", "mouth")]
    bend = {"smiling": 0.14, "sad": -0.14}.get(expression, 0.0) * r
    width = (0.30 if expression in ("smiling", "sad") else 0.20) * r
    thick = 0.055 * r
    return [rod((s * width, y + bend, z - 0.06 * r), (0, y - bend * 0.4, z), thick, "mouth", "mouth") for s in (-1, 1)]


def _hair(style: str, wide: float, r: float) -> list[Part]:
    if style == "bald":
        return []
    cap = Part(ELLIPSOID, (0, 0.22 * r, -0.16 * r), (wide * 1.10, r * 0.90, r * 0.88), "hair", "hair")
    if style == "short":
        return [cap]
    if style == "long":
        sides = [
            Part(ELLIPSOID, (s * wide * 0.92, -0.45 * r, -0.15 * r), (0.24 * r, 0.95 * r, 0.40 * r), "hair", "hair")
            for s in (-1, 1)
        ]
        return [
            cap,
            *sides,
            Part(ELLIPSOID, (0, -0.40 * r, -0.45 * r), (wide * 0.95, 0.95 * r, 0.45 * r), "hair", "hair"),
        ]
    if style == "curly":
        angles = np.radians([-80, -40, 0, 40, 80])
        curls = [
            Part(
                ELLIPSOID,
                (np.sin(a) * wide * 1.1, 0.35 * r + np.cos(a) * 0.65 * r, 0.05 * r),
                np.full(3, 0.36 * r),
                "hair",
                "hair",
            )
            for a in angles
        ]
        return [cap, *curls]
    if style == "bun":
        return [cap, Part(ELLIPSOID, (0, 1.22 * r, -0.1 * r), np.full(3, 0.36 * r), "hair", "hair")]
    return [Part(ELLIPSOID, (0, 0.85 * r, -0.15 * r), (0.15 * r, 0.55 * r, 0.80 * r), "hair", "hair")]  # mohawk


def person(
    face: Face,
    pose: Pose,
    *,
    garment: str = "shirt",
    logo: bool = False,
    build: float = 0.5,
    expression: str = "neutral",
) -> list[Part]:
    """A full figure; ``build`` in [0, 1], slim to broad. Slots: garment (patterned), trousers, shoes, accent."""
    wide = 0.15 + 0.05 * build
    head = 0.155
    skeleton = Skeleton(0.42, 0.38, 0.40, 0.05, wide + 0.04, 0.075, head)
    trunk = [Part(FRUSTUM, (0, 0.18, 0), (wide * 0.95, 0.20, 0.11), "garment", "garment", None, 1.1, True)]
    if garment == "dress":
        trunk.append(
            Part(FRUSTUM, (0, -0.12, 0), (wide * 1.9, 0.17, wide * 1.5), "garment", "garment", None, 0.5, True)
        )
    elif garment == "coat":
        trunk.append(
            Part(FRUSTUM, (0, -0.10, 0), (wide * 1.25, 0.19, wide * 0.95), "garment", "garment", None, 0.9, True)
        )
        trunk.append(Part(BOX, (0, 0.05, wide * 0.72), (0.022, 0.34, 0.03), "ivory", "garment"))
    elif garment != "shirt":
        raise ValueError(f"garment must be shirt, dress or coat, got {garment!r}")
    if logo:
        trunk.append(Part(ELLIPSOID, (0, 0.24, 0.115), (0.07, 0.07, 0.02), "accent", "logo"))
    neck = [Part(CAPSULE, (0, -head, 0), (0.05, 0.05, 0.05), "skin", "head")]
    slots = {
        "arm": "skin" if garment == "dress" else "garment",
        "hand": "skin",
        "leg": "skin" if garment == "dress" else "trousers",
        "foot": "shoes",
    }
    return assemble(skeleton, pose, trunk, neck + head_parts(face, head, expression), slots)


def bust(face: Face, expression: str, *, logo: bool = False) -> list[Part]:
    """Head and shoulders for a close-up; the head is about 0.62 units high, the bottom at y = 0."""
    shoulders = [
        Part(ELLIPSOID, (0, 0.0, -0.06), (0.46, 0.24, 0.22), "garment", "garment", None, 1.0, True),
        Part(CAPSULE, (0, 0.26, -0.03), (0.11, 0.08, 0.11), "skin", "head"),
    ]
    if logo:
        shoulders.append(Part(ELLIPSOID, (0.18, 0.12, 0.12), (0.06, 0.06, 0.03), "accent", "logo"))
    return shoulders + [part.moved((0, 0.62, 0)) for part in head_parts(face, 0.36, expression)]
