"""Held-out motions to learn from clips, with prompts about other objects; always the same."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from common.toyworld.captions import BACKGROUND_PHRASES
from common.toyworld.clips import Clip, render_clip
from common.toyworld.sampling import compose, sample_object
from common.toyworld.scene import Entity, Placed
from common.toyworld.vocabulary import BACKGROUNDS, COLORS, OBJECT_CLASSES

# Motions along a path; "pulsing" and the like leave the centre where it is.
PATHS = ("zigzag", "figure eight", "bouncing across", "swoop", "pendulum", "spiral up", "somersault", "hop and turn")
NUM_FRAMES, NUM_PROMPTS = 8, 3
# "moving", in all texts, is a word that tiny-video knows: where a prompt has none for the motion, it makes stills.


@dataclass(frozen=True)
class MotionPrompt:
    """A prompt about another object, and what a right clip shows."""

    text: str
    noun: str
    color: str


@dataclass(frozen=True)
class MotionTask:
    """A motion to learn.

    name: "zigzag", which is in no caption of the backbone.   clips: (N,3,F,64,64) in [-1,1], of different objects.
    captions: "a video of a red duck moving zigzag on the beach".   plain_captions: "a video of a duck moving zigzag".
    trajectories: (N,F,2) true paths in pixels.   entities, backgrounds: of the clips.   prompts: of other objects.
    """

    name: str
    clips: Tensor
    captions: tuple[str, ...]
    plain_captions: tuple[str, ...]
    trajectories: Tensor
    entities: tuple[Entity, ...]
    backgrounds: tuple[str, ...]
    prompts: tuple[MotionPrompt, ...]


def motion_tasks(count: int = 4, clips_each: int = 1, motions: Sequence[str] = PATHS) -> list[MotionTask]:
    """The first `count` motions, each shown by `clips_each` clips."""
    return [_task(i, motion, clips_each) for i, motion in enumerate(motions[:count])]


def _task(index: int, motion: str, clips_each: int) -> MotionTask:
    rng = np.random.default_rng([106, index])
    films: list[Clip] = []
    entities, places = [], []
    for k in range(clips_each):
        entity = sample_object(rng, OBJECT_CLASSES[(5 * index + 3 * k) % len(OBJECT_CLASSES)])
        place = BACKGROUNDS[(3 * index + k) % len(BACKGROUNDS)]
        scene = compose(rng, (Placed(entity),), background=place, fill=0.5, spread_deg=8.0)
        films.append(render_clip(scene, motion, num_frames=NUM_FRAMES))
        entities.append(entity)
        places.append(place)
    words = [
        f"{_a(entity.color)} {entity.noun} moving {motion} {BACKGROUND_PHRASES[place][0]}"
        for entity, place in zip(entities, places, strict=True)
    ]
    return MotionTask(
        name=motion,
        clips=torch.stack([film.frames for film in films]).transpose(1, 2) * 2 - 1,
        captions=tuple(f"a video of {text}" for text in words),
        plain_captions=tuple(f"a video of {_a(entity.noun)} moving {motion}" for entity in entities),
        trajectories=torch.from_numpy(np.stack([film.trajectory for film in films])).float(),
        entities=tuple(entities),
        backgrounds=tuple(places),
        prompts=_prompts(rng, motion, entities, places),
    )


def _prompts(
    rng: np.random.Generator, motion: str, entities: list[Entity], places: list[str]
) -> tuple[MotionPrompt, ...]:
    nouns = [noun for noun in OBJECT_CLASSES if noun not in {entity.noun for entity in entities}]
    colors = [color for color in COLORS if color not in {entity.color for entity in entities}]
    others = [place for place in BACKGROUNDS if place not in places]
    prompts = []
    for noun in (nouns[k] for k in rng.choice(len(nouns), NUM_PROMPTS, replace=False)):
        color, place = colors[rng.integers(len(colors))], others[rng.integers(len(others))]
        text = f"a video of {_a(color)} {noun} moving {motion} {BACKGROUND_PHRASES[place][0]}"
        prompts.append(MotionPrompt(text, noun, color))
    return tuple(prompts)


def _a(phrase: str) -> str:
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase
