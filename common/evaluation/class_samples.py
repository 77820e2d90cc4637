"""Pictures of "a photo of a [class noun]": what learning one dog has done to all dogs."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common.backbones import load_backbone
from common.data.images import load_image, to_pixel_values
from common.evaluation.study import PLAIN_PROMPT, Candidate, Learned
from common.sampling import sample_images
from common.sampling.images import save_png, to_pil
from common.toyworld.benchmark import Subject
from common.toyworld.render import render
from common.toyworld.sampling import compose, sample_object
from common.toyworld.scene import Placed
from common.toyworld.vocabulary import BACKGROUNDS
from common.training.optimize import default_device


def with_class_samples(candidate: Candidate, seeds: Sequence[int], folder: Path) -> Candidate:
    """The same candidate; its training ends with a picture of the class for each seed, in FOLDER/SUBJECT/."""

    def train(subject: Subject, photos: Path, run: Path) -> Learned:
        learned = candidate.train(subject, photos, run)
        pictures = learned.generate(PLAIN_PROMPT.format(subject.class_noun), seeds=list(seeds))
        save_samples(pictures, folder / subject.name)
        return learned

    return replace(candidate, train=train)


def sample_untuned(
    backbone_name: str, class_noun: str, seeds: Sequence[int], folder: Path, **sampling: float
) -> Tensor:
    """The class by the backbone before tuning; written into the folder too.   sampling: of `sample_images`."""
    backbone = load_backbone(backbone_name, device=default_device())
    pictures = sample_images(backbone, PLAIN_PROMPT.format(class_noun), seeds=list(seeds), **sampling)
    save_samples(pictures, folder)
    return pictures


def class_renders(class_noun: str, count: int) -> Tensor:
    """Photos of random members of a class, as the world makes them: (count,3,64,64) in [-1,1]."""
    rng = np.random.default_rng(93)
    scenes = [
        compose(rng, (Placed(sample_object(rng, class_noun)),), background=BACKGROUNDS[k % len(BACKGROUNDS)])
        for k in range(count)
    ]
    return render(scenes).images * 2 - 1


def save_samples(images: Tensor, folder: Path) -> None:
    """Write pictures (N,3,H,W) in [-1,1] as FOLDER/000.png and so on."""
    for i, image in enumerate(to_pil(images)):
        save_png(image, folder / f"{i:03d}.png")


def read_samples(folder: Path) -> Tensor:
    """What `save_samples` wrote, in order, (N,3,H,W) in [-1,1]."""
    return torch.stack([to_pixel_values(load_image(path)) for path in sorted(folder.glob("*.png"))])
