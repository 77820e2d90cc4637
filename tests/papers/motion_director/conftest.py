"""Settings and batches that suit the small video backbone: clips of four frames, 32 px, 8x8 latents."""

from dataclasses import replace

import pytest
import torch


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def small(paper):
    """A config for it.   changes: of the fields."""

    def config(**changes):
        changes = {"num_frames": 4, "resolution_px": 32, "rank": 2, "num_inference_steps": 2} | changes
        return replace(paper.config.MotionDirectorConfig.tiny(), num_inversion_steps=2, **changes)

    return config


@pytest.fixture
def make(paper, video_backbone, small):
    """A method on it."""

    def method(num_clips=1, **changes):
        return paper.method.MotionDirector(video_backbone, small(**changes), num_clips)

    return method


@pytest.fixture
def batch():
    """One clip, as the loop hands it out."""

    def of_step(step=0, clip=0):
        return {
            "latents": randn(1, 4, 4, 8, 8, seed=100 + clip),
            "prompt": ["a video of a duck zigzag"],
            "clip_index": torch.tensor([clip]),
            "sample_keys": torch.tensor([step]),
            "step": step,
        }

    return of_step


@pytest.fixture
def train_a_little():
    """Values as training could leave them."""

    def change(method):
        for i, (_, parameter) in enumerate(method.parameters()):
            parameter.data.copy_(0.1 * randn(*parameter.shape, seed=i))
        return method

    return change


@pytest.fixture
def predict():
    """What the network answers to fixed noisy latents of two clips."""

    @torch.no_grad()
    def answer(backbone, **options):
        told = backbone.encode_prompt(["a video of a duck", "a photo of a cat"])
        return backbone.predict(randn(2, 4, 4, 8, 8, seed=5), torch.tensor([5, 900]), told, **options)

    return answer
