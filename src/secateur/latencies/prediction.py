"""The latency of a network at any widths, put together from what was measured."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from secateur.costs import Polynomial, evaluate, make_cost
from secateur.errors import WrongModel
from secateur.groups import Coupling
from secateur.latencies.fits import fit_prices
from secateur.latencies.geometries import Placed, placed_layers
from secateur.latencies.grids import grid, point_text
from secateur.latencies.records import Latencies, Whole
from secateur.latencies.staircases import group_steps
from secateur.latencies.tables import Layers, NetworkLatency, Table, curve_through, features
from secateur.nodes import op_name, shape_of
from secateur.operations import costs_of, dims_of, macs_of

VIEWS = frozenset(
    """view reshape flatten unflatten permute transpose expand slice select getitem unsqueeze squeeze chunk split alias
    detach dropout identity contiguous""".split()
)
"""Operations that move nothing, or mostly nothing."""


def network_latency(coupling: Coupling, found: Latencies, *, through: Sequence[Whole] = ()) -> NetworkLatency:
    """The latency of a network as a function of its kept counts, fitted to the whole networks of ``found``, and
    corrected so that it is right about the dense one and those to go ``through``.

    Raises ``WrongModel`` for latencies of another network.
    """
    layers, others = placed_layers(coupling)
    names = [group.name for group in coupling.groups]
    if any(list(whole.widths) != names for whole in found.whole):
        raise WrongModel(_OTHER)
    parts = (
        Layers.of(layers, [_table(layer, found) for layer in layers], len(names)),
        costs_of(coupling, "params"),
        activation_elements(coupling),
        macs_of(coupling, others),
        make_cost([(1.0, [])]),
    )

    def seen(wholes: Sequence[Whole]) -> np.ndarray:
        return features(parts, np.array([list(whole.widths.values()) for whole in wholes], dtype=np.float64))

    general = [whole for whole in found.whole if not whole.decided]
    prices = fit_prices(seen(general), [whole.ms for whole in general])
    right = [found.whole[0], *through]
    return NetworkLatency(parts, prices, *curve_through(seen(right) @ prices, np.array([whole.ms for whole in right])))


def predicted_ms(coupling: Coupling, found: Latencies, widths: Mapping[str, int]) -> float:
    """Milliseconds of a batch where the groups have these widths; those not listed keep all."""
    keep = np.array([widths.get(group.name, group.channels) for group in coupling.groups], dtype=np.float64)
    return evaluate(network_latency(coupling, found), keep)


def activation_elements(coupling: Coupling) -> Polynomial:
    """The elements of all tensors that the eval pass computes from its inputs, views aside."""
    terms = []
    capture = coupling.graph.captures[0]
    weights_only = coupling.passes[0].weights_only
    for node in capture.graph.nodes:
        if node.op == "call_function" and shape_of(node) and node not in weights_only and op_name(node) not in VIEWS:
            dims = dims_of(coupling, node)
            fixed = math.prod(size for size, uses in dims if not uses)
            terms.append((fixed, [dim for dim in dims if dim[1]]))
    return make_cost(terms)


def width_steps(coupling: Coupling, found: Latencies) -> dict[str, int]:
    """For each group what its filters should be multiples of: the engine is no faster at numbers in between."""
    layers, _ = placed_layers(coupling)
    steps = group_steps(layers, found.steps, coupling.groups)
    return {group.name: step for group, step in zip(coupling.groups, steps, strict=True)}


def _table(layer: Placed, found: Latencies) -> Table:
    """The table of a layer from the points of its grid."""
    known = found.points.get(layer.geometry.text(), {})
    try:
        points = {(into, out): known[point_text(into, out)] for _, into, out in grid(layer, found.steps)}
    except KeyError:
        raise WrongModel(_OTHER) from None
    if layer.geometry.depthwise:  # both sides go together: one of them tells
        points = {(layer.geometry.channels[0], out): ms for (_, out), ms in points.items()}
    return Table.of(points)


_OTHER = (
    "the latencies are of another network, or of one whose channels are coupled in another way (residual, prefer)\n"
    "  do: measure them for this one, as it will be planned"
)
