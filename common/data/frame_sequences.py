"""Clips stored as pictures: animated GIFs and folders of frames."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageSequence

from common.data.frame_windows import even_times
from common.data.images import BadImage, load_image
from common.data.video_files import BadVideo, VideoInfo

PICTURE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}


def is_gif(path: Path) -> bool:
    """Whether a file starts as a GIF does."""
    with open(path, "rb") as file:
        return file.read(6) in (b"GIF87a", b"GIF89a")


def gif_info(path: Path) -> VideoInfo:
    """What a GIF holds; a frame that asks for 0 or 10 ms is shown for 100 ms, as browsers do. Raises: BadVideo."""
    durations_s, size = [], (0, 0)
    for frame in _gif_frames(path):
        duration_ms = frame.info.get("duration", 0)
        durations_s.append((duration_ms if duration_ms > 10 else 100) / 1000)
        size = frame.size
    if not path.read_bytes().rstrip(b"\0").endswith(b";"):
        raise BadVideo(path, f"it is truncated after {len(durations_s)} frames; copy or download it again")
    times = np.cumsum([0.0, *durations_s])
    return VideoInfo(path, len(durations_s), len(durations_s) / float(times[-1]), *size, 0, tuple(times[:-1].tolist()))


def read_gif_frames(info: VideoInfo, indices: Sequence[int]) -> np.ndarray:
    """Chosen frames of a GIF, uint8 (F,H,W,3), on white where transparent."""
    wanted, found = set(indices), {}
    for number, frame in enumerate(_gif_frames(info.path)):
        if number in wanted:
            picture = frame.convert("RGBA")
            found[number] = np.array(Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture))[..., :3]
        if number == max(wanted):
            return np.stack([found[index] for index in indices])
    raise BadVideo(info.path, f"it had {info.num_frames} frames before and has fewer now; open it again")


def frame_files(folder: Path) -> list[Path]:
    """The frames in a folder in the order of their numbers, "frame 10" after "frame 9". Raises: BadVideo."""
    files = [path for path in folder.iterdir() if path.is_file() and not path.name.startswith(".")]
    files.sort(key=lambda path: (_number_key(path), path.name))
    for path in files:
        if path.suffix.lower() not in PICTURE_SUFFIXES:
            raise BadVideo(path, "it lies among pictures, which are read as the frames of one clip; move it elsewhere")
    for one, other in zip(files, files[1:], strict=False):
        if _number_key(one) == _number_key(other):
            raise BadVideo(other, f"it has the same number as {one.name!r}; remove one of them")
    return files


def folder_info(folder: Path, fps: float | None) -> VideoInfo:
    """What a folder of frames holds; each is decoded once here. Raises: BadVideo naming the first unusable frame."""
    files = frame_files(folder)
    if not files:
        raise BadVideo(folder, "the folder holds no frames; put numbered pictures into it")
    if fps is None or not fps > 0:
        raise BadVideo(folder, f"pictures have no frame rate (frames_fps={fps}); pass frames_fps > 0 (--frames-fps)")
    height, width = _load_frame(files[0]).shape[:2]
    for path in files[1:]:
        found = _load_frame(path).shape[:2]
        if found != (height, width):
            raise BadVideo(
                path,
                f"it is {found[1]} x {found[0]} px, but {files[0].name!r} is {width} x {height} px; scale it alike",
            )
    return VideoInfo(folder, len(files), float(fps), width, height, 0, tuple(even_times(len(files), fps).tolist()))


def read_folder_frames(info: VideoInfo, indices: Sequence[int]) -> np.ndarray:
    """Chosen frames of a folder, upright, uint8 (F,H,W,3)."""
    files = frame_files(info.path)
    if len(files) != info.num_frames:
        raise BadVideo(info.path, f"it had {info.num_frames} frames before and has {len(files)} now; open it again")
    return np.stack([_load_frame(files[index]) for index in indices])


def _gif_frames(path: Path) -> Iterator[Image.Image]:
    try:
        with Image.open(path) as gif:
            yield from ImageSequence.Iterator(gif)
    except (OSError, SyntaxError, ValueError, IndexError) as error:
        raise BadVideo(
            path, f"it is truncated or damaged ({type(error).__name__}: {error}); copy or download it again"
        ) from error


def _number_key(path: Path) -> tuple[tuple[int, int | str], ...]:
    """A name as people sort it: digits compare as numbers."""
    parts = re.split(r"([0-9]+)", path.stem)
    return tuple((1, int(part)) if part.isdecimal() else (0, part) for part in parts if part)


def _load_frame(path: Path) -> np.ndarray:
    try:
        return np.array(load_image(path))
    except BadImage as error:
        raise BadVideo(path, error.reason) from error
