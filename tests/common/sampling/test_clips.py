"""Clips as files that other readers read back, as grids and as strips."""

import av
import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence

from common.sampling.clips import clip_grid, filmstrip, save_gif, save_mp4
from common.sampling.images import image_grid, to_pil
from common.toyworld.clips import render_clip
from common.toyworld.sampling import compose, sample_object
from common.toyworld.scene import Placed


@pytest.fixture(scope="module")
def clip() -> torch.Tensor:
    """A toy-world clip, (3,8,64,64) in [-1,1]."""
    rng = np.random.default_rng(3)
    scene = compose(rng, (Placed(sample_object(rng)),), fill=0.5, background="beach")
    return (render_clip(scene, "moving right", num_frames=8).frames * 2 - 1).transpose(0, 1)


def levels(clip: torch.Tensor, upscale: int) -> np.ndarray:
    frames = np.stack([np.asarray(frame) for frame in to_pil(clip.transpose(0, 1))])
    return frames.repeat(upscale, 1).repeat(upscale, 2)


def assert_same_frames(found: list[np.ndarray], expected: np.ndarray, least_db: float) -> None:
    assert len(found) == len(expected)
    for number, frame in enumerate(found):
        quality = [10 * np.log10(255**2 / np.mean((frame.astype(float) - other) ** 2)) for other in expected]
        assert quality[number] > least_db and quality[number] == max(quality)


@pytest.mark.parametrize("fps", [8, 24, 30000 / 1001])
def test_mp4_reads_back_with_pyav(clip, tmp_path, fps):
    save_mp4(clip, tmp_path / "new" / "a.mp4", fps, upscale=2)
    with av.open(str(tmp_path / "new" / "a.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert float(stream.average_rate) == pytest.approx(fps, rel=1e-6) and stream.frames == 8
        found = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
    assert_same_frames(found, levels(clip, 2), 35)


def test_mp4_has_the_same_bytes_every_time(clip, tmp_path):
    for name in ("a.mp4", "b.mp4"):
        save_mp4(clip, tmp_path / name, 8)
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


@pytest.mark.parametrize(
    ("fps", "durations_ms"), [(10, [100] * 8), (24, [40, 40, 50, 40, 40, 40, 40, 40]), (50, [20] * 8)]
)
def test_gif_reads_back_with_pillow(clip, tmp_path, fps, durations_ms):
    """24 per second: the moments 0, 41.7, 83.3, 125, ... ms are rounded to 0, 40, 80, 130, 170, 210, 250, 290."""
    save_gif(clip, tmp_path / "a.gif", fps, upscale=2)
    with Image.open(tmp_path / "a.gif") as gif:
        assert gif.info["loop"] == 0
        shown = [(frame.info["duration"], np.asarray(frame.convert("RGB"))) for frame in ImageSequence.Iterator(gif)]
    assert [duration for duration, _ in shown] == durations_ms
    assert_same_frames([frame for _, frame in shown], levels(clip, 2), 35)


def test_gif_keeps_frames_that_are_alike(tmp_path):
    save_gif(torch.zeros(3, 5, 7, 9), tmp_path / "a.gif", 10)
    with Image.open(tmp_path / "a.gif") as gif:
        assert gif.n_frames == 5 and gif.size == (9, 7)


@pytest.mark.parametrize("save", [save_mp4, save_gif])
def test_bad_clips_leave_no_file(save, tmp_path):
    good = torch.zeros(3, 2, 8, 8)
    for bad, settings, message in (
        (good[None], {}, r"must be \(3,F,H,W\) with F >= 1, got \(1, 3, 2, 8, 8\)"),
        (good.transpose(0, 1), {}, r"must be \(3,F,H,W\)"),
        (good[:, :0], {}, "F >= 1"),
        (torch.full_like(good, float("nan")), {}, "NaN"),
        (good, {"fps": 0}, "need fps > 0"),
        (good, {"upscale": 0}, "upscale >= 1"),
    ):
        with pytest.raises(ValueError, match=message):
            save(bad, tmp_path / "clip", **{"fps": 8, **settings})
    assert not list(tmp_path.iterdir())


def test_limits_of_the_formats(tmp_path):
    with pytest.raises(ValueError, match="even sizes, got 8 x 7 px; pass upscale=2, or write a GIF"):
        save_mp4(torch.zeros(3, 2, 8, 7), tmp_path / "a.mp4", 8)
    save_mp4(torch.zeros(3, 2, 8, 7), tmp_path / "a.mp4", 8, upscale=2)
    with pytest.raises(ValueError, match="at most 50 frames per second, got fps=60"):
        save_gif(torch.zeros(3, 2, 8, 8), tmp_path / "a.gif", 60)


def test_grid_of_clips_is_a_grid_of_pictures_at_every_moment(clip, tmp_path):
    clips, labels = [clip, clip.flip(1), clip.flip(3)], ["as is", "backwards", "mirrored"]
    grid = clip_grid(clips, 2, labels, upscale=2)
    for moment in range(8):
        expected = np.asarray(image_grid(torch.stack([c[:, moment] for c in clips]), 2, labels, upscale=2))
        found = ((grid[:, moment].permute(1, 2, 0) + 1) * 127.5).round().byte().numpy()
        assert np.array_equal(found[: expected.shape[0], : expected.shape[1]], expected)
    save_mp4(grid, tmp_path / "grid.mp4", 8)


def test_grid_has_even_sides_for_mp4(tmp_path):
    grid = clip_grid([torch.zeros(3, 2, 7, 7)] * 2, 1, ["a", ""])
    assert grid.shape[2] % 2 == 0 and grid.shape[3] == 16 and (grid[:, :, :, -1] == 1).all()
    save_mp4(grid, tmp_path / "grid.mp4", 8)


def test_grid_needs_clips_of_one_length():
    with pytest.raises(ValueError, match=r"the same number of frames, got \[2, 3\]"):
        clip_grid([torch.zeros(3, 2, 8, 8), torch.zeros(3, 3, 8, 8)], 2)


def test_filmstrip_shows_frames_from_first_to_last():
    clip = torch.linspace(-1, 1, 9).reshape(1, 9, 1, 1).expand(3, 9, 4, 4)
    strip = np.asarray(filmstrip(clip, 3))
    assert strip.shape[:2] == (4 + 8, 3 * (4 + 4) + 4)
    assert [int(strip[6, 6 + 8 * k, 0]) for k in range(3)] == [0, 128, 255]
    assert filmstrip(clip).width == 9 * 8 + 4
    assert filmstrip(clip, 2, ["first", "last"]).height > strip.shape[0]
    for num_frames in (0, 10):
        with pytest.raises(ValueError, match=rf"must be in 1..9, got {num_frames}"):
            filmstrip(clip, num_frames)
