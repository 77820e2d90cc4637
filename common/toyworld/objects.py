"""The object classes of the toy world, each a function of five free proportions to a list of parts.

``p`` holds five numbers in [0, 1]; captions never name them, so they are part of what personalization has to learn.
Entities stand on y = 0, face +z and are about one unit high or long. Slots: main, second, accent (free colours),
ink and ivory (fixed).
"""

from collections.abc import Callable

import numpy as np

from common.toyworld.geometry import BOX, ELLIPSOID, FRUSTUM, Part, rod, rotation_matrix

Proportions = np.ndarray
_LYING = rotation_matrix(x_deg=90.0)  # a frustum's axis along z, top forward


def _ball(center, size, slot="main", name="body", patterned=False) -> Part:
    size = (size, size, size) if np.isscalar(size) else size
    return Part(ELLIPSOID, center, size, slot, name, None, 1.0, patterned)


def _eyes(y: float, z: float, apart: float, radius: float, slot: str = "ink") -> list[Part]:
    return [_ball((side * apart, y, z), radius, slot, "eye") for side in (-1, 1)]


def duck(p: Proportions) -> list[Part]:
    w, head, neck = 0.26 + 0.08 * p[0], 0.17 + 0.06 * p[1], 0.08 * p[2]
    top = 0.52 + neck
    return [
        _ball((0, 0.26, -0.02), (w, 0.26, 0.40), patterned=True),
        _ball((0, 0.42, -0.40), (0.10, 0.08 + 0.05 * p[3], 0.14), "second", "tail"),
        rod((0, 0.35, 0.22), (0, top, 0.26), 0.10, "main", "neck"),
        _ball((0, top + 0.12, 0.28), head, "main", "head"),
        Part(
            FRUSTUM,
            (0, top + 0.08, 0.28 + head + 0.05),
            (0.10, 0.08 + 0.05 * p[4], 0.06),
            "accent",
            "beak",
            _LYING,
            0.4,
        ),
        *[_ball((side * w, 0.30, -0.05), (0.07, 0.13, 0.24), "second", "wing") for side in (-1, 1)],
        *_eyes(top + 0.18, 0.28 + head * 0.75, head * 0.6, 0.045),
    ]


def _quadruped(p: Proportions, *, ears: list[Part], tail: list[Part], head_size: float, snout: float) -> list[Part]:
    leg, length = 0.22 + 0.14 * p[0], 0.30 + 0.10 * p[1]
    body_y, head_y, head_z = leg + 0.15, leg + 0.38, length + 0.06
    legs = [
        rod((sx * 0.13, leg, sz * (length - 0.08)), (sx * 0.13, 0.07, sz * (length - 0.08)), 0.07, "second", "leg")
        for sx in (-1, 1)
        for sz in (-1, 1)
    ]
    lift = np.array([0.0, head_y, head_z])
    return [
        _ball((0, body_y, 0), (0.20, 0.19 + 0.04 * p[2], length + 0.08), patterned=True),
        *legs,
        _ball((0, head_y, head_z), head_size, "main", "head"),
        _ball((0, head_y - 0.05, head_z + head_size * 0.85), (0.09, 0.08, snout), "accent", "snout"),
        _ball((0, head_y - 0.01, head_z + head_size * 0.85 + snout), 0.04, "ink", "nose"),
        *_eyes(head_y + 0.06, head_z + head_size * 0.86, 0.085, 0.04),
        *[part.moved(lift) for part in ears],
        *[part.moved((0, body_y + 0.08, -length - 0.04)) for part in tail],
    ]


def dog(p: Proportions) -> list[Part]:
    ears = [_ball((side * 0.20, 0.0, -0.02), (0.055, 0.17 + 0.05 * p[3], 0.10), "second", "ear") for side in (-1, 1)]
    tail = [rod((0, 0, 0), (0, 0.16 + 0.08 * p[4], -0.14), 0.05, "main", "tail")]
    return _quadruped(p, ears=ears, tail=tail, head_size=0.20, snout=0.15)


