"""Benchmark sets of the toy world, with fixed seeds: what no training caption names, to be learned by the methods.

subjects      30 objects and animals x 5 pictures, 25 prompts each (the shape of the DreamBooth benchmark)
faces         20 people x 5 portraits                  styles     10 x 6 pictures
relations     10 x 8 exemplars with captions           actions     8 x 8 exemplars
clips         12 motions                               objects_3d 10 objects with posed views
try_on_pairs  person, garment, and the person wearing it
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from common.toyworld import relations as placements
from common.toyworld.captions import BACKGROUND_PHRASES
from common.toyworld.clips import Clip, render_clip
from common.toyworld.render import Render, render
from common.toyworld.sampling import compose, dressed_up, sample_face, sample_object, sample_person
from common.toyworld.scene import Entity, Placed, Scene, frame
from common.toyworld.vocabulary import (
    BACKGROUNDS,
    COLORS,
    GENDERS,
    HELD_OUT_ACTIONS,
    HELD_OUT_MOTIONS,
    HELD_OUT_RELATIONS,
    HELD_OUT_STATES,
    HELD_OUT_STYLES,
    LIVE_CLASSES,
    OBJECT_CLASSES,
    STYLES,
)  # fmt: skip

_SUBJECT_CLASSES = tuple(OBJECT_CLASSES[i % len(OBJECT_CLASSES)] for i in range(30))
_OCCASIONS = ("snow", "beach", "forest", "stage", "room")


@dataclass(frozen=True)
class Prompt:
    """A prompt with ``{}`` where the subject's words go, and the attributes that a right picture shows."""

    text: str
    expected: dict[str, str]


@dataclass(frozen=True)
class Subject:
    """One thing to personalise: pictures in [-1, 1], (N, 3, 64, 64), and the entity they were rendered from."""

    name: str
    class_noun: str
    entity: Entity
    images: Tensor
    masks: Tensor  # (N, 64, 64) bool
    attributes: dict[str, str]
    prompts: tuple[Prompt, ...]


def _pictures(scenes: list[Scene]) -> tuple[Tensor, Tensor]:
    rendered = render(scenes)
    return rendered.images * 2 - 1, rendered.masks > 0


def subject_prompts(entity: Entity) -> tuple[Prompt, ...]:
    """25 prompts: 20 recontextualisations and 5 properties; live subjects trade 10 of the former for accessories."""
    noun = entity.noun
    places = [
        Prompt(f"a photo of a {{}} {BACKGROUND_PHRASES[b][0]}", {"class": noun, "background": b, "style": "photo"})
        for b in BACKGROUNDS
    ]
    words = {
        "sketch": "a sketch of", "watercolor": "a watercolor painting of", "pixel art": "pixel art of",
        "neon": "a neon sign of",
        "cartoon": "a cartoon of", "monochrome": "a black and white photo of", "blueprint": "a blueprint of",
    }  # fmt: skip
    painted = [Prompt(f"{words[style]} a {{}}", {"class": noun, "style": style}) for style in STYLES[1:]]
    if noun in LIVE_CLASSES and noun != "fish":
        worn = [
            ("hat", None),
            ("crown", None),
            ("scarf", None),
            *[(a, b) for b in _OCCASIONS[:2] for a in ("hat", "crown", "scarf")],
            ("hat", "stage"),
        ]
        others = [
            Prompt(
                f"a photo of a {{}} wearing a {a}" + (f" {BACKGROUND_PHRASES[b][0]}" if b else ""),
                {"class": noun, "accessory": a} | ({"background": b} if b else {}),
            )
            for a, b in worn
        ]
    else:
        partner = "dog" if noun != "dog" else "car"
        beside = [
            Prompt(
                f"a photo of a {{}} {relation} a {partner}",
                {"class": noun, "relation": relation, "second_class": partner},
            )
            for relation in ("next to", "on top of", "behind")
        ]
        others = painted + beside
    tints = [c for c in COLORS if c != entity.color][:2]
    properties = [Prompt(f"a photo of a {c} {{}}", {"class": noun, "color": c}) for c in tints]
    properties += [
        Prompt("a photo of a metallic {}", {"class": noun, "material": "metallic"}),
        Prompt("a photo of a squashed {}", {"class": noun, "state": "squashed"}),
        Prompt("a photo of a {}, seen from the back", {"class": noun, "view": "back"}),
    ]
    return (*places, *others[:10], *properties)


