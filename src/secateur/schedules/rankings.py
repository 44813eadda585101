"""Criteria as zeroing needs them: somebody's criterion, but for the channels that are zero already."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from secateur.core import Criterion, GroupView, MapStatistics, OutputMoments
from secateur.criteria import WIDTH, label, locations, needs_width, reads, resolve
from secateur.schedules.places import Masks

Scores = Callable[[GroupView], torch.Tensor]


def gone_first(criterion: str | Criterion, gone: Masks) -> Criterion:
    """``criterion`` with the channels in ``gone`` below all others."""
    function = resolve(criterion)

    def scores(view: GroupView, /) -> torch.Tensor:
        found = function(view).double().clone()
        found[torch.from_numpy(gone[view.name])] = _below(found)
        return found

    return _named(scores, criterion, reads(criterion))


def among_the_rest(criterion: str | Criterion) -> Criterion:
    """``criterion`` as if there were no channels but those whose filters are not zero; the others score below them.

    What a filter is worth beside others (its distances to them, how like them it is) then does not count those that are
    gone: all of them lie in one point, and would make what is small seem to be in the middle of things.
    """
    function = resolve(criterion)

    def scores(view: GroupView, /) -> torch.Tensor:
        alive = _weights(view).ne(0).any(1)
        if bool(alive.all()) or not bool(alive.any()):
            return function(view)
        ranked = function(_of_rows(view, alive.nonzero()[:, 0])).double()
        found = torch.full((len(alive),), _below(ranked), dtype=torch.float64)
        found[alive] = ranked
        return found

    return _named(scores, criterion, ("filters", *reads(criterion)))


def _named(scores: Scores, criterion: str | Criterion, fields: tuple[str, ...]) -> Criterion:
    """``scores`` under the name of ``criterion``, shown ``fields`` of the view, and the width if it asks for that."""
    scores.reads = (*fields, *([WIDTH] if needs_width(criterion) else []))  # type: ignore[attr-defined]
    scores.locations = locations(criterion)  # type: ignore[attr-defined]
    scores.__name__ = label(criterion)
    return scores


def _below(scores: torch.Tensor) -> float:
    """A score below all of these: 0 where they are above it, so that scores which are never negative stay so."""
    lowest = float(scores.min())
    return 0.0 if lowest > 0 else lowest - abs(lowest) - 1


def _weights(view: GroupView) -> torch.Tensor:
    """``[C, f]``: the first of filters, readers and scales that has columns."""
    return next((m for m in (view.filters, view.readers, view.scales) if m.shape[1]), view.scales)


def _of_rows(view: GroupView, rows: torch.Tensor) -> GroupView:
    """The view of the channels ``rows [n]`` alone."""

    def own(value: Any) -> Any:
        if isinstance(value, MapStatistics):
            return replace(value, **{k: own(v) for k, v in vars(value).items()})
        if isinstance(value, OutputMoments):
            return replace(value, gram=value.gram[:, rows][:, :, rows], target=value.target[:, rows])
        return value[rows] if isinstance(value, torch.Tensor) else value

    few = replace(view, **{name: own(value) for name, value in vars(view).items()})
    return replace(few, n_keep=None if view.n_keep is None else min(view.n_keep, len(rows)))
