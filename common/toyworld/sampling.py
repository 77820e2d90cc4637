"""Random scenes: one seed, one scene. The training mixture, and entities for the benchmarks."""

from dataclasses import replace

import numpy as np

from common.toyworld import relations
from common.toyworld.puppets import Face
from common.toyworld.scene import Entity, Placed, Scene, frame
from common.toyworld.vocabulary import (
    ACCESSORIES,
    BACKGROUNDS,
    CELEBRITIES,
    COLORS,
    EXPRESSIONS,
    GARMENTS,
    GENDERS,
    HAIR_COLORS,
    HAIR_STYLES,
    MATERIALS,
    OBJECT_CLASSES,
    PATTERNS,
    POSES,
    PUPPET_CLASSES,
    RELATIONS,
    SKINS,
    STATES,
    STYLES,
    VIEWS,
    WEARERS,
)  # fmt: skip

NUM_OBJECT_INSTANCES = 600  # recurring objects in the training set, so that identity can be learned
NUM_FACE_INSTANCES = 240  # recurring unnamed faces, beside the celebrities
KINDS = {"object": 0.46, "relation": 0.19, "figure": 0.14, "portrait": 0.21}
_AZIMUTH = {"front": 0.0, "side": 90.0, "back": 180.0, "overhead": 0.0}
Generator = np.random.Generator


def _pick(rng: Generator, names, weights=None) -> str:
    return names[int(rng.choice(len(names), p=weights))]


def jittered(rng: Generator, color: str, amount: float = 0.05) -> tuple[float, float, float]:
    """A shade of a named colour, RGB in [0, 1]."""
    return tuple(float(c) for c in np.clip(np.asarray(COLORS[color]) + rng.uniform(-amount, amount, 3), 0.03, 1.0))


def _three_colors(rng: Generator) -> list[str]:
    return [list(COLORS)[i] for i in rng.choice(len(COLORS), 3, replace=False)]


def sample_object(rng: Generator, noun: str | None = None) -> Entity:
    """A random object or animal in its normal state, without accessory."""
    noun = noun or _pick(rng, OBJECT_CLASSES)
    color, second, accent = _three_colors(rng)
    rgb = {"main": jittered(rng, color), "second": jittered(rng, second), "accent": jittered(rng, accent)}
    pattern = _pick(rng, PATTERNS, (0.52, 0.16, 0.16, 0.16))
    return Entity(
        noun, color, second, rgb, pattern, jittered(rng, second), float(rng.uniform(0.18, 0.26)),
        _pick(rng, MATERIALS, (0.6, 0.2, 0.2)), tuple(float(v) for v in rng.random(5)),
    )  # fmt: skip


def sample_face(rng: Generator, gender: str) -> Face:
    styles = HAIR_STYLES if gender == "man" else ("long", "bun", "curly", "short", "long", "mohawk")
    iris = ((0.20, 0.40, 0.75), (0.25, 0.50, 0.25), (0.35, 0.20, 0.10))
    return Face(
        SKINS[rng.integers(len(SKINS))], HAIR_COLORS[rng.integers(len(HAIR_COLORS))], _pick(rng, styles),
        iris[rng.integers(3)], bool(rng.random() < 0.3), bool(gender == "man" and rng.random() < 0.4),
        *(float(v) for v in rng.random(4)),
    )  # fmt: skip


def celebrity_face(index: int) -> tuple[str, Face]:
    """Gender and the fixed face of a celebrity; 0 <= index < 60."""
    if not 0 <= index < len(CELEBRITIES):
        raise ValueError(f"celebrity index must be in 0..{len(CELEBRITIES) - 1}, got {index}")
    gender = GENDERS[(index % 20 + 1) % 2]
    return gender, sample_face(np.random.default_rng([77, index]), gender)


def sample_person(
    rng: Generator, *, portrait: bool, gender: str | None = None, face: Face | None = None, celebrity: int | None = None
) -> Entity:
    """A person with random clothes; gender and face are random where not given."""
    if celebrity is not None:
        gender, face = celebrity_face(celebrity)
    gender = gender or _pick(rng, GENDERS)
    face = face or sample_face(rng, gender)
    color, second, accent = _three_colors(rng)
    garment = jittered(rng, color)
    rgb = {
        "main": garment, "garment": garment, "trousers": jittered(rng, second), "accent": jittered(rng, accent),
        "shoes": (0.15, 0.12, 0.12), "skin": face.skin, "nose": tuple(0.86 * c for c in face.skin), "hair": face.hair,
        "eye": face.eye,
    }  # fmt: skip
    return Entity(
        "person", color, second, rgb, _pick(rng, PATTERNS, (0.55, 0.15, 0.15, 0.15)), jittered(rng, second),
        0.3 if portrait else 0.16, proportions=tuple(float(v) for v in rng.random(5)), gender=gender, face=face,
        garment="shirt" if portrait else _pick(rng, GARMENTS), logo=bool(rng.random() < 0.2),
        expression=_pick(rng, EXPRESSIONS) if portrait else "neutral", portrait=portrait, celebrity=celebrity,
    )  # fmt: skip


