"""Accuracy against cost: every network a point, and the front of those that no other one beats in both."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import log10
from typing import TYPE_CHECKING, Any

from secateur.report.answers import engine_name, ms_text, short_count
from secateur.report.canvas import ACCENT, DENSE, DISTINCT, FAINT, INK, KEPT, as_svg, canvas, plain_
from secateur.report.content import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LABELLED = 12
"""Up to so many networks have their names beside their points; of more, those on the front do."""
APART = 0.062
"""The least distance of two names, of the height of the axes."""


STRETCHED = " Accuracy is spaced by the logarithm of the error, which stretches what is near to 100 %."
MARKS = (0, 50, 70, 80, 90, 95, 98, 99, 99.5, 99.8, 99.9, 99.95, 99.98, 99.99)
"""Accuracies in per cent that an axis of errors may name."""
LEAST_ERROR = 0.02
"""In per cent, the least that such an axis shows; what makes no error stands there."""
WORTH_STRETCHING = 6.0
"""Where the largest error is so many times the smallest, the axis is one of errors."""


@dataclass(frozen=True)
class Point:
    """A network of ``run`` at the cost ``x`` and ``accuracy`` per cent. ``first``, ``last``: it is the dense one of its
    run, or what the run was for."""

    run: str
    row: Row
    x: float
    accuracy: float
    first: bool
    last: bool


@dataclass(frozen=True)
class Axis:
    """A cost to draw accuracy against: what it is called, and of a row its value or None."""

    label: str
    of: Callable[[Row], float | None]


MILLISECONDS = Axis("latency in the fastest engine, ms", lambda row: row.fastest[1] if row.fastest else None)
MEGA_MACS = Axis("MACs, millions", lambda row: row.macs / 1e6)


def points_of(runs: Mapping[str, Sequence[Row]], finals: Mapping[str, str], axis: Axis) -> list[Point]:
    """The networks of all runs that have an accuracy and that cost. ``finals``: run -> the name of its outcome."""
    found = []
    for run, rows in runs.items():
        for row in rows:
            x = axis.of(row)
            if x is not None and row.accuracy is not None:
                last = row.name == finals.get(run, rows[-1].name)
                first = row is rows[0] and len(rows) > 1
                found.append(Point(run, row, x, 100 * row.accuracy, first, last))
    return found


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Of ``(cost, accuracy)`` the indices of those that no other beats: none costs less at no less accuracy, or as much
    at more. From the cheapest on; of equal ones the first."""
    order = sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1]))
    best, found = float("-inf"), []
    for index in order:
        if points[index][1] > best:
            found.append(index)
            best = points[index][1]
    return found


def is_stretched(runs: Mapping[str, Sequence[Row]]) -> bool:
    """Whether errors differ so much that only their logarithms show the small ones."""
    errors = [_error(100 * row.accuracy) for rows in runs.values() for row in rows if row.accuracy is not None]
    return max(errors) > WORTH_STRETCHING * min(errors) and min(errors) < 100 / WORTH_STRETCHING


def _error(accuracy: float) -> float:
    return max(100 - accuracy, LEAST_ERROR)


def _height(accuracy: float, *, stretched: bool) -> float:
    """Where an accuracy stands on the axis: as it is, or by the logarithm of the error."""
    return -log10(_error(accuracy)) if stretched else accuracy


def has_front(runs: Mapping[str, Sequence[Row]]) -> bool:
    """Whether there is anything to draw: two networks with an accuracy, of unequal cost."""
    known = [row for rows in runs.values() for row in rows if row.accuracy is not None]
    return len({row.macs for row in known}) > 1 or len({row.fastest for row in known}) > 1


def front_figure(
    runs: Mapping[str, Sequence[Row]], finals: Mapping[str, str], *, name: str = "front", narrow: bool = False
) -> str:
    """Accuracy against latency, where there is any, and against MACs: side by side, or one above the other. Each run
    has a colour; its dense network is a square, its outcome a large point."""
    axes_of = [axis for axis in (MILLISECONDS, MEGA_MACS) if len(points_of(runs, finals, axis)) > 1]
    width, height = (2.45, 2.4) if narrow else (4.1 if len(axes_of) > 1 else 6.5, 3.2)
    figure, first = canvas(width, height)
    panels = [first]
    for place in range(1, len(axes_of)):
        box = (0, -1.3 * place, 1, 1) if narrow else (1.15 * place, 0, 1, 1)
        panels.append(figure.add_axes(box))
        plain_(panels[-1])
    tips: dict[str, str] = {}
    for place, (panel, axis) in enumerate(zip(panels, axes_of, strict=True)):
        points = points_of(runs, finals, axis)
        _draw_(panel, points, list(runs), tips, place, small=narrow, stretched=is_stretched(runs))
        panel.set_xlabel(axis.label)
        if narrow or place == 0:
            panel.set_ylabel("test accuracy, %")
    return as_svg(figure, name, "Accuracy of every network against what it costs", tips, told=_told(runs, finals))


