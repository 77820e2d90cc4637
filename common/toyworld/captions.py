"""Captions from a grammar with synonyms and dropped attributes, and the corpus the tokenizer is trained on."""

from collections.abc import Iterable, Mapping

import numpy as np

from common.toyworld.scene import Entity, Scene
from common.toyworld.vocabulary import (
    CELEBRITIES,
    COLORLESS_STYLES,
    COLORS,
    HELD_OUT_ACTIONS,
    HELD_OUT_MOTIONS,
    HELD_OUT_RELATIONS,
    HELD_OUT_STATES,
    HELD_OUT_STYLES,
    LINE_STYLES,
    MOTIONS,
    PUPPET_CLASSES,
    ROUND_CLASSES,
)  # fmt: skip

NOUNS = {
    "bear": ("bear", "teddy bear"), "robot": ("robot",), "duck": ("duck", "toy duck"), "dog": ("dog", "puppy"),
    "cat": ("cat", "kitten"), "fish": ("fish",), "car": ("car", "automobile"), "house": ("house", "home"),
    "mug": ("mug", "cup"), "teapot": ("teapot",), "rocket": ("rocket", "spaceship"), "mushroom": ("mushroom",),
    "chair": ("chair", "seat"), "vase": ("vase",),
}  # fmt: skip
STYLE_PREFIXES = {
    "photo": ("a photo of", "a photo of", "a picture of", "a photograph of",
              "an image of", "a rendering of", "a close-up photo of", "a good photo of"),
    "sketch": ("a sketch of", "a pencil sketch of", "a line drawing of"),
    "watercolor": ("a watercolor painting of", "a watercolor of", "a painting in watercolor of"),
    "pixel art": ("pixel art of", "a pixel art image of", "a pixelated picture of"),
    "neon": ("a neon sign of", "a neon drawing of", "neon art of"),
    "cartoon": ("a cartoon of", "a cartoon drawing of", "a comic picture of"),
    "monochrome": ("a black and white photo of", "a monochrome photo of", "a gray photo of"),
    "blueprint": ("a blueprint of", "a blueprint drawing of", "a technical blueprint of"),
}  # fmt: skip
BACKGROUND_PHRASES = {
    "meadow": ("in a meadow", "on the grass", "on a green meadow"),
    "snow": ("in the snow", "on snow", "in a snowy field"),
    "beach": ("on the beach", "on a sandy beach", "at the beach"),
    "city": ("in the city", "on a city street", "on a street"),
    "room": ("in a room", "on a wooden floor", "in a living room"),
    "night": ("at night", "in the dark night", "under the moon at night"),
    "lake": ("on a lake", "on the water", "on a blue lake"), "forest": ("in a forest", "in the woods", "in the jungle"),
    "desert": ("in the desert", "on desert sand", "in a desert"),
    "stage": ("on a stage", "on stage", "on a theater stage"),
}  # fmt: skip
VIEW_PHRASES = {
    "front": ("front view", "seen from the front", "facing the camera"),
    "side": ("side view", "seen from the side", "in profile"),
    "back": ("back view", "seen from the back", "from the rear"),
    "overhead": ("overhead view", "seen from above", "top view"),
}  # fmt: skip
POSE_PHRASES = {
    "standing": ("standing", "standing still"), "waving": ("waving", "waving a hand"),
    "arms raised": ("with arms raised", "raising both arms"), "sitting": ("sitting", "sitting down"),
    "running": ("running", "running fast"), "hands on hips": ("with hands on hips",),
    "pointing": ("pointing", "pointing sideways"), "kneeling": ("kneeling", "kneeling down"),
}  # fmt: skip
RELATION_PHRASES = {
    "on top of": ("on top of", "on", "atop", "upon", "above", "over"),
    "under": ("under", "below", "beneath", "underneath"),
    "next to": ("next to", "beside", "near", "by", "alongside", "to the left of"),
    "inside": ("inside", "in", "within", "into"),
    "behind": ("behind", "after", "past"),
    "in front of": ("in front of", "before", "ahead of"),
    "carrying": ("carrying", "holding", "with"),
}  # fmt: skip
STATE_WORDS = {
    "inflated": ("inflated", "puffy", "swollen"), "squashed": ("squashed", "flat", "flattened"),
    "stretched": ("stretched", "tall", "elongated"), "tilted": ("tilted", "leaning", "slanted"),
}  # fmt: skip
MOTION_PHRASES = {
    "still": ("still", "not moving"), "moving left": ("moving left", "moving to the left"),
    "moving right": ("moving right", "moving to the right"), "jumping": ("jumping", "jumping up and down"),
    "spinning": ("spinning", "spinning around"), "growing": ("growing", "growing big"),
    "shrinking": ("shrinking", "shrinking small"), "zooming in": ("zooming in", "the camera zooming in"),
    "zooming out": ("zooming out", "the camera zooming out"),
    "orbiting camera": ("orbiting camera", "the camera orbiting around"),
}  # fmt: skip
_OF_PICTURES = (NOUNS, STYLE_PREFIXES, BACKGROUND_PHRASES, VIEW_PHRASES, POSE_PHRASES, RELATION_PHRASES, STATE_WORDS)
_CLIP_PREFIXES = ("a video of", "a video of", "a clip of", "a photo of")
_FILLERS = ("nice", "cool", "clean", "good", "cute", "small", "large", "weird", "new")
_DETAILS = ("details", "parts")
RARE_TOKENS = ("sks", "zwx", "ohwx", "qlv", "vbk", "jzt", "xqo", "pfw")


