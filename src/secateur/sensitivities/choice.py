"""From what a sensitivity analysis found to what is pruned: ratios under a tolerance, and losses for a budget.

Li et al., "Pruning Filters for Efficient ConvNets" (ICLR 2017), section 3.2, choose by eye: one ratio for all layers
of a stage, a smaller one or none for those that are sensitive. Here a number says what sensitive means: how far the
score may fall below the dense network's when a group alone is pruned. What several groups lose together is not the sum
of what each loses alone, so a tolerance says where to begin, and not what the pruned network will score.

The scores decide that were measured without retraining. ``R`` ratios, ``n`` channels of a group.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import takewhile
from numbers import Real
from typing import Literal

import numpy as np

from secateur.allocation import matching
from secateur.errors import BadRequest, nearest
from secateur.sensitivities.curves import GroupCurve, Sensitivity

PER = ("group", "stage")
SLACK = 1e-9
"""What a difference of two scores may be off by for being floating point."""


def ratios_from(
    found: Sensitivity,
    *,
    tolerance: float,
    per: Literal["group", "stage"] = "group",
    skip: str | Sequence[str] = (),
    quorum: float = 0.5,
) -> dict[str, float]:
    """``{group name: ratio}`` of every group that was measured, for ``sc.plan(ratios=...)``; 0.0 keeps it whole.

    ``tolerance``: how far a group's score may lie below the dense network's, in the units of the scores (0.02: two
    points of accuracy). ``per="group"``: the largest measured ratio up to which the score never fell further.
    ``per="stage"``: one ratio for all groups whose maps have the same size, as in the paper; the largest at which at
    least the fraction ``quorum`` of the stage's groups stays within the tolerance. The others of the stage are skipped
    (ratio 0). ``skip``: names or globs of groups that stay whole, and have no say in their stage's ratio.

    Raises ``BadRequest`` for what is out of range, and for a name or glob that no measured group has.
    """
    _check_tolerance(tolerance, found)
    if per not in PER:
        raise BadRequest(f"per={per!r} means nothing{nearest(str(per), PER)}")
    if not (_is_number(quorum) and 0 < quorum <= 1):
        raise BadRequest(f"quorum={quorum!r} is not a fraction in (0, 1]: it says how many of a stage have to agree")
    skipped = _named(found, skip)
    limits = {c.group: largest_ratio(found, c, tolerance) for c in found.curves if c.group not in skipped}
    if per == "stage":
        limits = _stages_agreed(found, limits, quorum)
    return {curve.group: limits.get(curve.group, 0.0) for curve in found.curves}


def largest_ratio(found: Sensitivity, curve: GroupCurve, tolerance: float) -> float:
    """The largest measured ratio up to which the score of ``curve`` never fell more than ``tolerance`` below dense; 0.0
    where the first one is too much."""
    within = takewhile(
        lambda at: found.dense - at[1] <= tolerance + SLACK, zip(found.ratios, curve.scores, strict=True)
    )
    return max((ratio for ratio, _ in within), default=0.0)


def losses(found: Sensitivity) -> dict[str, np.ndarray]:
    """``{group name: [n + 1]}``: how far the score is predicted to fall if the group alone keeps ``0 ... n`` channels.

    Linear between the measured widths, from 0 at the dense one. What falls and rises again as more channels go counts
    as fallen, and a score above the dense one as no gain: with few images both are mostly chance. Below the narrowest
    width that was measured nothing is known, and the loss is infinite, as it is at 0.
    """
    return {curve.group: _drops(found, curve) for curve in found.curves}


def _drops(found: Sensitivity, curve: GroupCurve) -> np.ndarray:
    worst = {curve.channels: 0.0}  # of ratios that keep equally many, the worse one counts
    for keep, score in zip(curve.keep, curve.scores, strict=True):
        if keep < curve.channels:
            worst[keep] = max(worst.get(keep, 0.0), found.dense - score)
    widths = np.array(sorted(worst))
    drops = np.maximum.accumulate([worst[width] for width in widths.tolist()[::-1]])[::-1]
    table = np.interp(np.arange(curve.channels + 1), widths, drops)
    table[: widths[0]] = np.inf
    return np.asarray(table)


def _stages_agreed(found: Sensitivity, limits: Mapping[str, float], quorum: float) -> dict[str, float]:
    """One ratio a stage: the largest at which enough of its groups are still within their own ``limits``."""
    stages: dict[str, list[str]] = {}
    for curve in found.curves:
        if curve.group in limits:
            stages.setdefault(curve.stage, []).append(curve.group)
    agreed: dict[str, float] = {}
    for members in stages.values():
        wanted = max(1, math.ceil(quorum * len(members) - SLACK))
        ratio = sorted((limits[name] for name in members), reverse=True)[wanted - 1]
        agreed |= {name: ratio if limits[name] >= ratio else 0.0 for name in members}
    return agreed


def _named(found: Sensitivity, patterns: str | Sequence[str]) -> set[str]:
    """The measured groups of those names or, where there is none, that match those globs."""
    names = [curve.group for curve in found.curves]
    chosen: set[str] = set()
    for pattern in (patterns,) if isinstance(patterns, str) else patterns:
        if not isinstance(pattern, str):
            raise BadRequest(f"skip: {pattern!r} is not a group's name or a glob over group names")
        matched = matching(pattern, names)
        if not matched:
            raise BadRequest(
                f"skip: no group that was measured is called, or matches, {pattern!r}{nearest(pattern, names)}"
            )
        chosen.update(matched)
    return chosen


def _check_tolerance(tolerance: object, found: Sensitivity) -> None:
    if not (_is_number(tolerance) and tolerance >= 0):  # type: ignore[operator]
        raise BadRequest(
            f"tolerance={tolerance!r} is not a number of 0 or more\n"
            "  do: say how far the score may fall below the dense network's; 0.02 is two points of accuracy"
        )
    if 0 < found.dense <= 1 <= tolerance:  # type: ignore[operator]
        raise BadRequest(
            f"tolerance={tolerance!r} is more than the dense network's whole score, {found.dense:.4f}\n"
            f"  do: give it in the units of the scores; {tolerance} points of accuracy are {tolerance / 100:g}"  # type: ignore[operator]
        )


def _is_number(value: object) -> bool:
    return not isinstance(value, bool) and isinstance(value, Real) and math.isfinite(value)
