"""Widths within a budget of latency: predicted, decided, timed, and decided again where the prediction was off.

Whoever looks for the widths that are predicted to be fastest finds those about which the prediction is too good. So the
network that was decided on is timed as a whole, predictions are corrected by it, and it is decided anew, until a
network really takes what it may; of those that were timed the slowest within the budget is taken, or else, with a
warning, the fastest.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from secateur.core import Budget
from secateur.costs import Cost, evaluate
from secateur.errors import SecateurWarning
from secateur.groups import Coupling
from secateur.latencies.measuring import latencies_of, one_more
from secateur.latencies.prediction import network_latency, predicted_ms, width_steps
from secateur.latencies.records import Latencies, Whole, check_setting
from secateur.latencies.store import Setting

SHORT, OVER = 0.95, 1.005
"""The parts of a budget between which the time of a network that was decided on is left as it is."""
TRIES = 4
"""So many networks are timed at most."""

Keep = dict[str, tuple[int, ...]]


def decide_within(
    coupling: Coupling, budget: Budget, given: Latencies | None, decide: Callable[[Cost, Mapping[str, int]], Keep]
) -> Decision:
    """What ``decide(cost, steps)`` decides in the end. ``given``: latencies of another time or machine, which are taken
    as they are; without them everything is measured here.

    Asked again, it comes to the same, and times nothing: predictions are corrected by the networks that this budget
    came to, in their order, whatever else has been timed.
    """
    assert budget.engine is not None
    if given is not None:
        check_setting(given, {"engine": budget.engine, "threads": budget.threads, "batch": budget.batch})
    found = given or latencies_of(coupling, engine=budget.engine, threads=budget.threads, batch=budget.batch)
    steps, dense_ms = width_steps(coupling, found), predicted_ms(coupling, found, {})

    def decided(through: Sequence[Whole]) -> Decision:
        cost = network_latency(coupling, found, through=through)
        keep = decide(cost, steps)
        widths = np.array([len(keep[group.name]) for group in coupling.groups], dtype=np.float64)
        return Decision(keep, found, dense_ms, evaluate(cost, widths))

    if given is not None:
        return decided(())
    target = float(budget.at_most or (budget.keep or 1) * dense_ms)
    seen: list[tuple[Decision, Whole]] = []
    with one_more(coupling, Setting(found.engine, found.version, found.threads, found.batch)) as add:
        while len(seen) < TRIES:
            way = [whole for _, whole in seen]
            decision = decided(way)
            widths = {name: len(kept) for name, kept in decision.keep.items()}
            if any(dict(whole.widths) == widths for whole in way):
                break  # no other network suits the forecast better
            known = [whole for whole in found.whole if whole.decided and dict(whole.widths) == widths]
            if not known:
                found = add(found, widths)
            one = known[0] if known else found.whole[-1]
            seen.append((replace(decision, found=found, measured_ms=one.ms), one))
            if SHORT * target <= one.ms <= OVER * target:
                break
    by_time = sorted(seen, key=lambda pair: pair[1].ms)
    within = [decision for decision, whole in by_time if whole.ms <= OVER * target]
    if within:
        return within[-1]
    decision, whole = by_time[0]
    warnings.warn(
        f"the network takes {whole.ms:.4g} ms, and the budget is {target:.4g} ms: of {len(seen)} networks that were "
        "foreseen to meet it this one came nearest\n"
        "  do: ask again when the machine is idle, or for a little less",
        SecateurWarning,
        stacklevel=2,
    )
    return decision


@dataclass(frozen=True, eq=False)
class Decision:
    """What every group keeps, and what that is expected to take. ``predicted_ms``: before the network was timed;
    ``measured_ms``: when it was, if it was."""

    keep: Keep
    found: Latencies
    dense_ms: float
    predicted_ms: float
    measured_ms: float | None = None

    def told(self) -> dict[str, Any]:
        """What a plan says about it, as JSON values."""
        values: dict[str, Any] = {name: getattr(self.found, name) for name in ("version", "machine", "seconds")}
        for name in ("dense_ms", "predicted_ms", "measured_ms"):
            ms = getattr(self, name)
            values |= {} if ms is None else {name: round(ms, 4)}
        return values
