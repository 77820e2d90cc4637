"""Labelled pictures: scenes rendered with captions and ground-truth attributes, one seed an example."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from common.toyworld.captions import caption, shows_view
from common.toyworld.render import render
from common.toyworld.sampling import sample_training_scene
from common.toyworld.scene import Scene
from common.toyworld.vocabulary import (
    ACCESSORIES,
    BACKGROUNDS,
    CELEBRITIES,
    CLASSES,
    COLORLESS_STYLES,
    COLORS,
    EXPRESSIONS,
    GARMENTS,
    GENDERS,
    HAIR_STYLES,
    LINE_STYLES,
    MATERIALS,
    PATTERNS,
    POSES,
    PUPPET_CLASSES,
    RELATIONS,
    STATES,
    STYLES,
    VIEWS,
)  # fmt: skip

LABELS: dict[str, list[str]] = {
    "class": list(CLASSES), "color": list(COLORS), "pattern": list(PATTERNS), "material": list(MATERIALS),
    "background": list(BACKGROUNDS), "style": list(STYLES), "view": list(VIEWS), "relation": ["none", *RELATIONS],
    "second_class": list(CLASSES), "second_color": list(COLORS), "pose": list(POSES), "state": list(STATES),
    "accessory": list(ACCESSORIES), "expression": list(EXPRESSIONS), "garment": list(GARMENTS), "gender": list(GENDERS),
    "hair_style": list(HAIR_STYLES), "glasses": ["no", "yes"], "beard": ["no", "yes"], "celebrity": list(CELEBRITIES),
}  # fmt: skip
NUM_CAPTIONS = 3


@dataclass(frozen=True)
class ExampleBatch:
    """N pictures with captions and labels; a label of -1 does not apply or cannot be seen."""

    images: np.ndarray  # (N, 64, 64, 3) uint8
    masks: np.ndarray  # (N, 64, 64) uint8, 0 = background, k = entity k in the order of the caption
    labels: dict[str, np.ndarray]  # attribute -> (N,) int64 index into LABELS
    instances: np.ndarray  # (N,) int64: recurring identity, -1 = seen once
    captions: list[list[str]]  # NUM_CAPTIONS paraphrases each
    mentioned: dict[str, np.ndarray]  # attribute -> (N,) bool: the first caption states it


def scene_labels(scene: Scene, labels: dict[str, list[str]] = LABELS) -> dict[str, int]:
    """Ground truth of every attribute as an index into its labels, -1 = does not apply or cannot be seen."""
    entity = scene.placed[0].entity
    colored, surfaced = scene.style not in COLORLESS_STYLES, scene.style not in LINE_STYLES
    seen = {
        "class": entity.noun, "style": scene.style, "relation": scene.relation or "none",
        "color": entity.color if colored and entity.color in COLORS else None,
        "background": scene.background if surfaced else None,
        "view": scene.view if shows_view(scene) else None,
    }  # fmt: skip
    single = scene.relation is None
    if single:
        seen |= {
            "pattern": entity.pattern if surfaced else None,
            "state": entity.state if entity.noun != "person" else None,
        }
        seen["material"] = entity.material if surfaced and entity.noun != "person" else None
        seen["pose"] = (
            entity.pose if entity.noun in PUPPET_CLASSES and not entity.portrait and scene.view == "front" else None
        )
        seen["accessory"] = entity.accessory if entity.noun != "person" else None
    else:
        other = next(p.entity for p in scene.placed if p.entity is not entity and p.entity.noun != entity.noun)
        seen |= {"second_class": other.noun, "second_color": other.color if colored else None}
    if entity.noun == "person" and single:
        seen["garment"] = entity.garment if not entity.portrait else None
        if entity.portrait:
            face = entity.face
            seen |= {"expression": entity.expression, "gender": entity.gender, "hair_style": face.hair_style}
            seen |= {"glasses": "yes" if face.glasses else "no", "beard": "yes" if face.beard else "no"}
            if entity.celebrity is not None and surfaced:
                seen["celebrity"] = CELEBRITIES[entity.celebrity]
    return {name: names.index(seen[name]) if seen.get(name) in names else -1 for name, names in labels.items()}


def label_scenes(scenes: Sequence[Scene], instances: Sequence[int], caption_seeds: Sequence[int]) -> ExampleBatch:
    """Render scenes and write their captions and labels."""
    pictures = render(list(scenes))
    texts, mentioned = [], {name: np.zeros(len(scenes), bool) for name in LABELS}
    for i, (scene, seed) in enumerate(zip(scenes, caption_seeds, strict=True)):
        rng = np.random.default_rng([13, seed])
        drawn = [caption(scene, rng) for _ in range(NUM_CAPTIONS)]
        texts.append([text for text, _ in drawn])
        for name in drawn[0][1] & LABELS.keys():
            mentioned[name][i] = True
    rows = [scene_labels(scene) for scene in scenes]
    return ExampleBatch(
        images=(pictures.images * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy(),
        masks=pictures.masks.byte().cpu().numpy(),
        labels={name: np.array([row[name] for row in rows], np.int64) for name in LABELS},
        instances=np.asarray(instances, np.int64),
        captions=texts,
        mentioned={name: mentioned[name] & np.array([row[name] >= 0 for row in rows]) for name in LABELS},
    )


def make_examples(seeds: Sequence[int]) -> ExampleBatch:
    """The training examples of these seeds; the same seed always gives the same example."""
    drawn = [sample_training_scene(int(seed)) for seed in seeds]
    return label_scenes([scene for scene, _ in drawn], [instance for _, instance in drawn], seeds)
