"""Meeting a budget: which widths, out of those that the groups may take, come nearest to it from below.

The choice is one list of *units* (the channels between two allowed widths of a group) in the order in which they go;
the shortest prefix that meets the budget goes, and what then still fits is put back, last removed first. Where units
are so coarse that this ends below 0.99 of the budget, other combinations are tried: all of them if they are few, else
by a local search that exchanges units.

Where it is known what each group loses at each width (a sensitivity analysis), no order is needed: what is looked for
is the combination that meets the budget with the least sum of losses (``tradeoffs.py``).

The order needs an exchange rate between groups. ``global``: a unit is worth the share of the importance that its group
still holds, as ``log(before / after)``, times the number of layers that write the group (a residual stage is many
layers pruned as one), per unit of what removing a channel of the dense network saves. A share is free of scale, and
grows as the group gets thinner, so that no layer collapses merely because its channels are expensive. ``uniform``: one
ratio for all groups; a unit goes as soon as the ratio does not round to a wider one.

A peak, as memory is, has no such rate: what is not alive at the worst moment saves nothing, and of two moments that are
equally bad no group lowers both, perhaps. It is met when every moment is, which is a problem of covering: next goes the
unit that loses least per byte that it takes off what still exceeds the budget, of all moments together. What in the end
was not needed is put back like anything else, so that nothing goes that does not help.

Letters: ``G`` groups, ``U`` units, ``B`` choices, ``S`` sums of a peak.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from secateur.core import Budget, Group
from secateur.costs import Cost, Peak, Polynomial, evaluate, marginals
from secateur.errors import BadRequest, Unreachable
from secateur.scores import normalise
from secateur.tradeoffs import NEAR, Menu, best_of_all, few, least_loss, menu_of

TRIES = 300
"""So many steps the search among more combinations takes at most."""


UNITS = {"memory": ("bytes", 0), "latency": ("milliseconds", 4)}
"""What a budget is a number of and with how many decimals it is told, where not macs, params or channels."""


@dataclass(frozen=True)
class Ladder:
    """The widths groups may take, ``[G]`` each: dense at level 0, ``top``, ``top - step`` ... at ``levels``."""

    dense: np.ndarray
    top: np.ndarray
    step: np.ndarray
    levels: np.ndarray

    def width(self, level: np.ndarray) -> np.ndarray:
        """Kept counts ``[..., G]`` at ``level [..., G]``."""
        return np.where(level == 0, self.dense, self.top - (level - 1) * self.step)


def ladder_of(groups: Sequence[Group], min_channels: int, round_to: int | Sequence[int]) -> Ladder:
    """The widths between ``min_channels`` and dense that are multiples of ``round_to``, and dense itself.

    ``round_to``: for all groups, or ``[G]``, for each. Both are in channels of the writing layer, of which a channel of
    a group stands for ``partitions``.
    """
    dense = np.array([g.channels for g in groups], dtype=np.int64)
    filters = np.array([g.partitions for g in groups], dtype=np.int64)
    multiple = np.asarray(round_to, dtype=np.int64)
    step = multiple // np.gcd(multiple, filters)
    fewest = -(-min_channels // filters)
    lowest = -(-fewest // step) * step
    top = (dense - 1) // step * step
    return Ladder(dense, top, step, np.where(lowest < dense, (top - lowest) // step + 1, 0))


@dataclass(frozen=True)
class Problem:
    """What a budget is met with: ``width [G]`` is where each group starts, ``free [G]`` whether it may shrink."""

    groups: Sequence[Group]
    scores: Mapping[str, torch.Tensor]
    cost: Cost
    width: np.ndarray
    free: np.ndarray
    ladder: Ladder

    def keep(self, level: np.ndarray) -> np.ndarray:
        """Kept counts at ``level [..., G]``, the level of the free groups on the ladder."""
        return np.where(self.free, self.ladder.width(level), self.width)

    def cost_at(self, level: np.ndarray) -> float:
        """The cost at ``level [G]``."""
        return evaluate(self.cost, self.keep(level))


@dataclass(frozen=True)
class Units:
    """Units in the order in which they go, ``[U]`` each: unit ``u`` takes ``group[u]`` from ``level[u]`` to the next.
    ``loss [U]``: what is lost by it."""

    group: np.ndarray
    level: np.ndarray
    loss: np.ndarray


def meet(
    problem: Problem,
    budget: Budget,
    allocation: str,
    n_excluded: int,
    locked: Sequence[Group],
    *,
    losses: Mapping[str, np.ndarray] | None = None,
) -> np.ndarray:
    """The kept counts ``[G]`` that come nearest to the budget from below.

    ``allocation``: the order in which units go, global or uniform. ``losses``: ``{group name: [channels + 1]}``, what
    is lost where a group keeps so many channels, infinite where that is not known; then neither order nor scores
    matter, but the sum of losses is the least (or nearly: ``tradeoffs.py``) within [0.99, 1.00] of the budget, and a
    free group that is not listed stays whole. ``n_excluded`` and ``locked`` only explain.

    Raises ``Unreachable``, with the reachable range and what bounds it, and ``BadRequest`` for losses of other groups.
    """
    if losses is not None:
        problem = replace(problem, ladder=_known(problem, losses))
    n_groups = len(problem.groups)
    dense = evaluate(problem.cost, problem.ladder.dense)
    target = float(budget.at_most) if budget.at_most is not None else float(budget.keep or 0) * dense
    none = np.zeros(n_groups, dtype=np.int64)
    if problem.cost_at(none) <= target:
        return problem.keep(none)
    lowest = problem.cost_at(problem.ladder.levels)
    if lowest > target:
        raise Unreachable(_why_unreachable(problem, budget, target, dense, n_excluded, locked, losses))
    if losses is not None:
        level = least_loss(_menu(problem, losses), target)
        return problem.keep(level if problem.cost_at(level) >= NEAR * target else _searched(problem, level, target))
    units = _units(problem, allocation, target)
    fewest, most = 0, len(units.group)
    while most - fewest > 1:
        middle = (fewest + most) // 2
        too_much = problem.cost_at(_levels(units, middle, n_groups)) > target
        fewest, most = (middle, most) if too_much else (fewest, middle)
    level = _fill(problem, units, _levels(units, most, n_groups), target)
    if problem.cost_at(level) < NEAR * target:
        level = _combine(problem, units, level, target)
    return problem.keep(level)


def _levels(units: Units, count: int, n_groups: int) -> np.ndarray:
    return np.bincount(units.group[:count], minlength=n_groups)


def _units(problem: Problem, allocation: str, target: float) -> Units:
    """All units of the free groups, in the order in which they go."""
    normal = normalise(problem.scores)
    price = _slopes(problem)
    group, level, first, second, loss = [], [], [], [], []
    for i in np.flatnonzero(problem.free & (problem.ladder.levels > 0)).tolist():
        of = problem.groups[i]
        steps = np.arange(problem.ladder.levels[i] + 1)
        dense, top, step = (int(a[i]) for a in (problem.ladder.dense, problem.ladder.top, problem.ladder.step))
        widths = np.where(steps == 0, dense, top - (steps - 1) * step)
        ascending = np.sort(normal[of.name].cpu().numpy())
        left = np.cumsum(ascending[::-1])[widths - 1]
        with np.errstate(divide="ignore", invalid="ignore"):
            share = np.where(left[1:] > 0, np.log(left[:-1] / left[1:]), 0.0) * _layers(of)
            worth = share / (-np.diff(widths) * price[i]) if price[i] > 0 else np.full(len(share), np.inf)
        ratio = 1 - (widths[1:] + 1) / dense  # Above this ratio the rule of ratios keeps widths[1:] or less.
        # Rounding must not put a unit before one that goes earlier in its own group.
        worth = np.maximum.accumulate(worth)
        group.append(np.full(len(share), i))
        level.append(steps[:-1])
        first.append(ratio if allocation == "uniform" else worth)
        second.append(worth)
        loss.append(share)
    groups, levels = np.concatenate(group), np.concatenate(level)
    order = np.lexsort((levels, groups, np.concatenate(second), np.concatenate(first)))
    units = Units(groups[order], levels[order], np.concatenate(loss)[order])
    if allocation == "global" and isinstance(problem.cost, Peak):
        return _by_turns(problem, problem.cost, units, target)
    return units


def _by_turns(problem: Problem, cost: Peak, units: Units, target: float) -> Units:
    """The units in the order in which they go to meet a peak; those that need not go follow as they were."""
    numbers = [np.flatnonzero(units.group == g) for g in range(len(problem.groups))]
    level, taken = np.zeros(len(numbers), dtype=np.int64), []
    left = np.array([len(own) for own in numbers])
    loss = np.array([units.loss[own[0]] if len(own) else 0.0 for own in numbers])
    while True:
        keep = problem.keep(level)
        over = np.maximum(cost.sums(keep[None])[0] - target, 0.0)
        steps = np.where(left > level, keep - problem.keep(np.minimum(level + 1, left)), 0)
        gain = np.minimum(cost.falls(keep, steps), over).sum(axis=1)
        if not gain.any():
            break
        g = int(np.argmin(np.divide(loss, gain, out=np.full(len(gain), np.inf), where=gain > 0)))
        taken.append(numbers[g][level[g]])
        level[g] += 1
        loss[g] = units.loss[numbers[g][min(level[g], left[g] - 1)]]
    rest = np.setdiff1d(np.arange(len(units.group)), taken)
    order = np.concatenate([np.array(taken, dtype=np.int64), rest])
    return Units(units.group[order], units.level[order], units.loss[order])


def _slopes(problem: Problem) -> np.ndarray:
    """What a channel of each group saves ``[G]`` while all others are as wide as they start.

    A polynomial is smooth, and the first channel tells. Any other cost may fall in steps, of which a single channel
    sees nothing or all: there it is the mean over all that the group may lose.
    """
    if isinstance(problem.cost, Polynomial):
        return marginals(problem.cost, problem.width)
    span = problem.width - problem.keep(problem.ladder.levels)
    return marginals(problem.cost, problem.width, span) / np.maximum(span, 1)


def _layers(group: Group) -> int:
    """How many weights write the group: the layers that lose a filter with each channel."""
    return max(1, len({s.tensor for s in group.slices if s.role == "writes"}))


def _prices(problem: Problem, level: np.ndarray, target: float) -> tuple[np.ndarray, np.ndarray]:
    """What the next unit of each group costs to put back ``[G]``, and whether there is none or it does not fit."""
    keep = problem.keep(level)
    wider = problem.keep(np.maximum(level - 1, 0)) - keep
    price = -marginals(problem.cost, keep, -wider)
    return price, (wider == 0) | (price > target - evaluate(problem.cost, keep))


def _fill(problem: Problem, units: Units, level: np.ndarray, target: float) -> np.ndarray:
    """``level [G]`` with units put back, last removed first, until none fits.

    While widths grow, prices grow and room shrinks: a group whose next unit does not fit is done for good.
    """
    level = level.copy()
    done = np.zeros(len(level), dtype=bool)
    while True:
        done |= _prices(problem, level, target)[1]
        back = np.flatnonzero((units.level < level[units.group]) & ~done[units.group])[::-1]
        if not len(back):
            return level
        fits, not_all = 0, len(back) + 1
        while not_all - fits > 1:
            middle = (fits + not_all) // 2
            cheap = problem.cost_at(level - np.bincount(units.group[back[:middle]], minlength=len(level))) <= target
            fits, not_all = (middle, not_all) if cheap else (fits, middle)
        level -= np.bincount(units.group[back[:fits]], minlength=len(level))
        if fits < len(back):
            done[units.group[back[fits]]] = True


def _combine(problem: Problem, units: Units, level: np.ndarray, target: float) -> np.ndarray:
    """A combination of widths nearer to the budget than ``level [G]``, where there is one."""
    lost = [np.concatenate([[0.0], np.cumsum(units.loss[units.group == i])]) for i in range(len(level))]
    menu = menu_of(problem.cost, _widths(problem), lost)
    return best_of_all(menu, target) if few(menu) else _searched(problem, level, target)


def _widths(problem: Problem) -> list[np.ndarray]:
    """The widths of each group from the widest on; one for a group that is not free."""
    tops = np.where(problem.free, problem.ladder.levels, 0)
    levels = np.minimum(np.arange(tops.max(initial=0) + 1)[:, None], tops)
    return [own[: top + 1] for own, top in zip(problem.keep(levels).T, tops, strict=True)]


def _known(problem: Problem, losses: Mapping[str, np.ndarray]) -> Ladder:
    """The ladder without the widths at which the loss is not known."""
    levels = np.zeros_like(problem.ladder.levels)
    for i, own in enumerate(_widths(problem)):
        group = problem.groups[i]
        lost = losses.get(group.name)
        if lost is not None and len(lost) != group.channels + 1:
            raise BadRequest(
                f"group {group.name!r} has {group.channels} channels, and its losses are known for {len(lost) - 1}\n"
                "  do: measure the sensitivity with the same residual and prefer as you plan with"
            )
        if lost is not None and problem.free[i]:
            levels[i] = np.isfinite(lost[own]).sum() - 1
    return replace(problem.ladder, levels=np.maximum(levels, 0))


def _menu(problem: Problem, losses: Mapping[str, np.ndarray]) -> Menu:
    widths = _widths(problem)
    lost = [
        losses[group.name][own] if len(own) > 1 else np.zeros(1)
        for group, own in zip(problem.groups, widths, strict=True)
    ]
    return menu_of(problem.cost, widths, lost)


def _searched(problem: Problem, level: np.ndarray, target: float) -> np.ndarray:
    """A choice nearer to the budget than ``level [G]``, by a local search: take up to four units, put back what fits.

    Steps that change nothing are followed, or it would stick where two units must go for one. The draws are seeded.
    """
    draw = np.random.default_rng(0)
    at, reached = level, problem.cost_at(level)
    start = reached
    for _ in range(TRIES):
        trial = at.copy()
        for _ in range(int(draw.integers(1, 5))):
            left = np.flatnonzero(problem.free & (trial < problem.ladder.levels))
            if len(left):
                trial[draw.choice(left)] += 1
        while not (done := _prices(problem, trial, target)[1]).all():
            trial[draw.choice(np.flatnonzero(~done))] -= 1
        cost = problem.cost_at(trial)
        if reached <= cost <= target:
            at, reached = trial, cost
        if reached >= NEAR * target:
            break
    return at if reached > start else level


def _why_unreachable(
    problem: Problem,
    budget: Budget,
    target: float,
    dense: float,
    n_excluded: int,
    locked: Sequence[Group],
    losses: Mapping[str, np.ndarray] | None,
) -> str:
    """What the budget asks for, what can be reached, and what stands in the way."""
    least, most = problem.cost_at(problem.ladder.levels), problem.cost_at(np.zeros_like(problem.width))
    held = {group.name for group in locked}
    n_fixed = sum(g.name not in held for g, free in zip(problem.groups, problem.free, strict=True) if not free)
    n_fixed -= n_excluded
    bounds = [f"min_channels={budget.min_channels}" if budget.min_channels > 1 else "one channel of every group stays"]
    if budget.round_to > 1:
        bounds.append(f"round_to={budget.round_to}")
    if losses is not None:
        bounds.append("no group is narrower than the sensitivity analysis has tried it")
        unknown = [
            g.name for g, free in zip(problem.groups, problem.free, strict=True) if free and g.name not in losses
        ]
        if unknown:
            bounds.append(f"{len(unknown)} of {len(problem.groups)} groups were not analysed ({unknown[0]!r})")
    if n_excluded:
        bounds.append(f"{n_excluded} of {len(problem.groups)} groups excluded")
    if n_fixed:
        bounds.append(f"{n_fixed} of {len(problem.groups)} groups fixed by ratios")
    if locked:
        bounds.append(f"{len(locked)} groups locked ({locked[0].name!r}: {locked[0].locked})")
    unit, digits = UNITS.get(budget.of, (budget.of, 0))
    return (
        f"no choice of channels has at most {target:,.{digits}f} {unit}, {target / dense:.4f} of the dense network\n"
        f"  reachable: {least:,.{digits}f} to {most:,.{digits}f} {unit}, {least / dense:.4f} to {most / dense:.4f}\n"
        f"  bounded by: {'; '.join(bounds)}\n"
        "  do: ask for a budget in that range, or loosen what bounds it"
    )