def cat(p: Proportions) -> list[Part]:
    ears = [
        Part(FRUSTUM, (side * 0.12, 0.22, 0.0), (0.085, 0.09 + 0.04 * p[3], 0.06), "second", "ear", None, 0.0)
        for side in (-1, 1)
    ]
    high = 0.34 + 0.14 * p[4]
    tail = [
        rod((0, 0, 0), (0, high * 0.55, -0.16), 0.045, "main", "tail"),
        rod((0, high * 0.55, -0.16), (0, high, -0.04), 0.045, "second", "tail"),
    ]
    return _quadruped(p, ears=ears, tail=tail, head_size=0.19, snout=0.05)


def fish(p: Proportions) -> list[Part]:
    tall, length = 0.24 + 0.10 * p[0], 0.40 + 0.06 * p[1]
    y = 0.42
    fin = rotation_matrix(x_deg=-90.0)
    return [
        _ball((0, y, 0.05), (0.15, tall, length), patterned=True),
        Part(
            FRUSTUM,
            (0, y, -length - 0.08),
            (0.05, 0.16, 0.22 + 0.08 * p[2]),
            "second",
            "tail",
            fin @ rotation_matrix(0, 0, 180),
            0.15,
        ),
        Part(BOX, (0, y + tall, 0.0), (0.03, 0.10 + 0.05 * p[3], 0.17), "accent", "fin", rotation_matrix(x_deg=-12)),
        *[
            Part(BOX, (s * 0.17, y - 0.10, 0.08), (0.02, 0.05, 0.11), "accent", "fin", rotation_matrix(0, 0, s * 40))
            for s in (-1, 1)
        ],
        _ball((0, y - 0.04, length + 0.02), (0.07, 0.06, 0.06), "accent", "mouth"),
        *[_ball((s * 0.115, y + 0.08, length * 0.62 + 0.05), 0.07, "ivory", "eye") for s in (-1, 1)],
        *[_ball((s * 0.165, y + 0.08, length * 0.66 + 0.05), 0.04, "ink", "eye") for s in (-1, 1)],
    ]


def car(p: Proportions) -> list[Part]:
    length, tall, cabin = 0.50 + 0.08 * p[0], 0.12 + 0.05 * p[1], 0.12 + 0.06 * p[2]
    wheel, cabin_z = 0.13 + 0.04 * p[3], -0.14 + 0.12 * p[4]
    axle = rotation_matrix(z_deg=90.0)
    corners = [(sx, sz * length * 0.62) for sx in (-1, 1) for sz in (-1, 1)]
    base = wheel + 0.04 + tall
    roof = base + tall + cabin
    return [
        Part(BOX, (0, base, 0), (0.28, tall, length), "main", "body", None, 1.0, True),
        Part(BOX, (0, roof, cabin_z), (0.24, cabin, 0.30), "second", "cabin"),
        Part(BOX, (0, roof, cabin_z), (0.19, cabin * 0.62, 0.315), "ink", "window"),
        Part(BOX, (0, roof, cabin_z), (0.255, cabin * 0.62, 0.23), "ink", "window"),
        *[Part(FRUSTUM, (sx * 0.27, wheel, z), (wheel, 0.055, wheel), "ink", "wheel", axle) for sx, z in corners],
        *[_ball((sx * 0.325, wheel, z), (0.02, wheel * 0.5, wheel * 0.5), "ivory", "wheel") for sx, z in corners],
        *[_ball((s * 0.18, base, length), (0.06, 0.06, 0.03), "accent", "lamp") for s in (-1, 1)],
    ]


def house(p: Proportions) -> list[Part]:
    w, h, roof = 0.36 + 0.08 * p[0], 0.26 + 0.08 * p[1], 0.20 + 0.10 * p[2]
    quarter = rotation_matrix(y_deg=0.0)
    chimney = (0.20 if p[3] > 0.5 else -0.20, 2 * h + roof * 1.2, -0.12)
    return [
        Part(BOX, (0, h, 0), (w, h, 0.34), "main", "wall", None, 1.0, True),
        Part(FRUSTUM, (0, 2 * h + roof, 0), (w * 1.35, roof, 0.52), "second", "roof", quarter, 0.0),
        Part(BOX, (0, 0.15, 0.34), (0.09, 0.15, 0.02), "accent", "door"),
        *[Part(BOX, (s * w * 0.62, h * 1.25, 0.34), (0.08, 0.08, 0.02), "ivory", "window") for s in (-1, 1)],
        *[Part(BOX, (s * w, h * 1.1, 0.0), (0.02, 0.09, 0.09), "ivory", "window") for s in (-1, 1)],
        Part(BOX, chimney, (0.07, 0.16 + 0.06 * p[4], 0.07), "accent", "chimney"),
    ]


