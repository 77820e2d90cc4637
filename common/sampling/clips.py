"""Clips: tensors to mp4 and GIF files, labelled grids that move, film strips."""

from collections.abc import Sequence
from fractions import Fraction
from io import BytesIO
from pathlib import Path

import av
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from common.data.images import to_pixel_values
from common.io import atomic_write_bytes
from common.sampling.images import image_grid, to_pil

MAX_GIF_FPS = 50  # browsers slow down what asks for less than 20 ms


def save_mp4(clip: Tensor, path: str | Path, fps: float, *, upscale: int = 1) -> None:
    """Write a clip as H.264 in mp4, whole or not at all; the same clip gives the same bytes.

    Args:
        clip: (3,F,H,W) in [-1,1]; values beyond are clamped. H.264 stores colour at half resolution (yuv420p, which
            every player reads), so upscaled H and W must be even.
        fps: frames per second.
        upscale: whole factor, nearest neighbour; 4 shows 64 px clips without blurring their pixels.
    Raises: ValueError for another shape, NaN, an odd size or fps <= 0.
    """
    frames = _levels(clip, fps, upscale)
    height, width = frames.shape[1:3]
    if height % 2 or width % 2:
        raise ValueError(f"H.264 needs even sizes, got {height} x {width} px; pass upscale=2, or write a GIF")
    buffer, rate = BytesIO(), _rate(fps)
    with av.open(buffer, "w", format="mp4") as container:
        # crf 18 looks as the original does; with mbtree the bytes of small clips differ from call to call
        stream = container.add_stream("libx264", rate=rate, options={"crf": "18", "x264-params": "mbtree=0"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.thread_count = 1  # the bytes depend on it
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    atomic_write_bytes(path, buffer.getvalue())


def save_gif(clip: Tensor, path: str | Path, fps: float, *, upscale: int = 1) -> None:
    """Write a clip as an endless GIF with one palette of its own, whole or not at all.

    A GIF counts time in steps of 10 ms. The moment of each frame is rounded, so that the rate is right on average: at
    24 per second frames last 40 or 50 ms. The last frame lasts as long as the one before it.

    Args: as `save_mp4`, with fps at most 50; any size.
    Raises: ValueError for another shape, NaN, or fps not in (0, 50].
    """
    frames = _levels(clip, fps, upscale)
    if fps > MAX_GIF_FPS:
        raise ValueError(f"a GIF shows at most {MAX_GIF_FPS} frames per second, got fps={fps}; write an mp4")
    buffer, rate = BytesIO(), _rate(fps)
    with av.open(buffer, "w", format="gif") as container:
        stream = container.add_stream("gif", rate=rate)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "pal8"
        for frame in _with_palette(frames, rate):
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    atomic_write_bytes(path, buffer.getvalue())


def clip_grid(
    clips: Sequence[Tensor],
    columns: int,
    labels: Sequence[str] | None = None,
    *,
    upscale: int = 1,
    font_px: int = 12,
) -> Tensor:
    """Several clips side by side as one clip, laid out and labelled as `image_grid` does.

    Args:
        clips: each (3,F,H,W) in [-1,1], all with the same number of frames.
        columns, labels, upscale, font_px: as for `image_grid`.
    Returns: (3,F,H',W') float32 in [-1,1], with a white edge where it needs one to have the even sides of an mp4.
    Raises: ValueError if the clips differ in length; else as `image_grid`.
    """
    lengths = sorted({clip.shape[1] for clip in clips})
    if len(lengths) != 1:
        raise ValueError(f"clip_grid needs clips with the same number of frames, got {lengths}")
    pictures = [to_pil(clip.transpose(0, 1)) for clip in clips]
    moments = [
        image_grid(moment, columns, labels, upscale=upscale, font_px=font_px) for moment in zip(*pictures, strict=True)
    ]
    return torch.stack([to_pixel_values(_even(moment)) for moment in moments], dim=1)


def filmstrip(
    clip: Tensor,
    num_frames: int | None = None,
    labels: Sequence[str] | None = None,
    *,
    upscale: int = 1,
    font_px: int = 12,
) -> Image.Image:
    """A clip as one row of frames, from the first to the last.

    Args:
        clip: (3,F,H,W) in [-1,1].
        num_frames: how many, evenly spaced; None = all F.
        labels: one text per frame shown.
    Raises: ValueError if num_frames is not in 1..F; else as `image_grid`.
    """
    total = clip.shape[1]
    num_frames = total if num_frames is None else num_frames
    if not 1 <= num_frames <= total:
        raise ValueError(f"num_frames must be in 1..{total}, got {num_frames}")
    shown = np.linspace(0, total - 1, num_frames).round().astype(int).tolist()
    return image_grid(clip[:, shown].transpose(0, 1), num_frames, labels, upscale=upscale, font_px=font_px)


def _levels(clip: Tensor, fps: float, upscale: int) -> np.ndarray:
    """uint8 (F, upscale H, upscale W, 3)."""
    if clip.ndim != 4 or clip.shape[0] != 3 or clip.shape[1] < 1:
        raise ValueError(f"a clip must be (3,F,H,W) with F >= 1, got {tuple(clip.shape)}; index a batch")
    if not fps > 0 or upscale < 1:
        raise ValueError(f"need fps > 0 and upscale >= 1, got {fps} and {upscale}")
    frames = np.stack([np.asarray(frame) for frame in to_pil(clip.transpose(0, 1))])
    return np.ascontiguousarray(frames.repeat(upscale, axis=1).repeat(upscale, axis=2))


def _rate(fps: float) -> Fraction:
    """The rate as the ratio that it is meant to be, such as 8/1 or 30000/1001."""
    return Fraction(fps).limit_denominator(1001)


def _with_palette(frames: np.ndarray, rate: Fraction) -> list[av.VideoFrame]:
    """FFmpeg's palettegen and paletteuse: the 255 colours that serve all frames best, without dithering."""
    graph = av.filter.Graph()
    height, width = frames.shape[1:3]
    source = graph.add_buffer(width=width, height=height, format="rgb24", time_base=1 / rate)
    split, generate = graph.add("split"), graph.add("palettegen", "stats_mode=full")
    use, sink = graph.add("paletteuse", "dither=none"), graph.add("buffersink")
    source.link_to(split)
    split.link_to(generate, 0, 0)
    split.link_to(use, 1, 0)
    generate.link_to(use, 0, 1)
    use.link_to(sink)
    graph.configure()
    for number, levels in enumerate(frames):
        frame = av.VideoFrame.from_ndarray(levels, format="rgb24")
        frame.pts, frame.time_base = number, 1 / rate
        source.push(frame)
    source.push(None)
    return [sink.pull() for _ in frames]


def _even(picture: Image.Image) -> Image.Image:
    width, height = picture.width + picture.width % 2, picture.height + picture.height % 2
    padded = Image.new("RGB", (width, height), "white")
    padded.paste(picture)
    return padded