def _one(rng: np.random.Generator, options) -> str:
    return options[int(rng.integers(len(options)))]


def _article(phrase: str) -> str:
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


def entity_phrase(rng: np.random.Generator, entity: Entity, style: str, keep: float) -> tuple[str, set[str]]:
    """A noun phrase and the attributes it names; each optional attribute is kept with probability ``keep``."""
    said: set[str] = {"class"}
    colored, surfaced = style not in COLORLESS_STYLES, style not in LINE_STYLES
    if entity.noun == "person":
        return _person_phrase(rng, entity, colored, surfaced, keep)
    words = []
    if rng.random() < 0.06:
        words.append(_one(rng, _FILLERS))
    if entity.state in STATE_WORDS:
        words.append(_one(rng, STATE_WORDS[entity.state]))
        said.add("state")
    if surfaced and entity.material != "matte" and rng.random() < keep:
        words.append("shiny" if entity.material == "glossy" and rng.random() < 0.5 else entity.material)
        said.add("material")
    if colored and rng.random() < max(keep, 0.9 * keep + 0.1):
        words.append(entity.color)
        said.add("color")
    if surfaced and entity.pattern != "plain" and rng.random() < keep:
        words.append(entity.pattern)
        said.add("pattern")
    words.append(entity.noun if rng.random() < 0.8 else _one(rng, NOUNS[entity.noun]))
    phrase = _article(" ".join(words))
    if colored and rng.random() < 0.3:
        phrase += f" with {entity.second} {_one(rng, _DETAILS)}"
        said.add("second")
    if entity.accessory != "none":
        phrase += f" wearing {_article(entity.accessory)}"
        said.add("accessory")
    return phrase, said


def _person_phrase(rng, entity: Entity, colored: bool, surfaced: bool, keep: float) -> tuple[str, set[str]]:
    said = {"class"}
    if entity.celebrity is not None:
        phrase = CELEBRITIES[entity.celebrity]
        said.add("celebrity")
        if entity.portrait and entity.expression != "neutral":
            phrase, said = f"{entity.expression} {phrase}", said | {"expression"}
    else:
        words = []
        if entity.portrait and entity.expression != "neutral":
            words.append(entity.expression)
            said.add("expression")
        words.append(entity.gender if rng.random() < 0.85 else "person")
        if words[-1] != "person":
            said.add("gender")
        phrase = _article(" ".join(words))
        if entity.portrait and rng.random() < keep:
            style = entity.face.hair_style
            looks = [
                "a bald head"
                if style == "bald"
                else f"{_article(style) if style in ('bun', 'mohawk') else style + ' hair'}"
            ]
            looks += ["glasses"] * entity.face.glasses + ["a beard"] * entity.face.beard
            phrase += " with " + " and ".join(looks)
            said |= {"hair_style", "glasses", "beard"}
    if rng.random() < keep:
        clothes = [entity.color] if colored else []
        if colored:
            said.add("color")
        if surfaced and entity.pattern != "plain" and rng.random() < keep:
            clothes.append(entity.pattern)
            said.add("pattern")
        phrase += f" in {_article(' '.join([*clothes, entity.garment]))}"
        said.add("garment")
    return phrase, said