def _handle(x: float, low: float, high: float, reach: float, thick: float, slot: str) -> list[Part]:
    out = x + reach
    return [
        rod((x, high, 0), (out, high - 0.03, 0), thick, slot, "handle"),
        rod((out, high - 0.03, 0), (out, low + 0.03, 0), thick, slot, "handle"),
        rod((out, low + 0.03, 0), (x, low, 0), thick, slot, "handle"),
    ]


def mug(p: Proportions) -> list[Part]:
    radius, half, taper = 0.26 + 0.07 * p[0], 0.32 + 0.09 * p[1], 0.9 + 0.3 * p[2]
    rim = radius * taper
    side = radius * (1 + taper) / 2
    return [
        Part(FRUSTUM, (0, half, 0), (radius, half, radius), "main", "body", None, taper, True),
        Part(FRUSTUM, (0, 2 * half, 0), (rim * 0.86, 0.012, rim * 0.86), "ink", "inside"),
        Part(FRUSTUM, (0, 0.05, 0), (radius * 1.03, 0.05, radius * 1.03), "second", "base"),
        *_handle(side - 0.03, half * 0.6, half * 1.5, 0.16 + 0.06 * p[3], 0.045 + 0.02 * p[4], "accent"),
    ]


def teapot(p: Proportions) -> list[Part]:
    wide, tall = 0.34 + 0.06 * p[0], 0.27 + 0.07 * p[1]
    return [
        _ball((0, tall + 0.03, 0), (wide, tall, wide), patterned=True),
        Part(FRUSTUM, (0, 0.04, 0), (wide * 0.6, 0.04, wide * 0.6), "second", "foot"),
        _ball((0, 2 * tall, 0), (wide * 0.55, 0.07, wide * 0.55), "second", "lid"),
        _ball((0, 2 * tall + 0.11, 0), 0.06 + 0.03 * p[2], "accent", "knob"),
        rod((-wide * 0.8, tall * 0.8, 0), (-wide - 0.22 - 0.06 * p[3], tall * 1.75, 0), 0.07, "accent", "spout"),
        *_handle(wide - 0.06, tall * 0.6, tall * 1.5, 0.18 + 0.06 * p[4], 0.05, "second"),
    ]


def rocket(p: Proportions) -> list[Part]:
    radius, half, nose = 0.19 + 0.06 * p[0], 0.34 + 0.06 * p[1], 0.15 + 0.07 * p[2]
    base = 0.14
    fins = []
    for angle in (0.0, 90.0, 180.0, 270.0):
        turn = rotation_matrix(y_deg=angle)
        fins.append(
            Part(BOX, (radius + 0.08, 0.17, 0), (0.12 + 0.03 * p[3], 0.17, 0.03), "second", "fin").moved(rotation=turn)
        )
    return [
        Part(FRUSTUM, (0, base + half, 0), (radius, half, radius), "main", "body", None, 0.92, True),
        Part(
            FRUSTUM, (0, base + 2 * half + nose, 0), (radius * 0.92, nose, radius * 0.92), "second", "nose", None, 0.0
        ),
        _ball((0, base + half * 1.35, radius * 0.86), (0.10, 0.10, 0.05), "accent", "window"),
        Part(FRUSTUM, (0, 0.08, 0), (radius * 0.8, 0.08, radius * 0.8), "ink", "engine", None, 0.7),
        *fins,
    ]


def mushroom(p: Proportions) -> list[Part]:
    stem, cap, dome = 0.12 + 0.06 * p[0], 0.36 + 0.10 * p[1], 0.24 + 0.08 * p[2]
    tall = 0.22 + 0.08 * p[3]
    return [
        Part(FRUSTUM, (0, tall, 0), (stem * 1.2, tall, stem * 1.2), "second", "stem", None, 0.8),
        _ball((0, 2 * tall + dome * 0.4, 0), (cap, dome, cap), "main", "cap", True),
        Part(FRUSTUM, (0, 2 * tall + dome * 0.05, 0), (cap * 0.7, 0.03 + 0.02 * p[4], cap * 0.7), "accent", "gills"),
    ]


