"""Prompts and seeds to images."""

import pytest
import torch

from common.backbones import load_backbone
from common.sampling.generate import sample_images


def test_tiny_sd_equals_its_own_diffusers_pipeline():
    """Text to pixels: tokenizer, text encoder, sampler and decoder."""
    backbone = load_backbone("tiny-sd", weights="random").freeze()
    settings = {"num_inference_steps": 4, "guidance_scale": 3.0}
    prompts = ["a photo of a red cup", "a drawing of a blue dog"]
    images = sample_images(backbone, prompts, seeds=[1, 2], negative_prompt="blurry", **settings)
    pipe = backbone.to_pipeline()
    pipe.set_progress_bar_config(disable=True)
    expected = pipe(
        prompts,
        negative_prompt=["blurry"] * 2,
        generator=[torch.Generator().manual_seed(seed) for seed in (1, 2)],
        height=64,
        width=64,
        output_type="pt",
        **settings,
    ).images
    torch.testing.assert_close(images, expected * 2 - 1, rtol=0, atol=1e-4)


def test_images_do_not_depend_on_batch_size(small_backbone):
    prompts = ["a red cup", "a dog", "a red cup", "a cat", "a dog"]
    settings = {"seeds": [0, 1, 2, 3, 4], "num_inference_steps": 5}
    images = sample_images(small_backbone, prompts, batch_size=5, **settings)
    assert images.shape == (5, 3, 16, 16) and images.dtype == torch.float32 and images.abs().max() <= 1
    for batch_size in (1, 2):
        again = sample_images(small_backbone, prompts, batch_size=batch_size, **settings)
        torch.testing.assert_close(again, images, rtol=1e-4, atol=1e-4)


def test_each_image_belongs_to_its_prompt_and_seed(small_backbone):
    settings = {"num_inference_steps": 3}
    images = sample_images(small_backbone, ["a dog", "a cat"], seeds=[5, 6], batch_size=1, **settings)
    second = sample_images(small_backbone, "a cat", seeds=[6], **settings)
    torch.testing.assert_close(images[1:], second, rtol=1e-5, atol=1e-5)


def test_each_prompt_and_the_negative_prompt_are_encoded_once(small_backbone):
    small_backbone.encoded_prompts.clear()
    sample_images(
        small_backbone, "a dog", seeds=range(6), negative_prompt="blurry", batch_size=2, num_inference_steps=1
    )
    assert sorted(small_backbone.encoded_prompts) == ["a dog", "blurry"]


def test_negative_prompt_is_not_encoded_without_guidance(small_backbone):
    small_backbone.encoded_prompts.clear()
    sample_images(small_backbone, "a dog", seeds=[0], guidance_scale=1, num_inference_steps=1)
    assert small_backbone.encoded_prompts == ["a dog"]


def test_a_conditioning_serves_as_prompt(small_backbone):
    settings = {"seeds": [0, 1, 2], "num_inference_steps": 2, "batch_size": 2}
    by_text = sample_images(small_backbone, ["a dog", "a cat", "a cup"], negative_prompt="blurry", **settings)
    by_embeds = sample_images(
        small_backbone,
        small_backbone.encode_prompt(["a dog", "a cat", "a cup"]),
        negative_prompt=small_backbone.encode_prompt("blurry"),
        **settings,
    )
    assert torch.equal(by_text, by_embeds)


def test_callback_and_progress(small_backbone, capsys):
    steps = []
    sample_images(
        small_backbone,
        "a dog",
        seeds=[0, 1, 2],
        batch_size=2,
        num_inference_steps=3,
        progress=True,
        on_step=lambda i, t, x, n: steps.append((i, len(x))),
    )
    assert steps == [(0, 2), (1, 2), (2, 2), (0, 1), (1, 1), (2, 1)]
    assert "6/6" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("prompts", "seeds", "message"),
    [(["a", "b"], [0], "2 prompts and 1 seeds"), (["a"], [0, 1], "1 prompts and 2 seeds"), ("a", [], "0 seeds")],
)
def test_counts_must_agree(small_backbone, prompts, seeds, message):
    with pytest.raises(ValueError, match=message):
        sample_images(small_backbone, prompts, seeds=seeds)


def test_batch_size_is_checked(small_backbone):
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        sample_images(small_backbone, "a dog", seeds=[0], batch_size=0)
