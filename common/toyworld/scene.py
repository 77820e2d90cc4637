"""What is in a picture: entities, their states, and the scene that holds them (plain data, no rendering)."""

from dataclasses import dataclass, field, replace

import numpy as np

from common.toyworld import objects, puppets
from common.toyworld.geometry import CAPSULE, ELLIPSOID, FRUSTUM, Part, bounds, rotation_matrix
from common.toyworld.poses import POSES, Pose
from common.toyworld.vocabulary import PUPPET_CLASSES

RGB = tuple[float, float, float]
_FIXED = {
    "ink": (0.08, 0.08, 0.10),
    "ivory": (0.96, 0.96, 0.94),
    "mouth": (0.72, 0.16, 0.18),
    "gold": (0.96, 0.78, 0.15),
}
_FLAME = {"flame": (0.98, 0.45, 0.08), "ember": (1.0, 0.82, 0.20), "ice": (0.72, 0.90, 0.98), "puddle": None}


@dataclass(frozen=True)
class Entity:
    """One object, animal or person: the words that captions may use and the parameters that they cannot express."""

    noun: str
    color: str = "red"  # name of the main colour (of the garment, for people)
    second: str = "white"
    rgb: dict[str, RGB] = field(default_factory=dict)  # slot -> jittered colour in [0, 1]
    pattern: str = "plain"
    pattern_rgb: RGB = (1.0, 1.0, 1.0)
    pattern_period: float = 0.22  # in units of the entity's height
    material: str = "matte"
    proportions: tuple[float, ...] = (0.5,) * 5
    accessory: str = "none"
    pose: str | Pose = "standing"
    state: str = "normal"
    gender: str | None = None
    face: puppets.Face | None = None
    garment: str = "shirt"
    logo: bool = False
    expression: str = "neutral"
    portrait: bool = False  # head and shoulders only
    celebrity: int | None = None
    only: frozenset[str] | None = None  # keep only parts of these names (a garment without its wearer)

    def parts(self) -> list[Part]:
        """All primitives in entity coordinates, state applied."""
        pose = POSES[self.pose] if isinstance(self.pose, str) else self.pose
        p = np.asarray(self.proportions)
        if self.noun == "person":
            if self.face is None:
                raise ValueError("a person needs a face")
            if self.portrait:
                built = puppets.bust(self.face, self.expression, logo=self.logo)
            else:
                built = puppets.person(
                    self.face, pose, garment=self.garment, logo=self.logo, build=float(p[0]), expression=self.expression
                )
        elif self.noun in PUPPET_CLASSES:
            built = getattr(puppets, self.noun)(p, pose)
        else:
            built = objects.BUILDERS[self.noun](p)
        if self.only is not None:
            built = [part for part in built if part.name in self.only]
        if self.accessory != "none":
            head = next(part for part in built if part.name == "head")
            built = built + objects.accessory(self.accessory, head)
        return apply_state(built, self.state)

    def slot_color(self, slot: str) -> RGB:
        if slot in self.rgb:
            return self.rgb[slot]
        if slot == "puddle":
            return self.rgb["main"]
        return _FIXED.get(slot) or _FLAME[slot]


@dataclass(frozen=True)
class Placed:
    """An entity somewhere in the scene (units of an entity's height; the ground is y = 0)."""

    entity: Entity
    offset: tuple[float, float, float] = (0.0, 0.0, 0.0)
    yaw_deg: float = 0.0
    scale: float = 1.0
    roll_deg: float = 0.0
    pitch_deg: float = 0.0

    def parts(self) -> list[Part]:
        parts = self.entity.parts()
        if self.roll_deg or self.pitch_deg:
            turn = rotation_matrix(self.pitch_deg, 0.0, self.roll_deg)
            low, high = bounds(parts)
            middle = np.array([0.0, (low[1] + high[1]) / 2, 0.0])
            parts = [part.moved(-middle).moved(middle, 1.0, turn) for part in parts]
        return [part.moved(self.offset, self.scale, rotation_matrix(y_deg=self.yaw_deg)) for part in parts]


@dataclass(frozen=True)
class Camera:
    """A pinhole camera on a sphere around ``target``; azimuth 0 sees the front (+z side) of an entity with yaw 0."""

    target: tuple[float, float, float] = (0.0, 0.5, 0.0)
    azimuth_deg: float = 0.0
    elevation_deg: float = 14.0
    distance: float = 3.0
    fov_deg: float = 36.0

    def position(self) -> np.ndarray:
        a, e = np.radians([self.azimuth_deg, self.elevation_deg])
        return np.asarray(self.target) + self.distance * np.array(
            [np.sin(a) * np.cos(e), np.sin(e), np.cos(a) * np.cos(e)]
        )

    def axes(self) -> np.ndarray:
        """Rows right, up, back (the camera looks along -back): world-to-camera rotation, (3, 3)."""
        back = self.position() - np.asarray(self.target)
        back /= np.linalg.norm(back)
        right = np.cross([0.0, 1.0, 0.0], back)
        right /= np.linalg.norm(right)
        return np.stack([right, np.cross(back, right), back])


@dataclass(frozen=True)
class Scene:
    """Everything a picture is made from."""

    placed: tuple[Placed, ...]
    background: str = "meadow"
    style: str = "photo"
    view: str = "front"
    camera: Camera = Camera()
    relation: str | None = None
    scenery: float = 0.0  # in [0, 1): which stretch of the background is seen

    def styled(self, style: str) -> "Scene":
        return replace(self, style=style)