def photo_session(entity: Entity, seed: int, count: int = 5) -> list[Scene]:
    """Photos of one entity: other backgrounds, mostly from the front, one from the side."""
    rng = np.random.default_rng([90, seed])
    order = rng.permutation(len(BACKGROUNDS))
    views = ("front", "front", "side", "front", "back", "front")
    return [
        compose(rng, (Placed(entity),), background=BACKGROUNDS[order[k]], view=views[k % 6], spread_deg=35.0)
        for k in range(count)
    ]


def subjects(count: int = 30, images_each: int = 5) -> list[Subject]:
    """The object and animal subjects, always the same; ``count`` takes the first ones.

    Raises: ValueError if count is not in 1..30.
    """
    if not 1 <= count <= 30:
        raise ValueError(f"count must be in 1..30, got {count}")
    chosen = []
    for i, noun in enumerate(_SUBJECT_CLASSES[:count]):
        entity = sample_object(np.random.default_rng([91, i]), noun)
        images, masks = _pictures(photo_session(entity, i, images_each))
        words = {"class": noun, "color": entity.color, "pattern": entity.pattern, "material": entity.material}
        chosen.append(Subject(f"{noun}_{i:02d}", noun, entity, images, masks, words, subject_prompts(entity)))
    return chosen


def held_out_views(entity: Entity, count: int = 8) -> Tensor:
    """Fresh photos of an entity that no photo session has, (count, 3, 64, 64) in [-1, 1]."""
    rng = np.random.default_rng(92)
    scenes = [
        compose(rng, (Placed(entity),), background=BACKGROUNDS[k % len(BACKGROUNDS)], spread_deg=35.0)
        for k in range(count)
    ]
    return _pictures(scenes)[0]


def faces(count: int = 20, images_each: int = 5) -> list[Subject]:
    """Unnamed people: portraits with other expressions, clothes and backgrounds."""
    people = []
    for i in range(count):
        rng = np.random.default_rng([93, i])
        gender = GENDERS[i % 2]
        face = sample_face(rng, gender)
        scenes = []
        for k in range(images_each):
            portrait = sample_person(rng, portrait=True, gender=gender, face=face)
            scenes.append(compose(rng, (Placed(portrait),), background=BACKGROUNDS[(3 * i + k) % len(BACKGROUNDS)]))
        images, masks = _pictures(scenes)
        prompts = tuple(
            Prompt(f"a photo of a {{}} {BACKGROUND_PHRASES[b][0]}", {"class": "person", "background": b})
            for b in BACKGROUNDS
        )
        entity = scenes[0].placed[0].entity
        people.append(
            Subject(f"{gender}_{i:02d}", gender, entity, images, masks, {"class": "person", "gender": gender}, prompts)
        )
    return people


@dataclass(frozen=True)
class Exemplars:
    """Pictures that share one thing to learn, each with a coarse caption that does not name it."""

    name: str
    images: Tensor  # (N, 3, 64, 64) in [-1, 1]
    captions: tuple[str, ...]
    scenes: tuple[Scene, ...]


def styles(images_each: int = 6) -> list[Exemplars]:
    """The held-out styles; captions name the content."""
    sets = []
    for i, style in enumerate(HELD_OUT_STYLES):
        rng = np.random.default_rng([94, i])
        scenes, texts = [], []
        for k in range(images_each):
            entity = sample_object(rng)
            place = BACKGROUNDS[k % len(BACKGROUNDS)]
            scenes.append(compose(rng, (Placed(entity),), background=place, style=style))
            texts.append(f"a {entity.noun} {BACKGROUND_PHRASES[place][0]}")
        sets.append(Exemplars(style, _pictures(scenes)[0], tuple(texts), tuple(scenes)))
    return sets


def relations(images_each: int = 8) -> list[Exemplars]:
    """The held-out relations between changing pairs; captions name both entities."""
    sets = []
    for i, relation in enumerate(HELD_OUT_RELATIONS):
        rng = np.random.default_rng([95, i])
        scenes, texts = [], []
        for k in range(images_each):
            a, b = rng.choice(len(OBJECT_CLASSES), 2, replace=False)
            first, second = sample_object(rng, OBJECT_CLASSES[a]), sample_object(rng, OBJECT_CLASSES[b])
            placed = placements.place(relation, first, second)
            scenes.append(
                compose(rng, placed, background=BACKGROUNDS[k % 10], relation=relation, fill=0.86, spread_deg=8.0)
            )
            texts.append(f"a {first.noun} and a {second.noun}")
        sets.append(Exemplars(relation, _pictures(scenes)[0], tuple(texts), tuple(scenes)))
    return sets


