"""A video file, a GIF or a folder of frames -> chosen frames, upright -> cut to size -> pixel_values of a clip."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from common.data.frame_sequences import folder_info, gif_info, is_gif, read_folder_frames, read_gif_frames
from common.data.video_files import BadVideo, VideoInfo, file_info, read_file_frames

VIDEO_PREPROCESSING_VERSION = (
    1  # raise it when the same file would give other pixel_values; cached latents depend on it
)


def video_info(path: str | Path, *, frames_fps: float | None = None) -> VideoInfo:
    """What a video holds; all of it is decoded once, so that nothing that can be read later is missing or made up.

    Formats: mp4, mov, webm, mkv, avi with a codec that decord knows (H.264, H.265, MPEG-4, VP8, VP9, ...; not AV1);
    GIF; a folder of pictures, which are its frames in the order of their numbers.
    A rotation in the file's metadata (phones) is applied. Frames need not be evenly spaced: `times_s` says when each is
    shown. Damage that the codec itself cannot notice (a changed bit in VP9) is not found.

    Args:
        frames_fps: frame rate of a folder of pictures; files have their own.
    Raises: BadVideo for a file that is missing, empty, truncated, damaged, without frames, audio only, a picture or no
        video at all; mirrored or rotated by odd angles; with pixels that are not square; cut so that it hides frames.
    """
    path = Path(path)
    if path.is_dir():
        return folder_info(path, frames_fps)
    if not path.is_file():
        raise BadVideo(path, "there is no such file (a broken link, or a wrong path)")
    if path.stat().st_size == 0:
        raise BadVideo(path, "the file is empty (0 bytes); copy or download it again")
    return gif_info(path) if is_gif(path) else file_info(path)


def read_frames(info: VideoInfo, indices: Sequence[int]) -> np.ndarray:
    """Chosen frames of a video, upright, uint8 (F,H,W,3), in the order of the indices.

    Raises: IndexError for a frame that the video does not have; BadVideo if the file has changed since `video_info`.
    """
    outside = [index for index in indices if not 0 <= index < info.num_frames]
    if outside or not len(indices):
        raise IndexError(f"frames {outside} asked of {str(info.path)!r}, which has 0 to {info.num_frames - 1}")
    if info.path.is_dir():
        return read_folder_frames(info, indices)
    if not info.path.is_file():
        raise BadVideo(info.path, "it was there before and is gone")
    return read_gif_frames(info, indices) if is_gif(info.path) else read_file_frames(info, indices)


def crop_frames(frames: np.ndarray, height_px: int, width_px: int) -> np.ndarray:
    """Scale the short side to fit and cut the centre: uint8 (F,H,W,3) -> (F,height_px,width_px,3), nothing distorted.

    Cropping and scaling are one step, with Pillow's Lanczos filter, which is antialiased; a frame that has the size
    already keeps its bits.
    """
    height, width = frames.shape[1:3]
    box_width, box_height = min(width, height * width_px / height_px), min(height, width * height_px / width_px)
    left, top = (width - box_width) / 2, (height - box_height) / 2
    box = (left, top, left + box_width, top + box_height)
    cut = [Image.fromarray(frame).resize((width_px, height_px), Image.Resampling.LANCZOS, box=box) for frame in frames]
    return np.stack([np.array(frame) for frame in cut])


def to_clip(frames: np.ndarray) -> Tensor:
    """uint8 (F,H,W,3) -> pixel_values of a clip, (3,F,H,W) float32 in [-1,1]; 0 -> -1, 255 -> 1."""
    return (
        torch.from_numpy(frames).permute(3, 0, 1, 2).to(torch.float32, memory_format=torch.contiguous_format) / 127.5
        - 1
    )


def check_size(height_px: int, width_px: int, multiple_px: int) -> None:
    """Raises: ValueError unless both sides are positive multiples, naming the nearest size that is."""
    if min(height_px, width_px, multiple_px) < 1:
        raise ValueError(f"sizes must be at least 1 px, got {height_px} x {width_px}, multiples of {multiple_px}")
    if height_px % multiple_px or width_px % multiple_px:
        height, width = (max(1, round(side / multiple_px)) * multiple_px for side in (height_px, width_px))
        raise ValueError(
            f"height and width must be multiples of {multiple_px} px, got {height_px} x {width_px}; "
            f"nearest: {height} x {width}"
        )


def nearest_size(height_px: int, width_px: int, *, short_side_px: int, multiple_px: int) -> tuple[int, int]:
    """The (height, width) whose aspect is nearest to a video's, so that `crop_frames` cuts little off.

    Args:
        height_px, width_px: of the video.
        short_side_px: of the result, a multiple of multiple_px.
        multiple_px: of both sides; 64 for Stable Diffusion types (VAE 8, UNet 8), 8 for tiny ones.
    """
    check_size(short_side_px, short_side_px, multiple_px)
    long_side_px = short_side_px * max(height_px, width_px) / min(height_px, width_px)
    long_side_px = round(long_side_px / multiple_px) * multiple_px
    return (long_side_px, short_side_px) if height_px > width_px else (short_side_px, long_side_px)
