"""What a schedule asks of ``plan``: its options as one bundle, and the part of them that an intermediate step asks for.

Between the network that a schedule sets out from and its goal, the kept fraction shrinks geometrically: after the part
``f`` of the way ``keep ** f`` stays, so that every cut takes the same share of what is left. For a ratio that is
``1 - (1 - ratio) ** f``. Fractions are of the network at the start, never of the one at hand: rounding does not add up.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypedDict, cast

import numpy as np
import torch

from secateur.allocation import allocate, excluded_groups, fixed_widths
from secateur.calibration import Loss
from secateur.core import Budget, Criterion, Group
from secateur.costs import evaluate
from secateur.errors import BadRequest
from secateur.graph import Graph
from secateur.groups import Coupling, Prefer, couple
from secateur.latencies import latencies_of, predicted_ms
from secateur.liveness import memory_of
from secateur.operations import costs_of
from secateur.pipeline import Constants, Residual, folded_groups
from secateur.residuals import kept_whole
from secateur.sensitivities import Sensitivity
from secateur.surgery import record


class Options(TypedDict, total=False):
    """The options of ``plan``, each with the meaning and the default that it has there."""

    criterion: str | Criterion
    budget: Budget | None
    ratios: float | Mapping[str, float] | None
    exclude: str | Sequence[str]
    allocation: Literal["global", "uniform"]
    data: Iterable[Any] | None
    loss: Loss | None
    residual: Residual
    constants: Constants
    greedy: bool
    sensitivity: Sensitivity | None
    prefer: Prefer
    min_channels: int
    round_to: int
    seed: int


SPAN = 2**32
"""More than a group can have channels: group and channel as one number."""

SCORING = ("criterion", "data", "loss", "residual", "constants", "greedy", "prefer", "seed")
"""The options that say which channels go, and what becomes of what they leave; the others say how many."""


Origin = Mapping[str, Mapping[int, np.ndarray]]
"""``{tensor: {axis: positions}}``: which positions of the first network of all are left."""


@dataclass(frozen=True, eq=False)
class Start:
    """The network that a schedule sets out from: its free and its locked groups and its cost in each unit that a budget
    may be of. ``origin``: which positions of each axis it has kept itself, where it was pruned before. ``whole``:
    ``{group: why}`` of the free groups that the residual rule leaves whole. All of it depends on the structure alone,
    so that a resumed run can make it again; but for a cost in milliseconds, which is measured, and kept on the disk.
    """

    groups: tuple[Group, ...]
    locked: tuple[Group, ...]
    cost: Mapping[str, float]
    origin: Origin
    whole: Mapping[str, str] = field(default_factory=dict)


def start_of(graph: Graph, options: Options) -> Start:
    """The start, as read off a captured network."""
    coupling = coupled(graph, options)
    dense = np.array([group.channels for group in coupling.groups], dtype=np.int64)
    cost = {of: evaluate(costs_of(coupling, of), dense) for of in ("macs", "params")}
    budget = options.get("budget")
    if budget is not None and budget.of == "memory":
        cost["memory"] = evaluate(memory_of(coupling, budget.batch), dense)
    if budget is not None and budget.of == "latency":
        assert budget.engine is not None
        if options.get("latencies") is not None:
            raise BadRequest(
                "latencies are those of the network at the start, and a schedule plans networks on the way as well\n"
                "  do: leave latencies out: every network is measured when its turn comes"
            )
        found = latencies_of(coupling, engine=budget.engine, threads=budget.threads, batch=budget.batch)
        cost["latency"] = predicted_ms(coupling, found, {})
    cost["channels"] = float(sum(group.channels * group.partitions for group in coupling.groups))
    return Start(coupling.groups, tuple(coupling.locked), cost, _origin(graph), whole_groups(graph, options))


def whole_groups(graph: Graph, options: Options) -> dict[str, str]:
    """``{group: why}`` of the free groups that the residual rule among the options leaves whole."""
    return kept_whole(coupled(graph, options), options.get("residual", "coupled"))


def coupled(graph: Graph, options: Options) -> Coupling:
    """The groups of the network, as the options have them coupled."""
    scatter = options.get("residual", "coupled") == "scatter"
    return couple(graph, options.get("prefer", "channels"), scatter=scatter)


def successors(start: Start, graph: Graph, options: Options) -> dict[str, Group]:
    """What has become of each free group of the start in a later network, by the start's name for it.

    Names need not last: of ``conv`` and ``conv#2`` the second is called ``conv`` once the first is down to a channel
    that nobody can remove. So groups are found again by the positions where their channels lay at the start. One that
    has fallen apart, so that a plan could remove half of a channel of the start, is left out.
    """
    owner: dict[tuple[str, int], np.ndarray] = {}
    lengths = {(name, axis): size for name, t in graph.tensors.items() for axis, size in enumerate(t.shape)}
    for number, group in enumerate(start.groups):
        for part in group.slices:
            place = (part.tensor, part.axis)
            size = max(lengths.get(place, 0), int(part.positions.max()) + 1)
            known = owner.get(place, np.full(0, -1))
            owner[place] = np.concatenate([known, np.full(max(0, size - len(known)), -1)])
            owner[place][part.positions] = number * SPAN + np.arange(group.channels)[:, None]
    now = _origin(graph)
    found: dict[str, list[tuple[Group, bool]]] = {}
    for group in coupled(graph, options).groups:
        known_places = [s for s in group.slices if (s.tensor, s.axis) in owner]
        if known_places:
            part = known_places[0]
            at = _places_at_start(part.positions, part.tensor, part.axis, start.origin, now)
            channels = owner[part.tensor, part.axis][at]
            if channels.min() >= 0:
                whole = sum(len(np.unique(row)) for row in channels) == len(np.unique(channels))
                found.setdefault(start.groups[int(channels[0, 0]) // SPAN].name, []).append((group, whole))
    return {name: parts[0][0] for name, parts in found.items() if len(parts) == 1 and parts[0][1]}


def _origin(graph: Graph) -> Origin:
    made = record(graph.model)
    return {} if made is None else made.plan.kept()


def _places_at_start(positions: np.ndarray, tensor: str, axis: int, then: Origin, now: Origin) -> np.ndarray:
    """Where positions of the network at hand were in the network at the start; both count from the first of all."""
    kept_now, kept_then = now.get(tensor, {}).get(axis), then.get(tensor, {}).get(axis)
    first = positions if kept_now is None else kept_now[positions]
    return first if kept_then is None else np.searchsorted(kept_then, first)


def at_widths(options: Options, widths: Mapping[str, float]) -> Options:
    """``options`` of which only those count that say which channels go, for the widths given; other groups stay."""
    how = cast(Options, {name: value for name, value in options.items() if name in SCORING})
    how["ratios"] = dict(widths)
    return how


def partway(start: Start, options: Options, fraction: float, found: Mapping[str, Group]) -> Options:
    """``options`` with the budget and the ratios of ``fraction`` (0 to 1) of the way, for a network on that way, whose
    groups are the ``successors`` found of the start's: one that is down to its last channel may have none."""
    result = options.copy()
    budget, ratios, exclude = options.get("budget"), options.get("ratios"), options.get("exclude", ())
    if budget is not None:
        lost = sum(g.partitions for g in start.groups if g.name not in found) if budget.of == "channels" else 0
        result["budget"] = replace(budget, keep=None, at_most=_target(start, budget, fraction) - lost)
    if ratios is not None:
        result["ratios"] = widths_of(_widths(start, options, ratios, fraction), found)
    excluded = excluded_groups(start.groups, exclude, start.locked)
    result["exclude"] = [group.name for name, group in found.items() if name in excluded]
    if "constants" in options:
        result["constants"] = constants_of(start, options["constants"], found)
    return result


