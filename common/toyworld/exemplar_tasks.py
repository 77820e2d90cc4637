"""What is learned from exemplars that share it: a relation, an action or a state, all held out, with fixed seeds.

Each task has exemplars with captions that do not name what they share, and prompts about other entities.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from common.toyworld.benchmark import Exemplars, Prompt, actions, photo_session, relations
from common.toyworld.captions import BACKGROUND_PHRASES
from common.toyworld.render import render
from common.toyworld.sampling import sample_object
from common.toyworld.scene import Scene
from common.toyworld.vocabulary import BACKGROUNDS, COLORS, HELD_OUT_STATES, OBJECT_CLASSES, POSES

NUM_EXEMPLARS, NUM_HELD_OUT, NUM_PROMPTS = 8, 8, 8
_ACTORS = ("bear", "robot", "man", "woman")
_STATES = tuple(state for state in HELD_OUT_STATES if state != "floating")  # which only the shadow shows


@dataclass(frozen=True)
class Task:
    """Something to learn, and the prompts that examine it.

    name: "riding".   attribute: what the held-out judge calls it: "relation".
    images, captions, scenes: the exemplars (N,3,64,64) in [-1,1]; {} in a caption is where the learned words go.
    others, others_captions: pictures that lack it but share all else (actions: exemplar k in another pose; states: the
        subject as it is); None for relations.
    held_out, held_out_captions: fresh exemplars for losses.
    prompts: about entities that no exemplar shows; {} is where the learned words go.
    """

    name: str
    attribute: str
    images: Tensor
    captions: tuple[str, ...]
    scenes: tuple[Scene, ...]
    others: Tensor | None
    others_captions: tuple[str, ...]
    held_out: Tensor
    held_out_captions: tuple[str, ...]
    prompts: tuple[Prompt, ...]


def relation_tasks(count: int = 5) -> list[Task]:
    """Relations of changing pairs: "a photo of a duck {} a chair". Prompts: pairs that no exemplar shows."""
    return _tasks("relation", relations(NUM_EXEMPLARS + NUM_HELD_OUT)[:count], _relation_caption, _relation_prompts)


def action_tasks(count: int = 5) -> list[Task]:
    """Actions of people, bears and robots: "a photo of a bear {}". Prompts: in colours that no exemplar of them has."""
    tasks = _tasks("pose", actions(NUM_EXEMPLARS + NUM_HELD_OUT)[:count], _action_caption, _action_prompts)
    return [replace(task, others=_pictures(_other_poses(task.scenes)), others_captions=task.captions) for task in tasks]


def state_tasks(count: int = 5, images_each: int = 4) -> list[Task]:
    """States of one subject: "a photo of a duck {}", beside photos of it as it is. Prompts: of other classes."""
    tasks = []
    for i, state in enumerate(_STATES[:count]):
        entity = sample_object(np.random.default_rng([102, i]), OBJECT_CLASSES[(3 * i) % len(OBJECT_CLASSES)])
        changed = photo_session(replace(entity, state=state), 2000 + i, images_each + NUM_HELD_OUT // 2)
        plain = photo_session(entity, 3000 + i, images_each)
        caption = f"a photo of a {entity.noun} {{}}"
        images, held_out = _pictures(changed[:images_each]), _pictures(changed[images_each:])
        tasks.append(
            Task(
                state,
                "state",
                images,
                (caption,) * len(images),
                tuple(changed[:images_each]),
                _pictures(plain),
                (f"a photo of a {entity.noun}",) * len(plain),
                held_out,
                (caption,) * len(held_out),
                _state_prompts(i, state, entity.noun),
            )  # fmt: skip
        )
    return tasks


def _tasks(
    attribute: str, sets: Sequence[Exemplars], caption: Callable[[Scene], str],
    prompts: Callable[[int, str, Sequence[Scene]], tuple[Prompt, ...]],
) -> list[Task]:  # fmt: skip
    tasks = []
    for i, found in enumerate(sets):
        captions = tuple(caption(scene) for scene in found.scenes)
        first, rest = slice(0, NUM_EXEMPLARS), slice(NUM_EXEMPLARS, None)
        tasks.append(
            Task(
                found.name,
                attribute,
                found.images[first],
                captions[first],
                found.scenes[first],
                None,
                (),
                found.images[rest],
                captions[rest],
                prompts(i, found.name, found.scenes[first]),
            )  # fmt: skip
        )
    return tasks


def _pictures(scenes: Sequence[Scene]) -> Tensor:
    return render(list(scenes)).images * 2 - 1


def entity_nouns(scene: Scene) -> list[str]:
    """The different entities of a scene, the first one first: ["duck", "chair"]."""
    return list(dict.fromkeys(placed.entity.gender or placed.entity.noun for placed in scene.placed))


def _relation_caption(scene: Scene) -> str:
    first, second = entity_nouns(scene)
    return f"a photo of a {first} {{}} a {second}"


def _relation_prompts(index: int, relation: str, scenes: Sequence[Scene]) -> tuple[Prompt, ...]:
    shown = [entity_nouns(scene) for scene in scenes]
    rng = np.random.default_rng([103, index])
    every = [(a, b) for a in OBJECT_CLASSES for b in OBJECT_CLASSES if a != b and [a, b] not in shown]
    pairs = [every[k] for k in rng.choice(len(every), NUM_PROMPTS, replace=False)]
    return tuple(
        Prompt(f"a photo of a {a} {{}} a {b}", {"relation": relation, "class": a, "second_class": b}) for a, b in pairs
    )


def _action_caption(scene: Scene) -> str:
    return f"a photo of a {entity_nouns(scene)[0]} {{}}"


def _action_prompts(index: int, action: str, scenes: Sequence[Scene]) -> tuple[Prompt, ...]:
    rng = np.random.default_rng([104, index])
    prompts: dict[str, Prompt] = {}  # by text, so that none is there twice
    while len(prompts) < NUM_PROMPTS:
        actor = _ACTORS[len(prompts) % len(_ACTORS)]
        worn = {scene.placed[0].entity.color for scene in scenes if entity_nouns(scene)[0] == actor}
        free = [color for color in COLORS if color not in worn]
        color, place = free[rng.integers(len(free))], BACKGROUNDS[rng.integers(len(BACKGROUNDS))]
        is_person = actor in ("man", "woman")
        article = "an" if color[0] in "aeiou" else "a"
        words = f"a {actor} in {article} {color} shirt" if is_person else f"{article} {color} {actor}"
        shown = {"pose": action, "class": "person" if is_person else actor, "color": color, "background": place}
        text = f"a photo of {words} {{}} {BACKGROUND_PHRASES[place][0]}"
        prompts[text] = Prompt(text, shown)
    return tuple(prompts.values())


def _other_poses(scenes: Sequence[Scene]) -> list[Scene]:
    """The same actor, place and camera; each scene in another of the poses that have a name."""
    return [
        replace(scene, placed=(replace(scene.placed[0], entity=replace(scene.placed[0].entity, pose=pose)),))
        for scene, pose in zip(scenes, [POSES[k % len(POSES)] for k in range(len(scenes))], strict=True)
    ]


def _state_prompts(index: int, state: str, learned_noun: str) -> tuple[Prompt, ...]:
    rng = np.random.default_rng([105, index])
    nouns = [noun for noun in OBJECT_CLASSES if noun != learned_noun]
    chosen = [nouns[k] for k in rng.choice(len(nouns), NUM_PROMPTS, replace=False)]
    return tuple(Prompt(f"a photo of a {noun} {{}}", {"state": state, "class": noun}) for noun in chosen)
