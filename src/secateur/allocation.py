"""Which channels stay: from ratios, from a budget, or from both.

Within a group the order is the criterion's: the lowest score goes first, ties keep the lower index. How many go is said
by ``ratios`` (this file: what may be asked for, and what it means) or chosen to meet a budget (``budgets.py``).

Widths are rounded and bounded in channels of the layer that writes them: in a convolution of 32 groups, where a channel
of the group stands for 32 filters, any width is a multiple of 32.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from numbers import Integral, Real

import numpy as np
import torch

from secateur.budgets import UNITS, Ladder, Problem, ladder_of, meet
from secateur.core import Budget, Group
from secateur.costs import Cost, make_cost
from secateur.errors import BadRequest, CannotPrune, nearest

ALLOCATIONS = ("global", "uniform")
OF = ("macs", "params", "channels", "memory", "latency")


def allocate(
    groups: Sequence[Group],
    scores: Mapping[str, torch.Tensor],
    *,
    ratios: float | Mapping[str, float] | None = None,
    budget: Budget | None = None,
    cost: Cost | None = None,
    allocation: str = "global",
    exclude: str | Sequence[str] = (),
    min_channels: int = 1,
    round_to: int | Mapping[str, int] = 1,
    locked: Sequence[Group] = (),
    whole: Mapping[str, str] | None = None,
    losses: Mapping[str, np.ndarray] | None = None,
) -> dict[str, tuple[int, ...]]:
    """The sorted indices of the channels that each group keeps; every group is listed.

    ``scores``: ``{group name: [C]}``, higher is kept longer, for all groups that may get narrower. ``ratios``: the
    fraction removed, in [0, 1), for all groups, or ``{name or glob: ratio or absolute width}`` (a name goes before
    globs, among globs the first that matches counts; a width counts channels of the group; a group of ``n`` keeps
    ``floor(n (1 - ratio) + 1e-9)``, rounded up to ``round_to``). ``budget`` and ``cost`` (index = place in ``groups``;
    not needed for channels): groups that ``ratios`` names keep that width and the others meet the budget. ``exclude``:
    names or globs that keep everything, whatever ``ratios`` says. ``round_to``: what widths are multiples of, or
    ``{group: that}`` (1 for groups not listed) where costs fall in steps. ``locked``: only to tell why they cannot be
    asked for. ``whole``: ``{group: why}`` of free groups that a rule leaves whole. ``losses``: ``{group: [C + 1]}``,
    what is predicted to be lost at each width; the budget is then met with the least sum of them (see
    ``budgets.meet``), and ``allocation`` does not count.

    Raises ``BadRequest`` for what is out of range, contradictory or matches nothing, ``CannotPrune`` for a request
    that touches only groups which are locked or stay whole, and ``Unreachable``, with the reachable range, for a budget
    that cannot be met.
    """
    _check_request(ratios, budget, allocation)
    min_channels, multiples = _bounds(groups, budget, min_channels, round_to)
    whole = whole or {}
    excluded = excluded_groups(groups, exclude, locked) - whole.keys()
    fixed = fixed_widths(groups, ratios, locked, whole)
    ladder = ladder_of(groups, min_channels, multiples)
    width = np.array([g.channels for g in groups], dtype=np.int64)
    free = np.ones(len(groups), dtype=bool)
    for i, group in enumerate(groups):
        if group.name in excluded or group.name in whole:
            free[i] = False
        elif group.name in fixed:
            width[i], free[i] = _width(group, fixed[group.name], ladder, i), False
    narrower = [width[i] < group.channels or (free[i] and budget is not None) for i, group in enumerate(groups)]
    _check_scores([group for group, needed in zip(groups, narrower, strict=True) if needed], scores)
    if budget is not None:
        if budget.of == "channels":
            cost = _channel_cost(groups)
        elif cost is None:
            raise BadRequest(f"a budget of {budget.of} needs the cost of the network as a function of its widths")
        held = [replace(g, locked=whole[g.name]) for g in groups if g.name in whole]
        problem = Problem(groups, scores, cost, width, free, ladder)
        width = meet(problem, budget, allocation, len(excluded), (*held, *locked), losses=losses)
    return {
        g.name: highest(scores[g.name], int(w)) if w < g.channels else tuple(range(g.channels))
        for g, w in zip(groups, width, strict=True)
    }


def matching(pattern: str, names: Collection[str]) -> list[str]:
    """The name itself if it is one of ``names``, else those that match it as a glob."""
    return [pattern] if pattern in names else [name for name in names if fnmatchcase(name, pattern)]


def width_at(channels: int, ratio: float) -> int:
    """How many of ``channels`` are kept where the fraction ``ratio`` goes: rounded down, and at least one."""
    return max(1, math.floor(channels * (1 - ratio) + 1e-9))


def highest(scores: torch.Tensor, count: int) -> tuple[int, ...]:
    """The indices of the ``count`` highest scores, sorted; of equal ones the lower indices."""
    order = np.argsort(-scores.detach().cpu().double().numpy(), kind="stable")
    return tuple(np.sort(order[:count]).tolist())


# What may be asked for -------------------------------------------------------------------------------------------


def _check_request(ratios: object, budget: object, allocation: str) -> None:
    if allocation not in ALLOCATIONS:
        raise BadRequest(f"there is no allocation {allocation!r}{nearest(str(allocation), ALLOCATIONS)}")
    if ratios is None and budget is None:
        raise BadRequest("nothing says how much to prune\n  do: give ratios, or a budget such as Budget(keep=0.5)")
    if budget is not None:
        check_budget(budget)
        if ratios is not None and not isinstance(ratios, Mapping):
            raise BadRequest(
                f"ratios={ratios!r} fixes every group, so nothing is left to meet the budget\n"
                "  do: give one of them, or ratios for some groups as {pattern: ratio}"
            )


def _check_scores(groups: Sequence[Group], scores: Mapping[str, torch.Tensor]) -> None:
    for group in groups:
        values = scores.get(group.name)
        if values is None:
            raise BadRequest(f"group {group.name!r} has no scores{nearest(group.name, scores)}")
        if tuple(values.shape) != (group.channels,) or not bool(torch.isfinite(values).all()):
            raise BadRequest(
                f"the scores of group {group.name!r} are not {group.channels} finite numbers: "
                f"shape {list(values.shape)}, {int(torch.isfinite(values).sum())} finite"
            )


def check_budget(budget: object) -> None:
    """That a budget is one, whatever the network. Raises ``BadRequest``."""
    if not isinstance(budget, Budget):
        raise BadRequest(f"a budget is a Budget(keep=... or at_most=...), not {budget!r}")
    if budget.of not in OF:
        raise BadRequest(f"a budget of {budget.of!r} is not known; known: {', '.join(OF)}")
    unit, _ = UNITS.get(budget.of, (budget.of, 0))
    if (budget.keep is None) == (budget.at_most is None):
        raise BadRequest(
            f"a budget has exactly one of keep (a fraction) and at_most (a number of {unit}), "
            f"not keep={budget.keep!r} with at_most={budget.at_most!r}"
        )
    if budget.keep is not None and not (_is_number(budget.keep) and 0 < budget.keep <= 1):
        raise BadRequest(f"Budget.keep={budget.keep!r} is not a fraction in (0, 1]: it says what stays")
    if budget.at_most is not None and not (_is_number(budget.at_most) and budget.at_most > 0):
        raise BadRequest(f"Budget.at_most={budget.at_most!r} is not a positive number of {unit}")
    _check_run(budget)


def _check_run(budget: Budget) -> None:
    """That engine, batch and threads are said where they mean something, and only there."""
    for name in ("batch", "threads"):
        if not _is_count(getattr(budget, name)):
            raise BadRequest(f"Budget.{name}={getattr(budget, name)!r} is not a whole number, 1 or more")
    if budget.of == "latency":
        if not isinstance(budget.engine, str):
            raise BadRequest(
                f"a latency is that of an engine, and Budget.engine is {budget.engine!r}\n"
                "  do: say which, as in Budget(keep=0.5, of='latency', engine='onnxruntime')"
            )
        return
    unmeant = {"engine": budget.engine, "threads": budget.threads, "batch": budget.batch}
    unmeant = {name: value for name, value in unmeant.items() if value not in (None, 1)}
    if budget.of == "memory":
        unmeant.pop("batch", None)
    for name, value in unmeant.items():
        raise BadRequest(
            f"Budget.{name}={value!r} means nothing to a budget of {budget.of}, which is counted and not timed\n"
            f"  do: leave {name} out, or ask for of='latency'"
        )


def _is_number(value: object) -> bool:
    return not isinstance(value, bool) and isinstance(value, Real) and math.isfinite(value)


def _is_count(value: object) -> bool:
    return not isinstance(value, bool) and isinstance(value, Integral) and int(value) >= 1


def _bounds(
    groups: Sequence[Group], budget: Budget | None, min_channels: int, round_to: int | Mapping[str, int]
) -> tuple[int, list[int]]:
    """``min_channels`` and what the widths of each group are multiples of, both of which the budget may bound too."""
    by_group = round_to if isinstance(round_to, Mapping) else None
    pairs = {"min_channels": [min_channels], "round_to": [1 if isinstance(round_to, Mapping) else round_to]}
    if budget is not None:
        pairs["min_channels"].append(budget.min_channels)
        pairs["round_to"].append(budget.round_to)
    for name, values in pairs.items():
        for value in values:
            if not _is_count(value):
                raise BadRequest(f"{name}={value!r} is not a whole number of channels, 1 or more")
    chosen = {value for value in pairs["round_to"] if value != 1}
    if len(chosen) > 1:
        raise BadRequest(f"round_to={round_to} contradicts Budget.round_to={max(chosen - {round_to})}\n  do: give one")
    most = int(max(pairs["round_to"]))
    return int(max(pairs["min_channels"])), [math.lcm(most, own) for own in _multiples(groups, by_group or {})]


def _multiples(groups: Sequence[Group], round_to: Mapping[str, int]) -> list[int]:
    names = [group.name for group in groups]
    for name, value in round_to.items():
        if name not in names:
            raise BadRequest(f"round_to: there is no group {name!r}{nearest(str(name), names)}")
        if not _is_count(value):
            raise BadRequest(f"round_to[{name!r}]={value!r} is not a whole number of channels, 1 or more")
    return [int(round_to.get(name, 1)) for name in names]


def _matches(
    pattern: object, groups: Sequence[Group], locked: Sequence[Group], what: str
) -> tuple[list[Group], list[Group]]:
    """The free and the locked groups of that name, or if there is none, that match the glob."""
    if not isinstance(pattern, str):
        raise BadRequest(f"{what}: {pattern!r} is not a group's name or a glob over group names")
    names = [g.name for g in (*groups, *locked)]
    found = set(matching(pattern, names))
    if not found:
        raise BadRequest(f"{what}: no group is called, or matches, {pattern!r}{nearest(pattern, names)}")
    return [g for g in groups if g.name in found], [g for g in locked if g.name in found]


def excluded_groups(
    groups: Sequence[Group], exclude: str | Sequence[str], locked: Sequence[Group], *, what: str = "exclude"
) -> set[str]:
    """The names of the free groups that names or globs mean, those that keep everything. To exclude what is locked
    anyway is no mistake. ``what``: what the option is called."""
    patterns = (exclude,) if isinstance(exclude, str) else exclude
    return {g.name for pattern in patterns for g in _matches(pattern, groups, locked, what)[0]}


def fixed_widths(
    groups: Sequence[Group],
    ratios: float | Mapping[str, float] | None,
    locked: Sequence[Group],
    whole: Mapping[str, str] | None = None,
) -> dict[str, float]:
    """``{group name: ratio or width}`` of the groups that ``ratios`` speaks of, but for those that stay ``whole``.

    A glob passes over what stays whole if it matches anything else; so does one ratio for all groups.
    """
    whole = whole or {}
    if ratios is None:
        return {}
    if not isinstance(ratios, Mapping):
        _check_ratio(ratios, "ratios")
        return {g.name: float(ratios) for g in groups if g.name not in whole}
    named: dict[str, float] = {}
    matched: dict[str, float] = {}
    for pattern, value in ratios.items():
        free, bound = _matches(pattern, groups, locked, "ratios")
        if not free:
            raise CannotPrune(
                f"ratios: {pattern!r} asks for group {bound[0].name!r} ({bound[0].channels} channels), "
                f"which is locked\n  {bound[0].locked}\n  do: leave it out; find_groups lists the groups that are free"
            )
        if not _is_count(value):
            _check_ratio(value, f"ratios[{pattern!r}]", " or a width of 1 or more (an int)")
        held = [g for g in free if g.name in whole]
        if len(held) == len(free) and any(value not in (0, g.channels) for g in held):
            raise CannotPrune(
                f"ratios: {pattern!r} asks for group {held[0].name!r} ({held[0].channels} channels)\n"
                f"  {whole[held[0].name]}\n  do: leave it out, or take residual='coupled', where it is free"
            )
        for group in free if not held else (g for g in free if g.name not in whole):
            (named if group.name == pattern else matched).setdefault(group.name, value)
    return {**matched, **named}


def _check_ratio(value: object, where: str, also: str = "") -> None:
    if not (_is_number(value) and 0 <= value < 1):  # type: ignore[operator]
        raise BadRequest(
            f"{where}: {value!r} is not a ratio in [0, 1){also}\n"
            "  a ratio is the fraction removed: 0 keeps everything, 0.9 keeps a tenth"
        )


def _width(group: Group, asked: float, ladder: Ladder, i: int) -> int:
    """The width that a ratio or an absolute width means for group ``i``."""
    n, step = group.channels, int(ladder.step[i])
    lowest = int(ladder.width(ladder.levels)[i])
    if not _is_count(asked):
        width = max(width_at(n, asked), lowest)
        return min(-(-width // step) * step, n)
    if asked > n:
        raise BadRequest(f"group {group.name!r} has {n} channels: it cannot keep {asked}")
    if asked != n and (asked % step or asked < lowest):
        raise BadRequest(
            f"group {group.name!r} cannot keep {asked} of {n} channels: round_to and min_channels allow "
            f"{n} and the multiples of {step} from {lowest} on"
        )
    return int(asked)


def _channel_cost(groups: Sequence[Group]) -> Cost:
    return make_cost([(1.0, [(0.0, {i: g.partitions for i, g in enumerate(groups)})])])
