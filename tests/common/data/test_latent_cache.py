"""Cached latents equal those of the VAE, are reused only where they are still right, and never half written."""

import os

import pytest
import torch
from PIL import Image

from common.backbones import load_backbone
from common.data import latent_cache
from common.data.image_folder import ImageFolder
from common.data.latent_cache import LatentCache, module_hash


def test_latents_are_the_posterior_of_every_variant(photos, backbone):
    """Reference: diffusers' own DiagonalGaussianDistribution, mode and sample, times the scaling factor."""
    folder = ImageFolder(photos, resolution_px=16, num_crops=2, flip=True)
    cache = LatentCache(folder, backbone)
    assert len(cache) == 3 and [cache.num_variants(i) for i in range(3)] == [2, 4, 4]
    assert cache.latent_shape == (4, 8, 8) and cache.masks is None
    for index in range(3):
        for number, variant in enumerate(folder.variants(index)):
            pixel_values = folder.item(index, variant)["pixel_values"][None]
            posterior = backbone.vae.encode(pixel_values).latent_dist
            torch.testing.assert_close(cache.latents(index, number), posterior.mode()[0] * 0.3)
            noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5))
            sample = posterior.sample(generator=torch.Generator().manual_seed(5))
            torch.testing.assert_close(cache.latents(index, number, noise[0]), sample[0] * 0.3)


def test_agrees_with_the_backbone(photos):
    backbone = load_backbone("tiny-sd", weights="random")
    folder = ImageFolder(photos, resolution_px=64)
    cache = LatentCache(folder, backbone)
    for index in range(3):
        expected = backbone.encode_images(folder[index]["pixel_values"][None])[0]
        torch.testing.assert_close(cache.latents(index), expected)


def test_a_half_precision_vae_encodes_in_float32_and_is_left_as_it_was(photos, backbone):
    backbone.vae.half()
    before = {name: tensor.clone() for name, tensor in backbone.vae.state_dict().items()}
    folder = ImageFolder(photos, resolution_px=16)
    cache = LatentCache(folder, backbone)
    assert all(torch.equal(tensor, before[name]) for name, tensor in backbone.vae.state_dict().items())
    assert backbone.vae.dtype == torch.float16
    expected = backbone.vae.float().encode(folder[0]["pixel_values"][None]).latent_dist.mode()[0] * 0.3
    torch.testing.assert_close(cache.latents(0), expected, rtol=0, atol=0)


def test_variants_differ_and_a_flip_is_not_a_flipped_latent(photos, backbone):
    cache = LatentCache(ImageFolder(photos, resolution_px=16, flip=True), backbone)
    plain, flipped = cache.latents(0, 0), cache.latents(0, 1)
    assert not torch.allclose(plain, flipped) and not torch.allclose(plain.flip(-1), flipped)


def test_caller_cannot_change_the_cache(photos, backbone):
    cache = LatentCache(ImageFolder(photos, resolution_px=16), backbone)
    before = cache.latents(0)
    cache.latents(0).zero_()
    torch.testing.assert_close(cache.latents(0), before, rtol=0, atol=0)


@pytest.fixture
def encodings(monkeypatch) -> list[int]:
    """Picture indices that were really encoded."""
    encoded, encode = [], latent_cache._encode
    monkeypatch.setattr(latent_cache, "_encode", lambda f, i, b: encoded.append(i) or encode(f, i, b))
    return encoded


def test_disk_cache_is_used_again_and_bit_equal(photos, backbone, tmp_path, encodings):
    folder = ImageFolder(photos, resolution_px=16, flip=True)
    first = LatentCache(folder, backbone, cache_dir=tmp_path / "cache")
    assert encodings == [0, 1, 2] and len(os.listdir(tmp_path / "cache")) == 3
    (photos / "b.png").rename(photos / "z.png")  # same bytes under another name and at another place
    second = LatentCache(ImageFolder(photos, resolution_px=16, flip=True), backbone, cache_dir=tmp_path / "cache")
    assert encodings == [0, 1, 2]
    for old, new in ((0, 0), (1, 2), (2, 1)):
        assert torch.equal(first.latents(old, 1, torch.ones(4, 8, 8)), second.latents(new, 1, torch.ones(4, 8, 8)))


def test_stale_cache_files_are_not_used(photos, backbone, tmp_path, encodings):
    def open_cache(**settings) -> list[int]:
        encodings.clear()
        LatentCache(ImageFolder(photos, **{"resolution_px": 16, **settings}), backbone, cache_dir=tmp_path / "cache")
        return list(encodings)

    assert open_cache() == [0, 1, 2] and open_cache() == []
    Image.new("RGB", (20, 20)).save(photos / "a.png")  # content of one picture
    assert open_cache() == [0]
    assert open_cache(resolution_px=24) == [0, 1, 2]
    assert open_cache(flip=True) == [0, 1, 2]
    assert open_cache(num_crops=2) == [1, 2]  # the square picture has the same variants as before
    with torch.no_grad():
        backbone.vae.encoder.conv_in.bias[0] += 1e-3
    assert open_cache() == [0, 1, 2]
    backbone.vae.register_to_config(scaling_factor=0.5)
    assert open_cache() == [0, 1, 2]


def test_a_damaged_cache_file_is_computed_again(photos, backbone, tmp_path, encodings):
    folder = ImageFolder(photos, resolution_px=16)
    first = LatentCache(folder, backbone, cache_dir=tmp_path / "cache")
    for file in (tmp_path / "cache").iterdir():
        file.write_bytes(file.read_bytes()[:-50])
    with pytest.warns(UserWarning, match="computing latents again: .*truncated"):
        second = LatentCache(folder, backbone, cache_dir=tmp_path / "cache")
    assert encodings == [0, 1, 2] * 2 and torch.equal(first.latents(2), second.latents(2))
    LatentCache(folder, backbone, cache_dir=tmp_path / "cache")
    assert encodings == [0, 1, 2] * 2


def test_masks_are_kept_for_each_variant(photos, backbone):
    masks = photos.parent / "masks"
    masks.mkdir()
    for path in photos.iterdir():
        with Image.open(path) as image:
            mask = Image.new("L", image.size, 0)
            mask.paste(255, (0, 0, image.width // 2, image.height))
            mask.save(masks / path.name)
    cache = LatentCache(ImageFolder(photos, resolution_px=16, flip=True, masks=masks), backbone)
    assert [tuple(mask.shape) for mask in cache.masks] == [(2, 1, 16, 16)] * 3
    assert cache.masks[0][0, 0, 0].tolist() == [1] * 8 + [0] * 8
    assert cache.masks[0][1, 0, 0].tolist() == [0] * 8 + [1] * 8


def test_latents_that_are_not_finite_name_the_picture(photos, backbone):
    with torch.no_grad():
        backbone.vae.quant_conv.bias[0] = float("nan")
    with pytest.raises(ValueError, match=r"not finite for .*a\.png'; check its weights"):
        LatentCache(ImageFolder(photos, resolution_px=16), backbone)


def test_module_hash_sees_every_bit_and_the_type(backbone):
    before = module_hash(backbone.vae)
    assert module_hash(backbone.vae) == before
    assert module_hash(backbone.vae.to(torch.bfloat16)) != before
