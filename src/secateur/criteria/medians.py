"""The true geometric median of the filters of a group: the point from which the sum of the distances to them is least.

    x* = argmin_x f(x),    f(x) = sum_j ||x - F_j||_2

Source: He et al., "Filter Pruning via Geometric Median for Deep Convolutional Neural Networks Acceleration" (CVPR
2019), equations 2 and 3, of which ``fpgm`` is the paper's approximation; Weiszfeld (Tohoku Mathematical Journal, 1937)
for the iteration; Vardi and Zhang, "The multivariate L1-median and associated data depth" (PNAS 2000), for iterates
that hit a filter.

With the *pull* ``R(x) = sum_j (F_j - x) / ||F_j - x||`` over the filters that are not at ``x``, and the number ``n`` of
those that are, ``x`` is the median if and only if ``||R|| <= n``; elsewhere Weiszfeld's step, shortened by ``1 - n /
||R||`` where it leaves a filter (Vardi and Zhang), makes ``f`` smaller.

Letters: ``C`` channels, ``f`` weights of a filter.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from secateur.core import GroupView
from secateur.criteria.norms import weights
from secateur.criteria.sums import euclidean_sums
from secateur.errors import CannotPrune

CONVERGED = 1e-10
"""The median is found where the mean of the unit vectors towards all filters is shorter than this."""
PATIENCE = 30
"""Weiszfeld's steps before Newton's are tried: near a line, or a filter, the former become very short."""
STEPS = 1000
"""The most steps that are taken."""
TIED = 1e-13
"""Sums of distances that differ by less than this fraction are equal."""


def geometric_median(view: GroupView, /) -> torch.Tensor:
    """``s_j = ||F_j - x*||_2``, ``[C]``: the distance of filter ``j`` to the geometric median ``x*`` of all (He et al.,
    equation 3). The nearest go first. See ``median_of`` for filters whose median is not unique."""
    filters = weights(view).to(torch.float64)
    return torch.linalg.vector_norm(filters - median_of(filters), dim=1)


def median_of(filters: torch.Tensor) -> torch.Tensor:
    """The geometric median ``[f]`` of ``filters [C, f]``, float64.

    The search begins at the filter of the least sum of distances, and ``f`` only falls from there, so that no step
    meets a filter again but for rounding. If that filter is itself a median, no search is needed. Filters that do not
    lie on one line have one median. On a line it is the middle one, or any point between the two in the middle: then
    the mean of those filters that are medians is taken, which is the middle of two filters. Filters that are all equal
    are their own median.

    Raises ``CannotPrune`` if the search has not converged (``CONVERGED``) after ``STEPS`` steps.
    """
    sums = euclidean_sums(filters)
    best = filters[sums.argmin()]
    around = filters - best  # the origin is where digits are needed
    x = torch.zeros_like(best)
    here = _look(around, x)
    if here.is_median:
        return best + around[sums <= sums.min() * (1 + TIED)].mean(0)
    for step in range(STEPS):
        found = _newton(around, x, here) if step >= PATIENCE else None
        if found is None:
            x = x + here.step
            here = _look(around, x)
        else:
            x, here = found
        if here.is_median:
            return best + x
    raise CannotPrune(
        f"the geometric median of {len(filters)} filters was not found in {STEPS} steps: the pull of them all is still "
        f"{here.excess / len(filters):.1e} of what it could be, and should be {CONVERGED:.0e}\n"
        "  do: take 'fpgm', which needs no search and chooses nearly the same"
    )


class _Place(NamedTuple):
    """What the filters look like from a point. ``pull [f]``, ``weights [C]``: one over the distances, 0 of filters that
    are ``here``; ``excess``: how much the pull exceeds what they hold."""

    pull: torch.Tensor
    weights: torch.Tensor
    here: int
    excess: float

    @property
    def is_median(self) -> bool:
        return self.excess <= CONVERGED * len(self.weights)

    @property
    def step(self) -> torch.Tensor:
        """Weiszfeld's, shortened by as much as the filters here hold back."""
        return self.pull / self.weights.sum() * (self.excess / (self.excess + self.here))


def _look(filters: torch.Tensor, x: torch.Tensor) -> _Place:
    towards = filters - x
    distances = torch.linalg.vector_norm(towards, dim=1)
    weights = torch.where(distances > 0, 1 / distances, 0.0)
    pull = weights @ towards
    here = int((distances == 0).sum())
    return _Place(pull, weights, here, float(torch.linalg.vector_norm(pull)) - here)


def _newton(filters: torch.Tensor, x: torch.Tensor, here: _Place) -> tuple[torch.Tensor, _Place] | None:
    """Newton's step from ``x``, halved until the pull is smaller, and what is seen from there; ``None`` where that does
    not help.

    The second derivative of ``f`` is ``sum_j w_j (1 - u_j u_j')``, ``w_j`` one over the distances, ``u_j`` unit
    vectors. With ``V`` of the rows ``sqrt(w_j) u_j`` and ``w = sum_j w_j`` it is ``w - V' V``, whose inverse on ``V'``
    is ``V'`` times that of ``w - V V'``: the smaller of both is solved.
    """
    if here.here:
        return None
    roots = here.weights.pow(1.5)[:, None] * (filters - x)
    total = here.weights.sum()
    narrow = roots.shape[1] <= roots.shape[0]
    matrix = (roots.mT @ roots if narrow else roots @ roots.mT).neg_()
    matrix.diagonal().add_(total)
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if int(failed):
        return None
    if narrow:
        step = torch.cholesky_solve(here.pull[:, None], factor)[:, 0]
    else:
        step = (here.pull + roots.mT @ torch.cholesky_solve((roots @ here.pull)[:, None], factor)[:, 0]) / total
    for _ in range(20):
        there = _look(filters, x + step)
        if there.excess < here.excess and not there.here:
            return x + step, there
        step = step / 2
    return None
