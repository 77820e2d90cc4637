"""Latents of clips equal those of the VAE, are reused only where they are still right, and are drawn as documented."""

import os
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from common.data import clip_latents
from common.data.clip_dataset import ClipDataset
from common.data.clip_folder import ClipFolder
from common.data.clip_latents import ClipLatents
from common.sampling.clips import save_gif

PROMPTS = ["a clip of a <s>", "a film of a <s>", "the clip of a <s>"]


@pytest.fixture
def videos(tmp_path):
    """Two noisy clips of 12 frames, a GIF and a folder of frames."""
    folder = tmp_path / "videos"
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    save_gif(torch.rand(3, 12, 16, 16, generator=generator) * 2 - 1, folder / "a.gif", 8)
    (folder / "b").mkdir()
    for number, levels in enumerate(np.random.default_rng(0).integers(0, 256, (12, 16, 16, 3), dtype=np.uint8)):
        Image.fromarray(levels).save(folder / "b" / f"{number}.png")
    return folder


def open_folder(videos, **settings) -> ClipFolder:
    return ClipFolder(
        videos, **{"num_frames": 10, "height_px": 16, "width_px": 16, "multiple_px": 2, "frames_fps": 8, **settings}
    )


def test_latents_are_the_posterior_of_every_frame(videos, backbone):
    """Reference: diffusers' own DiagonalGaussianDistribution of each frame alone; 10 frames are two chunks."""
    folder = open_folder(videos)
    latents = ClipLatents(folder, backbone, num_windows=2)
    assert len(latents) == 2 and latents.latent_shape == (4, 10, 8, 8)
    assert [windows[:, 0].tolist() for windows in latents.windows] == [[0, 2], [0, 2]]
    noise = torch.randn(4, 10, 8, 8, generator=torch.Generator().manual_seed(0))
    for index in range(2):
        for number, window in enumerate(latents.windows[index]):
            frames = folder.item(index, window)["pixel_values"]
            for k in range(10):
                posterior = backbone.vae.encode(frames[None, :, k]).latent_dist
                mean, std = posterior.mode()[0] * 0.3, posterior.std[0] * 0.3
                torch.testing.assert_close(latents.latents(index, number)[:, k], mean)
                torch.testing.assert_close(latents.latents(index, number, noise)[:, k], mean + std * noise[:, k])


def test_a_half_precision_vae_encodes_in_float32_and_is_left_as_it_was(videos, backbone):
    backbone.vae.half()
    found = ClipLatents(open_folder(videos), backbone).latents(0)
    assert backbone.vae.dtype == torch.float16 and found.dtype == torch.float32
    frame = open_folder(videos)[0]["pixel_values"][None, :, 3]
    torch.testing.assert_close(found[:, 3], backbone.vae.float().encode(frame).latent_dist.mode()[0] * 0.3)


@pytest.fixture
def encodings(monkeypatch) -> list[tuple[int, int]]:
    """(video, first frame) of the windows that were really encoded."""
    encoded, encode = [], clip_latents._encode
    monkeypatch.setattr(
        clip_latents, "_encode", lambda f, i, window, b: encoded.append((i, int(window[0]))) or encode(f, i, window, b)
    )
    return encoded


def test_disk_cache_is_used_again_and_bit_equal(videos, backbone, tmp_path, encodings):
    first = ClipLatents(open_folder(videos), backbone, num_windows=2, cache_dir=tmp_path / "cache")
    assert encodings == [(0, 0), (0, 2), (1, 0), (1, 2)] and len(os.listdir(tmp_path / "cache")) == 4
    (videos / "a.gif").rename(videos / "z.gif")
    second = ClipLatents(open_folder(videos), backbone, num_windows=2, cache_dir=tmp_path / "cache")
    assert len(encodings) == 4
    for old, new in ((0, 1), (1, 0)):
        for window in range(2):
            ones = torch.ones(first.latent_shape)
            assert torch.equal(first.latents(old, window, ones), second.latents(new, window, ones))
    third = ClipLatents(open_folder(videos), backbone, num_windows=3, cache_dir=tmp_path / "cache")
    assert encodings[4:] == [(0, 1), (1, 1)] and third.num_windows(0) == 3