def chair(p: Proportions) -> list[Part]:
    w, seat, back = 0.28 + 0.06 * p[0], 0.32 + 0.08 * p[1], 0.26 + 0.08 * p[2]
    thick = 0.045 + 0.02 * p[3]
    legs = [
        Part(BOX, (sx * (w - 0.05), seat / 2, sz * (w - 0.05)), (thick, seat / 2, thick), "second", "leg")
        for sx in (-1, 1)
        for sz in (-1, 1)
    ]
    return [
        *legs,
        Part(BOX, (0, seat + 0.05, 0), (w, 0.06, w), "main", "seat"),
        Part(
            BOX,
            (0, seat + 0.1 + back, -w + 0.05),
            (w, back, 0.05),
            "main",
            "back",
            rotation_matrix(x_deg=-6 * p[4]),
            1.0,
            True,
        ),
        Part(BOX, (0, seat + 0.1 + 2 * back, -w + 0.04), (w * 1.08, 0.05, 0.07), "accent", "rail"),
    ]


def vase(p: Proportions) -> list[Part]:
    belly, neck, tall = 0.26 + 0.10 * p[0], 0.10 + 0.06 * p[1], 0.24 + 0.06 * p[2]
    rise = 0.14 + 0.06 * p[3]
    top = 2 * tall + rise * 1.6
    return [
        Part(FRUSTUM, (0, 0.05, 0), (belly * 0.6, 0.05, belly * 0.6), "second", "foot"),
        _ball((0, tall + 0.05, 0), (belly, tall, belly), "main", "belly", True),
        Part(FRUSTUM, (0, 2 * tall + rise * 0.6, 0), (neck, rise, neck), "main", "neck"),
        Part(FRUSTUM, (0, top + 0.04, 0), (neck, 0.07, neck), "accent", "rim", None, 1.5 + 0.3 * p[4]),
    ]


BUILDERS: dict[str, Callable[[Proportions], list[Part]]] = {
    "duck": duck, "dog": dog, "cat": cat, "fish": fish, "car": car, "house": house, "mug": mug, "teapot": teapot,
    "rocket": rocket, "mushroom": mushroom, "chair": chair, "vase": vase,
}  # fmt: skip


def accessory(name: str, head: Part) -> list[Part]:
    """A hat, crown or scarf for an entity whose head is ``head`` (an ellipsoid or box part)."""
    center, size = np.asarray(head.center, float), np.asarray(head.size, float)
    width, top = float(size[0]), center[1] + float(size[1])
    if name == "hat":
        return [
            Part(FRUSTUM, center + [0, top - center[1] - 0.02, 0], (width * 1.25, 0.025, width * 1.25), "wear", "hat"),
            Part(FRUSTUM, center + [0, top - center[1] + 0.13, 0], (width * 0.75, 0.14, width * 0.75), "wear", "hat"),
        ]
    if name == "crown":
        spikes = [
            Part(
                FRUSTUM,
                center + [np.sin(a) * width * 0.7, size[1] + 0.15, np.cos(a) * width * 0.7],
                (0.06, 0.07, 0.06),
                "gold",
                "crown",
                None,
                0.0,
            )
            for a in np.arange(6) * np.pi / 3
        ]
        return [
            Part(FRUSTUM, center + [0, size[1] + 0.03, 0], (width * 0.8, 0.07, width * 0.8), "gold", "crown"),
            *spikes,
        ]
    if name == "scarf":
        y = center[1] - size[1] * 0.98
        return [
            Part(FRUSTUM, (center[0], y, center[2] * 0.8), (width * 0.95, 0.07, width * 0.95), "wear", "scarf"),
            Part(
                BOX,
                (center[0] + width * 0.4, y - 0.14, center[2] * 0.8 + width * 0.9),
                (0.06, 0.13, 0.03),
                "wear",
                "scarf",
            ),
        ]
    raise ValueError(f"accessory must be hat, crown or scarf, got {name!r}")
