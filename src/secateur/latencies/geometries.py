"""The layers of a network that are timed: what of them a time depends on, and how their widths follow the groups'.

Two layers of one geometry are timed once. A width is affine in the kept counts, as it is for MACs (``costs.py``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from torch import fx

from secateur.costs import Dim
from secateur.groups import Coupling
from secateur.nodes import as_int, named_args, op_name, shape_of
from secateur.operations import Operation, dims_of, operations

Kind = Literal["conv", "linear"]


@dataclass(frozen=True)
class Geometry:
    """A layer but for its widths. ``channels``: its dense ``(in, out)``.

    ``size``: the map that a convolution reads; of a linear layer, how many rows an example has, where not one.
    ``groups``: of a convolution, 0 for a depthwise one, which has as many as it has inputs. ``multiplier``: of a
    depthwise convolution, outputs an input. All have a bias: engines put batch norms into it.
    """

    kind: Kind
    channels: tuple[int, int]
    size: tuple[int, ...]
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1
    multiplier: int = 1

    @property
    def depthwise(self) -> bool:
        return self.groups == 0

    @property
    def family(self) -> str:
        """Layers of one family go by one kernel, in most engines, and so have steps of one width."""
        if self.kind == "linear":
            return "linear"
        if self.depthwise:
            return "depthwise"
        kernel = "1x1" if math.prod(self.kernel) == 1 else "spatial"
        return kernel if self.groups == 1 else f"grouped {kernel}"

    def text(self) -> str:
        """What this geometry is called in a file: its fields, one after another."""
        parts = [self.kind, *("x".join(map(str, own)) for own in (self.channels, self.size, self.kernel))]
        parts += ["x".join(map(str, own)) for own in (self.stride, self.padding, self.dilation)]
        return "/".join([*parts, str(self.groups), str(self.multiplier)])


@dataclass(frozen=True, eq=False)
class Placed:
    """A layer of a network: its geometry, and its widths as functions of the kept counts."""

    name: str
    geometry: Geometry
    into: Dim
    out: Dim


def placed_layers(coupling: Coupling) -> tuple[list[Placed], list[Operation]]:
    """The layers of the eval pass that tables can tell the time of, in graph order, and the operations that none can
    (matrix products of activations, transposed convolutions)."""
    layers, others = [], []
    for operation in operations(coupling.graph):
        geometry = _geometry(operation)
        if geometry is None:
            others.append(operation)
            continue
        axis = 1 if geometry.kind == "conv" else -1
        into = dims_of(coupling, named_args(operation.node)["input"])[axis]
        out = dims_of(coupling, operation.node)[axis]
        layers.append(Placed(operation.weight.removesuffix(".weight") or operation.node.name, geometry, into, out))
    return layers, others


def _geometry(operation: Operation) -> Geometry | None:
    name, args = op_name(operation.node), named_args(operation.node)
    if operation.kind == "linear":
        shape, out = _shape(args["input"]), _shape(operation.node)
        rows = math.prod(shape[1:-1])
        return Geometry("linear", (shape[-1], out[-1]), (rows,) if rows > 1 else ())
    if operation.kind != "conv" or "transpose" in name:
        return None
    x, weight, out = _shape(args["input"]), _shape(args["weight"]), _shape(operation.node)
    kernel, groups = weight[2:], int(args.get("groups") or 1)
    depthwise = groups == x[1] > 1
    stride, dilation = _each(args["stride"], len(kernel)), _each(args["dilation"], len(kernel))
    padding = args["padding"]
    if padding == "valid":
        padding = 0
    elif padding == "same":
        padding = [d * (k - 1) // 2 for d, k in zip(dilation, kernel, strict=True)]
    return Geometry(
        "conv",
        (x[1], out[1]),
        tuple(x[2:]),
        kernel,
        stride,
        _each(padding, len(kernel)),
        dilation,
        0 if depthwise else groups,
        out[1] // x[1] if depthwise else 1,
    )


def _shape(node: fx.Node) -> tuple[int, ...]:
    shape = shape_of(node)
    assert shape is not None
    return shape


def _each(value: Any, count: int) -> tuple[int, ...]:
    values = [value] if isinstance(value, int) else list(value)
    return tuple(as_int(k) for k in (values * count if len(values) == 1 else values))
