"""Clips from seeds, and noise that remembers a clip."""

from dataclasses import replace

import pytest
import torch

from common.backbones import load_backbone
from common.sampling import ddim_invert, ddim_reconstruct, sample_latents, seeded_noise
from common.sampling.video import clip_noise, mixed_noise, sample_clips
from common.training.noising import noise_batch
from common.training.seeding import seeded_randn


@pytest.fixture(scope="module")
def backbone():
    return load_backbone("tiny-video", weights="random").freeze()


def test_a_clip_depends_on_its_seed_alone(backbone):
    options = {"num_inference_steps": 2, "guidance_scale": 3.0}
    both = sample_clips(backbone, "a cat", seeds=[1, 2], **options)
    assert both.shape == (2, 3, 8, 64, 64) and both.abs().max() <= 1
    alone = sample_clips(backbone, "a cat", seeds=[2], batch_size=1, **options)
    torch.testing.assert_close(both[1:], alone, rtol=1e-3, atol=1e-3)
    noise = clip_noise(backbone, [1, 2])
    torch.testing.assert_close(sample_clips(backbone, "a cat", seeds=[8, 9], noise=noise, **options), both)
    never = sample_clips(backbone, "a cat", seeds=[1, 2], guidance=lambda uncond, cond, t, s: cond, **options)
    unguided = sample_clips(backbone, "a cat", seeds=[1, 2], num_inference_steps=2, guidance_scale=1.0)
    torch.testing.assert_close(never, unguided, rtol=1e-3, atol=1e-3)
    assert (never - both).abs().max() > 1e-3


def covariance_of_frames(clips):
    return torch.cov(clips.transpose(1, 2).transpose(0, 1).flatten(1))  # (F, F) over (B,C,h,w)


def test_noise_of_training_is_like_that_of_sampling(backbone):
    clips, keys = torch.zeros(40, *backbone.latent_shape), torch.arange(40)
    for share in (0.0, 0.3):
        own = replace(backbone, noise_share=share)
        noised = noise_batch(own, clips, keys, seed=3)
        expected = share + (1 - share) * torch.eye(8)
        torch.testing.assert_close(covariance_of_frames(noised["noise"]), expected, rtol=0, atol=0.02)
        some = noise_batch(own, clips[5:7], keys[5:7], seed=3)["noise"]
        assert torch.equal(some, noised["noise"][5:7])  # whatever is in the batch beside it
    independent = noise_batch(replace(backbone, noise_share=0.0), clips[:1], keys[:1], seed=3)["noise"]
    assert torch.equal(independent, seeded_randn(keys[:1], backbone.latent_shape, seed=3))


def test_frames_of_the_initial_noise_have_a_part_in_common(backbone):
    assert backbone.noise_share == 0.5
    noise = clip_noise(backbone, range(40))
    torch.testing.assert_close(covariance_of_frames(noise), 0.5 + 0.5 * torch.eye(8), rtol=0, atol=0.02)
    other = torch.stack([noise[:20].flatten(), noise[20:].flatten()])
    assert torch.corrcoef(other)[0, 1].abs() < 0.01  # clips have nothing in common
    independent = replace(backbone, noise_share=0.0)
    assert torch.equal(clip_noise(independent, [3, 4]), seeded_noise(backbone, [3, 4]))


def test_mixed_noise_is_the_root_weighted_sum(backbone):
    inverted = torch.full((1, *backbone.latent_shape), 2.0)
    fresh = clip_noise(backbone, [4, 5])
    torch.testing.assert_close(mixed_noise(backbone, inverted, [4, 5], 0.36), 0.6 * 2.0 + 0.8 * fresh)
    assert torch.equal(mixed_noise(backbone, inverted, [4, 5], 0.0), fresh)
    assert torch.equal(mixed_noise(backbone, inverted, [4, 5], 1.0), inverted.expand(2, -1, -1, -1, -1))


@torch.no_grad()
def test_inverting_and_sampling_a_clip_gives_it_back():
    backbone = load_backbone("tiny-video", weights="random").freeze()
    torch.nn.init.normal_(backbone.unet.conv_out.weight, std=1e-4)  # a network that changes slowly inverts well
    clip = torch.randn(1, *backbone.latent_shape, generator=torch.Generator().manual_seed(0))
    told = backbone.encode_prompt("")
    noise = ddim_invert(backbone, clip, told, num_inference_steps=10)
    again = ddim_reconstruct(backbone, noise, told, num_inference_steps=10)
    torch.testing.assert_close(again, clip, rtol=0.02, atol=0.02)


def test_what_does_not_fit_is_refused(backbone):
    with pytest.raises(ValueError, match="at least 1"):
        sample_clips(backbone, "a cat", seeds=[])
    with pytest.raises(ValueError, match="noise holds 1 clips but there are 2 seeds"):
        sample_clips(backbone, "a cat", seeds=[0, 1], noise=seeded_noise(backbone, [0]))
    with pytest.raises(ValueError, match=r"share must be in \[0, 1\]"):
        mixed_noise(backbone, torch.zeros(1, *backbone.latent_shape), [0], 1.5)
    with pytest.raises(ValueError, match="the inverted clip is"):
        mixed_noise(backbone, torch.zeros(1, 4, 5, 16, 16), [0], 0.5)
    with pytest.raises(ValueError, match="images but there are"):
        sample_latents(backbone, backbone.encode_prompt(["a", "b"]), seeds=[0], num_inference_steps=1)
