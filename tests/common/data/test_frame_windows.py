"""Which frames make a clip: values worked out by hand, and advice in errors that works when it is followed."""

import re
from collections import Counter

import numpy as np
import pytest

from common.data.frame_windows import (
    consecutive_windows,
    even_times,
    first_window,
    nearest_frames,
    possible_windows,
    random_window,
    spread_windows,
)


def test_stored_frames_and_strides():
    times = even_times(7, 30)
    assert possible_windows(times, 3).tolist() == [[s, s + 1, s + 2] for s in range(5)]
    assert possible_windows(times, 3, stride=3).tolist() == [[0, 3, 6]]
    assert first_window(times, 2, stride=2).tolist() == [0, 2]
    assert consecutive_windows(times, 3).tolist() == [[0, 1, 2], [3, 4, 5]]  # frame 6 is left over
    assert consecutive_windows(times, 2, stride=2).tolist() == [[0, 2], [4, 6]]


def test_other_rates_take_the_nearest_frame():
    assert first_window(even_times(24, 24), 8, fps=8).tolist() == [0, 3, 6, 9, 12, 15, 18, 21]
    # 24 -> 10 per second: moments 0, 2.4, 4.8, 7.2, 9.6 in frames
    assert first_window(even_times(24, 24), 5, fps=10).tolist() == [0, 2, 5, 7, 10]
    # 24 -> 16: 1.5 and 4.5 lie between two frames, the earlier is taken whatever the rounding of the start
    windows = possible_windows(even_times(240, 24), 4, fps=16)
    assert (windows - windows[:, :1] == [0, 1, 3, 4]).all()
    # 29.97 -> 8: moment k is frame 3.746 k
    assert first_window(even_times(60, 30000 / 1001), 8, fps=8).tolist() == [0, 4, 7, 11, 15, 19, 22, 26]
    assert first_window(even_times(10, 8), 10, fps=8).tolist() == list(range(10))
    assert first_window(even_times(100, 30000 / 1001), 100, fps=30).tolist() == list(range(100))


def test_times_decide_where_frames_are_uneven():
    times = [0.0, 0.1, 0.4, 0.5, 0.8, 0.9, 1.2, 1.3]
    assert first_window(times, 4, fps=2.5).tolist() == [0, 2, 4, 6]  # 0, 0.4, 0.8, 1.2 s
    assert possible_windows(times, 3, fps=2).tolist() == [[0, 3, 5], [1, 3, 6]]  # from frame 2: 1.4 s is past the end
    # 10 per second: 0.2 s would show frame 1 (or 0.3 s frame 2) again, so only pairs 0.1 s apart are possible
    assert possible_windows(times, 2, fps=10).tolist() == [[0, 1], [2, 3], [4, 5], [6, 7]]
    with pytest.raises(ValueError, match="would show a frame twice: ask for a lower rate"):
        possible_windows(times, 4, fps=10)


@pytest.mark.parametrize("fps", [3.0, 7.5, 8.0, 23.976])
def test_nearest_frame_against_a_search_of_all(fps):
    times = np.sort(np.random.default_rng(0).uniform(0, 5, 120))
    moments = np.arange(0, 5, 1 / fps)
    expected = [int(np.argmin(np.abs(times - moment))) for moment in moments]
    assert nearest_frames(times, moments).tolist() == expected


def test_consecutive_windows_keep_the_rhythm():
    """24 -> 8 per second: the last frame of one window and the first of the next are as far apart as any two."""
    windows = consecutive_windows(even_times(50, 24), 4, fps=8)
    assert windows.tolist() == [[0, 3, 6, 9], [12, 15, 18, 21], [24, 27, 30, 33], [36, 39, 42, 45]]
    odd = consecutive_windows(even_times(61, 30000 / 1001), 4, fps=8).ravel()
    assert len(odd) == 16 and set(np.diff(odd)) == {3, 4}


def test_random_windows_are_fair_and_pure():
    windows = possible_windows(even_times(20, 8), 16)
    draws = [tuple(random_window(windows, seed=1, sample_key=key)) for key in range(1000)]
    assert draws[7] == tuple(random_window(windows, seed=1, sample_key=7))
    counts = Counter(draws)
    assert len(counts) == 5 and max(abs(count - 200) for count in counts.values()) < 64  # 5 standard deviations
    assert draws != [tuple(random_window(windows, seed=2, sample_key=key)) for key in range(1000)]


def test_spread_windows():
    windows = possible_windows(even_times(20, 8), 16)
    assert spread_windows(windows, 1)[:, 0].tolist() == [0]
    assert spread_windows(windows, 3)[:, 0].tolist() == [0, 2, 4]
    assert spread_windows(windows, 99)[:, 0].tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="count must be at least 1, got 0"):
        spread_windows(windows, 0)


def test_too_short_says_what_fits_and_it_does():
    times = even_times(20, 24)
    with pytest.raises(ValueError) as caught:
        possible_windows(times, 16, fps=8)
    message = str(caught.value)
    assert message.startswith("it has 20 frames in 0.79 s (24 per second); 16 at 8 per second need 1.88 s")
    most = int(re.search(r"at most (\d+) \(--num-frames\)", message)[1])
    slowest = float(re.search(r"or for ([\d.]+) to 24 per second", message)[1])
    assert len(possible_windows(times, most, fps=8)) and len(possible_windows(times, 16, fps=slowest))
    for num_frames, fps in ((most + 1, 8), (16, slowest * 0.95)):
        with pytest.raises(ValueError):
            possible_windows(times, num_frames, fps=fps)
    with pytest.raises(
        ValueError, match=r"20 frames; 16 with stride 2 need 31: ask for at most 10 .* a stride of 1 or"
    ):
        possible_windows(times, 16, stride=2)
    with pytest.raises(ValueError, match=r"20 frames; 21 with stride 1 need 21: ask for at most 20 \(--num-frames\)$"):
        possible_windows(times, 21)
    with pytest.raises(ValueError, match="it has 1 frames in 0.00 s; 2 at 8 per second need 0.12 s: .* at most 1 "):
        possible_windows([0.0], 2, fps=8)


def test_never_a_frame_twice():
    with pytest.raises(ValueError, match=r"\(8 per second\); 4 at 30 per second would show a frame twice"):
        possible_windows(even_times(20, 8), 4, fps=30)


@pytest.mark.parametrize("settings", [{"num_frames": 0}, {"stride": 0}, {"fps": 0.0}, {"fps": float("nan")}])
def test_bad_settings(settings):
    with pytest.raises(ValueError, match="need num_frames >= 1, stride >= 1, fps > 0"):
        possible_windows([0.0, 1.0], **{"num_frames": 2, **settings})


def test_fps_and_stride_exclude_each_other():
    with pytest.raises(ValueError, match="fps or stride, not both, got fps=8 and stride=2"):
        possible_windows([0.0, 1.0], 2, fps=8, stride=2)
