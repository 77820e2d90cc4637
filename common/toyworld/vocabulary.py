"""The names of everything the toy world can show: what captions say, what the judge reads, what is held out.

Training captions use only the names in the plain tuples. The ``HELD_OUT_*`` tuples name what no training image shows
and no training caption says; the benchmark sets are made of them.
"""

COLORS: dict[str, tuple[float, float, float]] = {
    "red": (0.84, 0.13, 0.13),
    "orange": (0.96, 0.53, 0.10),
    "yellow": (0.97, 0.85, 0.18),
    "green": (0.18, 0.60, 0.22),
    "blue": (0.15, 0.33, 0.82),
    "purple": (0.52, 0.20, 0.70),
    "pink": (0.96, 0.55, 0.72),
    "brown": (0.45, 0.27, 0.13),
    "white": (0.95, 0.95, 0.95),
    "black": (0.10, 0.10, 0.12),
}
PATTERNS = ("plain", "striped", "dotted", "checkered")
MATERIALS = ("matte", "glossy", "metallic")
VIEWS = ("front", "side", "back", "overhead")
BACKGROUNDS = ("meadow", "snow", "beach", "city", "room", "night", "lake", "forest", "desert", "stage")

STYLES = ("photo", "sketch", "watercolor", "pixel art", "neon", "cartoon", "monochrome", "blueprint")
HELD_OUT_STYLES = (
    "sepia", "pop art", "thermal", "negative", "halftone", "woodcut", "mosaic", "duotone", "night vision", "glitch",
)  # fmt: skip
COLORLESS_STYLES = frozenset({"sketch", "neon", "monochrome", "blueprint"})  # the main colour cannot be read
LINE_STYLES = frozenset({"sketch", "neon", "blueprint"})  # nor can the background, pattern and material

OBJECT_CLASSES = (
    "bear", "robot", "duck", "dog", "cat", "fish", "car", "house", "mug", "teapot", "rocket", "mushroom", "chair",
    "vase",
)  # fmt: skip
PUPPET_CLASSES = frozenset({"bear", "robot", "person"})  # articulated: they take poses and carry things
ROUND_CLASSES = frozenset({"mushroom", "vase"})  # the same from all sides, so no view is named
LIVE_CLASSES = frozenset({"bear", "duck", "dog", "cat", "fish"})
CLASSES = (*OBJECT_CLASSES, "person")
ACCESSORIES = ("none", "hat", "crown", "scarf")
WEARERS = frozenset({"bear", "robot", "duck", "dog", "cat"})

POSES = ("standing", "waving", "arms raised", "sitting", "running", "hands on hips", "pointing", "kneeling")
HELD_OUT_ACTIONS = ("t-pose", "high kick", "bow", "handstand", "splits", "star jump", "lying", "lunge")

STATES = ("normal", "inflated", "squashed", "stretched", "tilted")
HELD_OUT_STATES = ("melting", "frozen", "burning", "exploded", "floating", "upside down")

RELATIONS = ("on top of", "under", "next to", "inside", "behind", "in front of", "carrying")
HELD_OUT_RELATIONS = (
    "hanging below", "leaning on", "riding", "balanced upside down on", "surrounding", "back to back", "face to face",
    "towering over", "sandwiched between", "orbiting above",
)  # fmt: skip

EXPRESSIONS = ("neutral", "smiling", "sad", "surprised", "angry")
GARMENTS = ("shirt", "dress", "coat")
GENDERS = ("man", "woman")
HAIR_STYLES = ("short", "long", "bald", "curly", "bun", "mohawk")
SKINS: tuple[tuple[float, float, float], ...] = (
    (0.98, 0.84, 0.74), (0.93, 0.74, 0.60), (0.80, 0.58, 0.42), (0.60, 0.40, 0.27), (0.40, 0.26, 0.18),
)  # fmt: skip
HAIR_COLORS: tuple[tuple[float, float, float], ...] = (
    (0.10, 0.08, 0.08), (0.36, 0.20, 0.10), (0.92, 0.78, 0.36), (0.78, 0.30, 0.10), (0.72, 0.72, 0.74),
    (0.25, 0.45, 0.85), (0.85, 0.35, 0.60),
)  # fmt: skip

MOTIONS = (
    "still", "moving left", "moving right", "jumping", "spinning", "growing", "shrinking", "zooming in", "zooming out",
    "orbiting camera",
)  # fmt: skip
HELD_OUT_MOTIONS = (
    "zigzag", "figure eight", "somersault", "pendulum", "spiral up", "shaking", "bouncing across", "pulsing",
    "dolly and rise", "hop and turn", "swoop", "tumble",
)  # fmt: skip

_FIRST_NAMES = (
    "Alba", "Boris", "Clara", "Dario", "Edda", "Felix", "Greta", "Hugo", "Ilse", "Jonas", "Kira", "Leon", "Mira",
    "Nils", "Olga", "Pavel", "Rosa", "Silas", "Tilda", "Viktor",
)  # fmt: skip
_LAST_NAMES = ("Amberly", "Brookes", "Castellan", "Dunmore", "Everhart", "Fennick")
CELEBRITIES = tuple(
    f"{first} {_LAST_NAMES[(i + 2 * k) % len(_LAST_NAMES)]}" for k in range(3) for i, first in enumerate(_FIRST_NAMES)
)  # 60 fixed identities with invented names; even first-name index: woman, odd: man