def constants_of(start: Start, constants: Constants, found: Mapping[str, Group]) -> Constants:
    """``constants``, said of the start's groups, by the names that the groups found have now."""
    return {found[name].name: asked for name, asked in folded_groups(start.groups, constants).items() if name in found}


def widths_of(widths: Mapping[str, int], found: Mapping[str, Group]) -> dict[str, float]:
    """``widths`` of the start's groups, by the names that the groups found have now."""
    return {found[name].name: min(width, found[name].channels) for name, width in widths.items() if name in found}


def _target(start: Start, budget: Budget, fraction: float) -> float:
    """What the budget allows after ``fraction`` of the way, in its own unit."""
    dense = start.cost[budget.of]
    goal = float(budget.at_most) if budget.at_most is not None else float(budget.keep or 0) * dense
    return goal if fraction >= 1 else dense * min(goal / dense, 1.0) ** fraction


def _widths(start: Start, options: Options, ratios: float | Mapping[str, float], fraction: float) -> dict[str, int]:
    """How many channels the groups that ``ratios`` speaks of keep after ``fraction`` of the way."""
    asked = fixed_widths(start.groups, ratios, start.locked, start.whole)
    if fraction < 1:
        channels = {group.name: group.channels for group in start.groups}
        kept = {name: value / channels[name] if _is_width(value) else 1 - value for name, value in asked.items()}
        asked = {name: 1 - min(keep, 1.0) ** fraction for name, keep in kept.items()}
    round_to = options.get("round_to", 1)
    budget = options.get("budget")
    if budget is not None:
        round_to = max(round_to, budget.round_to)
    keep = allocate(
        start.groups,
        {group.name: torch.zeros(group.channels) for group in start.groups},
        ratios=asked,
        exclude=options.get("exclude", ()),
        min_channels=max(options.get("min_channels", 1), budget.min_channels if budget is not None else 1),
        round_to=round_to,
        locked=start.locked,
        whole=start.whole,
    )
    return {name: len(keep[name]) for name in asked}


def _is_width(value: float) -> bool:
    return int(value) == value and value >= 1
