"""Video backbones: shapes, counts, clips through the VAE, single frames, stock pipelines."""

import pytest
import torch
from diffusers import MotionAdapter, UNetMotionModel

from common.backbones import load_backbone
from common.backbones.inflate import temporal_modules
from common.backbones.video import VideoBackbone


@pytest.fixture(scope="module")
def backbone():
    backbone = load_backbone("tiny-video", weights="random").freeze()
    generator = torch.Generator().manual_seed(0)
    for module in temporal_modules(backbone.unet).values():
        for parameter in module.parameters():
            parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)
    return backbone


@pytest.mark.parametrize(
    ("name", "total", "shape"),
    [
        ("modelscope", 1_411_233_860, (4, 16, 32, 32)),  # counted on the diffusers class
        ("zeroscope", 1_411_233_860, (4, 24, 32, 32)),
        ("animatediff", 859_520_964 + 453_209_280, (4, 16, 64, 64)),  # SD 1.5 and MotionAdapter
    ],
)
def test_real_sizes(name, total, shape):
    backbone = load_backbone(name, weights="meta")
    assert isinstance(backbone, VideoBackbone) and backbone.latent_shape == shape
    assert sum(p.numel() for p in backbone.unet.parameters()) == total


def test_clips_go_through_the_vae_frame_by_frame(backbone):
    clips = torch.rand(2, 3, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        latents = backbone.encode_clips(clips)
        alone = backbone.encode_images(clips[1, :, 2][None])
        torch.testing.assert_close(latents[1:, :, 2], alone, rtol=1e-4, atol=1e-5)
        decoded = backbone.decode_clips(latents)
        torch.testing.assert_close(decoded[1:, :, 2], backbone.decode_latents(alone), rtol=1e-4, atol=1e-4)
    assert latents.shape == (2, 4, 3, 16, 16) and decoded.shape == clips.shape
    with pytest.raises(ValueError, match=r"clips must be \(B,3,F,H,W\)"):
        backbone.encode_clips(clips[0])


@torch.no_grad()
def test_single_frames_need_no_temporal_layers(backbone):
    frame = torch.randn(1, 4, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    told = backbone.encode_prompt("a photo of a cat")
    plain = backbone.predict(frame, 500, told, temporal=False)
    image = load_backbone("tiny-sd", weights="random")
    expected = image.predict(frame[:, :, 0], 500, told)
    torch.testing.assert_close(plain[:, :, 0], expected, rtol=1e-4, atol=1e-4)
    assert (backbone.predict(frame, 500, told) - plain).abs().max() > 1e-3
    with pytest.raises(ValueError, match="takes latents"):
        backbone.predict(frame[:, :, 0], 500, told)


@torch.no_grad()
def test_a_stock_pipeline_makes_the_same_latents(backbone):
    from common.sampling import sample_latents, seeded_noise

    pipe = backbone.to_pipeline()
    pipe.set_progress_bar_config(disable=True)
    ours = sample_latents(
        backbone, backbone.encode_prompt("a cat"), seeds=[3], num_inference_steps=2, guidance_scale=4.0
    )
    theirs = pipe(
        "a cat", num_frames=8, height=64, width=64, num_inference_steps=2, guidance_scale=4.0,
        latents=seeded_noise(backbone, [3]), output_type="latent",
    ).frames  # fmt: skip
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


@pytest.fixture(scope="module")
def animatediff():
    """An image network with motion modules that do something."""
    image = load_backbone("tiny-sd", weights="random")
    adapter = MotionAdapter(
        block_out_channels=tuple(image.unet.config.block_out_channels), motion_num_attention_heads=4,
        motion_max_seq_length=8, motion_norm_num_groups=32,
    )  # fmt: skip
    unet = UNetMotionModel.from_unet2d(image.unet, adapter).eval()
    return VideoBackbone("small", unet, image.vae, image.text_encoder, image.tokenizer, image.noise_scheduler)


@torch.no_grad()
def test_an_animatediff_network_leaves_its_motion_modules_out_for_single_frames(animatediff):
    image = load_backbone("tiny-sd", weights="random")
    frame = torch.randn(1, 4, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    told = animatediff.encode_prompt("a photo of a cat")
    plain = animatediff.predict(frame, 500, told, temporal=False)
    torch.testing.assert_close(plain[:, :, 0], image.predict(frame[:, :, 0], 500, told), rtol=1e-4, atol=1e-4)
    assert not torch.equal(animatediff.predict(frame, 500, told), plain)


@torch.no_grad()
def test_all_frames_of_an_animatediff_clip_are_told_its_own_prompt(animatediff):
    """Its network takes a context for each frame; without motion modules each is what the image network makes of it."""
    image = load_backbone("tiny-sd", weights="random")
    clips = torch.randn(2, 4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    told = animatediff.encode_prompt(["a photo of a cat", "a red car"])
    plain = animatediff.predict(clips, 500, told, temporal=False)
    for b in range(2):
        own = image.encode_prompt(["a photo of a cat", "a red car"][b]).repeat(3)
        expected = image.predict(clips[b].transpose(0, 1), 500, own).transpose(0, 1)
        torch.testing.assert_close(plain[b], expected, rtol=1e-4, atol=1e-4)
    moved = animatediff.predict(clips, 500, told)
    assert moved.shape == clips.shape and not torch.equal(moved, plain)
