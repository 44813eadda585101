"""Criteria: how much a channel matters.

A criterion is a pure function from a ``GroupView`` to ``[C]`` scores, higher is kept longer. It is short, states its
formula, shapes and source, and is tested against a naive loop. One family a file; this dict is the registry. A user's
own criterion is any function of the same shape and needs no registration.
"""

from __future__ import annotations

from secateur.core import Criterion
from secateur.criteria.ablation import largest, random
from secateur.criteria.norms import l1, l2
from secateur.errors import BadRequest, nearest

__all__ = ["CRITERIA", "READS", "l1", "l2", "largest", "random", "resolve"]

CRITERIA: dict[str, Criterion] = {
    "l1": l1,
    "l2": l2,
    "random": random,
    "largest": largest,
}

READS: dict[Criterion, tuple[str, ...]] = {
    l1: ("filters",),
    l2: ("filters",),
    random: ("filters",),
    largest: ("filters",),
}
"""Which matrices of the view a criterion reads, so that the others need not be gathered; not listed: all of them."""


def resolve(criterion: str | Criterion) -> Criterion:
    """The criterion of that name, or the callable itself. Raises ``BadRequest`` for an unknown name."""
    if isinstance(criterion, str):
        if criterion not in CRITERIA:
            raise BadRequest(f"there is no criterion {criterion!r}{nearest(criterion, CRITERIA)}")
        return CRITERIA[criterion]
    if not callable(criterion):
        raise BadRequest(
            f"a criterion is a name or a function from a GroupView to [channels] scores, not {criterion!r}\n"
            f"  names: {', '.join(CRITERIA)}"
        )
    return criterion
