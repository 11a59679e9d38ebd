"""Medians, spreads, and ratios with bootstrap intervals."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from sgdcore._arrays import Array

__all__ = ["NOISY", "Ratio", "ratio", "ratio_of_runs", "spread"]

NOISY = 0.2  # a spread above which a time is not to be believed
_DRAWS = 1000


class Ratio(NamedTuple):
    """A ratio of medians, and the ends of its 95 % bootstrap interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        digits = 3 if self.value < 10 else 1
        return f"{self.value:.{digits}f} [{self.low:.{digits}f}, {self.high:.{digits}f}]"


def spread(seconds: Sequence[float]) -> float:
    """Return the interquartile range over the median; 0 for a single sample."""
    if len(seconds) < 2:
        return 0.0
    low, middle, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return (high - low) / middle


def ratio(other: Sequence[float], base: Sequence[float], placements: Sequence[int] = ()) -> Ratio:
    """Return median(other) / median(base) of samples that were taken round by round, in turn.

    Rounds are drawn with replacement, both contenders' together, so that what slowed a whole round cancels. Where both
    were set up several times, these placements are drawn first, and then rounds within each. A contender that took part
    in the first rounds only is compared with the other's same rounds.

    Args:
        other: the samples of one.
        base: those of what it is compared with.
        placements: how many of them were taken each time that the contenders were set up; () for once.
    """
    count = min(len(other), len(base))
    rng = np.random.default_rng(0)
    drawn = _drawn_from(placements if count == sum(placements) else [count], rng)
    return _ratio(other[:count], base[:count], drawn, drawn)


def _drawn_from(placements: Sequence[int], rng: np.random.Generator) -> Array:
    """Return the indices of rounds, first drawn by placement."""
    counts, starts = np.asarray(placements), np.cumsum([0, *placements[:-1]])
    picked = np.repeat(
        rng.integers(len(counts), size=(_DRAWS, len(counts))), max(placements), axis=1
    )
    within: Array = starts[picked] + rng.integers(counts[picked])
    return within


def ratio_of_runs(
    after: Sequence[float],
    before: Sequence[float],
    placements_after: Sequence[int] = (),
    placements_before: Sequence[int] = (),
) -> Ratio:
    """Return median(after) / median(before) of two runs, whose rounds have nothing to do with each other.

    Args:
        after: the samples of one.
        before: those of the other.
        placements_after: how many of its samples were taken each time that it was set up; () for once.
        placements_before: the same for the other.
    """
    rng = np.random.default_rng(0)
    first = _drawn_from(placements_after or [len(after)], rng)
    second = _drawn_from(placements_before or [len(before)], rng)
    return _ratio(after, before, first, second)


def _ratio(a: Sequence[float], b: Sequence[float], drawn_a: Array, drawn_b: Array) -> Ratio:
    x, y = np.asarray(a), np.asarray(b)
    ratios = np.median(x[drawn_a], axis=1) / np.median(y[drawn_b], axis=1)
    low, high = np.quantile(ratios, [0.025, 0.975])
    return Ratio(float(np.median(x) / np.median(y)), float(low), float(high))
