"""Clips of one size and rate from videos: a file, a folder of files, or folders of frames, with optional captions."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from common.data.captions import CAPTION_TABLES, read_captions
from common.data.files import existing_folder, list_files, name_key
from common.data.frame_sequences import PICTURE_SUFFIXES
from common.data.frame_windows import possible_windows, random_window
from common.data.video_files import BadVideo, VideoInfo
from common.data.videos import check_size, crop_frames, read_frames, to_clip, video_info


class ClipFolder(Dataset):
    """Videos in a fixed order; each is decoded once here, so that errors come early.

    Items: {"pixel_values": (3,F,H,W) float32 in [-1,1], "path": str, "fps": float} and, where there are any, "caption":
    str. `folder[i]` is the first window of F frames, `sample(i, sample_key)` a random one, `clip(i, window)` any of
    `folder.windows[i]`. Frames are read when asked for, by a reader of the moment, so workers may share the dataset.

    Args:
        root: a video file; a folder of pictures, which are the frames of one clip; or a folder with video files and
            such folders below it. Hidden files are passed over; NAME.txt beside NAME.mp4 or the folder NAME,
            metadata.jsonl and captions.json are captions; anything else must be a video, whatever its suffix.
        num_frames: F, at least 1; no frame is repeated to reach it.
        height_px, width_px: of the items; short side scaled, centre cut.
        fps: of the clips, frames per second, by the times of the frames; None = stored frames as they come.
        stride: every stride-th stored frame, without fps.
        multiple_px: of both sides; 64 for Stable Diffusion types, 8 for tiny ones.
        frames_fps: frame rate of folders of pictures, which have none of their own.
        captions: folder of the caption files; None = the folder that holds the videos.
        seed: of `sample`.
        skip_bad_videos: leave unusable videos out with a warning; they are listed in `skipped`.
    Attributes:
        videos: what each video holds.
        windows: for each video (S,F) int64, all windows that fit (see `possible_windows`).
        captions: for each video, or None.
    Raises: BadVideo naming the first unusable or too short video; ValueError if nothing usable is left, if captions are
        incomplete or a size is no multiple; FileNotFoundError if root is not there.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        num_frames: int,
        height_px: int,
        width_px: int,
        fps: float | None = None,
        stride: int = 1,
        multiple_px: int = 8,
        frames_fps: float | None = None,
        captions: str | Path | None = None,
        seed: int = 0,
        skip_bad_videos: bool = False,
    ):
        check_size(height_px, width_px, multiple_px)
        possible_windows([0.0], 1, fps=fps, stride=stride)  # bad settings are no video's fault
        self.root, self.num_frames, self.fps, self.stride, self.seed = Path(root), num_frames, fps, stride, seed
        self.height_px, self.width_px = height_px, width_px
        folder, paths = _video_paths(self.root)
        caption_root = folder if captions is None else existing_folder(captions)
        self.videos: list[VideoInfo] = []
        self.windows: list[np.ndarray] = []
        self.skipped: list[BadVideo] = []
        for path in paths:
            try:
                video = video_info(path, frames_fps=frames_fps)
                windows = _windows_of(video, num_frames, fps, stride)
            except BadVideo as error:
                if not skip_bad_videos:
                    raise BadVideo(
                        error.path, f"{error.reason}; or pass skip_bad_videos=True (--skip-bad-videos)"
                    ) from error
                self.skipped.append(error)
                continue
            self.videos.append(video)
            self.windows.append(windows)
        self._report()
        self.captions = read_captions(caption_root, folder, [video.path for video in self.videos])

    def _report(self) -> None:
        skipped = "".join(f"\n  {error}" for error in self.skipped)
        if not self.videos:
            found = f"none of its files can be used:{skipped}" if skipped else "it holds no file that could be one"
            raise ValueError(f"no video in {str(self.root)!r}: {found}")
        if skipped:
            total = len(self.videos) + len(self.skipped)
            warnings.warn(f"skipped {len(self.skipped)} of {total} videos:{skipped}", stacklevel=3)

    def __len__(self) -> int:
        """Number of videos."""
        return len(self.videos)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The first window, for validation: nothing is drawn."""
        return self.item(index, self.windows[index][0])

    def sample(self, index: int, sample_key: int) -> dict[str, Any]:
        """Video `index` as sample `sample_key` of a run shows it: a pure function of (seed, index, sample_key)."""
        return self.item(index, random_window(self.windows[index], seed=self.seed, sample_key=sample_key))

    def item(self, index: int, window: Sequence[int]) -> dict[str, Any]:
        """The item that shows the given frames of one video."""
        video = self.videos[index]
        item = {
            "pixel_values": self.clip(index, window),
            "path": str(video.path),
            "fps": video.fps / self.stride if self.fps is None else float(self.fps),
        }
        if self.captions is not None:
            item["caption"] = self.captions[index]
        return item

    def clip(self, index: int, window: Sequence[int]) -> Tensor:
        """The given frames of one video, cut to size: (3,F,H,W) float32 in [-1,1]."""
        frames = read_frames(self.videos[index], [int(number) for number in window])
        return to_clip(crop_frames(frames, self.height_px, self.width_px))


def _windows_of(video: VideoInfo, num_frames: int, fps: float | None, stride: int) -> np.ndarray:
    try:
        return possible_windows(video.times_s, num_frames, fps=fps, stride=stride)
    except ValueError as error:
        raise BadVideo(video.path, str(error)) from error


def _video_paths(root: Path) -> tuple[Path, list[Path]]:
    """(the folder that captions are relative to, files and folders that have to be videos)."""
    if root.is_file():
        return root.parent, [root]
    files = list_files(existing_folder(root))
    frame_folders = {path.parent for path in files if path.suffix.lower() in PICTURE_SUFFIXES}
    if root in frame_folders:
        root = root.resolve()
        return root.parent, [root]
    others = [path for path in files if path.parent not in frame_folders and path.name not in CAPTION_TABLES]
    texts = [path for path in others if path.suffix.lower() == ".txt"]
    videos = [*(path for path in others if path not in texts), *frame_folders]
    captioned = {name_key(path.with_suffix("")) for path in videos}
    videos += [path for path in texts if name_key(path.with_suffix("")) not in captioned]
    return root, sorted(videos, key=lambda path: (name_key(path.relative_to(root)), str(path)))
