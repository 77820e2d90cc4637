"""What is read from pictures and from artifacts, beside the scores of the study."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from common.toyworld.exemplar_tasks import Task, entity_nouns
from common.toyworld.judge import Judge

from .method import Lego


def subject_noun(task: Task) -> str:
    """Of the subject in the pictures: "bear"."""
    return entity_nouns(task.scenes[0])[0]


@torch.no_grad()
def subject_probability(judge: Judge, task: Task, images: Sequence[Tensor]) -> float:
    """The judge's mean probability of the training subject's class, in pictures (S,3,H,W) of prompts for others."""
    learned = judge.labels["class"].index(subject_noun(task))
    return judge.read(torch.cat(list(images)))["class"][:, learned].mean().item()


@torch.no_grad()
def joint_accuracy(judge: Judge, task: Task, images: Sequence[Tensor]) -> float:
    """Share of pictures that show all factors of the concept: the state, and the place of a two-word concept.

    Args: images: for each prompt in order, (S,3,H,W) in [-1,1].
    """
    right: list[bool] = []
    for prompt, made in zip(task.prompts, images, strict=False):
        read = judge.read(made)
        factors = {name: judge.labels[name].index(value) for name, value in prompt.expected.items() if name != "class"}
        right += torch.stack([read[name].argmax(-1) == k for name, k in factors.items()]).all(0).tolist()
    return sum(right) / len(right)


@torch.no_grad()
def reconstruction_loss(method: Lego, images: Tensor) -> float:
    """Denoising loss of pictures (N,3,H,W) under "a photo of a s c_1 .. c_k", noise fixed."""
    size = (method.backbone.resolution_px,) * 2
    resized = F.interpolate(images, size, mode="bicubic", antialias=True).clamp(-1, 1)
    prompts = method.config.concept_prompts()[:1] * len(images)
    return method.validation_loss(method.backbone.encode_images(resized), prompts)
