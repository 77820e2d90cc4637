"""Look at the toy world: ``pcs world --grid out.png --kind objects``."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from torch import Tensor

from common.sampling.images import image_grid, save_png
from common.toyworld import benchmark, relations
from common.toyworld.examples import make_examples
from common.toyworld.render import render
from common.toyworld.sampling import celebrity_face, compose, sample_object, sample_person
from common.toyworld.scene import Placed, Scene
from common.toyworld.vocabulary import (
    BACKGROUNDS,
    CELEBRITIES,
    EXPRESSIONS,
    HELD_OUT_ACTIONS,
    HELD_OUT_RELATIONS,
    HELD_OUT_STATES,
    HELD_OUT_STYLES,
    OBJECT_CLASSES,
    POSES,
    RELATIONS,
    STATES,
    STYLES,
    VIEWS,
)  # fmt: skip

Labelled = list[tuple[str, Scene]]


def _objects(rng) -> Labelled:
    return [
        (
            f"{noun}, {view}",
            compose(rng, (Placed(sample_object(rng, noun)),), background=BACKGROUNDS[(i + k) % 10], view=view),
        )
        for i, noun in enumerate(OBJECT_CLASSES)
        for k, view in enumerate(VIEWS)
    ]


def _people(rng) -> Labelled:
    shown = []
    for i, pose in enumerate((*POSES, *HELD_OUT_ACTIONS)):
        actors = [sample_person(rng, portrait=False), sample_object(rng, "bear"), sample_object(rng, "robot")]
        shown += [
            (pose, compose(rng, (Placed(replace(a, pose=pose)),), background=BACKGROUNDS[i % 10])) for a in actors
        ]
    for i in range(len(CELEBRITIES)):
        person = replace(sample_person(rng, portrait=True, celebrity=i), expression=EXPRESSIONS[i % 5])
        assert person.face == celebrity_face(i)[1]
        shown.append((CELEBRITIES[i], compose(rng, (Placed(person),), background=BACKGROUNDS[i % 10])))
    return shown


def _relations(rng) -> Labelled:
    shown = []
    for relation in (*RELATIONS, *HELD_OUT_RELATIONS):
        for k in range(3):
            first = sample_object(
                rng, ("bear", "robot", "bear")[k] if relation == "carrying" else ("bear", "duck", "cat")[k]
            )
            second = sample_object(rng, ("mug", "car", "teapot")[k])
            placed = relations.place(relation, first, second)
            shown.append(
                (relation, compose(rng, placed, background="meadow", relation=relation, fill=0.86, spread_deg=8.0))
            )
    return shown


def _styles(rng) -> Labelled:
    return [
        (style, compose(rng, (Placed(sample_object(rng, noun)),), background=BACKGROUNDS[k], style=style))
        for style in (*STYLES, *HELD_OUT_STYLES)
        for k, noun in enumerate(("car", "bear", "teapot"))
    ]


def _states(rng) -> Labelled:
    return [
        (state, compose(rng, (Placed(replace(sample_object(rng, noun), state=state)),), background="meadow"))
        for state in (*STATES, *HELD_OUT_STATES)
        for noun in ("car", "bear", "duck")
    ]


def _backgrounds(rng) -> Labelled:
    return [
        (place, compose(rng, (Placed(sample_object(rng, "mug")),), background=place, view=view))
        for place in BACKGROUNDS
        for view in ("front", "front", "overhead")
    ]


_KINDS: dict[str, Callable[[np.random.Generator], Labelled]] = {
    "objects": _objects, "people": _people, "relations": _relations, "styles": _styles, "states": _states,
    "backgrounds": _backgrounds,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ShowConfig:
    """Draw a labelled grid of the toy world."""

    grid: Path  # PNG to write
    kind: Literal["training", "subjects", "objects", "people", "relations", "styles", "states", "backgrounds"] = (
        "training"
    )
    seed: int = 0
    columns: int = 12  # pictures a row
    scale: int = 2  # times 64 px


def labelled_pictures(kind: str, seed: int) -> tuple[Tensor, list[str]]:
    """Pictures (N, 3, 64, 64) in [-1, 1] and a label each."""
    if kind == "training":
        batch = make_examples(range(seed, seed + 96))
        images = torch.from_numpy(batch.images).permute(0, 3, 1, 2) / 127.5 - 1
        return images, [texts[0].split(" of ", 1)[-1] for texts in batch.captions]
    if kind == "subjects":
        everyone = benchmark.subjects()
        return torch.cat([s.images for s in everyone]), [s.name for s in everyone for _ in s.images]
    shown = _KINDS[kind](np.random.default_rng(seed))
    return render([scene for _, scene in shown]).images * 2 - 1, [label for label, _ in shown]


def main(argv: list[str] | None = None) -> None:
    config = tyro.cli(ShowConfig, args=argv, prog="pcs world")
    images, labels = labelled_pictures(config.kind, config.seed)
    grid = image_grid(images, config.columns, labels, upscale=config.scale)
    save_png(grid, config.grid)
    print(f"{len(images)} pictures -> {config.grid}")


if __name__ == "__main__":
    main()
