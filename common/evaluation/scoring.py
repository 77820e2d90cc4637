"""All scores of the pictures of one prompt."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from common.evaluation import metrics
from common.evaluation.encoders import Encoders, ImageEncoder
from common.evaluation.feature_cache import FeatureCache
from common.evaluation.subjects import BenchmarkSubject
from common.fingerprint import weights_hash


class Judge(Protocol):
    """A module that reads attributes back from pictures, as `common.toyworld.judge.Judge` does."""

    labels: dict[str, list[str]]

    def read(self, pixel_values: Tensor) -> dict[str, Tensor]:
        """(B,3,H,W) in [-1,1] -> attribute -> probabilities (B, number of labels)."""
        ...

    def embed_identity(self, pixel_values: Tensor) -> Tensor:
        """Unit vectors (B,D) that tell instances apart."""
        ...


@dataclass(frozen=True)
class Score:
    """One metric over some pictures: `values` per picture, or none if only the `value` of all together exists."""

    metric: str
    value: float
    values: list[float]
    n_images: int
    backbone: str
    preprocessing: str


def score_images(
    generated: Tensor | Sequence[Tensor],
    reference: Tensor | Sequence[Tensor],
    text: str,
    encoders: Encoders,
    cache: FeatureCache,
) -> list[Score]:
    """clip_i and dino against the references, clip_t if there is a text, diversity if there are two pictures.

    Args: generated, reference: pictures (3,H,W) in [-1,1].   text: prompt without placeholder, with class noun; or "".
    """
    clip, dino = (cache.embed(encoder, generated) for encoder in (encoders.clip, encoders.dino))
    clip_reference, dino_reference = (cache.embed(encoder, reference) for encoder in (encoders.clip, encoders.dino))
    scores = [
        _per_image("clip_i", metrics.image_similarity(clip, clip_reference), encoders.clip),
        _per_image("dino", metrics.image_similarity(dino, dino_reference), encoders.dino),
    ]
    if text:
        scores.append(
            _per_image("clip_t", metrics.text_similarity(clip, encoders.clip.embed_texts([text])), encoders.clip)
        )
    if len(dino) > 1:
        value = metrics.diversity(dino, metrics.cosine_distance)
        scores.append(Score("diversity", value, [], len(dino), encoders.dino.name, encoders.dino.preprocessing))
    return scores


@torch.no_grad()
def score_prompt(
    images: Tensor,
    subject: BenchmarkSubject,
    index: int,
    encoders: Encoders,
    judge: Judge | None,
    cache: FeatureCache,
) -> list[Score]:
    """All scores of the pictures (N,3,H,W) that a method made for one prompt of a subject.

    With a judge also: identity; prompt_attributes (of those the prompt asks for, with attribute/NAME for each) and
    subject_attributes (the subject's own, unless the prompt changes them).
    """
    scores = score_images(images, subject.pixel_values, subject.plain_prompt(index), encoders, cache)
    if judge is None:
        return scores
    identity = metrics.image_similarity(judge.embed_identity(images), judge.embed_identity(subject.pixel_values))
    scores.append(_judged("identity", identity, judge))
    expected, kept = subject.expected[index], subject.kept_attributes(index)
    probabilities = judge.read(images)
    if expected:
        right = metrics.attributes_right(probabilities, judge.labels, expected)
        scores.append(_judged("prompt_attributes", metrics.attribute_accuracy(right), judge))
        scores += [_judged(f"attribute/{name}", hits.double(), judge) for name, hits in right.items()]
    if kept:
        right = metrics.attributes_right(probabilities, judge.labels, kept)
        scores.append(_judged("subject_attributes", metrics.attribute_accuracy(right), judge))
    return scores


def judge_name(judge: Judge) -> str:
    """What records call a judge: it changes with any of its weights."""
    return f"judge@{weights_hash(judge)}"


def _per_image(metric: str, values: Tensor, encoder: ImageEncoder) -> Score:
    return _score(metric, values, encoder.name, encoder.preprocessing)


def _judged(metric: str, values: Tensor, judge: Judge) -> Score:
    return _score(metric, values, judge_name(judge), "the judge's own")


def _score(metric: str, values: Tensor, backbone: str, preprocessing: str) -> Score:
    if not torch.isfinite(values).all():
        raise ValueError(f"{metric} of {backbone} is not finite: {values.tolist()}")
    return Score(metric, values.mean().item(), values.tolist(), len(values), backbone, preprocessing)
