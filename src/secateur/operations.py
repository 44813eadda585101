"""The operations of a captured graph that cost something, each as a product of widths.

One record serves every way of counting: the dense count, the papers' conventions, the per-layer table, and the cost as
a function of kept channels (``costs_of``). A convolution costs one multiply-add for every weight and output position.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from torch import fx

from secateur.capture import is_tensor_node
from secateur.costs import Dim, Polynomial, make_cost
from secateur.graph import Graph
from secateur.groups import Coupling
from secateur.labels import Factors, compress, varying
from secateur.nodes import as_int, module_stack, named_args, op_name, shape_of

Kind = Literal["conv", "linear", "matmul"]


@dataclass(frozen=True, eq=False)
class Operation:
    """One costly node. MACs of one example are ``coefficient * product of widths``; a width is axis ``a`` of the tensor
    of node ``n``. ``weight``: the parameter's ``state_dict`` name, or ``""`` where it is computed or there is none."""

    node: fx.Node
    kind: Kind
    coefficient: float
    widths: tuple[tuple[fx.Node, int], ...]
    weight: str = ""

    @property
    def macs(self) -> float:
        shapes = [shape_of(n) for n, _ in self.widths]
        return self.coefficient * math.prod(s[a] for s, (_, a) in zip(shapes, self.widths, strict=True) if s)


def operations(graph: Graph) -> list[Operation]:
    """Every convolution, linear layer and matrix product of the eval pass, in graph order. Convolutions that depend on
    no input are left out: they are a constant of the network, not a cost of an image."""
    capture = graph.captures[0]
    examples, batch = captured_batch(graph)
    found = []
    for node in capture.graph.nodes:
        reader = _READERS.get(op_name(node)) if node.op == "call_function" else None
        if reader is not None:
            kind, parts, weight = reader(node)
            if kind == "conv" and node not in examples:
                continue  # of constants alone, as where constants were folded: the same for every image
            for scale, widths in parts:
                name = (
                    capture.names[str(weight.target)] if weight is not None and is_tensor_node(weight, capture) else ""
                )
                found.append(Operation(node, kind, scale / (batch if node in examples else 1), tuple(widths), name))
    return found


def captured_batch(graph: Graph) -> tuple[set[fx.Node], int]:
    """The nodes of the eval pass that depend on an input, and for how many examples: weights computed from weights do
    not grow with the batch. Where no axis counts examples, the inputs are one."""
    capture = graph.captures[0]
    batch = 1
    if any(capture.batched):
        places = [n for n in capture.graph.nodes if n.op == "placeholder"]
        batch = (shape_of(places[capture.batched.index(True)]) or (1,))[0]
    examples: set[fx.Node] = set()
    for node in capture.graph.nodes:
        if node.op == "placeholder" or any(s in examples for s in node.all_input_nodes):
            examples.add(node)
    return examples, batch


Part = tuple[float, list[tuple[fx.Node, int]]]
Read = tuple[Kind, list[Part], fx.Node | None]


def _shape(node: Any) -> tuple[int, ...]:
    shape = shape_of(node)
    assert shape is not None
    return shape


def _convolution(node: fx.Node) -> Read:
    args = named_args(node)
    weight, x = args["weight"], args["input"]
    transposed = "transpose" in op_name(node)
    positions = _shape(x) if transposed else _shape(node)
    scale = positions[0] * math.prod(positions[2:]) * math.prod(_shape(weight)[2:])
    return "conv", [(scale, [(weight, 0), (weight, 1)])], weight


def _linear(node: fx.Node) -> Read:
    args = named_args(node)
    x, weight = args["input"], args["weight"]
    front = [(x, a) for a in range(len(_shape(x)) - 1)]
    return "linear", [(1.0, [*front, (weight, 0), (weight, 1)])], weight


def _product(node: fx.Node) -> Read:
    a, b = [t for t in named_args(node).values() if isinstance(t, fx.Node) and shape_of(t) is not None][-2:]
    out = [(node, i) for i in range(len(_shape(node)))]
    weight = b if b.op == "get_attr" else a if a.op == "get_attr" else None
    return "matmul", [(1.0, [*out, (a, len(_shape(a)) - 1)])], weight


def _einsum(node: fx.Node) -> Read:
    args = named_args(node)
    terms = str(args["equation"]).replace(" ", "").partition("->")[0].split(",")
    place: dict[str, tuple[fx.Node, int]] = {}
    for tensor, term in zip(args["tensors"], terms, strict=True):
        for axis, letter in enumerate(term):
            place.setdefault(letter, (tensor, axis))
    return "matmul", [(1.0, list(place.values()))], None


def _attention(node: fx.Node) -> Read:
    args = named_args(node)
    q, k, v = args["query"], args["key"], args["value"]
    last = len(_shape(q)) - 1
    scores = [*((q, a) for a in range(last)), (k, last - 1)]
    return "matmul", [(1.0, [*scores, (q, last)]), (1.0, [*scores, (v, last)])], None


