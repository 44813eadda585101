"""From what calibration images show of an activation to the range that eight bits will cover.

A value ``x`` becomes ``round(x / s) + z`` in 0 ... 255: a range ``[low, high]`` is divided into 255 steps ``s``, and
what lies outside is clipped to its ends. A wide range is coarse, a narrow one clips.

Letters: ``B`` bins of a histogram, ``L`` levels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

Method = Literal["minmax", "percentile", "entropy"]
METHODS: tuple[Method, ...] = get_args(Method)
BINS = 4096
"""Of a histogram, one half for each sign."""
PERCENT_CLIPPED = 0.001
"""What the percentile rule leaves out, half of it at each end."""
LEVELS = 256
STRIDE = 8
"""Bins from one candidate of the entropy rule to the next."""


@dataclass(frozen=True, eq=False)
class Histogram:
    """All values of one activation. ``low`` and ``high``: the least and the largest; ``zeros``: how many are exactly 0;
    ``counts [B]`` int64: how many of the others lie in each of ``B`` equal bins of ``[-reach, reach]``."""

    low: float
    high: float
    zeros: int
    counts: np.ndarray

    @property
    def reach(self) -> float:
        """The largest magnitude."""
        return max(abs(self.low), abs(self.high))


def percentile_range(histogram: Histogram) -> tuple[float, float]:
    """Leaves out ``PERCENT_CLIPPED`` per cent of all values, half of them at each end, as precisely as bins allow: the
    ends of the outermost bins that stay."""
    reach, bins = histogram.reach, len(histogram.counts)
    counts = histogram.counts.copy()
    counts[bins // 2] += histogram.zeros
    allowed = counts.sum() * PERCENT_CLIPPED / 200
    below = int(np.searchsorted(np.cumsum(counts), allowed, side="right"))
    above = int(np.searchsorted(np.cumsum(counts[::-1]), allowed, side="right"))
    edges = np.linspace(-reach, reach, bins + 1)
    return max(histogram.low, float(edges[below])), min(histogram.high, float(edges[bins - above]))


def entropy_range(histogram: Histogram) -> tuple[float, float]:
    """Clips magnitudes at the threshold where the values, rounded to the levels, are distributed most like they were.

    Like is meant in the sense of the divergence ``sum_i p_i log(p_i / q_i)`` over the bins up to the threshold: ``p``
    counts the values, all that is clipped in the last bin; ``q`` spreads what falls on a level evenly over those of its
    bins that hold anything. The rule is that of S. Migacz, "8-bit inference with TensorRT", GTC 2017. An activation of
    both signs has half of the levels for either; zeros are left out, which every level but one has nothing to do with.
    """
    half = len(histogram.counts) // 2
    magnitudes = histogram.counts[half:] + histogram.counts[:half][::-1]
    levels = LEVELS if histogram.low >= 0 or histogram.high <= 0 else LEVELS // 2
    if not magnitudes.any():
        return histogram.low, histogram.high
    candidates = range(levels, half + 1, STRIDE)
    losses = [_divergence(magnitudes, bins, levels) for bins in candidates]
    # of equal losses the widest range: nothing is clipped without need
    best = len(losses) - 1 - int(np.argmin(losses[::-1]))
    threshold = histogram.reach * candidates[best] / half
    return max(histogram.low, -threshold), min(histogram.high, threshold)


def _divergence(magnitudes: np.ndarray, bins: int, levels: int) -> float:
    """How much a clipping at ``bins`` of the ``magnitudes [B]`` and rounding to ``levels`` change the distribution."""
    inside = magnitudes[:bins].astype(np.float64)
    p = inside.copy()
    p[-1] += magnitudes[bins:].sum()
    starts = np.arange(levels) * bins // levels
    widths = np.diff(np.append(starts, bins))
    full = np.repeat(np.add.reduceat((inside > 0).astype(np.float64), starts), widths)
    spread = np.repeat(np.add.reduceat(inside, starts), widths) / np.maximum(full, 1)
    q = np.where(inside > 0, spread, 0)
    if not q.any() or (q[-1] == 0 and p[-1] > 0):
        return np.inf  # what is clipped has nowhere to go
    p, q = p / p.sum(), q / q.sum()
    held = p > 0
    return float((p[held] * np.log(p[held] / q[held])).sum())


RANGES: Mapping[str, Callable[[Histogram], tuple[float, float]]] = {
    "minmax": lambda histogram: (histogram.low, histogram.high),
    "percentile": percentile_range,
    "entropy": entropy_range,
}
