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
from secateur.groups import Coupling, couple
from secateur.pipeline import plan
from secateur.plans import Plan
from secateur.schedules.options import Options, Start, at_widths, partway, start_of, successors, widths_of
from secateur.surgery import apply


def starting_point(model: nn.Module | Graph, example_inputs: Inputs | None = None, **options: Unpack[Options]) -> Start:
    """What the steps need to know of the network at the start, after making sure that the goal can be reached.

    Raises what ``plan`` raises for a budget, ratios or names that are wrong: now, rather than after hours of training.
    """
    graph = trace(model, example_inputs)
    plan(graph, **options)
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
    graph = trace(model, example_inputs)
    found = successors(start, graph, options)
    asked = partway(start, options, (step + 1) / steps, found)
    known = {group.name for group in found.values()}
    groups = couple(graph, options.get("prefer", "channels")).groups
    asked["exclude"] = [*asked["exclude"], *(group.name for group in groups if group.name not in known)]
    cut = plan(graph, **asked)
    return cut, apply(graph, cut)


def layer_widths(
    model: nn.Module | Graph, example_inputs: Inputs | None = None, **options: Unpack[Options]
) -> dict[str, int]:
    """``{group: channels kept}`` of one plan for the whole network: the groups that get narrower, in the order in which
    the forward pass first writes them, which is the order of ``layer_step``."""
    graph = trace(model, example_inputs)
    decided = plan(graph, **options)
    widths = {name: len(kept) for name, kept in decided.keep.items()}
    dense = {group.name: group.channels for group in decided.groups}
    order = forward_order(couple(graph, options.get("prefer", "channels")))
    return {name: widths[name] for name in order if widths[name] < dense[name]}


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
    that say which channels go: criterion, data, residual, prefer, seed. Warns (``SecateurWarning``) where earlier cuts
    have left nothing of the group that can be cut on its own.
    """
    graph = trace(model, example_inputs)
    widths = widths_of({name: int(width)}, successors(start, graph, options))
    if not widths:
        warnings.warn(
            f"group {name!r} cannot be cut any more after the cuts before it, and stays as it is", SecateurWarning, 2
        )
    cut = plan(graph, **at_widths(options, widths))
    return cut, apply(graph, cut)


def forward_order(coupling: Coupling) -> list[str]:
    """The names of the free groups, in the order in which the forward pass first uses a tensor that writes them.

    The groups themselves stand in the order in which the modules were registered, which need not be the same.
    """
    capture = coupling.graph.captures[0]
    first: dict[str, int] = {}
    for position, node in enumerate(capture.graph.nodes):
        for source in node.all_input_nodes:
            if source.op == "get_attr" and str(source.target) in capture.names:
                first.setdefault(capture.names[str(source.target)], position)
    never = len(capture.graph.nodes)

    def begins(number: int) -> tuple[int, int]:
        slices = coupling.groups[number].slices
        writers = [s for s in slices if s.role == "writes"] or list(slices)
        return min(first.get(s.tensor, never) for s in writers), number

    return [coupling.groups[number].name for number in sorted(range(len(coupling.groups)), key=begins)]
