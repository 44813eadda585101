"""FPGM-mix: first the filters of the smallest norms go, then those nearest to all that are left.

Source: He et al., "Filter Pruning via Geometric Median for Deep Convolutional Neural Networks Acceleration" (CVPR
2019), section 4, "FPGM-mix", whose "mix 40 %" is 10 % by norm and 30 % by distance; and its released code, in which
distances count among the filters that the norm leaves, and both numbers are rounded down.

Letters: ``C`` channels, ``f`` weights of a filter.
"""

from __future__ import annotations

import math
from numbers import Real

import torch

from secateur.core import Criterion, GroupView
from secateur.criteria.norms import l2, weights
from secateur.criteria.sums import euclidean_sums
from secateur.errors import BadRequest

NORM, DISTANCE = 0.1, 0.3
"""The paper's rates: what fraction of the filters goes by its norm, and what by its distance."""
EPSILON = 1e-9
"""What is added before rounding down, since 0.3 * 10 is 2.9999999999999996 or 3.0000000000000004 by turns."""


def fpgm_mix(view: GroupView, /) -> torch.Tensor:
    """Scores ``[C]`` of the paper's mixture: of what goes a quarter by the smallest norms, the rest by the smallest
    sums of distances among those left. See ``fpgm_mix_with``."""
    return _scored(view, NORM, DISTANCE)


def fpgm_mix_with(*, norm: float = NORM, distance: float = DISTANCE) -> Criterion:
    """A mixture of other rates: a criterion that puts ``floor(C norm)`` filters of the smallest L2 norms first, in that
    order, and then the others by the sum of their Euclidean distances among themselves. The first ``floor(C norm) +
    floor(C distance)`` are what the paper removes.

    Where it is known how many go (``view.n_keep``), and it is another number ``r``, both shares follow in proportion:
    ``m`` go by norm, the largest number with ``m + floor(m distance / norm) <= r``. That is the paper's number again
    where ``r`` is the paper's, and all of them where ``distance`` is 0. Products and quotients are rounded down after
    1e-9 was added, as everywhere. Of equal norms the higher index goes first.

    The scores of those that go by norm lie evenly between 0 and the lowest of the others. Raises ``BadRequest`` for
    rates that are no fractions or that sum to more than 1 or to 0.
    """
    _check_rates(norm, distance)

    def criterion(view: GroupView, /) -> torch.Tensor:
        return _scored(view, norm, distance)

    criterion.__name__ = f"fpgm_mix_with(norm={norm!r}, distance={distance!r})"
    criterion.__dict__.update(reads=("filters", "n_keep"))
    return criterion


def _check_rates(norm: object, distance: object) -> None:
    for key, value in (("norm", norm), ("distance", distance)):
        if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= float(value) <= 1:
            raise BadRequest(
                f"{key}={value!r} is not a fraction of the filters, 0 to 1\n"
                "  do: say which fraction goes by its norm and which by its distance, such as norm=0.1, distance=0.3"
            )
    total = norm + distance  # type: ignore[operator]
    if not 0 < total <= 1 + EPSILON:
        raise BadRequest(
            f"norm={norm!r} and distance={distance!r} sum to {total:g}, and of all filters more than none and at most "
            "all can go\n  do: say fractions of all filters, of a sum of at most 1, such as norm=0.1, distance=0.3"
        )


def _scored(view: GroupView, norm: float, distance: float) -> torch.Tensor:
    filters = weights(view)
    channels = len(filters)
    removed = None if view.n_keep is None else channels - view.n_keep
    count = by_norm(channels, norm, distance, removed)
    order = l2(view).flip(0).sort(stable=True).indices.sub(channels - 1).neg()  # of equal norms the higher index first
    first, rest = order[:count], order[count:].sort().values
    scores = torch.empty(channels, dtype=torch.float64)
    sums = euclidean_sums(filters[rest])
    scores[rest] = sums if bool(sums.any()) else torch.ones_like(sums)  # of equal filters; others must fit below
    lowest = float(scores[rest].min()) if len(rest) else 1.0
    scores[first] = lowest * torch.arange(1, count + 1, dtype=torch.float64) / (count + 1)
    return scores


def by_norm(channels: int, norm: float, distance: float, removed: int | None = None) -> int:
    """How many of ``channels`` filters go by their norm: the paper's number, or where ``removed`` go in all, the
    largest ``m`` with ``m + floor(m distance / norm) <= removed``."""
    if removed is None:
        return math.floor(channels * norm + EPSILON)
    if norm == 0 or math.isinf(distance / norm):
        return 0
    number = 0
    while number + 1 + math.floor((number + 1) * distance / norm + EPSILON) <= removed:
        number += 1
    return number
