"""The ablations of Textual Inversion that train differently (Sec. 5): progressive vectors, per-image tokens."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.nn import Parameter

from common.backbones import Backbone
from common.data.subject_dataset import SubjectDataset
from common.training.loop import fit
from common.training.seeding import seeded_uniform

from .config import TextualInversionConfig
from .method import TextualInversion
from .train import fit_config

PER_IMAGE_PROBABILITY = 0.25  # of a template with the token of the image (official code)


def stage_lengths(train_steps: int, unlock_every: int, num_vectors: int) -> list[int]:
    """Steps of each stage of the progressive extension; the last one lasts to the end.

    Stage k = 1 + floor(step / unlock_every) trains k vectors; the paper unlocks at 2000 and 4000 steps.
    """
    if unlock_every < 1:
        raise ValueError(f"unlock_every must be >= 1 step, got {unlock_every}")
    starts = [k * unlock_every for k in range(num_vectors) if k * unlock_every < train_steps]
    return [end - start for start, end in zip(starts, [*starts[1:], train_steps], strict=True)]


def train_progressively(
    backbone: Backbone,
    make_dataset: Callable[[TextualInversionConfig], SubjectDataset],
    config: TextualInversionConfig,
    output_dir: Path,
    *,
    unlock_every: int,
) -> TextualInversion:
    """Sec. 5, "Progressive extensions": begin with one vector and add another every `unlock_every` steps.

    Each stage is a run of its own in output_dir/stage-K with a fresh optimiser (not in the paper: the code keeps it).
    Pseudo-words that the backbone holds are removed.

    Args:
        make_dataset: the training data for the config of a stage.
        config: `num_vectors` is the most that is reached.
        unlock_every: steps, >= 1.
    """
    method = None
    for index, steps in enumerate(stage_lengths(config.train_steps, unlock_every, config.num_vectors)):
        stage = replace(config, num_vectors=index + 1, train_steps=steps, seed=config.seed + index)
        start = None
        if method is not None:  # what is trained so far, and one more vector at the initializer, the last to start
            pairs = zip(method.vectors, method.initial_vectors, strict=True)
            start = [torch.cat([vectors.detach(), initial[-1:]]) for vectors, initial in pairs]
        if backbone.placeholders is not None:
            backbone.placeholders.remove()
        method = TextualInversion(backbone, stage, initial_vectors=start)
        fit(method, make_dataset(stage), fit_config(stage), output_dir / f"stage-{index + 1}", resume=True)
    return method


class PerImageTextualInversion(TextualInversion):
    """Sec. 5, "Per-image tokens": S_i takes up what is special to image i, so that S* need not.

    With probability 1/4 a template ends in "with S_i". Training alone uses the S_i; the artifact holds S* only.
    They start at Gaussian vectors with the statistics of the vocabulary (D5).

    Args:
        num_images: of the training set, in the order of its "image_index".
    """

    def __init__(self, backbone: Backbone, config: TextualInversionConfig, num_images: int) -> None:
        super().__init__(backbone, config)
        self.image_tokens = [f"<image-{i}-{config.placeholder.strip('<>')}>" for i in range(num_images)]
        self.image_vectors = [
            vectors for i, token in enumerate(self.image_tokens) for vectors in self.tokens.add(token, seed=i)
        ]

    def parameters(self) -> list[tuple[str, Parameter]]:
        """v* and the vectors of all images."""
        return super().parameters() + [(f"image_vectors.{i}", vectors) for i, vectors in enumerate(self.image_vectors)]

    def prompts(self, batch: dict[str, Any]) -> list[str]:
        """Templates, a quarter of them as "a photo of a S* with S_i"."""
        uniform = seeded_uniform(batch["sample_keys"], seed=self.config.seed, stream="per-image token")
        names = [self.image_tokens[index] for index in batch["image_index"].tolist()]
        drawn = (uniform < PER_IMAGE_PROBABILITY).tolist()
        rows = zip(batch["prompt"], names, drawn, strict=True)
        return [f"{prompt} with {name}" if with_name else prompt for prompt, name, with_name in rows]