def frame(
    placed: tuple[Placed, ...], *, azimuth_deg: float, elevation_deg: float, fill: float = 0.62, fov_deg: float = 36.0
) -> Camera:
    """The camera from that direction in whose picture the entities fill ``fill`` of the frame's longer extent.

    Args: fill: fraction of the picture's side in (0, 1].
    """
    corners = []
    for item in placed:
        low, high = bounds(item.parts())
        corners += [[x, y, z] for x in (low[0], high[0]) for y in (low[1], high[1]) for z in (low[2], high[2])]
    points = np.asarray(corners)
    target = (points.min(0) + points.max(0)) / 2
    if len(placed) == 1 and placed[0].entity.portrait:
        target, points = np.array([0.0, 0.56, 0.0]), np.array([[0.44, 1.0, 0.0], [-0.44, 0.1, 0.0]])
    camera = Camera(tuple(target), azimuth_deg, elevation_deg, 1.0, fov_deg)
    seen = (points - target) @ camera.axes().T
    extent = max(np.abs(seen[:, 0]).max(), np.abs(seen[:, 1]).max())
    return replace(camera, distance=float(extent / (fill * np.tan(np.radians(fov_deg / 2))) + 0.5 * seen[:, 2].max()))


def apply_state(parts: list[Part], state: str) -> list[Part]:
    """Deform an entity's parts into a named state (see vocabulary.STATES and HELD_OUT_STATES)."""
    low, high = bounds(parts)
    height, reach = high[1] - low[1], float(max(high[0] - low[0], high[2] - low[2])) / 2
    if state == "normal":
        return parts
    if state == "squashed":
        return _stretched(parts, np.array([1.25, 0.5, 1.25]))
    if state == "stretched":
        return _stretched(parts, np.array([0.72, 1.5, 0.72]))
    if state == "inflated":
        return _grounded(
            [replace(part, size=np.asarray(part.size) * (1.0 if part.name in _FLAT else 1.38)) for part in parts]
        )
    if state in ("tilted", "upside down"):
        turn = rotation_matrix(z_deg=32.0 if state == "tilted" else 180.0)
        return _grounded([part.moved(rotation=turn) for part in parts])
    if state == "floating":
        return [part.moved((0, 0.55, 0)) for part in parts]
    if state == "melting":
        sunk = _stretched(parts, np.array([1.1, 0.6, 1.1]))
        spread = [
            replace(p, size=np.asarray(p.size) * np.array([1, 1, 1]) * (1.0 + 0.5 * max(0.0, 0.35 - p.center[1])))
            for p in sunk
        ]
        puddle = Part(ELLIPSOID, (0.05, 0.0, 0.08), (reach * 1.5, 0.05, reach * 1.25), "puddle", "puddle")
        drops = [
            Part(CAPSULE, (s * reach * 0.7, 0.16, reach * 0.35), (0.06, 0.12, 0.06), "puddle", "puddle")
            for s in (-1, 0.2, 1)
        ]
        return [*spread, puddle, *drops]
    if state == "frozen":
        shards = []
        for k in range(9):
            angle = 2 * np.pi * k / 9
            at = np.array(
                [np.sin(angle) * reach * 1.05, height * (0.14 + 0.08 * (k % 3)), np.cos(angle) * reach * 1.05]
            )
            turn = rotation_matrix(z_deg=-18 * np.sin(angle), x_deg=18 * np.cos(angle))
            shards.append(Part(FRUSTUM, at, (0.13, height * (0.2 + 0.08 * (k % 3)), 0.13), "ice", "ice", turn, 0.1))
        return [replace(p, slot=p.slot if p.slot in ("ink", "ivory") else f"ice:{p.slot}") for p in parts] + shards
    if state == "burning":
        flames = []
        for k in range(8):
            angle = 2 * np.pi * k / 8
            at = np.array(
                [np.sin(angle) * reach * 0.75, height * (0.62 + 0.22 * (k % 2)), np.cos(angle) * reach * 0.75]
            )
            flames.append(
                Part(
                    FRUSTUM, at, (0.12, 0.24 + 0.06 * (k % 3), 0.12), "ember" if k % 2 else "flame", "flame", None, 0.0
                )
            )
        return [*parts, *flames, Part(FRUSTUM, (0, height + 0.15, 0), (0.2, 0.3, 0.2), "flame", "flame", None, 0.0)]
    if state == "exploded":
        middle = np.array([0.0, height * 0.4, 0.0])
        burst = [replace(p, center=middle + (np.asarray(p.center) - middle) * 1.75) for p in parts]
        return _grounded(burst)
    raise ValueError(f"unknown state {state!r}")


_FLAT = frozenset({"eye", "nose", "mouth", "lamp", "window", "door", "button"})


def _stretched(parts: list[Part], factor: np.ndarray) -> list[Part]:
    """Scale along the axes; rotated primitives keep their axes and take the stretched axes' lengths."""
    result = []
    for part in parts:
        turn = np.eye(3) if part.rotation is None else part.rotation
        size = np.asarray(part.size) * np.linalg.norm(factor[:, None] * turn, axis=0)
        result.append(replace(part, center=np.asarray(part.center) * factor, size=size))
    return result


def _grounded(parts: list[Part]) -> list[Part]:
    low, _ = bounds(parts)
    return [part.moved((0, -low[1], 0)) for part in parts]