def dressed_up(rng: Generator, entity: Entity, name: str) -> Entity:
    """The entity wearing an accessory in a random colour."""
    return replace(entity, accessory=name, rgb={**entity.rgb, "wear": jittered(rng, _pick(rng, list(COLORS)))})


def compose(
    rng: Generator, placed: tuple[Placed, ...], *, background: str, style: str = "photo", view: str = "front",
    relation: str | None = None, fill: float | None = None, spread_deg: float = 22.0,
) -> Scene:  # fmt: skip
    """Point a camera at placed entities, with the jitter of the training set."""
    portrait = placed[0].entity.portrait
    spread = 12.0 if portrait else spread_deg
    elevation = (
        66.0 + rng.uniform(-5, 5)
        if view == "overhead"
        else rng.uniform(1.0, 6.0)
        if portrait
        else rng.uniform(7.0, 13.0)
    )
    azimuth = _AZIMUTH[view] + rng.uniform(-spread, spread)
    fill = fill if fill is not None else (rng.uniform(0.84, 0.94) if portrait else rng.uniform(0.70, 0.84))
    camera = frame(placed, azimuth_deg=azimuth, elevation_deg=float(elevation), fill=float(fill))
    return Scene(placed, background, style, view, camera, relation, float(rng.random()))


def sample_training_scene(seed: int) -> tuple[Scene, int]:
    """One scene of the training mixture.

    Returns: the scene, and its recurring instance (objects 0..599, unnamed faces 600..839, celebrities 840..899),
        -1 where the identity is not seen again.
    """
    rng = np.random.default_rng([11, seed])
    background = _pick(rng, BACKGROUNDS)
    style = _pick(rng, STYLES, (0.58, *[0.06] * 7))
    kind = _pick(rng, tuple(KINDS), tuple(KINDS.values()))
    instance = -1
    if kind == "relation":
        scene = _relation_scene(rng, background, style)
    elif kind in ("portrait", "figure"):
        roll = rng.random()
        portrait = kind == "portrait"
        if roll < (0.5 if portrait else 0.25):
            index = int(rng.integers(len(CELEBRITIES)))
            person = sample_person(rng, portrait=portrait, celebrity=index)
            instance = NUM_OBJECT_INSTANCES + NUM_FACE_INSTANCES + index
        elif roll < 0.75 and portrait:
            index = int(rng.integers(NUM_FACE_INSTANCES))
            gender = GENDERS[index % 2]
            person = sample_person(
                rng, portrait=True, gender=gender, face=sample_face(np.random.default_rng([78, index]), gender)
            )
            instance = NUM_OBJECT_INSTANCES + index
        elif not portrait and roll < 0.45:
            person = sample_object(rng, _pick(rng, ("bear", "robot")))
        else:
            person = sample_person(rng, portrait=portrait)
        if not portrait:
            person = replace(person, pose=_pick(rng, POSES))
        scene = compose(rng, (Placed(person),), background=background, style=style)
    else:
        if rng.random() < 0.4:
            instance = int(rng.integers(NUM_OBJECT_INSTANCES))
            entity = sample_object(np.random.default_rng([79, instance]))
        else:
            entity = sample_object(rng)
        if entity.noun in WEARERS and rng.random() < 0.25:
            entity = dressed_up(rng, entity, _pick(rng, ACCESSORIES[1:]))
        if rng.random() < 0.2:
            entity = replace(entity, state=_pick(rng, STATES[1:]))
        view = _pick(rng, VIEWS, (0.46, 0.26, 0.16, 0.12))
        scene = compose(rng, (Placed(entity),), background=background, style=style, view=view)
    return scene, instance


def _relation_scene(rng: Generator, background: str, style: str) -> Scene:
    relation = _pick(rng, RELATIONS)
    first_nouns: tuple[str, ...] = tuple(PUPPET_CLASSES) if relation == "carrying" else (*OBJECT_CLASSES, "person")
    first_noun = _pick(rng, tuple(sorted(first_nouns)))
    choices = relations.CONTAINERS if relation == "inside" else OBJECT_CLASSES
    second_noun = _pick(rng, tuple(n for n in choices if n != first_noun))
    first = sample_person(rng, portrait=False) if first_noun == "person" else sample_object(rng, first_noun)
    placed = relations.place(relation, first, sample_object(rng, second_noun), tuple(rng.uniform(-25, 25, 2)))
    return compose(
        rng,
        placed,
        background=background,
        style=style,
        relation=relation,
        fill=float(rng.uniform(0.80, 0.92)),
        spread_deg=8.0,
    )