def caption(scene: Scene, rng: np.random.Generator, keep: float = 0.85) -> tuple[str, set[str]]:
    """One caption and the names of the attributes that it states (see examples.LABELS)."""
    first = scene.placed[0].entity
    phrase, said = entity_phrase(rng, first, scene.style, keep)
    prefix = _one(rng, STYLE_PREFIXES[scene.style])
    said.add("style")
    if first.portrait:
        prefix = (
            f"{prefix} the face of"
            if rng.random() < 0.25
            else prefix.replace(" of", " portrait of")
            if rng.random() < 0.4
            else prefix
        )
    text = f"{prefix} {phrase}"
    if scene.relation is not None:
        other = next(p.entity for p in scene.placed if p.entity is not first and p.entity.noun != first.noun)
        other_phrase, other_said = entity_phrase(rng, other, scene.style, keep * 0.8)
        text += f" {_one(rng, RELATION_PHRASES[scene.relation])} {other_phrase}"
        said |= {"relation", "second_class"} | ({"second_color"} if "color" in other_said else set())
    elif (
        first.noun in PUPPET_CLASSES and not first.portrait and (first.pose != "standing" or rng.random() < keep * 0.6)
    ):
        text += f" {_one(rng, POSE_PHRASES[first.pose])}"
        said.add("pose")
    if scene.style not in LINE_STYLES and rng.random() < keep:
        text += f" {_one(rng, BACKGROUND_PHRASES[scene.background])}"
        said.add("background")
    if shows_view(scene) and (scene.view != "front" or rng.random() < 0.5):
        text += f", {_one(rng, VIEW_PHRASES[scene.view])}"
        said.add("view")
    return text, said


def clip_caption(scene: Scene, motion: str, rng: np.random.Generator, keep: float = 0.85) -> str:
    """A caption of a clip of one entity: "a video of a red duck jumping on the beach"."""
    phrase, _ = entity_phrase(rng, scene.placed[0].entity, scene.style, keep)
    text = f"{_one(rng, _CLIP_PREFIXES)} {phrase} {_one(rng, MOTION_PHRASES[motion])}"
    return f"{text} {_one(rng, BACKGROUND_PHRASES[scene.background])}" if rng.random() < keep else text


def shows_view(scene: Scene) -> bool:
    """Whether the view can be told from the picture: one object that is not the same from all sides."""
    first = scene.placed[0].entity
    return (
        scene.relation is None and not first.portrait and (first.noun not in ROUND_CLASSES or scene.view == "overhead")
    )


def motion_words() -> list[str]:
    """Words that tell motions and stand in no caption of a picture, sorted."""
    return sorted(_words(_phrases(MOTION_PHRASES)) - _words([*_phrases(*_OF_PICTURES), *_FILLERS, *_DETAILS]))


def _phrases(*tables: Mapping[str, Iterable[str]]) -> list[str]:
    return [phrase for table in tables for phrases in table.values() for phrase in phrases]


def _words(phrases: Iterable[str]) -> set[str]:
    return {word for phrase in phrases for word in phrase.split()}


def corpus() -> list[str]:
    """Every word that prompts may use, as sentences: each becomes one token of tiny-sd's tokenizer."""
    lines = _phrases(*_OF_PICTURES)
    lines += [*COLORS, *CELEBRITIES, *_FILLERS, *_DETAILS, *RARE_TOKENS, *MOTIONS, *HELD_OUT_MOTIONS, *HELD_OUT_ACTIONS]
    lines += [*HELD_OUT_RELATIONS, *HELD_OUT_STATES, *HELD_OUT_STYLES, *_EXTRA.split()]
    return lines


_EXTRA = """
plain striped dotted checkered matte glossy metallic shiny hat crown scarf shirt dress coat neutral smiling sad
surprised angry short long bald curly bun mohawk hair head glasses beard face portrait man woman person people boy
girl child toy object thing animal concept style art painting illustration depiction rendition oil drawing the my
one two three this that it is at of to and or not no from for as with without wearing dirty dark bright cropped
close close-up big tiny red-hot wet dry shaped cube ball round square made wood stone glass metal gold silver
rainbow sun sky cloud tree flower mountain river road wall floor table box bridge eiffel tower background wheat
field cobblestone purple rug pink fabric blanket santa police firefighter outfit chef bow tie yellow orange blue
green black white brown red against around along across between through toward towards off out up down onto outside
inside upside opposite beyond about during since until painted carved contained sits stands lies rides hugs shakes
wears eats sleeping jumping walking dancing flying swimming cold hot warm old young happy broken whole solid liquid
melted ice fire flame burnt burned unfrozen intact calm blown shattered sinking hovering normal upright heavy light
empty full open closed clay vector anime minimalist retro vintage video clip motion moving left right spinning
growing shrinking zooming orbiting camera slow fast
""".replace("\n", " ")
