"""Meeting a budget with the least sum of losses, where it is known what each group loses at each of its widths.

A cost is a polynomial in the widths, and no sum over groups, so that the best combination cannot be put together group
by group. A few combinations are tried one and all. Of many, descents find where to begin: a price of a unit of cost is
sought at which the widths that are best for each group, the others being as they are, just meet the budget. Then come
exchanges: one group gives up some channels, and another one takes the room where that gains more. The result cannot be
improved by any such exchange; where all combinations can be tried for comparison, it mostly is the best of them. Of a
peak (``costs.Peak``), what is priced is how much all its sums together exceed the budget: a group that lowers one of
them, and not the largest, helps all the same.

A group's widths are numbered by *levels*: 0 is the widest. Losses do not fall from one level to the next.

Letters: ``G`` groups, ``L`` levels of the group that has most, ``B`` combinations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from secateur.costs import Cost, Peak, evaluate, evaluate_many, marginals

NEAR = 0.99
"""A budget counts as reached from this fraction of it on."""
FEW = 20_000
"""So many combinations of widths are tried one and all."""
COARSE = 200
"""With no more levels than this in all groups together, pairs of groups are changed in every way."""
HALVINGS = 30
"""So often the interval of prices is halved."""
SWEEPS = 20
"""So often a descent goes through all groups at most."""
MOVES = 3_000
"""So many exchanges are looked at, at most."""


@dataclass(frozen=True, eq=False)
class Menu:
    """What each group may be: ``widths`` and ``losses`` ``[G, L]`` at its levels, of which ``last [G]`` is the
    narrowest (what stands behind it repeats it)."""

    cost: Cost
    widths: np.ndarray
    losses: np.ndarray
    last: np.ndarray

    def keep(self, level: np.ndarray) -> np.ndarray:
        """Kept counts ``[..., G]`` at ``level [..., G]``."""
        return np.asarray(self.widths[np.arange(len(self.last)), level])

    def each(self, level: np.ndarray) -> np.ndarray:
        """What each group loses ``[..., G]`` at ``level [..., G]``."""
        return np.asarray(self.losses[np.arange(len(self.last)), level])

    def cost_at(self, level: np.ndarray) -> float:
        """The cost at ``level [G]``."""
        return evaluate(self.cost, self.keep(level))


def menu_of(cost: Cost, widths: Sequence[np.ndarray], losses: Sequence[np.ndarray]) -> Menu:
    """The menu of groups whose own widths and losses are given from the widest on; one for a group that stays."""
    longest = max(map(len, widths))
    wide, lost = (np.stack([np.pad(row, (0, longest - len(row)), "edge") for row in rows]) for rows in (widths, losses))
    return Menu(cost, wide, lost, np.array([len(own) - 1 for own in widths]))


def least_loss(menu: Menu, target: float) -> np.ndarray:
    """The levels ``[G]`` that lose least within [0.99, 1.00] of ``target``, or mostly so; what is searched rather than
    tried one and all may end below that. The narrowest of all must cost ``target`` or less."""
    if few(menu):
        return best_of_all(menu, target)
    level = _exchanged(menu, _descended(menu, target), target)
    near = menu.cost_at(level) >= NEAR * target
    if near and menu.last.sum() > COARSE:
        return level
    # in widths so coarse, much is left of the budget where nothing fits any more: other combinations may suit it better
    landed = [_landed(menu, start, target) for start in (level, menu.last, np.zeros_like(level))]
    landed = [end for end in landed if NEAR * target <= menu.cost_at(end) <= target]
    return min(landed, key=lambda end: float(menu.each(end).sum()), default=level)


def few(menu: Menu) -> bool:
    """Whether all combinations can be tried."""
    return bool(np.prod(menu.last + 1.0) <= FEW)


def best_of_all(menu: Menu, target: float) -> np.ndarray:
    """Of all combinations within [0.99, 1.00] of ``target`` the one that loses least (of equals the costliest), else
    the nearest below it."""
    axes = [np.arange(last + 1) for last in menu.last]
    levels = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, len(axes))
    costs = evaluate_many(menu.cost, menu.keep(levels))
    near = (costs <= target) & (costs >= min(NEAR * target, costs[costs <= target].max()))
    levels, costs = levels[near], costs[near]
    return np.asarray(levels[np.lexsort((-costs, menu.each(levels).sum(axis=1)))[0]])


# The start -------------------------------------------------------------------------------------------------------


def _descended(menu: Menu, target: float) -> np.ndarray:
    """The levels ``[G]`` that lose least of those at which descents at many prices end and that meet the target."""
    dense, best = np.zeros_like(menu.last), menu.last
    bends = [_bends(menu, g) for g in range(len(best))]
    priced = _priced(menu, target)
    # from a price at which next to nothing is given up, to one at which next to everything is
    unit = max(float(menu.each(best).sum()), 1e-12) / float(priced(menu.keep(dense)[None])[0])
    low, high = np.log(unit * 1e-4), np.log(unit * 1e6)
    for _ in range(HALVINGS):
        price = (low + high) / 2
        ends = [_descent(menu, bends, start, priced, float(np.exp(price))) for start in (dense, menu.last)]
        meets = [level for level in ends if menu.cost_at(level) <= target]
        best = min([best, *meets], key=lambda level: float(menu.each(level).sum()))
        low, high = (low, price) if meets else (price, high)
    return best


def _bends(menu: Menu, g: int) -> np.ndarray:
    """The levels at which the loss of group ``g`` changes its slope, the first and the last one too.

    Between them the loss is linear in the width, and so is the cost, or bent upwards: at a price, the best width of a
    group is mostly one of these.
    """
    losses, widths = (table[g, : menu.last[g] + 1] for table in (menu.losses, menu.widths))
    slopes = np.diff(losses) / np.diff(widths)
    inner = np.flatnonzero(~np.isclose(slopes[1:], slopes[:-1], rtol=1e-6, atol=1e-12)) + 1
    return np.unique(np.concatenate([[0], inner, [menu.last[g]]]))


def _priced(menu: Menu, target: float) -> Callable[[np.ndarray], np.ndarray]:
    """What a descent prices ``[B]`` at ``keep [B, G]``: the cost, or of a peak what exceeds the target."""
    cost = menu.cost
    return (lambda keep: cost.excess(keep, target)) if isinstance(cost, Peak) else cost.at


def _descent(
    menu: Menu,
    bends: Sequence[np.ndarray],
    start: np.ndarray,
    priced: Callable[[np.ndarray], np.ndarray],
    price: float,
) -> np.ndarray:
    """The levels ``[G]`` at which loss + price x what is priced cannot be made less by any one group."""
    level = start.copy()
    for _ in range(SWEEPS):
        before = level.copy()
        for g, options in enumerate(bends):
            if len(options) > 1:
                keep = np.tile(menu.keep(level), (len(options), 1))
                keep[:, g] = menu.widths[g, options]
                level[g] = options[np.argmin(menu.losses[g, options] + price * priced(keep))]
        if (level == before).all():
            break
    return level


# Exchanges -------------------------------------------------------------------------------------------------------


def _exchanged(menu: Menu, level: np.ndarray, target: float) -> np.ndarray:
    """``level [G]`` after every exchange that loses less, and with what room is left given to whom it helps most."""
    level, looked = _filled(menu, level, target), 0
    while True:
        before = level
        for g in range(len(level)):
            for step in _steps(int(menu.last[g] - level[g])):
                looked += 1
                better = _exchange(menu, level, g, step, target)
                if better is not None:
                    level = _filled(menu, better, target)
                    break
        if (level == before).all() or looked >= MOVES:
            return level


def _exchange(menu: Menu, level: np.ndarray, giver: int, step: int, target: float) -> np.ndarray | None:
    """The levels ``[G]`` after ``giver`` went down by ``step`` and the group took the room that gains most by it; None
    if that gains less than was given up."""
    trial = level.copy()
    trial[giver] += step
    wider = _widest(menu, trial, target)
    wider[giver] = trial[giver]
    gains = menu.each(trial) - menu.each(wider)
    taker = int(np.argmax(gains))
    given = menu.losses[giver, trial[giver]] - menu.losses[giver, level[giver]]
    if gains[taker] <= given + 1e-12:
        return None
    trial[taker] = wider[taker]
    return trial


def _landed(menu: Menu, level: np.ndarray, target: float) -> np.ndarray:
    """The levels ``[G]`` that lose least, within [0.99, 1.00] of ``target``, of those that differ from ``level [G]`` in
    two groups, and again from there until nothing is gained; ``level`` where there are none."""
    least = np.inf
    while True:
        best = level
        for g, last in enumerate(menu.last):
            for at in np.unique(np.linspace(0, last, min(int(last) + 1, 2 + MOVES // len(level))).astype(np.int64)):
                trial = level.copy()
                trial[g] = at
                other = _widest(menu, trial, target)
                other[g] = at
                keep = menu.keep(trial)
                costs = evaluate(menu.cost, keep) - marginals(menu.cost, keep, keep - menu.keep(other))
                lost = menu.each(trial).sum() - menu.each(trial) + menu.each(other)
                lost = np.where((costs <= target) & (costs >= NEAR * target), lost, np.inf)
                taker = int(np.argmin(lost))
                if lost[taker] < least - 1e-12:
                    least, best = float(lost[taker]), trial
                    best[taker] = other[taker]
        if best is level:
            return level
        level = best


def _steps(most: int) -> Iterator[int]:
    """1, 2, 3, 4, 6, 9, 13 ... up to ``most``."""
    step = 1
    while step <= most:
        yield step
        step += max(1, step // 2)


def _filled(menu: Menu, level: np.ndarray, target: float) -> np.ndarray:
    """``level [G]`` with groups widened until nothing fits: first the one that gains most, of equals the cheapest."""
    level = level.copy()
    while True:
        wider = _widest(menu, level, target)
        if (wider == level).all():
            return level
        gains = np.where(wider < level, menu.each(level) - menu.each(wider), -1.0)
        keep = menu.keep(level)
        prices = -marginals(menu.cost, keep, keep - menu.keep(wider))
        taker = np.lexsort((prices, -gains))[0]
        level[taker] = wider[taker]


def _widest(menu: Menu, level: np.ndarray, target: float) -> np.ndarray:
    """``[G]``: the lowest level that each group alone could be at, the others at ``level [G]``; the last one where
    none meets the target."""
    keep = menu.keep(level)
    room = target - evaluate(menu.cost, keep)
    low, high = np.zeros_like(level), menu.last.copy()
    while (low < high).any():
        middle = (low + high) // 2
        fits = -marginals(menu.cost, keep, keep - menu.keep(middle)) <= room
        low, high = np.where(fits, low, middle + 1), np.where(fits, middle, high)
    return high
