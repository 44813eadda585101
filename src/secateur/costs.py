"""What a network costs as a function of how many channels each group keeps, without surgery.

A ``Cost`` is anything that says what it is at kept counts, and what taking channels from one group saves. It must not
fall as widths grow. MACs and parameters are sums of products of widths, and a width is affine in the kept counts: a
convolution costs ``k * h * w * O * I``, where ``O = keep[a]`` and, behind a concat, ``I = 3 + keep[a] + 2 * keep[b]``.
A ``Polynomial`` is that as arrays. A ``Peak`` is the largest of several such sums, as memory is: what is alive at the
worst moment. Integers stay exact: every product and partial sum is an integer below 2**53 in float64. Widths may also
be real numbers, as in FPGM's own way of counting.

Letters: ``B`` choices of kept counts, ``G`` groups, ``D`` distinct widths (dims), ``T`` terms, ``J`` factors of a term,
``E`` nonzero multiplicities, ``P`` pairs of a term and a group that occurs in it, ``S`` sums of a peak.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol

import numpy as np

from secateur.errors import BadRequest

Dim = tuple[float, Mapping[int, float]]
"""A width: what is fixed, and ``{group index: how often one of its channels counts}``."""


class Cost(Protocol):
    """What a network costs at kept counts; no cost falls as a group gets wider."""

    def at(self, keep: np.ndarray) -> np.ndarray:
        """The costs ``[B]`` of ``B`` choices ``keep [B, G]``."""
        ...

    def marginals(self, keep: np.ndarray, steps: np.ndarray) -> np.ndarray:
        """What is saved at ``keep [G]`` by taking ``steps[g]`` channels from group ``g`` alone, ``[G]``, for each
        ``g``; a negative step adds channels, and the result is then minus the price of them."""
        ...


@dataclass(frozen=True, eq=False)
class Polynomial:
    """``sum_t coefficients[t] * prod_j width[factors[t, j]]`` with ``width = fixed + multiplicities * keep``.

    ``fixed [D]``; dim 0 is the constant one that fills up terms with fewer factors. ``dims``, ``groups``,
    ``multiplicities`` (``[E]`` each, sorted by dim): dim ``dims[e]`` grows by ``multiplicities[e]`` with each channel
    of group ``groups[e]``. ``coefficients [T]``, ``factors [T, J]``.
    """

    fixed: np.ndarray
    dims: np.ndarray
    groups: np.ndarray
    multiplicities: np.ndarray
    coefficients: np.ndarray
    factors: np.ndarray

    @cached_property
    def segments(self) -> tuple[np.ndarray, np.ndarray]:
        """The dims that depend on any group, and where the entries of each start in ``dims``."""
        return np.unique(self.dims, return_index=True)

    @cached_property
    def incidence(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Term ``[P]``, group ``[P]`` and multiplicity in each factor ``[P, J]`` of every pair that occurs."""
        start = np.searchsorted(self.dims, np.arange(len(self.fixed) + 1))
        n_terms, n_factors = self.factors.shape
        n_groups = self.n_groups
        keys, factor, entry = [], [], []
        for j in range(n_factors):
            first = start[self.factors[:, j]]
            count = start[self.factors[:, j] + 1] - first
            term = np.repeat(np.arange(n_terms), count)
            offset = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
            entry.append(np.repeat(first, count) + offset)
            factor.append(np.full(len(term), j))
            keys.append(term * n_groups + self.groups[entry[-1]])
        pairs, pair = np.unique(np.concatenate(keys), return_inverse=True)
        multiplicity = np.zeros((len(pairs), n_factors))
        multiplicity[pair, np.concatenate(factor)] = self.multiplicities[np.concatenate(entry)]
        return pairs // max(n_groups, 1), pairs % max(n_groups, 1), multiplicity

    @cached_property
    def n_groups(self) -> int:
        """So many groups ``keep`` must have at least."""
        return int(self.groups.max()) + 1 if len(self.groups) else 0

    def at(self, keep: np.ndarray) -> np.ndarray:
        """The costs ``[B]`` of ``B`` choices ``keep [B, G]``."""
        return np.asarray(self.products(keep) @ self.coefficients)

    def marginals(self, keep: np.ndarray, steps: np.ndarray) -> np.ndarray:
        """What is saved by taking ``steps[g]`` channels from group ``g`` alone: the exact differences ``[G]``, also
        where one group stands in several factors of a term."""
        fallen = self.coefficients[self.incidence[0]] * self.differences(keep, steps)
        return np.bincount(self.incidence[1], weights=fallen, minlength=len(keep))

    def products(self, keep: np.ndarray) -> np.ndarray:
        """The value ``[B, T]`` of every term without its coefficient."""
        return np.asarray(self.widths(keep)[:, self.factors].prod(axis=2))

    def differences(self, keep: np.ndarray, steps: np.ndarray) -> np.ndarray:
        """By how much each term falls, without its coefficient, as one group in it loses its steps: ``[P]``."""
        widths = self.widths(keep[None])[0][self.factors]
        term, group, multiplicity = self.incidence
        return np.asarray(widths.prod(axis=1)[term] - (widths[term] - steps[group, None] * multiplicity).prod(axis=1))

    def widths(self, keep: np.ndarray) -> np.ndarray:
        """``[B, D]``: the value of every dim for each row of ``keep [B, G]``."""
        if keep.shape[1] < self.n_groups:
            raise BadRequest(f"the cost depends on {self.n_groups} groups, but {keep.shape[1]} kept counts were given")
        widths = np.tile(self.fixed, (len(keep), 1))
        if len(self.dims):
            used, start = self.segments
            widths[:, used] += np.add.reduceat(self.multiplicities * keep[:, self.groups], start, axis=1)
        return widths


