"""Counting as PyTorch does, and as each of the papers does.

- ``torch``: convolutions, linear layers and matrix products; 2 FLOPs per MAC; all parameters.
- ``li``: convolutions and linear layers, projection shortcuts left out; 1 FLOP per MAC; their weights.
- ``thinet``: convolutions and linear layers; 2 FLOPs per MAC; their weights, and 2 for each batch-norm channel.
- ``fpgm``: convolutions; 1 FLOP per MAC; all parameters (the paper reports none).
- ``swp``: convolutions and linear layers; 2 FLOPs per MAC, plus linear biases, 2 per batch-norm element (none behind
  projections), 1 per element of a ReLU module and k*k per output of a pooling module; all parameters.

All of them per example. Recurrent layers, which are one operation to the graph, are not counted. A projection shortcut
is a 1x1 convolution that takes what another convolution takes as well and whose output, normalised or not, goes
straight into a sum.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from secateur import operations as ops
from secateur.errors import BadRequest, nearest
from secateur.graph import Graph, Inputs, trace
from secateur.nodes import module_stack, named_args, op_name, shape_of
from secateur.operations import Layer, Operation, operations

CONVENTIONS = ("torch", "li", "thinet", "fpgm", "swp")


@dataclass(frozen=True)
class Count:
    """What one example costs under a convention. ``macs``: multiply-adds; ``flops``: as the paper prints them."""

    macs: int
    flops: int
    params: int


def count(model: nn.Module | Graph, example_inputs: Inputs | None = None, *, convention: str = "torch") -> Count:
    """MACs, FLOPs and parameters of ``model`` under one of the conventions above.

    Raises ``BadRequest`` for an unknown convention, ``CannotCapture`` if the model cannot be traced.
    """
    if convention not in CONVENTIONS:
        raise BadRequest(f"unknown convention {convention!r}{nearest(convention, CONVENTIONS)}")
    graph = trace(model, example_inputs)
    found = operations(graph)
    everything = sum(p.numel() for p in graph.model.parameters())
    layers = [o for o in found if o.kind != "matmul"]
    if convention == "torch":
        macs = _macs(found)
        return Count(macs, 2 * macs, everything)
    if convention == "li":
        layers = [o for o in layers if not is_projection(o)]
        macs = _macs(layers)
        return Count(macs, macs, _weights(graph, layers))
    if convention == "thinet":
        macs = _macs(layers)
        return Count(macs, 2 * macs, _weights(graph, layers) + 2 * _norm_channels(graph))
    if convention == "fpgm":
        macs = _macs([o for o in layers if o.kind == "conv"])
        return Count(macs, macs, everything)
    macs = _macs(layers)
    return Count(macs, 2 * macs + _swp_extras(graph, layers), everything)


def layer_table(model: nn.Module | Graph, example_inputs: Inputs | None = None) -> list[Layer]:
    """The rows of the per-layer table that papers print: every convolution and linear layer, in graph order."""
    return ops.layer_table(trace(model, example_inputs))


def fpgm_macs(model: nn.Module | Graph, width: Callable[[int], float], example_inputs: Inputs | None = None) -> float:
    """FPGM's own count of a network in which every convolution but the projections keeps ``width(n)`` of its ``n``
    filters, block outputs included (they are scattered back into a stream of full width).

    ``width`` may give real numbers, ``lambda n: 0.6 * n``: that is how the paper's figures came about. A convolution
    reads a narrowed input only where it comes from one convolution, not from a sum.
    """
    graph = trace(model, example_inputs)
    total = 0.0
    for operation in operations(graph):
        if operation.kind != "conv":
            continue
        args = named_args(operation.node)
        out, into = _shape(args["weight"])[:2]
        kept_out = out if is_projection(operation) else width(out)
        kept_in = width(into) if _from_one_convolution(args["input"]) else into
        total += operation.macs * (kept_out / out) * (kept_in / into)
    return total


def is_projection(operation: Operation) -> bool:
    """Whether a convolution is the projection on a shortcut (see the module's docstring)."""
    if operation.kind != "conv" or operation.node.target is None:
        return False
    args = named_args(operation.node)
    if any(k != 1 for k in _shape(args["weight"])[2:]):
        return False
    shared = [u for u in args["input"].users if u is not operation.node and _leads_to_convolution(u)]
    if not shared:
        return False
    node = operation.node
    while len(node.users) == 1:
        (node,) = node.users
        if op_name(node) == "add":
            return True
        if op_name(node) not in ("batch_norm", "dropout"):
            return False
    return False


def _leads_to_convolution(node: fx.Node) -> bool:
    while op_name(node) in ("relu", "batch_norm") and len(node.users) == 1:
        (node,) = node.users
    return op_name(node).startswith("conv")


def _from_one_convolution(node: Any) -> bool:
    while isinstance(node, fx.Node) and node.op == "call_function":
        if op_name(node).startswith("conv"):
            return True
        if op_name(node) in ("add", "cat"):
            return False
        node = node.all_input_nodes[0]
    return False


def _macs(found: list[Operation]) -> int:
    return sum(round(o.macs) for o in found)


def _shape(node: Any) -> tuple[int, ...]:
    shape = shape_of(node)
    assert shape is not None
    return shape


def _weights(graph: Graph, layers: list[Operation]) -> int:
    return sum(math.prod(_shape(w)) for w in {named_args(o.node)["weight"] for o in layers})


def _calls(graph: Graph, name: str) -> list[fx.Node]:
    return [n for n in graph.captures[0].graph.nodes if n.op == "call_function" and op_name(n) == name]


def _norm_channels(graph: Graph) -> int:
    scales = {n.args[1] for n in _calls(graph, "batch_norm") if isinstance(n.args[1], fx.Node)}
    return sum(_shape(s)[0] for s in scales)


def _swp_extras(graph: Graph, layers: list[Operation]) -> int:
    def elements(node: Any) -> int:
        return math.prod(_shape(node)[1:])

    projections = {o.node for o in layers if is_projection(o)}
    biases = sum(_shape(b)[0] for o in layers if o.kind == "linear" and (b := named_args(o.node)["bias"]) is not None)
    norms = sum(2 * elements(n) for n in _calls(graph, "batch_norm") if n.args[0] not in projections)
    relus = sum(elements(n) for n in _calls(graph, "relu") if _inside(n, "ReLU"))
    pools = 0
    for name in ("max_pool2d", "avg_pool2d"):
        for node in _calls(graph, name):
            kernel = named_args(node)["kernel_size"]
            if _inside(node, "Pool2d"):
                pools += elements(node) * math.prod(kernel if len(kernel) == 2 else [kernel[0]] * 2)
    return biases + norms + relus + pools


def _inside(node: fx.Node, kind: str) -> bool:
    stack = module_stack(node)
    return bool(stack) and stack[-1][1].rsplit(".", 1)[-1].endswith(kind)
