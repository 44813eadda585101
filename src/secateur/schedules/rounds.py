"""Cutting and training by turns: ``iterative``, all groups a little in every round, and ``layer_by_layer``, one group
in every round. The training is yours: ``between`` is any function of the network, around your own loop or ours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Unpack

from torch import nn

from secateur.allocation import excluded_groups
from secateur.errors import BadRequest
from secateur.graph import Graph, Inputs, trace, unwrap
from secateur.pipeline import plan
from secateur.plans import Plan
from secateur.schedules.options import Options, at_widths
from secateur.schedules.steps import iterative_step, layer_step, layer_widths, starting_point
from secateur.surgery import apply, record

Between = Callable[[nn.Module, int], "nn.Module | None"]
"""Trains the network after cut ``i`` (from 0), in place, or returns the one to go on with (a copy of it, say)."""

AfterCut = Callable[[nn.Module, nn.Module, Plan], Any]
"""Called as ``(small, previous, plan)`` right after a cut, before the training: the place for compensation in place."""


def iterative(
    model: nn.Module | Graph,
    example_inputs: Inputs | None = None,
    *,
    steps: int,
    between: Between,
    **options: Unpack[Options],
) -> nn.Module:
    """Prune in ``steps`` cuts with ``between`` after each of them, the last included; returns the smallest network.

    ``options`` are those of ``plan``: the budget or the ratios say what the last cut leaves, as fractions of ``model``;
    the kept cost falls geometrically (``keep ** (i / steps)``). Channels are scored anew on the network at hand.
    ``record(small).plan`` speaks of ``model``, which is untouched: ``save`` and ``load`` know nothing of the rounds.

    Raises what ``plan`` and ``apply`` raise, for a goal out of reach before the first cut.
    """
    if steps < 1:
        raise BadRequest(f"steps={steps} is not a number of cuts, 1 or more")
    model = trace(model, example_inputs)
    inputs = dict(model.kwargs) or model.args
    start = starting_point(model, **options)
    for step in range(steps):
        _, small = iterative_step(model, inputs, start=start, step=step, steps=steps, **options)
        model = continued(between(small, step), small)
    assert isinstance(model, nn.Module)
    return model


def layer_by_layer(
    model: nn.Module | Graph,
    example_inputs: Inputs | None = None,
    *,
    between: Between,
    after_cut: AfterCut | None = None,
    together: str | Sequence[str] = (),
    **options: Unpack[Options],
) -> nn.Module:
    """Prune one group after the other, in the order of the forward pass, with ``between`` after each (ThiNet).

    The widths are those of one plan for the whole of ``model``, made up front with ``options``; which channels of a
    group go is decided when its turn comes, on the network that the cuts and the training before have left: what the
    criterion reads of ``data`` is measured on that. ``after_cut``: what is done after every cut. ``together``: names or
    globs of groups that are cut together with the one that follows: ``between`` is not called after them, but after the
    last cut of all (``"layer*.conv1"`` in a ResNet-50, which the authors of ThiNet train after every block). Where
    nothing is to be cut, a copy of ``model`` comes back, as from ``apply``, and ``between`` is not called.

    Raises what ``plan`` and ``apply`` raise, and ``BadRequest`` for a glob that no group matches.
    """
    graph = trace(model, example_inputs)
    start, widths = starting_point(graph, **options), layer_widths(graph, **options)
    untrained = excluded_groups(start.groups, together, start.locked, what="together")
    if not widths:
        return apply(graph, plan(graph, **at_widths(options, {})))
    model, inputs = graph, dict(graph.kwargs) or graph.args
    for number, (name, width) in enumerate(widths.items()):
        cut, small = layer_step(model, inputs, start=start, name=name, width=width, **options)
        if after_cut is not None:
            after_cut(small, model.model if isinstance(model, Graph) else unwrap(model), cut)
        trains = name not in untrained or number == len(widths) - 1
        model = continued(between(small, number) if trains else None, small)
    assert isinstance(model, nn.Module)
    return model


def continued(result: nn.Module | None, small: nn.Module) -> nn.Module:
    """The network to go on with after ``between`` gave ``result``. Raises BadRequest for one that ``apply`` did not
    make: the plans of all cuts could not be put together."""
    if result is None:
        return small
    if not isinstance(result, nn.Module) or record(unwrap(result)) is None:
        raise BadRequest(
            f"between returned a {type(result).__name__} that is not a network made by apply, so that the plans of all "
            "cuts cannot be put together\n  do: train in place and return nothing, or return a copy.deepcopy"
        )
    return unwrap(result)