@dataclass(frozen=True, eq=False)
class Peak:
    """The largest of ``S`` sums of terms: ``max_s sum_t weights[t, s] * product_t``, the products being those of the
    terms of ``terms`` (whose own coefficients do not count). ``weights [T, S]`` are not negative.

    At a tie no group alone lowers it, and a group outside the largest sum saves nothing: how far it is to a target is
    told by ``excess``, not by marginals.
    """

    terms: Polynomial
    weights: np.ndarray

    def at(self, keep: np.ndarray) -> np.ndarray:
        """The costs ``[B]`` of ``B`` choices ``keep [B, G]``."""
        return np.asarray(self.sums(keep).max(axis=1))

    def marginals(self, keep: np.ndarray, steps: np.ndarray) -> np.ndarray:
        """What is saved ``[G]`` by taking ``steps[g]`` channels from group ``g`` alone: the exact differences."""
        sums = self.sums(keep[None])[0]
        return np.asarray(sums.max() - (sums - self.falls(keep, steps)).max(axis=1))

    def sums(self, keep: np.ndarray) -> np.ndarray:
        """Every sum ``[B, S]`` at ``keep [B, G]``."""
        return np.asarray(self.terms.products(keep) @ self.weights)

    def falls(self, keep: np.ndarray, steps: np.ndarray) -> np.ndarray:
        """By how much each sum falls ``[G, S]`` as one group loses its steps."""
        term, group, _ = self.terms.incidence
        falls = np.zeros((len(keep), self.weights.shape[1]))
        np.add.at(falls, group, self.terms.differences(keep, steps)[:, None] * self.weights[term])
        return falls

    def excess(self, keep: np.ndarray, target: float) -> np.ndarray:
        """By how much the sums exceed ``target``, all together, ``[B]``: zero if and only if the cost is met. Where any
        group can lower some of it, this falls, also at a tie."""
        return np.asarray(np.maximum(self.sums(keep) - target, 0.0).sum(axis=1))


Term = tuple[float, Sequence[Dim]]
"""``(coefficient, [(fixed, {group index: multiplicity}), ...])``."""