_READERS = {
    **dict.fromkeys("conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d".split(), _convolution),
    **dict.fromkeys("matmul mm bmm addmm baddbmm".split(), _product),
    "linear": _linear,
    "einsum": _einsum,
    "scaled_dot_product_attention": _attention,
}


def costs_of(coupling: Coupling, of: str = "macs") -> Polynomial:
    """MACs of one example, or parameters, as a function of the kept counts of ``coupling.groups``.

    Equal, to the integer, to the count of the network that ``apply`` makes of those counts.
    """
    if of == "params":
        names = {name for name, _ in coupling.graph.model.named_parameters()}
        tensors = [
            (coupling.parameters.get(n, []), tuple(t.shape)) for n, t in coupling.graph.tensors.items() if n in names
        ]
        return make_cost([(1.0, _dims(coupling, factors, shape)) for factors, shape in tensors])
    return macs_of(coupling, operations(coupling.graph))


def macs_of(coupling: Coupling, found: Sequence[Operation]) -> Polynomial:
    """The MACs of one example that some operations have, as a function of the kept counts."""
    terms = []
    for operation in found:
        dims = [dims_of(coupling, node)[axis] for node, axis in operation.widths]
        fixed = math.prod(f for f, uses in dims if not uses)
        terms.append((operation.coefficient * fixed, [d for d in dims if d[1]]))
    return make_cost(terms)


def dims_of(coupling: Coupling, node: fx.Node, part: int | None = None) -> list[Dim]:
    """Every axis of the tensor of a node, or of ``part`` of its several, as ``(fixed positions, {group: positions for
    each of its channels})``."""
    factors = coupling.passes[0].factors.get(node, [])
    if part is not None:
        own = factors[part] if isinstance(factors, tuple) else []
        return _dims(coupling, own, [as_int(k) for k in node.meta["val"][part].shape])
    assert isinstance(factors, list)
    return _dims(coupling, factors, _shape(node))


def _dims(coupling: Coupling, factors: Factors, shape: Sequence[int]) -> list[Dim]:
    """Every axis of a tensor as ``(fixed positions, {group: positions for each of its channels})``."""
    dims: list[Dim] = [(float(k), {}) for k in shape]
    for factor in factors:
        classes = compress(coupling.classes.free[factor])
        axes = varying(classes)
        if len(axes) != 1 or dims[axes[0]][1]:
            continue
        groups = coupling.group_of[classes.reshape(-1).numpy()]
        uses: dict[int, float] = {}
        for g, count in zip(*np.unique(groups[groups >= 0], return_counts=True), strict=True):
            uses[int(g)] = float(count / coupling.groups[g].channels)
        dims[axes[0]] = (float((groups < 0).sum()), uses)
    return dims


@dataclass(frozen=True)
class Layer:
    """One row of the table that papers print. ``map_size``: output positions ``(h, w)`` (or fewer or more axes);
    ``macs`` of one example; ``params``: weight and bias."""

    name: str
    kind: Kind
    in_channels: int
    out_channels: int
    groups: int
    kernel: tuple[int, ...]
    map_size: tuple[int, ...]
    macs: int
    params: int


def layer_table(graph: Graph) -> list[Layer]:
    """Every convolution and linear layer in graph order; a module called twice has two rows and its parameters once."""
    rows, seen = [], set()
    tensors = graph.tensors
    for operation in operations(graph):
        args = named_args(operation.node)
        if operation.kind == "matmul":
            continue
        weight, bias, x = args["weight"], args.get("bias"), args["input"]
        shape, out = _shape(weight), _shape(operation.node)
        is_conv = operation.kind == "conv"
        own = [n for n in (operation.weight, _name(graph, bias)) if n and n not in seen]
        seen.update(own)
        rows.append(
            Layer(
                name=operation.weight.removesuffix(".weight") or _path(operation.node),
                kind=operation.kind,
                in_channels=_shape(x)[1 if is_conv else -1],
                out_channels=out[1 if is_conv else -1],
                groups=args.get("groups", 1),
                kernel=tuple(shape[2:]),
                map_size=tuple(as_int(k) for k in out[2:]) if is_conv else (),
                macs=round(operation.macs),
                params=sum(tensors[n].numel() for n in own),
            )
        )
    return rows


def _name(graph: Graph, node: Any) -> str:
    capture = graph.captures[0]
    return capture.names[str(node.target)] if isinstance(node, fx.Node) and is_tensor_node(node, capture) else ""


def _path(node: fx.Node) -> str:
    stack = module_stack(node)
    return stack[-1][0] if stack else node.name


__all__ = ["Layer", "Operation", "costs_of", "layer_table", "operations"]
