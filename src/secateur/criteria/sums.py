"""Sums over all pairs of filters, of what lies between them.

Letters: ``C`` filters, ``f`` weights of a filter, ``n`` of them that differ, ``R`` rows of a block. Nothing of ``[C,
C]`` is made: products are taken a block of rows at a time, and of each pair once. Filters that are equal are looked at
once, and count as often as they occur; training by zeroing leaves many.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch

ROWS = 256
"""How many rows of a matrix of ``[C, C]`` are worked on at a time, at most: few, so that little is done twice."""
BLOCK = 2**22
"""How many numbers are worked on at a time (32 MiB)."""
NEAR = 1e-4
"""Squared distances below this fraction of the squared norms are taken from the differences themselves: in
``a^2 + b^2 - 2ab`` they would lose most of their digits."""
WIDE = 512
"""Sums over fewer filters take too little time to save any by float32."""
PROBES, DOUBT, SAFETY = 16, 4e-7, 2
"""See ``_settled``."""


class Kinds(NamedTuple):
    """``filters [n, f]`` that differ, how often each occurs (``counts [n]``, float64), and which one each is (``of
    [C]``)."""

    filters: torch.Tensor
    counts: torch.Tensor
    of: torch.Tensor


class Pairs(NamedTuple):
    """What lies between the filters ``first`` to ``first + R`` and all from ``first`` on: ``values [R, C - first]``."""

    first: int
    values: torch.Tensor


def kinds_of(filters: torch.Tensor) -> Kinds:
    """The filters that differ. Equal ones are found among those that have the same product with a vector."""
    channels, size = filters.shape
    marks = filters @ torch.linspace(1, 2, size, dtype=filters.dtype)
    order = marks.sort(stable=True).indices
    same = (marks[order].diff() == 0).nonzero()[:, 0]
    new = torch.ones(channels, dtype=torch.bool)
    new[same + 1] = (filters[order[same + 1]] != filters[order[same]]).any(1)
    if bool(new.all()):
        return Kinds(filters, torch.ones(channels, dtype=torch.float64), torch.arange(channels))
    first = order[new]
    of = torch.empty(channels, dtype=torch.int64)
    of[order] = new.cumsum(0) - 1
    return Kinds(filters[first], of.bincount(minlength=len(first)).to(torch.float64), of)


# -------------------------------------------------------------------------------------------------------------- sums


def euclidean_sums(filters: torch.Tensor) -> torch.Tensor:
    """``sum_k ||F_j - F_k||_2`` of ``filters [C, f]``, ``[C]`` float64, in the order that float64 gives. From ``WIDE``
    filters on, only those that are close to one another are taken in float64, and the others are off by a millionth at
    most."""
    differing, counts, of = kinds_of(filters)
    if len(differing) < WIDE:
        return _summed(_roots(differing.to(torch.float64)), counts)[of]
    largest = differing.abs().max()  # squares of what is divided by it are in float32's range
    rough = _summed(_roots((differing / largest).to(torch.float32)), counts) * largest.to(torch.float64)
    return _settled(rough, differing, counts)[of]


def _settled(rough: torch.Tensor, filters: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """The sums ``rough [n]`` as float64 orders them. Those that are closer to a neighbour than the fraction ``DOUBT``
    of their mean, and ``PROBES`` from the smallest to the largest, are taken anew in float64. That shows how wrong they
    were: as long as there are others closer together than ``SAFETY`` times twice that, so are they."""
    order = rough.argsort()
    gaps = rough[order].diff()
    probes = order[torch.linspace(0, len(order) - 1, PROBES).long()]
    margin = DOUBT * rough.mean()
    exact, known = rough.clone(), torch.zeros(len(rough), dtype=torch.bool)
    while True:
        close = gaps <= margin
        due = torch.cat([probes, order[:-1][close], order[1:][close]]).unique()
        due = due[~known[due]]
        if not len(due):
            return exact
        exact[due] = _exact_sums(filters, counts, due)
        known[due] = True
        margin = torch.maximum(margin, 2 * SAFETY * (exact - rough).abs().max())


def _roots(filters: torch.Tensor) -> Iterator[Pairs]:
    return (Pairs(first, values.sqrt_()) for first, values in squared_distances(filters))


def _exact_sums(filters: torch.Tensor, counts: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """``sum_k counts_k ||F_j - F_k||_2`` in float64 for the ``chosen`` filters ``j``, ``[len(chosen)]``."""
    centre = filters.mean(0, dtype=torch.float64)
    rows = filters[chosen].to(torch.float64).sub_(centre)
    sums = torch.zeros(len(chosen), dtype=torch.float64)
    for columns, own in zip(filters.split(ROWS), counts.split(ROWS), strict=True):
        sums += squared_between(rows, columns.to(torch.float64) - centre).sqrt_() @ own
    return sums


def cosine_sums(filters: torch.Tensor) -> torch.Tensor:
    """``sum_k (1 - cos(F_j, F_k))`` of ``filters [C, f]``, ``[C]`` float64, filters of zeros neither counted nor far:
    below all others, though these have the same direction.

    Of unit vectors ``u``, ``1 - cos`` is half of a squared distance, and squared distances to all points are those to
    their mean ``m``: ``sum_k |u_j - u_k|^2 = n |u_j - m|^2 + sum_k |u_k - m|^2``. So no pair is looked at, and nothing
    cancels.
    """
    wide = filters.to(torch.float64)
    norms = torch.linalg.vector_norm(wide, dim=1)
    alive = norms > 0
    units = wide[alive] / norms[alive, None]
    squares = (units - units.mean(0)).square_().sum(1)
    sums = torch.zeros_like(norms)
    sums[alive] = ((len(units) * squares + squares.sum()) / 2).clamp_(min=torch.finfo(torch.float64).tiny)
    return sums


def absolute_sums(filters: torch.Tensor) -> torch.Tensor:
    """``sum_k ||F_j - F_k||_1`` of ``filters [C, f]``, ``[C]`` float64, one weight after the other: sorted, the values
    below a gap are each that much farther from all above it. That is ``C log C`` steps a weight, and sums of what is
    positive only."""
    channels = len(filters)
    total = torch.zeros(channels, dtype=torch.float64)
    below = torch.arange(1, channels, dtype=torch.float64)
    for part in filters.split(max(1, BLOCK // max(1, channels)), dim=1):
        values, order = part.mT.sort(1)
        gaps = values.to(torch.float64).diff(dim=1)
        sums = torch.zeros(values.shape, dtype=torch.float64)
        sums[:, 1:] += (gaps * below).cumsum(1)
        sums[:, :-1] += (gaps * below.flip(0)).flip(1).cumsum(1).flip(1)
        total += torch.empty_like(sums).scatter_(1, order, sums).sum(0)
    return total


def minkowski_sums(filters: torch.Tensor, p: float) -> torch.Tensor:
    """``sum_k ||F_j - F_k||_p`` of ``filters [C, f]``, ``[C]`` float64."""
    differing, counts, of = kinds_of(filters.to(torch.float64))
    apart = torch.cdist if p == math.inf else _powers
    blocks = (Pairs(first, apart(rows, differing[first:], p)) for first, rows in _rows(differing))
    return _summed(blocks, counts)[of]


def _powers(rows: torch.Tensor, columns: torch.Tensor, p: float) -> torch.Tensor:
    """``||R_j - C_k||_p``, ``[R, K]``. What powers are taken of is divided by the largest difference of the pair: those
    of weights themselves are 0 from some ``p`` on."""
    values = torch.empty(len(rows), len(columns), dtype=rows.dtype)
    step = max(1, BLOCK // 16 // max(1, columns.shape[1]))  # what fits in a cache
    for row, own in zip(rows, values, strict=True):
        for part, out in zip(columns.split(step), own.split(step), strict=True):
            apart = (part - row).abs_()
            largest = apart.amax(1)
            apart /= largest.where(largest > 0, 1)[:, None]
            out.copy_(apart.pow_(p).sum(1).pow_(1 / p).mul_(largest))
    return values


def hybrid_sums(filters: torch.Tensor) -> torch.Tensor:
    """``||F_j|| sum_k ||F_k|| (1 - |cos(F_j, F_k)|)`` of ``filters [C, f]``, ``[C]`` float64."""
    differing, counts, of = kinds_of(filters.to(torch.float64))
    norms = torch.linalg.vector_norm(differing, dim=1)
    units = differing / norms.where(norms > 0, torch.inf)[:, None]
    return (_summed(_angles(units), counts * norms) * norms)[of]


def _angles(units: torch.Tensor) -> Iterator[Pairs]:
    """``1 - |cos|`` of unit vectors: half of ``||a - b||^2`` or ``||a + b||^2``, which they are taken from where they
    are small."""
    for first, rows in _rows(units):
        columns = units[first:]
        cosines = (rows @ columns.mT).fill_diagonal_(0)
        values = 1 - cosines.abs()
        for part in (values < NEAR).nonzero().split(max(1, BLOCK // max(1, units.shape[1]))):
            a, b = part.unbind(1)
            values[a, b] = (rows[a] - cosines[a, b].sign()[:, None] * columns[b]).square_().sum(1) / 2
        yield Pairs(first, values.fill_diagonal_(0))


def _summed(blocks: Iterator[Pairs], counts: torch.Tensor) -> torch.Tensor:
    """Sums over all pairs, of what is the same from both sides, each filter counting ``counts [n]``: ``[n]``."""
    sums = torch.zeros_like(counts)
    for first, values in blocks:
        last, wide = first + len(values), values.to(torch.float64)
        sums[first:last] += wide @ counts[first:]
        sums[last:] += counts[first:last] @ wide[:, len(values) :]
    return sums


# ------------------------------------------------------------------------------------------------------------- pairs


def squared_distances(filters: torch.Tensor) -> Iterator[Pairs]:
    """``||F_j - F_k||^2`` of ``filters [C, f]``, in their dtype, a block of rows at a time."""
    centred = filters - filters.mean(0)  # distances stay, cancellation shrinks
    for first, rows in _rows(centred):
        yield Pairs(first, squared_between(rows, centred[first:], diagonal=True))


def squared_between(rows: torch.Tensor, columns: torch.Tensor, *, diagonal: bool = False) -> torch.Tensor:
    """``||R_j - C_k||^2`` of ``rows [R, f]`` and ``columns [K, f]``: ``[R, K]``. ``diagonal``: the columns begin with
    the rows."""
    squares = torch.linalg.vector_norm(rows, dim=1).square()
    values = torch.addmm(torch.linalg.vector_norm(columns, dim=1).square(), rows, columns.mT, alpha=-2)
    values += squares[:, None]
    if diagonal:
        values.fill_diagonal_(torch.inf)
    limits = 2 * NEAR * squares  # what is near has the same norm
    at = (values.amin(1) < limits).nonzero()[:, 0]
    for part in (values[at] < limits[at, None]).nonzero().split(max(1, BLOCK // max(1, rows.shape[1]))):
        a, b = at[part[:, 0]], part[:, 1]
        values[a, b] = (rows[a] - columns[b]).square_().sum(1)
    return values.fill_diagonal_(0) if diagonal else values


def _rows(filters: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
    step = max(1, min(ROWS, BLOCK // max(1, len(filters))))
    for first in range(0, len(filters), step):
        yield first, filters[first : first + step]
