"""Which filters were zero while a network trained, and which of them changed places from one choice to the next.

A *choice* takes filters in and lets others go (``Turnover``). What is drawn is, for every choice but the first and
every group, the share of its zeroed filters that changed: 0 where the choice is stable, 1 where all are others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from secateur.report.canvas import FAINT, INK, KEPT, as_svg, canvas
from secateur.report.content import Zeroed

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLUMNS = 100
"""More choices than this are drawn by several in one column, as their mean."""
SHADES = 5
"""Into so many steps of equal width the shares are sorted."""
NAMED = 12
"""So many filters are listed, of what may be hundreds."""


@dataclass(frozen=True, eq=False)
class Tally:
    """What became of a group's zeroed filters. ``first``, ``last``: which were zero after the first and the last
    choice. ``entered``, ``left``: how often a filter did after the first choice; ``changed``: which did at all, and
    ``settled``: the epoch of the last choice in which any did. ``shares [S - 1]``: the share of the zeroed filters that
    changed, for every choice but the first of ``S``."""

    group: str
    channels: int
    first: tuple[int, ...]
    last: tuple[int, ...]
    entered: int
    left: int
    changed: tuple[int, ...]
    settled: int | None
    shares: np.ndarray


def tallies(zeroed: Zeroed) -> list[Tally]:
    """The groups that ever had a filter zeroed, in their order."""
    touched = {name for choice in zeroed.history for name in choice.entered}
    return [_tally(zeroed, name) for name in zeroed.channels if name in touched]


def _tally(zeroed: Zeroed, name: str) -> Tally:
    first, *later = zeroed.history
    zero, changed = set(first.entered.get(name, ())), set[int]()
    entered = left = 0
    settled, shares = None, []
    for choice in later:
        came, went = choice.entered.get(name, ()), choice.left.get(name, ())
        zero = (zero | set(came)) - set(went)
        changed |= {*came, *went}
        entered, left = entered + len(came), left + len(went)
        settled = choice.epoch if came or went else settled
        shares.append(min(1.0, max(len(came), len(went)) / max(1, len(zero))))
    before = tuple(sorted(first.entered.get(name, ())))
    return Tally(
        name,
        zeroed.channels[name],
        before,
        tuple(sorted(zero)),
        entered,
        left,
        tuple(sorted(changed)),
        settled,
        np.array(shares),
    )


def turnover_figure(zeroed: Zeroed, *, name: str = "turnover") -> str:
    """A row a group, a column a choice but for the first: the darker, the more of the zeroed filters changed."""
    found, epochs = tallies(zeroed), [choice.epoch for choice in zeroed.history[1:]]
    figure, axes = canvas(6.4, max(0.5, 0.17 * len(found)))
    columns = np.array_split(np.arange(len(epochs)), min(len(epochs), COLUMNS))
    shares = np.array([[tally.shares[column].mean() for column in columns] for tally in found])
    _shade_(axes, shares)
    tips = {}
    for row, tally in enumerate(found):
        tips[f"row{row}"] = row_text(tally, len(epochs))
        axes.barh(row, len(columns), left=0, height=1, color=INK, alpha=0, gid=f"row{row}")
    axes.set_xlim(0, len(columns))
    axes.set_ylim(len(found) - 0.5, -0.5)
    axes.set_yticks(range(len(found)), [tally.group for tally in found], fontsize=8)
    marks = np.unique(np.linspace(0, len(columns) - 1, min(len(columns), 9)).round().astype(int))
    axes.set_xticks(marks + 0.5, [str(epochs[columns[mark][0]]) for mark in marks])
    axes.set_yticks(np.arange(len(found) + 1) - 0.5, minor=True)
    axes.grid(axis="y", which="minor", color=FAINT, linewidth=0.5)
    axes.tick_params(axis="y", which="both", length=0)
    axes.set_xlabel("epochs over when it was chosen")
    return as_svg(figure, name, summary(zeroed), tips)


def _shade_(axes: Axes, shares: np.ndarray) -> None:
    """A rectangle for every run of shares of one shade, all of one shade as one path: a network has thousands."""
    from matplotlib.patches import Patch, PathPatch
    from matplotlib.path import Path

    step = np.ceil(shares * SHADES - 1e-9).astype(int)
    edges = np.diff(np.pad(step, ((0, 0), (1, 1)), constant_values=-1), axis=1) != 0
    codes = [Path.MOVETO, Path.LINETO, Path.LINETO, Path.LINETO, Path.CLOSEPOLY]
    outlines: dict[int, list[tuple[float, float]]] = {shade: [] for shade in range(1, SHADES + 1)}
    for row, places in enumerate(edges):
        bounds = np.flatnonzero(places)
        top, bottom = row - 0.5, row + 0.5
        for left, right in pairwise(bounds.tolist()):
            if step[row, left]:
                outlines[step[row, left]] += [(left, top), (right, top), (right, bottom), (left, bottom), (left, top)]
    handles = []
    for shade, outline in outlines.items():
        look: dict[str, Any] = {"facecolor": KEPT, "edgecolor": "none", "alpha": shade / SHADES}
        if outline:
            path = Path(np.array(outline), codes * (len(outline) // len(codes)))
            axes.add_patch(PathPatch(path, linewidth=0, gid=f"shade{shade}", **look))
        handles.append(Patch(label=f"to {100 * shade // SHADES} %", **look))
    legend = axes.legend(
        handles=handles,
        title="of the zeroed\nfilters changed",
        title_fontsize=8,
        frameon=False,
        loc="upper left",
        bbox_to_anchor=(1.01, 1.02),
        fontsize=8,
        labelcolor=INK,
    )
    legend.get_title().set_color(INK)


def summary(zeroed: Zeroed) -> str:
    """The figure in words."""
    found, choices = tallies(zeroed), len(zeroed.history)
    moved = [tally for tally in found if tally.changed]
    text = f"{_count(choices, 'choice')} of the filters that are zero, in {_count(len(found), 'group')}. "
    if choices < 2:
        return f"{text}There was no second choice to change any."
    if not moved:
        return f"{text}After the first none of them changed."
    last = max(tally.settled or 0 for tally in moved)
    most = max(moved, key=lambda tally: float(tally.shares.mean()))
    return (
        f"{text}After the first, filters changed in {len(moved)} of the groups, for the last time after "
        f"{_count(last, 'epoch')}; most in {most.group}, where {100 * float(most.shares.mean()):.0f} % of the zeroed "
        "filters changed from one choice to the next."
    )


def row_text(tally: Tally, later: int) -> str:
    """A row of the figure in words; ``later``: how many choices there were after the first."""
    text = f"{tally.group}: {len(tally.last)} of {tally.channels} filters zero in the end"
    if not tally.changed:
        return f"{text}, the same in all choices"
    times = int((tally.shares > 0).sum())
    return f"{text}, changed in {times} of {_count(later, 'choice')} after the first, last after epoch {tally.settled}"


def listed(indices: Sequence[int]) -> str:
    """``0, 3, 7`` of filters, cut short where they are many; a dash for none."""
    shown = ", ".join(map(str, indices[:NAMED]))
    more = f" and {len(indices) - NAMED} more" if len(indices) > NAMED else ""
    return f"{shown}{more}" or "–"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"
