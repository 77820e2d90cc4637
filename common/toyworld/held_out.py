"""Labelled scenes of what no training picture of the backbones shows: held-out relations, actions, states and styles.

They teach the judge that examines methods which learn such things. Their seeds are not those of the benchmark sets.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from common.toyworld import relations
from common.toyworld.examples import LABELS as TRAINING_LABELS
from common.toyworld.examples import scene_labels
from common.toyworld.render import render
from common.toyworld.sampling import compose, sample_object, sample_person
from common.toyworld.scene import Placed, Scene
from common.toyworld.shards import RENDER_BATCH, ShardData, stack
from common.toyworld.vocabulary import (
    BACKGROUNDS,
    HELD_OUT_ACTIONS,
    HELD_OUT_RELATIONS,
    HELD_OUT_STATES,
    HELD_OUT_STYLES,
    OBJECT_CLASSES,
    STYLES,
)

LABELS: dict[str, list[str]] = TRAINING_LABELS | {
    "relation": [*TRAINING_LABELS["relation"], *HELD_OUT_RELATIONS],
    "pose": [*TRAINING_LABELS["pose"], *HELD_OUT_ACTIONS],
    "state": [*TRAINING_LABELS["state"], *HELD_OUT_STATES],
    "style": [*TRAINING_LABELS["style"], *HELD_OUT_STYLES],
}
KINDS = {"relation": 0.4, "action": 0.25, "state": 0.2, "style": 0.15}


def sample_held_out_scene(seed: int) -> Scene:
    """One scene with one held-out thing in it; pictures are photos four times of five, so that styles vary too."""
    rng = np.random.default_rng([12, seed])
    background = BACKGROUNDS[rng.integers(len(BACKGROUNDS))]
    style = "photo" if rng.random() < 0.8 else STYLES[rng.integers(len(STYLES))]
    kind = list(KINDS)[rng.choice(len(KINDS), p=list(KINDS.values()))]
    if kind == "relation":
        relation = HELD_OUT_RELATIONS[rng.integers(len(HELD_OUT_RELATIONS))]
        nouns = [OBJECT_CLASSES[i] for i in rng.choice(len(OBJECT_CLASSES), 2, replace=False)]
        placed = relations.place(relation, *(sample_object(rng, noun) for noun in nouns))
        fill = float(rng.uniform(0.80, 0.92))
        return compose(
            rng, placed, background=background, style=style, relation=relation, fill=fill, spread_deg=8.0
        )  # fmt: skip
    if kind == "action":
        is_person = rng.random() < 0.5
        actor = (
            sample_person(rng, portrait=False) if is_person else sample_object(rng, ("bear", "robot")[rng.integers(2)])
        )
        entity = replace(actor, pose=HELD_OUT_ACTIONS[rng.integers(len(HELD_OUT_ACTIONS))])
    else:
        entity = sample_object(rng)
        if kind == "state":
            entity = replace(entity, state=HELD_OUT_STATES[rng.integers(len(HELD_OUT_STATES))])
        else:
            style = HELD_OUT_STYLES[rng.integers(len(HELD_OUT_STYLES))]
    return compose(rng, (Placed(entity),), background=background, style=style)


def render_held_out(seeds: Sequence[int]) -> ShardData:
    """Render one scene per seed, with labels that index LABELS and without captions."""
    images, masks, rows = [], [], []
    for start in range(0, len(seeds), RENDER_BATCH):
        scenes = [sample_held_out_scene(int(seed)) for seed in seeds[start : start + RENDER_BATCH]]
        pictures = render(scenes)
        images.append((pictures.images * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy())
        masks.append(pictures.masks.byte().cpu().numpy())
        rows += [scene_labels(scene, LABELS) for scene in scenes]
    labels = {name: stack([np.array([row[name] for row in rows])]).long() for name in LABELS}
    return ShardData(
        images=stack(images),
        masks=stack(masks),
        labels=labels,
        mentioned={name: torch.zeros(len(rows), dtype=torch.bool) for name in labels},
        instances=stack([np.full(len(rows), -1)]).long(),
        captions=[[] for _ in rows],
    )
