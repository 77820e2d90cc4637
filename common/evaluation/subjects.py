"""What the benchmark is run on: subjects of the toy world, or a folder in the layout of google/dreambooth."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from common.data.image_folder import ImageFolder
from common.data.prompts import read_dreambooth
from common.toyworld.benchmark import Subject as ToySubject

SUBJECT_GAP = "{token} {class}"


@dataclass(frozen=True)
class BenchmarkSubject:
    """One subject with its reference photos and prompts.

    Args:
        name: unique among the subjects; also the name of a folder.
        class_noun: "dog".
        pixel_values: reference photos (N,3,H,W) in [-1,1].
        prompts: texts that contain "{token} {class}" once: "a photo of a {token} {class} in the snow".
        expected: for each prompt, the attributes that a right picture shows; {} where nobody can judge.
        attributes: the subject's own attributes, which pictures keep unless the prompt changes them.
    Raises: ValueError naming the subject and what does not fit.
    """

    name: str
    class_noun: str
    pixel_values: Tensor
    prompts: list[str]
    expected: list[dict[str, str]]
    attributes: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.name or "/" in self.name or self.name.startswith("."):
            raise ValueError(f"subject name '{self.name}' cannot be the name of a folder")
        if self.pixel_values.ndim != 4 or self.pixel_values.shape[1] != 3 or len(self.pixel_values) == 0:
            shape = tuple(self.pixel_values.shape)
            raise ValueError(f"{self.name}: reference photos must be (N,3,H,W) with N >= 1, got {shape}")
        if len(self.expected) != len(self.prompts):
            raise ValueError(f"{self.name}: {len(self.expected)} expected attributes for {len(self.prompts)} prompts")
        wrong = [prompt for prompt in self.prompts if prompt.count(SUBJECT_GAP) != 1]
        if wrong or not self.prompts:
            raise ValueError(f"{self.name}: every prompt must contain '{SUBJECT_GAP}' once, got {wrong[:3]}")

    def prompt(self, index: int, subject_words: str) -> str:
        """A prompt as a method reads it: `subject_words` ("sks {class}" or "<toy>") stand in the gap."""
        words = subject_words.replace("{class}", self.class_noun)
        return self.prompts[index].replace(SUBJECT_GAP, words)

    def plain_prompt(self, index: int) -> str:
        """The text of CLIP-T: token removed, class noun kept, the same for every method."""
        return self.prompt(index, "{class}")

    def kept_attributes(self, index: int) -> dict[str, str]:
        """Own attributes that a right picture of this prompt still shows.

        None for another style or a second object: those hide colours and patterns.
        """
        changed = self.expected[index]
        if changed.get("style", "photo") != "photo" or "relation" in changed:
            return {}
        return {name: label for name, label in self.attributes.items() if name not in changed}


def from_toy_world(subjects: Iterable[ToySubject], num_prompts: int | None = None) -> list[BenchmarkSubject]:
    """Subjects of `common.toyworld.benchmark`.

    Args: num_prompts: as many of the 25 prompts, evenly spread over their kinds; None = all.
    """
    converted = []
    for subject in subjects:
        prompts = _spread(subject.prompts, num_prompts)
        converted.append(
            BenchmarkSubject(
                name=subject.name,
                class_noun=subject.class_noun,
                pixel_values=subject.images,
                prompts=[prompt.text.format(SUBJECT_GAP) for prompt in prompts],
                expected=[dict(prompt.expected) for prompt in prompts],
                attributes=dict(subject.attributes),
            )
        )
    return converted


def from_dreambooth_folder(root: str | Path, *, resolution_px: int) -> list[BenchmarkSubject]:
    """Subjects of a folder laid out as google/dreambooth, photos cut to squares of resolution_px."""
    converted = []
    for subject in read_dreambooth(root):
        photos = ImageFolder(subject.images_dir, resolution_px=resolution_px)
        converted.append(
            BenchmarkSubject(
                name=subject.name,
                class_noun=subject.class_noun,
                pixel_values=torch.stack([item["pixel_values"] for item in photos]),
                prompts=[template.format("{token}", "{class}") for template in subject.templates],
                expected=[{} for _ in subject.templates],
            )
        )
    return converted


def _spread(items: tuple, count: int | None) -> tuple:
    """`count` items at even distances, the first included."""
    if count is None:
        return items
    if not 1 <= count <= len(items):
        raise ValueError(f"num_prompts must be in 1..{len(items)}, got {count}")
    return tuple(items[i * len(items) // count] for i in range(count))
