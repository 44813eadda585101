"""Tables of layer latency against width, and the latency of a network as a function of its kept counts.

    T(keep) = g( s * sum of its layers' times + w * parameters + a * elements of activations
                 + m * MACs of what has no table + c )

A layer's time is read from its table: bilinear between the widths that were timed, which is what a product of widths
is, and as steep below the narrowest as above it. Times do not fall as widths grow: where a measured one does, the
narrower width is as slow as the wider. ``s w a m c`` are not negative; they are fitted to whole networks (``fits.py``),
since layers alone do not tell what engines do between them. ``g`` rises, and takes the fit for the dense network, and
for those that plans came to before, to the times that these really took; it is linear between them.

Letters: ``B`` choices of kept counts, ``G`` groups, ``L`` layers, ``F`` features of a network.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from secateur.costs import Cost
from secateur.latencies.geometries import Placed

FEATURES = ("layers", "weights", "activations", "other macs", "constant")
"""What the time of a network is a sum of, with a price for each."""


@dataclass(frozen=True, eq=False)
class Table:
    """``ms [I, O]``: the time of a layer of ``into [I]`` inputs and ``out [O]`` outputs, ascending widths."""

    into: np.ndarray
    out: np.ndarray
    ms: np.ndarray

    @classmethod
    def of(cls, points: Mapping[tuple[int, int], float]) -> Table:
        """The table of points ``{(inputs, outputs): ms}`` that fill a grid; no time falls as a width grows."""
        into = np.array(sorted({i for i, _ in points}), dtype=np.float64)
        out = np.array(sorted({o for _, o in points}), dtype=np.float64)
        ms = np.array([[points[int(i), int(o)] for o in out] for i in into])
        return cls(into, out, np.maximum.accumulate(np.maximum.accumulate(ms, axis=0), axis=1))

    def at(self, into: np.ndarray, out: np.ndarray) -> np.ndarray:
        """The times ``[B]`` at widths ``[B]``; never below zero."""
        i, along = _between(self.into, into)
        j, across = _between(self.out, out)
        low = self.ms[i, j] * (1 - across) + self.ms[i, self._next(j, self.out)] * across
        k = self._next(i, self.into)
        high = self.ms[k, j] * (1 - across) + self.ms[k, self._next(j, self.out)] * across
        return np.asarray(np.maximum(low * (1 - along) + high * along, 0.0))

    @staticmethod
    def _next(index: np.ndarray, widths: np.ndarray) -> np.ndarray:
        return np.minimum(index + 1, len(widths) - 1)


def _between(widths: np.ndarray, at: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The place of each ``at [B]`` in ``widths``: the index before it, and how far it is on the way to the next."""
    if len(widths) == 1:
        return np.zeros(len(at), dtype=np.int64), np.zeros(len(at))
    index = np.clip(np.searchsorted(widths, at, side="right") - 1, 0, len(widths) - 2)
    return index, (at - widths[index]) / (widths[index + 1] - widths[index])


@dataclass(frozen=True, eq=False)
class Layers:
    """The layers of a network with their tables; a ``Cost`` of its own: milliseconds of all of them together.

    ``fixed [L, 2]`` and ``times [L, 2, G]``: the inputs and outputs of a layer are affine in the kept counts.
    """

    tables: Sequence[Table]
    fixed: np.ndarray
    times: np.ndarray

    @classmethod
    def of(cls, layers: Sequence[Placed], tables: Sequence[Table], n_groups: int) -> Layers:
        """The layers of a network of so many groups, each with its table."""
        fixed, times = np.zeros((len(layers), 2)), np.zeros((len(layers), 2, n_groups))
        for number, layer in enumerate(layers):
            for side, dim in enumerate((layer.into, layer.out)):
                fixed[number, side], uses = dim
                for group, count in uses.items():
                    times[number, side, group] = count
        return cls(tables, fixed, times)

    @cached_property
    def users(self) -> list[np.ndarray]:
        """The layers whose widths depend on each group."""
        return [np.flatnonzero(self.times[:, :, g].any(axis=1)) for g in range(self.times.shape[2])]

    def each(self, keep: np.ndarray, layers: Sequence[int] | np.ndarray) -> np.ndarray:
        """The times ``[B, len(layers)]`` of some layers at ``keep [B, G]``."""
        found = np.empty((len(keep), len(layers)))
        for place, number in enumerate(layers):
            widths = keep @ self.times[number].T + self.fixed[number]
            found[:, place] = self.tables[number].at(widths[:, 0], widths[:, 1])
        return found

    def at(self, keep: np.ndarray) -> np.ndarray:
        """The times ``[B]`` at ``keep [B, G]``."""
        return self.each(np.asarray(keep, dtype=np.float64), range(len(self.tables))).sum(axis=1)

    def marginals(self, keep: np.ndarray, steps: np.ndarray) -> np.ndarray:
        """What is saved by taking ``steps[g]`` channels from group ``g`` alone, ``[G]``: of the layers it is in."""
        keep = np.asarray(keep, dtype=np.float64)
        saved = np.zeros(len(keep))
        before = self.each(keep[None], range(len(self.tables)))[0]
        for group, layers in enumerate(self.users):
            if len(layers) and steps[group]:
                narrower = keep.copy()
                narrower[group] -= steps[group]
                saved[group] = before[layers].sum() - self.each(narrower[None], layers).sum()
        return saved


@dataclass(frozen=True, eq=False)
class NetworkLatency:
    """The latency of a network in milliseconds, a ``Cost``: ``parts [F]``, each a cost, at ``prices [F]``, and the
    curve ``g`` through the points ``fitted [K]``, ``timed [K]``, ascending; below the first it goes to the origin."""

    parts: Sequence[Cost]
    prices: np.ndarray
    fitted: np.ndarray
    timed: np.ndarray

    def at(self, keep: np.ndarray) -> np.ndarray:
        """Milliseconds ``[B]`` at ``keep [B, G]``."""
        return self.corrected(features(self.parts, keep) @ self.prices)

    def marginals(self, keep: np.ndarray, steps: np.ndarray) -> np.ndarray:
        """Milliseconds saved by taking ``steps[g]`` channels from group ``g`` alone, ``[G]``."""
        own = [part.marginals(keep, steps) * price for part, price in zip(self.parts, self.prices, strict=True)]
        before = features(self.parts, np.asarray(keep, dtype=np.float64)[None]) @ self.prices
        return self.corrected(before) - self.corrected(before - np.sum(own, axis=0))

    def corrected(self, fit: np.ndarray) -> np.ndarray:
        """``g``, as steep above the last point as below it."""
        x, y = np.concatenate([[0.0], self.fitted]), np.concatenate([[0.0], self.timed])
        slope = (y[-1] - y[-2]) / (x[-1] - x[-2])
        return np.asarray(np.where(fit > x[-1], y[-1] + slope * (fit - x[-1]), np.interp(fit, x, y)))


def curve_through(fitted: np.ndarray, timed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The points of a rising curve, ascending: of points at one place the last counts, and where a time is less than
    one before it, both are told by the longer."""
    last = dict(zip(fitted.tolist(), timed.tolist(), strict=True))
    x = np.array(sorted(last))
    return x, np.maximum.accumulate([last[at] for at in x.tolist()])


def features(parts: Sequence[Cost], keep: np.ndarray) -> np.ndarray:
    """``[B, F]``: what each part comes to at ``keep [B, G]``."""
    return np.stack([part.at(keep) for part in parts], axis=1)