def test_stale_cache_files_are_not_used(videos, backbone, tmp_path, encodings):
    def encoded(**settings) -> int:
        encodings.clear()
        ClipLatents(open_folder(videos, **settings), backbone, cache_dir=tmp_path / "cache")
        return len(encodings)

    assert encoded() == 2 and encoded() == 0
    Image.new("RGB", (16, 16)).save(videos / "b" / "7.png")
    assert encoded() == 1
    assert encoded(width_px=12) == 2
    assert encoded(num_frames=4, stride=2) == 2
    assert encoded(num_frames=4, fps=4) == 0  # the same frames
    assert encoded(num_frames=4, stride=3) == 2
    with torch.no_grad():
        backbone.vae.encoder.conv_in.bias[0] += 1e-3
    assert encoded() == 2


def test_a_damaged_cache_file_is_computed_again(videos, backbone, tmp_path, encodings):
    first = ClipLatents(open_folder(videos), backbone, cache_dir=tmp_path / "cache")
    for file in (tmp_path / "cache").iterdir():
        file.write_bytes(file.read_bytes()[:-50])
    with pytest.warns(UserWarning, match="computing latents again: .*truncated"):
        second = ClipLatents(open_folder(videos), backbone, cache_dir=tmp_path / "cache")
    assert len(encodings) == 4 and torch.equal(first.latents(1), second.latents(1))
    ClipLatents(open_folder(videos), backbone, cache_dir=tmp_path / "cache")
    assert len(encodings) == 4


def test_caller_cannot_change_the_latents(videos, backbone):
    latents = ClipLatents(open_folder(videos), backbone)
    before = latents.latents(0)
    latents.latents(0).zero_()
    assert torch.equal(latents.latents(0), before)


def test_latents_that_are_not_finite_name_the_video(videos, backbone):
    with torch.no_grad():
        backbone.vae.quant_conv.bias[0] = float("nan")
    with pytest.raises(ValueError, match=r"not finite for .*a\.gif'; check its weights"):
        ClipLatents(open_folder(videos), backbone)


def test_dataset_draws_window_prompt_and_noise_from_seed_index_and_key(videos, backbone):
    latents = ClipLatents(open_folder(videos), backbone, num_windows=3)
    dataset = ClipDataset(latents, PROMPTS, seed=0)
    item, again = dataset.sample(1, 7), ClipDataset(latents, PROMPTS, seed=0).sample(1, 7)
    assert set(item) == {"latents", "prompt", "clip_index"} and item["clip_index"] == 1 and len(dataset) == 2
    assert item["latents"].shape == (4, 10, 8, 8)
    assert torch.equal(item["latents"], again["latents"]) and item["prompt"] == again["prompt"]
    assert not torch.equal(item["latents"], dataset.sample(1, 8)["latents"])
    assert not torch.equal(item["latents"], ClipDataset(latents, PROMPTS, seed=1).sample(1, 7)["latents"])
    means = torch.stack([latents.latents(1, window) for window in range(3)])
    counts = Counter()
    for key in range(900):
        item = dataset.sample(1, key)
        counts[(means - item["latents"]).flatten(1).norm(dim=1).argmin().item(), item["prompt"]] += 1
    assert len(counts) == 9 and max(abs(count - 100) for count in counts.values()) < 48  # 5 standard deviations


def test_posterior_is_sampled_for_every_frame(videos, backbone):
    latents = ClipLatents(open_folder(videos, num_frames=3), backbone)
    dataset = ClipDataset(latents, PROMPTS, seed=0)
    draws = torch.stack([dataset.sample(0, key)["latents"] for key in range(2000)])
    std = latents.latents(0, 0, torch.ones(4, 3, 8, 8)) - latents.latents(0, 0)
    assert ((draws.mean(0) - latents.latents(0)) / std).abs().max() < 5 / 2000**0.5
    assert (draws.std(0) / std - 1).abs().max() < 5 / 4000**0.5


def test_plain_items_and_captions(videos, backbone):
    latents = ClipLatents(open_folder(videos), backbone, num_windows=2)
    item = ClipDataset(latents, PROMPTS, seed=3)[1]
    assert torch.equal(item["latents"], latents.latents(1, 0)) and item["prompt"] == PROMPTS[0]
    for prompts, error, message in (
        ("a clip", TypeError, "list of prompts, got the string 'a clip'"),
        ([], ValueError, "prompts is empty"),
        (None, ValueError, "have no captions; pass prompts"),
    ):
        with pytest.raises(error, match=message):
            ClipDataset(latents, prompts, seed=0)
    (videos / "a.txt").write_text("noise in colour")
    (videos / "b.txt").write_text("more noise")
    dataset = ClipDataset(ClipLatents(open_folder(videos), backbone), seed=0)
    assert [dataset.sample(index, 4)["prompt"] for index in range(2)] == ["noise in colour", "more noise"]
