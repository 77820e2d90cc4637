"""Means with 95% bootstrap intervals over subjects, and paired differences between methods."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

NUM_RESAMPLES = 1000


@dataclass(frozen=True)
class Interval:
    """A mean over n subjects with its 95% bootstrap interval [low, high]; with n = 1 the interval says nothing."""

    mean: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        """Three digits of the largest number, and as many places of the others: "0.200 [0.100, 0.300]"."""
        largest = max(abs(self.mean), abs(self.low), abs(self.high)) or 1.0
        places = max(0, 2 - math.floor(math.log10(largest)))
        return f"{self.mean:.{places}f} [{self.low:.{places}f}, {self.high:.{places}f}]"


def bootstrap_mean(values: Sequence[float], *, seed: int = 0) -> Interval:
    """Percentile interval of the mean over resampled subjects.

    Args:
        values: one number per subject, at least one.
        seed: of the resampling; the same values and seed give the same interval.
    Raises: ValueError if there is no value, or one is not finite.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or len(values) == 0 or not np.isfinite(values).all():
        raise ValueError(f"expected at least one finite value per subject, got {values.tolist()}")
    picks = np.random.default_rng(seed).integers(len(values), size=(NUM_RESAMPLES, len(values)))
    low, high = np.quantile(values[picks].mean(1), [0.025, 0.975])
    return Interval(float(values.mean()), float(low), float(high), len(values))


def paired_difference(first: Mapping[str, float], second: Mapping[str, float], *, seed: int = 0) -> Interval:
    """first - second, subject by subject, with its interval: what a claim "first is better than second" rests on.

    Args: first, second: subject -> value; both must have the same subjects.
    """
    if first.keys() != second.keys():
        raise ValueError(f"only one of the two has the subjects {sorted(first.keys() ^ second.keys())}")
    return bootstrap_mean([first[subject] - second[subject] for subject in sorted(first)], seed=seed)
