"""What the next layers put out: a channel whose part of it the others can spare matters little (ThiNet).

Source: Luo et al., "ThiNet: A Filter Level Pruning Method for Deep Neural Network Compression" (ICCV 2017), section
3.2, for the removal; the journal version "ThiNet: Pruning CNN Filters for a Thinner Net" (TPAMI 2018) for the pursuit.
Let ``z_c`` be the part of a reader's output that comes through channel ``c``, one entry for every sample, and ``t``
what the parts should sum to: their sum in the dense network. The removed set ``T`` and the kept set ``S`` are to
minimise

    f(T) = || t - sum_{c in S} z_c ||^2,

which is ``|| sum_{c in T} z_c ||^2`` where ``t = sum_c z_c``. The paper holds the ``z_c`` of 100,000 samples. Here all
is said by their inner products ``G = [z_c . z_c']`` and ``b = [z_c . t]``, which can be summed over any number:

* *removal* (ICCV): with ``q = b - G 1`` and ``v = sum_{c in T} G_c``, to remove ``j`` as well costs
  ``G_jj + 2 (v_j + q_j)``; the cheapest goes, until nothing is left.
* *pursuit* (TPAMI, orthogonal matching pursuit): from ``r = t`` and ``S`` empty, the ``j`` of the largest
  ``(z_j . r)^2 / G_jj`` is kept, and ``r`` becomes what least squares on ``S`` leaves of ``t``.

Letters: ``C`` channels, ``U`` readers. A step costs ``O(C)``, or ``O(C |S|)`` in a pursuit, whatever the samples.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import numpy as np
import torch

from secateur.core import Criterion, GroupView, OutputMoments
from secateur.errors import BadRequest, nearest

Order = Literal["removal", "pursuit"]
Statistics = Literal["outputs", "samples"]
Weighting = Literal["energy", "sum"]

LOCATIONS = 10
"""How many outputs of an image are drawn, as in the paper."""
ROUNDING = 16 * np.finfo(np.float64).eps
"""Sums that differ by less than this fraction of what was summed count as equal, so that the order in which data were
summed (their batches, the processes) does not decide."""
SPAN = 1e-10
"""A channel lies in the span of others where less than this fraction of its energy is outside."""
TILT = 1e-6
"""The part of the scores that only tells equal ones apart."""


class Ranking(NamedTuple):
    """``order [C]``, int64: the channels, first removed first; ``costs [C]``, float64: what each adds to ``f`` when it
    goes."""

    order: torch.Tensor
    costs: torch.Tensor


# ------------------------------------------------------------------------------------------------------------ orders


def removal_order(gram: torch.Tensor, slope: torch.Tensor | None = None) -> Ranking:
    """Greedy removal on ``gram [C, C]``: of all that are left, the channel goes whose removal costs least, until all
    are gone. ``slope [C]`` is ``q`` of the module's formula, nothing where the target is the sum of the parts. Of equal
    costs the higher index goes first, so that the lower stays."""
    g = _symmetric(gram)
    channels = len(g)
    first = np.zeros(channels) if slope is None else _array(slope)
    blur = ROUNDING * (np.abs(g).sum(1) + np.abs(first))
    cost = np.diagonal(g) + 2 * first
    twice = 2 * g
    order, costs = np.empty(channels, dtype=np.int64), np.empty(channels)
    for step in range(channels):
        low = cost.argmin()
        j = np.flatnonzero(cost <= cost[low] + np.maximum(blur, blur[low]))[-1]
        order[step], costs[step] = j, cost[j]
        cost += twice[j]
        cost[j] = np.inf
    return Ranking(torch.from_numpy(order), torch.from_numpy(costs))


def pursuit_order(gram: torch.Tensor, target: torch.Tensor) -> Ranking:
    """Orthogonal matching pursuit on ``gram [C, C]`` and ``target [C]``, until all are kept; the first kept is the last
    removed. ``costs`` are what least squares on the kept ones loses with each.

    What is kept is orthogonalised on the way: ``L`` is the Cholesky factor of ``G``, rows and columns in the order of
    the pursuit, ``a = z . r``, and ``d`` the energy of each channel outside of the span. Channels inside of it
    (``SPAN``) add nothing and go before all others, the higher index first, those without energy at the very start.
    """
    g, a = _symmetric(gram), _array(target)
    channels, energy = len(g), np.diagonal(g).copy()
    d, floor, alive = energy.copy(), SPAN * energy, energy > 0
    inverse = np.divide(1.0, energy, out=np.zeros(channels), where=alive)
    factor = np.zeros((channels, channels))  # row k: what each has along the new direction of the k-th that is kept
    kept: list[int] = []
    gains: list[float] = []
    largest = float((a * a * inverse).max(initial=0.0))
    while alive.any():
        gain = np.where(alive, a * a * inverse, -1.0)
        best = gain.max()
        # what is left by rounding alone tells nothing: the lowest index stays
        blur = ROUNDING * (best + ROUNDING * largest * channels)
        j = int((alive & (gain >= best - blur)).argmax())
        k, pivot = len(kept), np.sqrt(d[j])
        row = factor[k]
        row[:] = (g[j] - factor[:k, j] @ factor[:k]) / pivot
        along = a[j] / pivot
        a -= along * row
        d -= row * row
        kept.append(j)
        gains.append(along * along)
        alive[j] = False
        alive &= d > floor
    spare = np.setdiff1d(np.arange(channels), kept)
    spare = spare[np.lexsort((-spare, energy[spare] > 0))]  # no energy first, then the higher index first
    order = np.concatenate([spare, np.array(kept[::-1], dtype=np.int64)])
    costs = np.concatenate([np.zeros(len(spare)), gains[::-1]])
    return Ranking(torch.from_numpy(order), torch.from_numpy(costs))


def _symmetric(gram: torch.Tensor) -> np.ndarray:
    g = _array(gram)
    return (g + g.T) / 2


def _array(tensor: torch.Tensor) -> np.ndarray:
    """Its values in float64, in memory of their own."""
    return tensor.detach().to("cpu", torch.float64, copy=True).numpy()


# ---------------------------------------------------------------------------------------------------------- criteria


def thinet(view: GroupView, /) -> torch.Tensor:
    """Scores ``[C]`` by greedy removal (ICCV) on all outputs of all readers at all locations, each reader's moments
    divided by the energy of its output. See ``thinet_with`` for what the numbers mean."""
    return _scored(view, "removal", "outputs", "energy")


def thinet_omp(view: GroupView, /) -> torch.Tensor:
    """Scores ``[C]`` by orthogonal matching pursuit (TPAMI) on all outputs at all locations."""
    return _scored(view, "pursuit", "outputs", "energy")


def thinet_sampled(view: GroupView, /) -> torch.Tensor:
    """Scores ``[C]`` by greedy removal (ICCV) on outputs drawn at random, 10 filters and locations of an image, as
    published."""
    return _scored(view, "removal", "samples", "energy")


def thinet_sampled_omp(view: GroupView, /) -> torch.Tensor:
    """Scores ``[C]`` by orthogonal matching pursuit (TPAMI) on outputs drawn at random, as published."""
    return _scored(view, "pursuit", "samples", "energy")


def thinet_sequential(view: GroupView, /) -> torch.Tensor:
    """Scores ``[C]`` as ``thinet``. ``plan`` measures for it front to back: each group on a network in which what was
    decided before is gone, against what its readers put out in the dense one."""
    return _scored(view, "removal", "outputs", "energy")


def thinet_with(
    *,
    order: Order = "removal",
    statistics: Statistics = "outputs",
    weighting: Weighting = "energy",
    locations: int = LOCATIONS,
) -> Criterion:
    """A ThiNet criterion of other make. Its scores ``[C]`` are positive, sum to one and rise along the order in which
    channels go, so that any number that is kept is what the greedy search keeps. A score is what the channel adds to
    the objective when it goes, as a fraction of what all of them add; where a channel adds less than the one that went
    before it, both are given their mean, as often as needed (and all differ by a millionth, to keep the order).

    ``order``: greedy ``"removal"`` of the least (ICCV 2017), or orthogonal matching ``"pursuit"`` of what stays (TPAMI
    2018). ``statistics``: of all ``"outputs"``, or of ``"samples"``, ``locations`` drawn of each image. ``weighting``:
    the objectives of several readers are divided by the energy of their outputs, or plainly added up (``"sum"``).
    """
    stated = {"order": (order, Order), "statistics": (statistics, Statistics), "weighting": (weighting, Weighting)}
    for key, (value, known) in stated.items():
        if value not in get_args(known):
            raise BadRequest(f"there is no {key} {value!r}{nearest(str(value), get_args(known))}")
    if isinstance(locations, bool) or not isinstance(locations, int) or locations < 1:
        raise BadRequest(f"locations={locations!r} is not a number of outputs of an image, 1 or more")

    def criterion(view: GroupView, /) -> torch.Tensor:
        return _scored(view, order, statistics, weighting)

    drawn = f", locations={locations}" if statistics == "samples" else ""
    criterion.__name__ = f"thinet_with(order={order!r}, statistics={statistics!r}, weighting={weighting!r}{drawn})"
    criterion.__dict__.update(reads=(statistics,), locations=locations)
    return criterion


def _scored(view: GroupView, order: Order, statistics: Statistics, weighting: Weighting) -> torch.Tensor:
    moments = view.outputs if statistics == "outputs" else view.samples
    if moments is None:
        raise BadRequest(
            f"the view of group {view.name!r} has no {statistics}: nothing was measured on data\n"
            "  do: pass data= to plan, or evidence= from collect"
        )
    gram, target = pooled(moments, weighting)
    if not bool(gram.any()):
        return torch.zeros(len(target), dtype=torch.float64)  # nothing comes through: no channel matters
    ranking = pursuit_order(gram, target) if order == "pursuit" else removal_order(gram, _slope(gram, target))
    return _scores(ranking)


def pooled(moments: OutputMoments, weighting: Weighting = "energy") -> tuple[torch.Tensor, torch.Tensor]:
    """``gram [C, C]`` and ``target [C]`` of all readers together: each divided by its output's energy, or as they are.
    A reader whose output has no energy does not count."""
    energy = moments.energy.to(torch.float64)
    weight = torch.where(energy > 0, 1 / energy, 0.0) if weighting == "energy" else torch.ones_like(energy)
    return torch.einsum("u,uij->ij", weight, moments.gram), weight @ moments.target


def _slope(gram: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """``q = b - G 1``: zero, not rounding errors, where the target is the sum of the parts."""
    slope = target - gram.sum(1)
    blur = ROUNDING * len(gram) ** 0.5 * (target.abs() + gram.abs().sum(1))
    return slope if bool((slope.abs() > blur).any()) else torch.zeros_like(slope)


def _scores(ranking: Ranking) -> torch.Tensor:
    """``[C]``: strictly rising along the order, positive, of sum one."""
    costs = rising(ranking.costs.numpy()).clip(min=0)
    ramp = np.arange(1, len(costs) + 1, dtype=np.float64)
    total = costs.sum()
    values = (costs / total * (1 - TILT) if total > 0 else 0) + TILT * ramp / ramp.sum()
    scores = torch.empty(len(costs), dtype=torch.float64)
    scores[ranking.order] = torch.from_numpy(values)
    return scores


def rising(values: np.ndarray) -> np.ndarray:
    """The sequence that never falls and is nearest to ``values`` in the sense of least squares: where a value is lower
    than the mean of those before it, both blocks get their common mean (pool adjacent violators)."""
    sums: list[float] = []
    sizes: list[int] = []
    for value in values.tolist():
        total, size = value, 1
        while sums and sums[-1] * size >= total * sizes[-1]:
            total, size = total + sums.pop(), size + sizes.pop()
        sums.append(total)
        sizes.append(size)
    return np.repeat(np.array(sums) / np.array(sizes), sizes)
