"""Scoring: one number a channel, for every group.

``score`` shows each group to the criterion and checks what comes back, since a criterion may be the user's own.
``normalise`` makes scores of different groups comparable: a norm grows with the fan-in and with the scale that
training happened to give a layer, so only the distribution inside a group carries information.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from secateur.core import Criterion, Group, GroupView
from secateur.criteria import READS, resolve
from secateur.errors import BadRequest, CannotPrune
from secateur.views import FIELDS, view


def score(
    groups: Sequence[Group],
    tensors: Mapping[str, torch.Tensor],
    criterion: str | Criterion,
    *,
    n_keep: Mapping[str, int] | None = None,
    seed: int = 0,
) -> dict[str, torch.Tensor]:
    """The scores of every group, ``{name: [C] float64}``, higher is kept longer.

    ``tensors``: state_dict name -> tensor. ``n_keep``: how many channels of a group will stay, where it is known.
    Raises ``BadRequest`` for an unknown criterion and for one that returns anything but ``[C]`` real numbers, and
    ``CannotPrune`` for weights or scores that are not finite.
    """
    function = resolve(criterion)
    fields = READS.get(function, FIELDS) if getattr(function, "__hash__", None) else FIELDS
    label = criterion if isinstance(criterion, str) else getattr(criterion, "__name__", type(criterion).__name__)
    scores: dict[str, torch.Tensor] = {}
    for group in groups:
        kept = None if n_keep is None else n_keep.get(group.name)
        seen = view(group, tensors, n_keep=kept, seed=seed, fields=fields)
        if fields is FIELDS:  # what is not ours might write into the user's own weights
            seen = replace(seen, filters=seen.filters.clone(), readers=seen.readers.clone(), scales=seen.scales.clone())
        scores[group.name] = _checked(_call(function, seen, label), group, label)
    return scores


def _call(function: Criterion, seen: GroupView, label: str) -> object:
    try:
        with torch.no_grad():
            return function(seen)
    except Exception as error:
        error.add_note(f"while the criterion {label!r} scored the group {seen.name!r}")
        raise


def _checked(result: object, group: Group, label: str) -> torch.Tensor:
    """``result`` as ``[C]`` float64, or an error that names the criterion and the group."""
    where = f"criterion {label!r} on group {group.name!r}"
    if not isinstance(result, torch.Tensor):
        raise BadRequest(f"{where} returned {type(result).__name__}, not a tensor of {group.channels} scores")
    if tuple(result.shape) != (group.channels,):
        raise BadRequest(
            f"{where} returned the shape {list(result.shape)}, not [{group.channels}]\n"
            "  do: return one score a channel, that is one for each row of view.filters"
        )
    if result.is_complex() or result.dtype == torch.bool:
        raise BadRequest(f"{where} returned {result.dtype}, not real numbers")
    scores = result.detach().to("cpu", torch.float64)
    bad = int((~torch.isfinite(scores)).sum())
    if bad:
        raise CannotPrune(f"{where} returned {bad} of {group.channels} scores that are not finite (NaN or infinity)")
    return scores


def normalise(scores: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Scores that can be compared between groups: not negative, of mean one in every group, in the same order.

    ``s / mean(s)``. A group with negative scores is first lifted to start at zero (dividing by a negative mean would
    turn its order round). Equal scores become ones; all zeros stay zeros: nothing in that group matters.
    """
    return {name: _normalised(values.to(torch.float64)) for name, values in scores.items()}


def _normalised(values: torch.Tensor) -> torch.Tensor:
    if values.numel() == 0 or not bool(values.any()):
        return torch.zeros_like(values)
    low, high = values.min(), values.max()
    if low == high:
        return torch.ones_like(values)
    # Dividing by the largest magnitude first keeps sums and differences of extreme scores finite.
    scaled = values / torch.maximum(low.abs(), high.abs())
    if low < 0:
        scaled = scaled - scaled.min()
    return scaled / scaled.mean()