def _draw_(
    panel: Axes,
    points: Sequence[Point],
    runs: Sequence[str],
    tips: dict[str, str],
    place: int,
    *,
    small: bool,
    stretched: bool,
) -> None:
    heights = [_height(point.accuracy, stretched=stretched) for point in points]
    best = front([(point.x, height) for point, height in zip(points, heights, strict=True)])
    _limit_(panel, [point.x for point in points], heights)
    if stretched:
        low, high = panel.get_ylim()
        shown = [mark for mark in MARKS if low <= _height(mark, stretched=True) <= high]
        panel.set_yticks([_height(mark, stretched=True) for mark in shown], [f"{mark:g}" for mark in shown])
    # right of the last point of the front, nothing is better than that one; left of the first, there is nothing
    stairs = [*((points[i].x, heights[i]) for i in best), (panel.get_xlim()[1], heights[best[-1]])]
    panel.step([x for x, _ in stairs], [y for _, y in stairs], where="post", color=ACCENT, linewidth=1.1, alpha=0.8)
    for number, (point, height) in enumerate(zip(points, heights, strict=True)):
        colour = DISTINCT[runs.index(point.run) % len(DISTINCT)] if len(runs) > 1 else DENSE if point.first else KEPT
        gid = f"point{place}-{number}"
        look: dict[str, Any] = {"color": colour, "markeredgecolor": INK, "markeredgewidth": 0.6, "gid": gid}
        size = 9 if point.last else 7 if point.first else 5
        panel.plot([point.x], [height], "s" if point.first else "o", markersize=size, clip_on=False, **look)
        tips[gid] = _point_text(point)
    named = range(len(points)) if len(points) <= LABELLED else best
    _names_(panel, [(points[i], heights[i]) for i in named], small=small)
    panel.grid(color=FAINT, linewidth=0.7)


def _limit_(panel: Axes, along: Sequence[float], heights: Sequence[float]) -> None:
    """Some room around the points."""
    low, high = min(along), max(along)
    room = 0.14 * (high - low) or 0.1 * (high or 1.0)
    panel.set_xlim(max(0.0, low - room), high + room)
    low, high = min(heights), max(heights)
    room = 0.12 * (high - low) or 1.0
    panel.set_ylim(low - room, high + room)


def _names_(panel: Axes, named: Sequence[tuple[Point, float]], *, small: bool) -> None:
    """Names towards the middle of the axes, pushed apart where they would cover one another."""
    (left, right), (bottom, top) = panel.get_xlim(), panel.get_ylim()
    for side in (-1, 1):
        mine = [
            (_label(point), (point.x - left) / (right - left), (height - bottom) / (top - bottom))
            for point, height in named
            if (point.x <= (left + right) / 2) == (side > 0)
        ]
        beside = spread([y for _, _, y in mine], APART * (1.25 if small else 1))
        for (text, x, y), at in zip(mine, beside, strict=True):
            moved = abs(at - y) > APART / 3
            above = at + APART / 2  # clear of the line that joins the points
            panel.annotate(
                text,
                (x, y),
                (x + side * (0.085 if moved else 0.03), above),
                xycoords="axes fraction",
                textcoords="axes fraction",
                fontsize=8,
                color=INK,
                va="center",
                ha="left" if side > 0 else "right",
                arrowprops={"arrowstyle": "-", "color": FAINT, "linewidth": 0.8, "shrinkA": 1} if moved else None,
            )


def _label(point: Point) -> str:
    if not point.run or point.run == point.row.name:
        return point.row.name
    return point.run if point.last else f"{point.run}: {point.row.name}"


def spread(heights: Sequence[float], apart: float) -> list[float]:
    """The heights, in their order, moved as little as need be to be ``apart`` from one another, and within [0, 1] where
    they fit: blocks of heights that touch are merged, each around its own mean."""

    def middle(total: float, held: int) -> float:
        room = apart * (held - 1) / 2
        return min(max(total / held, room), max(1 - room, room))

    order = sorted(range(len(heights)), key=lambda i: heights[i])
    blocks: list[tuple[float, int]] = []  # of each block the sum of its heights, and how many it holds
    for index in order:
        total, held = heights[index], 1
        while blocks and middle(total, held) - middle(*blocks[-1]) < apart * (held + blocks[-1][1]) / 2:
            before, more = blocks.pop()
            total, held = total + before, held + more
        blocks.append((total, held))
    placed = [middle(total, held) + apart * (k - (held - 1) / 2) for total, held in blocks for k in range(held)]
    found = [0.0] * len(heights)
    for index, height in zip(order, placed, strict=True):
        found[index] = height
    return found


def _point_text(point: Point) -> str:
    alone = point.run in ("", point.row.name)
    name = point.row.name if alone else f"{point.run}, {point.row.name}"
    text = f"{name}: {point.accuracy:.2f} %, {short_count(point.row.macs)} MACs"
    if point.row.fastest is None:
        return text
    engine, ms = point.row.fastest
    return f"{text}, {ms_text(ms)} ms in {engine_name(engine)}"


def _told(runs: Mapping[str, Sequence[Row]], finals: Mapping[str, str]) -> str:
    return "; ".join(_point_text(point) for point in points_of(runs, finals, MEGA_MACS)) + "."
