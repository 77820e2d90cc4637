"""An inflated network is the image network, frame by frame, until its temporal layers learn."""

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.transformers.transformer_temporal import TransformerTemporalModel

from common.backbones import load_backbone
from common.backbones.inflate import inflate, spatial_transformers, temporal_modules, without_temporal_layers


@pytest.fixture(scope="module")
def image_backbone():
    return load_backbone("tiny-sd").freeze()


@pytest.fixture
def unet(image_backbone):
    return inflate(image_backbone.unet).eval()


def clip(frames: int = 3):
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 4, frames, 16, 16, generator=generator)
    return latents, torch.tensor([10, 700]), torch.randn(2, 77, 256, generator=generator)


@torch.no_grad()
def frame_by_frame(unet, latents, timesteps, context):
    frames = latents.shape[2]
    flat = unet(
        latents.transpose(1, 2).flatten(0, 1),
        timesteps.repeat_interleave(frames),
        context.repeat_interleave(frames, 0),
    ).sample
    return flat.unflatten(0, (len(latents), frames)).transpose(1, 2)


@torch.no_grad()
def test_starts_as_the_image_network(image_backbone, unet):
    latents, timesteps, context = clip()
    expected = frame_by_frame(image_backbone.unet, latents, timesteps, context)
    torch.testing.assert_close(unet(latents, timesteps, context).sample, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_trained_temporal_layers_mix_frames_and_can_be_left_out(image_backbone, unet):
    for module in temporal_modules(unet).values():
        for parameter in module.parameters():
            parameter.add_(0.02)
    latents, timesteps, context = clip()
    expected = frame_by_frame(image_backbone.unet, latents, timesteps, context)
    whole = unet(latents, timesteps, context).sample
    assert (whole - expected).abs().max() > 1e-2
    with without_temporal_layers(unet):
        apart = unet(latents, timesteps, context).sample
    torch.testing.assert_close(apart, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(unet(latents, timesteps, context).sample, whole)  # and they are back


def test_layers_are_those_of_the_class(unet):
    names = temporal_modules(unet)
    temporal = [name for name, module in names.items() if isinstance(module, TransformerTemporalModel)]
    assert len(temporal) == 17 and "transformer_in" in temporal  # 16 blocks and the first, as in ModelScope
    assert len(spatial_transformers(unet)) == 16
    assert sum("temp_convs" in name for name in names) == 22


def test_the_seed_decides_new_layers_and_global_random_numbers_stay(image_backbone):
    state = torch.random.get_rng_state()
    first, again, other = (inflate(image_backbone.unet, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), state)
    weights = [net.transformer_in.proj_in.weight for net in (first, again, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_another_layout_is_refused():
    other = UNet2DConditionModel(
        sample_size=8, block_out_channels=(32, 32), down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), cross_attention_dim=8, attention_head_dim=4,
        encoder_hid_dim=16,
    )  # fmt: skip
    with pytest.raises(ValueError, match="cannot be inflated"):
        inflate(other)