def make_cost(terms: Sequence[Term]) -> Polynomial:
    """A ``Polynomial`` from terms.

    Equal dims are stored once and terms of equal factors are added up. A convolution whose input and output are both
    group 0, 3x3 on a 8x8 map: ``(9 * 64, [(0, {0: 1}), (0, {0: 1})])``; a constant: ``(1000, [])``.
    """
    cost, coefficients = _indexed([terms])
    return replace(cost, coefficients=coefficients[:, 0])


def make_peak(sums: Sequence[Sequence[Term]]) -> Peak:
    """A ``Peak`` from the terms of each sum; none: it is 0. Sums that another one bounds at any widths are left out."""
    terms, weights = _indexed(sums or [[]])
    order = np.argsort(-weights.sum(axis=0), kind="stable")
    kept: list[int] = []
    for s in order.tolist():  # a bound has a larger total, or is equal, and then the first of them stands for all
        if not (weights[:, kept] >= weights[:, [s]]).all(axis=0).any():
            kept.append(s)
    return Peak(terms, weights[:, sorted(kept)])


def _indexed(sums: Sequence[Sequence[Term]]) -> tuple[Polynomial, np.ndarray]:
    """All terms that occur, of coefficient 1, and those that they have in each sum ``[T, S]``."""
    index: dict[tuple[float, tuple[tuple[int, float], ...]], int] = {(1.0, ()): 0}
    place: dict[tuple[int, ...], int] = {}
    coefficients: dict[tuple[int, int], float] = {}
    for s, terms in enumerate(sums):
        for coefficient, dims in terms:
            factors = []
            for fixed, uses in dims:
                key = (float(fixed), tuple(sorted((int(g), float(m)) for g, m in uses.items() if m)))
                factors.append(index.setdefault(key, len(index)))
            at = place.setdefault(tuple(sorted(f for f in factors if f)), len(place)), s
            coefficients[at] = coefficients.get(at, 0.0) + float(coefficient)
    weights = np.zeros((len(place), len(sums)))
    if coefficients:
        weights[tuple(np.array(list(coefficients)).T)] = list(coefficients.values())
    longest = max((len(where) for where in place), default=0) or 1
    padded = [where + (0,) * (longest - len(where)) for where in place]
    entries = [(dim, group, m) for (_, uses), dim in index.items() for group, m in uses]
    cost = Polynomial(
        fixed=np.array([fixed for fixed, _ in index], dtype=np.float64),
        dims=np.array([e[0] for e in entries], dtype=np.int64),
        groups=np.array([e[1] for e in entries], dtype=np.int64),
        multiplicities=np.array([e[2] for e in entries], dtype=np.float64),
        coefficients=np.ones(len(place)),
        factors=np.array(padded, dtype=np.int64).reshape(len(place), longest),
    )
    return cost, weights


def evaluate(cost: Cost, keep: np.ndarray) -> float:
    """The cost at ``keep [G]`` kept channels a group, integers or real numbers."""
    return float(cost.at(np.asarray(keep)[None])[0])


def evaluate_many(cost: Cost, keep: np.ndarray) -> np.ndarray:
    """The costs ``[B]`` of ``B`` choices ``keep [B, G]``."""
    return cost.at(np.asarray(keep))


def marginals(cost: Cost, keep: np.ndarray, steps: np.ndarray | None = None) -> np.ndarray:
    """What is saved by taking ``steps[g]`` channels (default 1) from group ``g`` alone, ``[G]``, for each ``g``.

    Entry ``g`` is ``evaluate(keep) - evaluate(keep - steps[g] at g)``. A negative step adds channels, and the result is
    then minus the price of them.
    """
    keep = np.asarray(keep, dtype=np.float64)
    steps = np.ones(len(keep)) if steps is None else np.asarray(steps, dtype=np.float64)
    return cost.marginals(keep, steps)