def actions(images_each: int = 8) -> list[Exemplars]:
    """The held-out actions by changing people, bears and robots."""
    sets = []
    for i, action in enumerate(HELD_OUT_ACTIONS):
        rng = np.random.default_rng([96, i])
        scenes, texts = [], []
        for k in range(images_each):
            actor = sample_person(rng, portrait=False) if k % 3 == 0 else sample_object(rng, ("bear", "robot")[k % 2])
            scenes.append(compose(rng, (Placed(replace(actor, pose=action)),), background=BACKGROUNDS[k % 10]))
            texts.append(f"a {actor.gender or actor.noun}")
        sets.append(Exemplars(action, _pictures(scenes)[0], tuple(texts), tuple(scenes)))
    return sets


def concepts(images_each: int = 6) -> list[Exemplars]:
    """The held-out states (general adjectives) shown on changing subjects."""
    sets = []
    for i, state in enumerate(HELD_OUT_STATES):
        rng = np.random.default_rng([97, i])
        entities = [replace(sample_object(rng), state=state) for _ in range(images_each)]
        scenes = [compose(rng, (Placed(e),), background=BACKGROUNDS[k % 10]) for k, e in enumerate(entities)]
        sets.append(Exemplars(state, _pictures(scenes)[0], tuple(f"a {e.noun}" for e in entities), tuple(scenes)))
    return sets


def clips(num_frames: int = 8) -> list[Clip]:
    """One clip for each held-out motion, all with different subjects."""
    films = []
    for i, motion in enumerate(HELD_OUT_MOTIONS):
        rng = np.random.default_rng([98, i])
        scene = compose(rng, (Placed(sample_object(rng)),), background=BACKGROUNDS[i % 10], fill=0.5, spread_deg=10.0)
        films.append(render_clip(scene, motion, num_frames=num_frames))
    return films


@dataclass(frozen=True)
class PosedObject:
    """An object for 3D: photos with cameras, and evenly spaced held-out views with all ground truth."""

    entity: Entity
    photos: Render
    held_out: Render


def objects_3d(count: int = 10, photos_each: int = 5, views_each: int = 8) -> list[PosedObject]:
    """Objects that have a front: photos on changing backgrounds, held-out views all around on one background."""
    nouns = ("bear", "car", "dog", "robot", "duck", "house", "cat", "teapot", "chair", "rocket")[:count]
    sets = []
    for i, noun in enumerate(nouns):
        entity = sample_object(np.random.default_rng([99, i]), noun)
        placed = (Placed(entity),)
        around = [
            Scene(placed, "snow", camera=frame(placed, azimuth_deg=360 * k / views_each, elevation_deg=15.0, fill=0.7))
            for k in range(views_each)
        ]
        sets.append(PosedObject(entity, render(photo_session(entity, 1000 + i, photos_each)), render(around)))
    return sets


@dataclass(frozen=True)
class TryOnPair:
    """Pictures in [-1, 1], (3, 64, 64) each: a person, a garment alone, and that person wearing it."""

    person: Tensor
    garment: Tensor
    worn: Tensor
    garment_mask: Tensor  # (64, 64) bool, where the garment is worn


def try_on_pairs(count: int = 8) -> list[TryOnPair]:
    """Garments move to other people; pose, camera and background stay."""
    pairs = []
    for i in range(count):
        rng = np.random.default_rng([100, i])
        wearer, donor = (sample_person(rng, portrait=False) for _ in range(2))
        cloth = {name: donor.rgb[name] for name in ("main", "garment", "accent")}
        dressed = replace(
            wearer, color=donor.color, pattern=donor.pattern, pattern_rgb=donor.pattern_rgb, garment=donor.garment,
            logo=donor.logo, rgb={**wearer.rgb, **cloth},
        )  # fmt: skip
        before = compose(rng, (Placed(wearer),), background=BACKGROUNDS[i % 10])
        flat = replace(dressed, only=frozenset({"garment", "logo", "arm"}))
        alone = compose(rng, (Placed(flat),), background="snow", spread_deg=0.0)
        shown = render([before, alone, replace(before, placed=(Placed(dressed),))])
        names = shown.part_names[2]
        worn_parts = torch.tensor([k + 1 for k, (_, name) in enumerate(names) if name in ("garment", "logo")])
        images = shown.images * 2 - 1
        pairs.append(TryOnPair(images[0], images[1], images[2], torch.isin(shown.parts[2], worn_parts)))
    return pairs


def accessory_subject(subject: Subject, name: str) -> Entity:
    """The subject's entity wearing an accessory: ground truth for accessory prompts."""
    return dressed_up(np.random.default_rng(101), subject.entity, name)
