"""Pruning in several cuts, one cut at a time: each step is a function of the network before it, and of plain data that
can be made again from the structure of the first network, so that a run can go on between any two of them.

``rounds.py`` strings the steps together. Sources: iterative pruning, Li et al. (ICLR 2017), section 3.4; layer by
layer, Luo et al. (ThiNet, ICCV 2017), section 3.1.
"""

from __future__ import annotations

import warnings
from typing import Unpack

from torch import nn

from secateur.errors import BadRequest, SecateurWarning
from secateur.graph import Graph, Inputs, trace
from secateur.pipeline import folded_groups, plan
from secateur.pipeline import widths as widths_kept
from secateur.plans import Plan
from secateur.schedules.options import (
    Options,
    Start,
    at_widths,
    constants_of,
    coupled,
    partway,
    start_of,
    successors,
    widths_of,
)
from secateur.selection import forward_order
from secateur.surgery import apply


def starting_point(model: nn.Module | Graph, example_inputs: Inputs | None = None, **options: Unpack[Options]) -> Start:
    """What the steps need to know of the network at the start, after making sure that the goal can be reached.

    Raises what ``plan`` raises for a budget, ratios or names that are wrong: now, rather than after hours of training.
    """
    graph = trace(model, example_inputs)
    widths_kept(graph, **options)
    folded_groups(coupled(graph, options).groups, options.get("constants", "drop"))
    return start_of(graph, options)


def iterative_step(
    model: nn.Module | Graph,
    example_inputs: Inputs | None = None,
    *,
    start: Start,
    step: int,
    steps: int,
    **options: Unpack[Options],
) -> tuple[Plan, nn.Module]:
    """Cut ``step`` (from 0) of ``steps``: the plan, which speaks of ``model``, and the smaller network.

    ``model`` is what the steps before have left, trained or not; ``start`` is the ``starting_point`` of the network
    before all of them. ``keep ** ((step + 1) / steps)`` of the start's cost stays, or ``(1 - ratio)`` to that power of
    each group. ``record(small).plan`` speaks of the network before all steps. ``model`` is untouched.
    """
    if not 0 <= step < steps:
        raise BadRequest(f"there is no step {step} of {steps}: steps count from 0")
    _check_lasting(steps, options)
    graph = trace(model, example_inputs)
    found = successors(start, graph, options)
    asked = partway(start, options, (step + 1) / steps, found)
    known = {group.name for group in found.values()}
    gone = [group.name for group in coupled(graph, options).groups if group.name not in known]
    asked["exclude"] = [*asked["exclude"], *gone]
    cut = plan(graph, **asked)
    return cut, apply(graph, cut)


def _check_lasting(steps: int, options: Options) -> None:
    """Raises ``BadRequest`` for options that know the network before the first of several cuts only."""
    if steps > 1 and options.get("sensitivity") is not None:
        raise BadRequest(
            "a sensitivity was measured on the network before the first cut, and does not know those in between\n"
            "  do: plan once with it, and give what comes out as widths: "
            "ratios={name: len(kept) for name, kept in plan.keep.items()}"
        )
    if steps > 1 and options.get("residual") == "scatter":
        raise BadRequest(
            "residual='scatter' rewires the last module of each branch, which no later cut can make narrower again\n"
            "  do: cut once; zero channels while training (zeroing) and cut then; or take residual='inner'"
        )


def layer_widths(
    model: nn.Module | Graph, example_inputs: Inputs | None = None, **options: Unpack[Options]
) -> dict[str, int]:
    """``{group: channels kept}`` of one plan for the whole network: the groups that get narrower, in the order in which
    the forward pass first writes them, which is the order of ``layer_step``. Data are read for a budget only: ratios
    say the widths themselves."""
    graph = trace(model, example_inputs)
    widths = widths_kept(graph, **options)
    coupling = coupled(graph, options)
    dense = {group.name: group.channels for group in coupling.groups}
    return {name: widths[name] for name in forward_order(coupling) if widths[name] < dense[name]}


def layer_step(
    model: nn.Module | Graph,
    example_inputs: Inputs | None = None,
    *,
    start: Start,
    name: str,
    width: int,
    **options: Unpack[Options],
) -> tuple[Plan, nn.Module]:
    """Cut one group to ``width`` channels, scored on the network at hand: the plan and the smaller network.

    ``name``: what the group was called in the network at the start (``layer_widths``). Of ``options`` only those count
    that say which channels go, and what becomes of what they leave: criterion, data, loss, residual, constants, greedy,
    prefer, seed. Warns (``SecateurWarning``) where earlier cuts have left nothing of the group that can be cut on its
    own.
    """
    graph = trace(model, example_inputs)
    found = successors(start, graph, options)
    widths = widths_of({name: int(width)}, found)
    if not widths:
        warnings.warn(
            f"group {name!r} cannot be cut any more after the cuts before it, and stays as it is", SecateurWarning, 2
        )
    asked = at_widths(options, widths)
    if "constants" in options:
        asked["constants"] = constants_of(start, options["constants"], found)
    cut = plan(graph, **asked)
    return cut, apply(graph, cut)
