"""Clips from files, folders of files and folders of frames: windows, captions, workers, errors that name the file."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from common.data.clip_folder import ClipFolder
from common.data.videos import BadVideo
from common.sampling.clips import save_gif, save_mp4

SIZE = {"height_px": 32, "width_px": 32}


def grey_clip(num_frames: int, first: int = 0) -> torch.Tensor:
    """Frame k is plain grey of level 10 k + first, so that a frame can be told from its pixels: (3,F,32,64)."""
    levels = torch.arange(num_frames) * 10.0 + first
    return (levels / 127.5 - 1).reshape(1, -1, 1, 1).expand(3, -1, 32, 64)


def numbers(pixel_values: torch.Tensor, first: int = 0) -> list[int]:
    """Which frames of a `grey_clip` these are."""
    return (((pixel_values.mean((0, 2, 3)) + 1) * 127.5 - first) / 10).round().int().tolist()


def save_frames(folder: Path, num_frames: int) -> None:
    folder.mkdir(parents=True)
    for number in range(num_frames):
        Image.new("RGB", (64, 32), (10 * number,) * 3).save(folder / f"{number}.png")


@pytest.fixture
def videos(tmp_path) -> Path:
    """12 frames at 24 per second (mp4), 20 at 8 (gif), 14 pictures."""
    folder = tmp_path / "videos"
    folder.mkdir()
    save_mp4(grey_clip(12), folder / "a.mp4", 24)
    save_gif(grey_clip(20), folder / "b.gif", 8)
    save_frames(folder / "deep" / "c", 14)
    return folder


def test_files_and_folders_of_frames_side_by_side(videos):
    folder = ClipFolder(videos, num_frames=4, **SIZE, frames_fps=10)
    assert [Path(item["path"]).name for item in folder] == ["a.mp4", "b.gif", "c"]
    assert [round(item["fps"], 1) for item in folder] == [24, 8, 10]
    for item in folder:
        assert set(item) == {"pixel_values", "path", "fps"}
        assert item["pixel_values"].shape == (3, 4, 32, 32) and item["pixel_values"].dtype == torch.float32
        assert numbers(item["pixel_values"]) == [0, 1, 2, 3]


def test_one_file_or_one_folder_of_frames(videos):
    (item,) = ClipFolder(videos / "b.gif", num_frames=20, **SIZE)
    assert numbers(item["pixel_values"]) == list(range(20))
    (item,) = ClipFolder(videos / "deep" / "c", num_frames=14, **SIZE, frames_fps=10)
    assert numbers(item["pixel_values"]) == list(range(14))
    (item,) = ClipFolder(videos / "deep", num_frames=7, **SIZE, frames_fps=10, fps=5)
    assert numbers(item["pixel_values"]) == list(range(0, 14, 2)) and item["fps"] == 5


def test_rate_and_stride(videos):
    (item,) = ClipFolder(videos / "a.mp4", num_frames=4, fps=8, **SIZE)
    assert numbers(item["pixel_values"]) == [0, 3, 6, 9] and item["fps"] == 8
    (item,) = ClipFolder(videos / "a.mp4", num_frames=3, stride=5, **SIZE)
    assert numbers(item["pixel_values"]) == [0, 5, 10] and item["fps"] == pytest.approx(4.8)


def test_samples_are_random_windows_and_a_pure_function_of_seed_index_and_key(videos):
    def draw(seed: int, index: int, key: int) -> torch.Tensor:
        folder = ClipFolder(videos, num_frames=8, **SIZE, frames_fps=10, seed=seed)
        return folder.sample(index, key)["pixel_values"]

    assert torch.equal(draw(0, 0, 5), draw(0, 0, 5))
    folder = ClipFolder(videos, num_frames=8, **SIZE, frames_fps=10, seed=0)
    starts = []
    for key in range(60):
        shown = numbers(folder.sample(0, key)["pixel_values"])
        assert shown == list(range(shown[0], shown[0] + 8))
        starts.append(shown[0])
    assert set(starts) == {0, 1, 2, 3, 4}
    other = ClipFolder(videos, num_frames=8, **SIZE, frames_fps=10, seed=1)
    assert starts != [numbers(other.sample(0, key)["pixel_values"])[0] for key in range(60)]


def test_captions_of_files_and_folders(videos):
    (videos / "a.txt").write_text("a grey square\n")
    (videos / "deep" / "c.txt").write_text("pictures")
    rows = [{"file_name": "b.gif", "text": "a gif"}, {"file_name": "a.mp4", "text": "not this one"}]
    (videos / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    folder = ClipFolder(videos, num_frames=4, **SIZE, frames_fps=10)
    assert [item["caption"] for item in folder] == ["a grey square", "a gif", "pictures"]
    (videos / "metadata.jsonl").unlink()
    with pytest.raises(ValueError, match="1 of 3 pictures in .* have no caption: 'b.gif'"):
        ClipFolder(videos, num_frames=4, **SIZE, frames_fps=10)
    assert ClipFolder(videos / "a.mp4", num_frames=4, **SIZE)[0]["caption"] == "a grey square"
    assert ClipFolder(videos / "deep" / "c", num_frames=4, **SIZE, frames_fps=1)[0]["caption"] == "pictures"


@pytest.mark.parametrize("start_method", ["fork", "spawn"])
def test_workers_read_the_same_bits(videos, start_method):
    folder = ClipFolder(videos, num_frames=4, **SIZE, frames_fps=10)
    here = list(DataLoader(folder, batch_size=1))  # decord and PyAV have been used in this process already
    there = list(DataLoader(folder, batch_size=1, num_workers=2, multiprocessing_context=start_method, timeout=120))
    assert len(there) == 3
    for one, other in zip(here, there, strict=True):
        assert one["path"] == other["path"] and torch.equal(one["pixel_values"], other["pixel_values"])


def test_too_short_videos_are_named_or_skipped(videos):
    with pytest.raises(BadVideo, match=r"a\.mp4.*it has 12 frames; 14 .*at most 12 \(--num-frames\).*skip_bad_videos"):
        ClipFolder(videos, num_frames=14, **SIZE, frames_fps=10)
    with pytest.warns(UserWarning, match=r"skipped 1 of 3 videos:\n.*a\.mp4.*it has 12 frames"):
        folder = ClipFolder(videos, num_frames=14, **SIZE, frames_fps=10, skip_bad_videos=True)
    assert len(folder) == 2 and [error.path.name for error in folder.skipped] == ["a.mp4"]
    assert Path(folder[0]["path"]).name == "b.gif"
    with pytest.raises(ValueError, match="none of its files can be used"):
        ClipFolder(videos, num_frames=99, **SIZE, frames_fps=10, skip_bad_videos=True)


def test_anything_that_is_no_video_is_named(videos):
    (videos / "notes.txt").write_text("of nothing")
    with pytest.raises(BadVideo, match=r"notes\.txt"):
        ClipFolder(videos, num_frames=4, **SIZE, frames_fps=10)
    (videos / "notes.txt").unlink()
    with pytest.raises(BadVideo, match=r"c'.*pictures have no frame rate.*--frames-fps"):
        ClipFolder(videos, num_frames=4, **SIZE)
    (videos / "deep" / "c" / "clip.mp4").write_bytes((videos / "a.mp4").read_bytes())
    with pytest.raises(BadVideo, match=r"clip\.mp4.*lies among pictures"):
        ClipFolder(videos, num_frames=4, **SIZE, frames_fps=10)


def test_bad_settings_are_no_videos_fault(videos, tmp_path):
    with pytest.raises(ValueError, match="multiples of 64 px, got 32 x 32; nearest: 64 x 64"):
        ClipFolder(videos, num_frames=4, **SIZE, multiple_px=64)
    for settings, message in (({"num_frames": 0}, "num_frames >= 1"), ({"fps": 8, "stride": 2}, "not both")):
        with pytest.raises(ValueError, match=message) as caught:
            ClipFolder(videos, **{"num_frames": 4, **SIZE, **settings}, skip_bad_videos=True)
        assert not isinstance(caught.value, BadVideo)
    with pytest.raises(FileNotFoundError):
        ClipFolder(tmp_path / "nowhere", num_frames=4, **SIZE)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no file that could be one"):
        ClipFolder(tmp_path / "empty", num_frames=4, **SIZE)


def test_items_are_cut_as_asked(videos):
    """The clip is 64 x 32; the right eighth made white is cut off by a square and kept by the whole."""
    clip = grey_clip(4).clone()
    clip[..., 56:] = 1
    save_gif(clip, videos / "b.gif", 8)
    square = ClipFolder(videos / "b.gif", num_frames=4, **SIZE)[0]["pixel_values"]
    whole = ClipFolder(videos / "b.gif", num_frames=4, height_px=32, width_px=64)[0]["pixel_values"]
    assert square.max() < 0 and np.allclose(whole, clip, atol=0.02)
