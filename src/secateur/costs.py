"""What a network costs as a function of how many channels each group keeps, without surgery.

MACs and parameters are sums of products of widths, and a width is affine in the kept counts: a convolution costs
``k * h * w * O * I``, where ``O = keep[a]`` and, behind a concat, ``I = 3 + keep[a] + 2 * keep[b]``. A ``Cost`` is that
polynomial as arrays. Integers stay exact: every product and partial sum is an integer below 2**53 in float64. Widths
may also be real numbers, as in FPGM's own way of counting.

Letters: ``G`` groups, ``D`` distinct widths (dims), ``T`` terms, ``J`` factors of a term, ``E`` nonzero multiplicities,
``P`` pairs of a term and a group that occurs in it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from secateur.errors import BadRequest

Dim = tuple[float, Mapping[int, float]]
"""A width: what is fixed, and ``{group index: how often one of its channels counts}``."""


@dataclass(frozen=True, eq=False)
class Cost:
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
        n_groups = _n_groups(self)
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


def make_cost(terms: Sequence[tuple[float, Sequence[Dim]]]) -> Cost:
    """A ``Cost`` from terms ``(coefficient, [(fixed, {group index: multiplicity}), ...])``.

    Equal dims are stored once and terms of equal factors are added up. A convolution whose input and output are both
    group 0, 3x3 on a 8x8 map: ``(9 * 64, [(0, {0: 1}), (0, {0: 1})])``; a constant: ``(1000, [])``.
    """
    index: dict[tuple[float, tuple[tuple[int, float], ...]], int] = {(1.0, ()): 0}
    total: dict[tuple[int, ...], float] = {}
    for coefficient, dims in terms:
        factors = []
        for fixed, uses in dims:
            key = (float(fixed), tuple(sorted((int(g), float(m)) for g, m in uses.items() if m)))
            factors.append(index.setdefault(key, len(index)))
        where = tuple(sorted(f for f in factors if f))
        total[where] = total.get(where, 0.0) + float(coefficient)
    longest = max((len(where) for where in total), default=0) or 1
    padded = [where + (0,) * (longest - len(where)) for where in total]
    entries = [(dim, group, m) for (_, uses), dim in index.items() for group, m in uses]
    return Cost(
        fixed=np.array([fixed for fixed, _ in index], dtype=np.float64),
        dims=np.array([e[0] for e in entries], dtype=np.int64),
        groups=np.array([e[1] for e in entries], dtype=np.int64),
        multiplicities=np.array([e[2] for e in entries], dtype=np.float64),
        coefficients=np.array(list(total.values()), dtype=np.float64),
        factors=np.array(padded, dtype=np.int64).reshape(len(total), longest),
    )


def evaluate(cost: Cost, keep: np.ndarray) -> float:
    """The cost at ``keep [G]`` kept channels a group, integers or real numbers."""
    return float(evaluate_many(cost, np.asarray(keep)[None])[0])


def evaluate_many(cost: Cost, keep: np.ndarray) -> np.ndarray:
    """The costs ``[B]`` of ``B`` choices ``keep [B, G]``."""
    return np.asarray(_widths(cost, keep)[:, cost.factors].prod(axis=2) @ cost.coefficients)


def marginals(cost: Cost, keep: np.ndarray, steps: np.ndarray | None = None) -> np.ndarray:
    """What is saved by taking ``steps[g]`` channels (default 1) from group ``g`` alone, ``[G]``, for each ``g``.

    Entry ``g`` is exactly ``evaluate(keep) - evaluate(keep - steps[g] at g)``, also where one group stands in several
    factors of a term. A negative step adds channels, and the result is then minus the price of them.
    """
    keep = np.asarray(keep, dtype=np.float64)
    steps = np.ones(len(keep)) if steps is None else np.asarray(steps, dtype=np.float64)
    widths = _widths(cost, keep[None])[0][cost.factors]
    term, group, multiplicity = cost.incidence
    before = widths.prod(axis=1)[term]
    after = (widths[term] - steps[group, None] * multiplicity).prod(axis=1)
    return np.bincount(group, weights=cost.coefficients[term] * (before - after), minlength=len(keep))


def _widths(cost: Cost, keep: np.ndarray) -> np.ndarray:
    """``[B, D]``: the value of every dim for each row of ``keep [B, G]``."""
    if keep.shape[1] < _n_groups(cost):
        raise BadRequest(f"the cost depends on {_n_groups(cost)} groups, but {keep.shape[1]} kept counts were given")
    widths = np.tile(cost.fixed, (len(keep), 1))
    if len(cost.dims):
        used, start = cost.segments
        widths[:, used] += np.add.reduceat(cost.multiplicities * keep[:, cost.groups], start, axis=1)
    return widths


def _n_groups(cost: Cost) -> int:
    return int(cost.groups.max()) + 1 if len(cost.groups) else 0
