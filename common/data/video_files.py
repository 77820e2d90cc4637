"""One video file: PyAV says what it holds and whether it is whole, decord reads chosen frames.

decord gives damaged, truncated and cut files without a word: it copies the last good frame, or shows frames that the
file hides. So every file is decoded once by PyAV first, strictly, and both readers must agree on what is in it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import av
import decord
import numpy as np

REENCODE = "ffmpeg -i IN -c:v libx264 -pix_fmt yuv420p OUT.mp4"

decord.logging.set_level(decord.logging.QUIET)  # its FFmpeg prints; what matters is raised


class BadVideo(ValueError):
    """A file or folder that cannot be used as a video; the message names it, the reason and the way out."""

    def __init__(self, path: str | Path, reason: str):
        super().__init__(f"cannot use {str(path)!r} as a video: {reason}")
        self.path, self.reason = Path(path), reason


@dataclass(frozen=True)
class VideoInfo:
    """What a video holds. Sizes are those of the upright frames."""

    path: Path  # a file, or a folder of frames
    num_frames: int
    fps: float  # frames per second; the average where the frames are not evenly spaced
    width_px: int
    height_px: int
    rotation_deg: int  # 0, 90, 180 or 270 clockwise: what the file asks for; frames are read already turned
    times_s: tuple[float, ...]  # when each frame is shown, increasing, the first at 0


def file_info(path: Path) -> VideoInfo:
    """Decode a video file once from end to end. Raises: BadVideo unless all of it can be shown as it was meant."""
    try:
        with av.open(str(path)) as container:
            stream = _picture_stream(container, path)
            codec = stream.codec_context.name
            declared_fps = float(stream.average_rate or 0)
            frames = _decode_all(container, stream, path)
    except av.error.InvalidDataError as error:
        raise BadVideo(
            path,
            "it is no video in a known format, or truncated or damaged; copy or download it again",
        ) from error
    except (av.error.FFmpegError, OSError) as error:
        raise BadVideo(
            path, f"it cannot be decoded ({type(error).__name__}: {error}); convert it: {REENCODE}"
        ) from error
    times = np.array([frame.time_s for frame in frames]) - frames[0].time_s
    info = VideoInfo(
        path,
        len(frames),
        mean_fps(times, declared_fps),
        *frames[0].upright_size,
        frames[0].rotation_deg,
        tuple(times.tolist()),
    )
    _check_frames(frames, info)
    _check_decord(info, codec)
    if not frames[0].is_key:
        raise BadVideo(path, "it does not begin with a whole picture; cut it where one is, or export it again")
    return info


def read_file_frames(info: VideoInfo, indices: Sequence[int]) -> np.ndarray:
    """Chosen frames of a video file, upright, uint8 (F,H,W,3). The reader lives only as long as this call."""
    reader = _open(info.path)
    if len(reader) != info.num_frames:
        raise BadVideo(info.path, f"it had {info.num_frames} frames before and has {len(reader)} now; open it again")
    try:
        return reader.get_batch(list(indices)).asnumpy()
    except Exception as error:  # DECORDError, RuntimeError, ...: not documented
        raise BadVideo(
            info.path,
            f"decord cannot read frames {list(indices)} of {info.width_px} x {info.height_px} px (it fails at a few "
            f"small widths such as 48 px); convert it, or scale it: {REENCODE}",
        ) from error


def mean_fps(times: np.ndarray, declared_fps: float) -> float:
    """Frames per second of moments in seconds; the declared rate where it is within 1%, as times may be rounded."""
    if len(times) < 2 or times[-1] <= times[0]:
        return declared_fps
    measured = (len(times) - 1) / (times[-1] - times[0])
    return declared_fps if abs(declared_fps / measured - 1) < 0.01 else float(measured)


@dataclass(frozen=True)
class _Frame:
    time_s: float
    upright_size: tuple[int, int]
    rotation_deg: int  # clockwise
    is_mirrored: bool
    is_key: bool


def _picture_stream(container: av.container.InputContainer, path: Path) -> av.VideoStream:
    if container.format.name.endswith("_pipe") or container.format.name == "image2":
        raise BadVideo(path, "it is a picture; put the pictures of a clip into a folder of their own")
    if container.format.name == "tty":  # FFmpeg would show the letters
        raise BadVideo(path, "it is a text; captions are named NAME.txt as the video NAME.mp4, or remove it")
    stream = container.streams.best("video")
    if stream is None or stream.disposition & av.stream.Disposition.attached_pic:
        kinds = ", ".join(sorted({other.type for other in container.streams if other is not stream})) or "nothing"
        raise BadVideo(path, f"it has no video track (it holds: {kinds}); remove it from the folder")
    aspect = stream.sample_aspect_ratio
    if aspect not in (None, 0, 1):
        raise BadVideo(
            path, f"its pixels are not square ({aspect}); convert it: ffmpeg -i IN -vf scale=iw*sar:ih,setsar=1 OUT.mp4"
        )
    return stream


def _decode_all(container: av.container.InputContainer, stream: av.VideoStream, path: Path) -> list[_Frame]:
    """Every frame that a player would show; raises where data is missing or an error would be painted over."""
    stream.codec_context.options = {"err_detect": "explode"}
    frames, num_packets, end_s = [], 0, 0.0
    for packet in container.demux(*container.streams.video, *container.streams.audio):
        if packet.size and packet.pts is not None:
            end_s = max(end_s, float((packet.pts + (packet.duration or 0)) * packet.time_base))
        if packet.stream.index == stream.index:
            num_packets += packet.size > 0
            frames += [_describe(frame, path) for frame in packet.decode()]
    if num_packets < stream.frames:
        raise BadVideo(path, f"it is truncated: {num_packets} of {stream.frames} frames are there; copy it again")
    start_s, duration_s = (container.start_time or 0) / av.time_base, (container.duration or 0) / av.time_base
    missing_s = start_s + duration_s - end_s
    tolerance_s = 1.5 * (frames[-1].time_s - frames[0].time_s) / (len(frames) - 1) if len(frames) > 1 else 0.5
    if "matroska" in container.format.name and missing_s > tolerance_s:  # elsewhere the duration may be a guess
        raise BadVideo(path, f"it is truncated: {missing_s:.2f} s of {duration_s:.2f} s are missing; copy it again")
    if not frames:
        raise BadVideo(path, "it has no frame that can be shown; export or download it again")
    return frames


def _describe(frame: av.VideoFrame, path: Path) -> _Frame:
    if frame.time is None:
        raise BadVideo(path, f"its frames do not say when they are shown; convert it: {REENCODE}")
    rotation = -frame.rotation % 360
    size = (frame.height, frame.width) if rotation % 180 else (frame.width, frame.height)
    return _Frame(frame.time, size, rotation, _is_mirrored(frame), frame.key_frame)


def _is_mirrored(frame: av.VideoFrame) -> bool:
    """Whether the display matrix (a, b, u, c, d, v, x, y, w) turns the picture over: a d - b c < 0."""
    for data in frame.side_data.keys():  # noqa: SIM118 (its items cannot be unpacked)
        if data.type == av.sidedata.sidedata.Type.DISPLAYMATRIX:
            a, b, _, c, d = np.frombuffer(bytes(data), dtype=np.int32)[:5].astype(float)
            return a * d - b * c < 0
    return False


def _check_frames(frames: list[_Frame], info: VideoInfo) -> None:
    first = frames[0]
    if first.rotation_deg % 90 or first.is_mirrored:
        turned = "mirrored" if first.is_mirrored else f"by {first.rotation_deg} degrees"
        raise BadVideo(info.path, f"its frames are to be shown turned ({turned}), which decord does not; {_bake()}")
    other = next((i for i, frame in enumerate(frames) if frame.upright_size != first.upright_size), None)
    if other is not None:
        sizes = f"{first.upright_size} px at first and {frames[other].upright_size} px from frame {other} on"
        raise BadVideo(info.path, f"its frames have several sizes: {sizes}; convert it: {REENCODE}")
    if (np.diff(info.times_s) <= 0).any():
        raise BadVideo(info.path, f"its frames are not in the order of their times; convert it: {REENCODE}")


def _check_decord(info: VideoInfo, codec: str) -> None:
    """decord must see the frames, moments and size that PyAV saw; cut files, for one, hide frames that decord shows."""
    try:
        reader = _open(info.path)
    except BadVideo as error:
        raise BadVideo(info.path, f"decord cannot read it (codec {codec}); convert it: {REENCODE}") from error
    times = reader.get_frame_timestamp(list(range(len(reader))))[:, 0]
    if len(times) != info.num_frames or np.abs(times - times[0] - info.times_s).max() > 0.5 / max(info.fps, 1e-3):
        raise BadVideo(
            info.path,
            f"it shows {info.num_frames} frames, but decord finds {len(times)} or others (the file was cut without "
            f"encoding it again); convert it: {REENCODE}",
        )
    height, width = read_file_frames(info, [0]).shape[1:3]
    if (width, height) != (info.width_px, info.height_px):
        raise BadVideo(info.path, f"decord gives frames of {width} x {height} px, not upright ones; {_bake()}")


def _open(path: Path) -> decord.VideoReader:
    try:
        return decord.VideoReader(str(path), num_threads=1)
    except Exception as error:  # DECORDError, RuntimeError, AssertionError: not documented
        raise BadVideo(path, f"decord cannot open it; convert it: {REENCODE}") from error


def _bake() -> str:
    return f"convert it, so that they are stored upright: {REENCODE}"
