"""Scoring: one number a channel, for every group.

``score`` shows each group to the criterion and checks what comes back, since a criterion may be the user's own.
``normalise`` makes scores of different groups comparable: a norm grows with the fan-in and with the scale that
training happened to give a layer, so only the distribution inside a group carries information.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from secateur.core import Criterion, Group, GroupView, MapStatistics, OutputMoments
from secateur.criteria import EVIDENCE, is_ours, label, reads, resolve
from secateur.errors import BadRequest, CannotPrune, SecateurWarning
from secateur.views import view


def score(
    groups: Sequence[Group],
    tensors: Mapping[str, torch.Tensor],
    criterion: str | Criterion,
    *,
    n_keep: Mapping[str, int] | None = None,
    seed: int = 0,
    evidence: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, torch.Tensor]:
    """The scores of every group, ``{name: [C] float64}``, higher is kept longer.

    ``tensors``: state_dict name -> tensor. ``n_keep``: how many channels of a group will stay, where it is known, for
    criteria whose scores depend on it (``criteria.needs_width``).
    ``evidence``: what ``calibration.collect`` measured, ``{group name: {field: value}}``, for a criterion that looks at
    activations or gradients. Raises ``BadRequest`` for an unknown criterion, for one that returns anything but ``[C]``
    real numbers and for evidence that is missing or another group's, and ``CannotPrune`` for weights or scores that
    are not finite. Warns (``SecateurWarning``) of groups whose channels all score the same.
    """
    function, fields, name = resolve(criterion), reads(criterion), label(criterion)
    scores: dict[str, torch.Tensor] = {}
    for group in groups:
        kept = None if n_keep is None else n_keep.get(group.name)
        known = _evidence(group, fields, evidence or {}, name)
        seen = view(group, tensors, n_keep=kept, seed=seed, fields=fields, evidence=known)
        if not is_ours(function):  # it might write into the user's own weights, or into what others will be shown
            seen = _copied(seen)
        scores[group.name] = _checked(_call(function, seen, name), group, name)
    _warn_of_ties(scores, name)
    return scores


def _warn_of_ties(scores: Mapping[str, torch.Tensor], label: str) -> None:
    """A criterion that says nothing of a group would keep its first channels without a word."""
    tied = [name for name, own in scores.items() if len(own) > 1 and bool((own == own[0]).all())]
    if tied:
        shown = ", ".join(map(repr, tied[:5])) + (f" and {len(tied) - 5} more" if len(tied) > 5 else "")
        warnings.warn(
            f"criterion {label!r} scores all channels of a group the same, in {len(tied)} of {len(scores)} groups "
            f"({shown}): it does not tell which of them matter, and their first channels stay\n"
            "  do: exclude these groups, or use a criterion that tells their channels apart, such as 'l1' (zeros say "
            "nothing behind a SiLU, deviations nothing of maps of one position, scales nothing before training, and no "
            "criterion tells equal filters apart, nor a distance two of them)",
            SecateurWarning,
            stacklevel=6,
        )


def _evidence(
    group: Group, fields: Collection[str], evidence: Mapping[str, Mapping[str, Any]], label: str
) -> dict[str, Any]:
    """What was measured of ``group``, as far as the criterion reads it, checked."""
    found: dict[str, Any] = {}
    for field in (f for f in fields if f in EVIDENCE):
        value = evidence.get(group.name, {}).get(field)
        if value is None:
            also = " and loss=" if field == "products" else ""
            raise BadRequest(
                f"criterion {label!r} reads the {field} of group {group.name!r}, which were not measured\n"
                f"  do: pass data={also} to plan, or evidence= from collect to score"
            )
        rows = _channels(value)
        if rows != group.channels:
            raise BadRequest(
                f"the {field} given for group {group.name!r} are of {rows} channels, and it has {group.channels}\n"
                "  do: collect them anew, on the network that is scored"
            )
        found[field] = value
    return found


def _channels(value: torch.Tensor | MapStatistics | OutputMoments) -> int:
    if isinstance(value, OutputMoments):
        return value.gram.shape[-1]
    return (value if isinstance(value, torch.Tensor) else value.mean).shape[0]


def _copied(seen: GroupView) -> GroupView:
    """The same view on tensors of its own."""

    def own(value: Any) -> Any:
        if isinstance(value, (MapStatistics, OutputMoments)):
            return replace(value, **{key: own(v) for key, v in vars(value).items()})
        return value.clone() if isinstance(value, torch.Tensor) else value

    return replace(seen, **{key: own(value) for key, value in vars(seen).items()})


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
        raise CannotPrune(
            f"{where} returned {bad} of {group.channels} scores that are not finite (NaN or infinity)\n"
            "  do: look whether its weights are so large that sums of their squares overflow, or mend the criterion"
        )
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
