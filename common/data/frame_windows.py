"""Which frames of a video make a clip: pure functions from the frames' times to frame numbers.

With `fps`, moment k of a window that starts at frame s is times_s[s] + k / fps, and the frame shown nearest to it is
taken (of two equally near, the earlier). So frames that are not evenly spaced, as phones record them, keep their speed.
With `stride`, every stride-th stored frame is taken, whatever its time. No frame is ever taken twice in one window.
"""

from collections.abc import Sequence
from math import ceil, floor

import numpy as np

from common.training.seeding import derive_seed

_TIE_S = 1e-6  # moments are moved earlier by this, so that rounding does not decide between two equally near frames


def even_times(num_frames: int, fps: float) -> np.ndarray:
    """When the frames of a video with a constant rate are shown, seconds, (num_frames,)."""
    return np.arange(num_frames) / fps


def possible_windows(
    times_s: Sequence[float], num_frames: int, *, fps: float | None = None, stride: int = 1
) -> np.ndarray:
    """Every window that fits, by its first frame: (S, num_frames) int64 frame numbers, each row increasing, S >= 1.

    Args:
        times_s: when each frame of the video is shown, increasing.
        num_frames: of the window, at least 1.
        fps: of the window, frames per second; None = take stored frames by `stride`.
        stride: 1 = every stored frame; only without fps.
    Raises: ValueError if no window fits, saying what would.
    """
    if num_frames < 1 or stride < 1 or (fps is not None and not fps > 0):
        raise ValueError(f"need num_frames >= 1, stride >= 1, fps > 0, got {num_frames}, {stride}, {fps}")
    if fps is not None and stride != 1:
        raise ValueError(f"pass fps or stride, not both, got fps={fps} and stride={stride}")
    times = np.asarray(times_s, dtype=np.float64)
    if fps is None:
        windows = np.arange(len(times))[:, None] + stride * np.arange(num_frames)
        windows = windows[windows[:, -1] < len(times)]
    else:
        moments = times[:, None] + np.arange(num_frames) / fps
        windows = nearest_frames(times, moments[moments[:, -1] <= times[-1] + _last_half_s(times) + _TIE_S])
        windows = windows[(np.diff(windows, axis=1) > 0).all(1)]
    if not len(windows):
        raise ValueError(_what_would_fit(times, num_frames, fps, stride))
    return windows


def first_window(times_s: Sequence[float], num_frames: int, *, fps: float | None = None, stride: int = 1) -> np.ndarray:
    """The earliest window that fits, (num_frames,) int64; see `possible_windows`."""
    return possible_windows(times_s, num_frames, fps=fps, stride=stride)[0]


def consecutive_windows(
    times_s: Sequence[float], num_frames: int, *, fps: float | None = None, stride: int = 1
) -> np.ndarray:
    """Windows that follow each other over the whole video, (N, num_frames) int64; see `possible_windows`.

    Each starts where the one before it would have had its next frame. A rest at the end that is shorter than a window
    is left out, and so is a stretch in which a frame stands so long that it would be taken twice.
    """
    times = np.asarray(times_s, dtype=np.float64)
    windows, chosen, start = possible_windows(times, num_frames, fps=fps, stride=stride), [], 0
    while (later := windows[windows[:, 0] >= start]).size:
        chosen.append(later[0])
        start = later[0, 0] + stride * num_frames
        if fps is not None:
            start = _first_frame_near(times, times[later[0, 0]] + num_frames / fps)
    return np.stack(chosen)


def random_window(windows: np.ndarray, *, seed: int, sample_key: int) -> np.ndarray:
    """One of `possible_windows`, all equally likely, a pure function of (seed, sample_key): (num_frames,) int64."""
    return windows[derive_seed(seed, "window", sample_key) % len(windows)]


def spread_windows(windows: np.ndarray, count: int) -> np.ndarray:
    """`count` of `possible_windows`, evenly spread from the first to the last; all of them if there are fewer.

    Returns: (min(count, S), num_frames) int64; count 1 gives the first.
    """
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    return windows[np.linspace(0, len(windows) - 1, min(count, len(windows))).round().astype(int)]


def nearest_frames(times: np.ndarray, moments: np.ndarray) -> np.ndarray:
    """The frame shown nearest to each moment, the earlier of two; int64 of the shape of moments."""
    after = np.searchsorted(times, moments - _TIE_S).clip(max=len(times) - 1)
    before = (after - 1).clip(min=0)
    return np.where(times[after] - (moments - _TIE_S) < (moments - _TIE_S) - times[before], after, before)


def _first_frame_near(times: np.ndarray, moment: float) -> int:
    """The frame nearest to a moment; past the last frame: a number that no frame has."""
    if moment > times[-1] + _last_half_s(times):
        return len(times)
    return int(nearest_frames(times, np.array(moment)))


def _last_half_s(times: np.ndarray) -> float:
    """Half of the time that the last frame is shown, taken to be the average: moments until then are nearest to it."""
    return 0.5 * (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else 0.0


def _what_would_fit(times: np.ndarray, num_frames: int, fps: float | None, stride: int) -> str:
    total, span_s = len(times), times[-1] - times[0]
    if fps is None:
        text = f"it has {total} frames; {num_frames} with stride {stride} need {(num_frames - 1) * stride + 1}: "
        text += f"ask for at most {(total - 1) // stride + 1} (--num-frames)"
        return text + (f" or a stride of {(total - 1) // (num_frames - 1)} or less" if total >= num_frames > 1 else "")
    native_fps = (total - 1) / span_s if total > 1 else float("nan")
    has = f"it has {total} frames in {span_s:.2f} s" + (f" ({native_fps:.4g} per second)" if total > 1 else "")
    most = floor((span_s + _last_half_s(times)) * fps) + 1
    if num_frames <= most:
        return f"{has}; {num_frames} at {fps:g} per second would show a frame twice: ask for a lower rate (--fps)"
    text = f"{has}; {num_frames} at {fps:g} per second need {(num_frames - 1) / fps:.2f} s: "
    text += f"ask for at most {min(most, total)} (--num-frames)"
    slowest = ceil(100 * (num_frames - 1) / span_s) / 100 if span_s > 0 else float("inf")
    return text + (f" or for {slowest:g} to {native_fps:.4g} per second (--fps)" if slowest <= native_fps else "")
