"""Whether a network treats the examples of a batch apart, as its captured graph tells it: it may be run in parts then.

The proof goes by shapes: where the number of examples is symbolic, the axis of the examples is the one of that size. A
network treats them apart if everything computed from them has just one such axis, and if every operation is known not
to look along it. What is not known does: no values are looked at, so that no batch can give another answer.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

from secateur.capture import Capture
from secateur.nodes import named_args, op_name

_SHAPED = frozenset({"view", "reshape", "_unsafe_view", "flatten", "unflatten", "expand"})
"""They keep the order of the elements: examples stay whole if as much lies in front of their axis as before."""
_TOLD_BY_SHAPES = frozenset(
    {"permute", "transpose", "movedim", "unsqueeze", "squeeze", "contiguous", "clone", "detach", "alias", "to"}
    | {"_to_copy", "dropout", "lift_fresh_copy", "unbind", "chunk", "split", "split_with_sizes", "select", "slice"}
    | {"hardswish", "hardsigmoid", "hardtanh", "leaky_relu", "relu6"}  # elementwise, whether tagged so or not
    | {"getitem", "cat", "stack", "concat", "mean", "sum", "amax", "amin", "var", "std", "linalg_vector_norm"}
)
"""Had they touched the examples' axis, it would be gone, or of another size."""
_FIRST_AXIS = frozenset(
    {"conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "convolution"}
    | {"batch_norm", "instance_norm", "group_norm", "pad", "constant_pad_nd", "pixel_shuffle", "pixel_unshuffle"}
    | {f"{kind}_pool{n}d" for kind in ("max", "avg", "adaptive_avg", "adaptive_max") for n in (1, 2, 3)}
    | {f"upsample_{kind}" for kind in ("nearest1d", "nearest2d", "nearest3d", "bilinear2d", "bicubic2d")}
)
_NOT_LAST_AXIS = frozenset({"linear", "layer_norm", "rms_norm"})
_ALONG = frozenset({"softmax", "log_softmax", "_softmax", "_log_softmax"})
_PRODUCTS = frozenset({"matmul", "bmm"})
_MIXED = -1
"""In place of an axis: several sizes depend on the number of examples, or one is more than just that number."""


def treats_examples_apart(capture: Capture) -> bool:
    """Whether the outputs for some examples are the same, but for the last bits, whatever others are in the batch."""
    nodes = list(capture.graph.nodes)
    inputs = [tensor for node in nodes if node.op == "placeholder" for tensor in _tensors(node)]
    lengths: list[Any] = [tensor.shape[0] for tensor in inputs if tensor.dim()]
    first = {str(length) for length in lengths if isinstance(length, torch.SymInt)}
    if not (capture.free and all(capture.batched) and len(first) == 1):
        return False
    symbol = first.pop()
    calls = [node for node in nodes if node.op == "call_function"]
    results = nodes[-1].all_input_nodes
    return all(_apart(node, symbol) for node in calls) and all(_axes(node, symbol) == [0] for node in results)


def _apart(node: fx.Node, symbol: str) -> bool:
    name = op_name(node)
    if name == "sym_size":
        return True
    sources = [source for source in node.all_input_nodes if _tensors(source)]
    if len(sources) < len(node.all_input_nodes) and name not in _SHAPED:
        return False  # how many examples there are is part of what it computes
    found = {source: axes[0] for source in sources if (axes := _batched(source, symbol))}
    results = _axes(node, symbol)
    if not found:
        return name == "expand" or all(axis is None for axis in results)
    if not results or _MIXED in found.values() or any(axis is None or axis == _MIXED for axis in results):
        return False
    return torch.Tag.pointwise in getattr(node.target, "tags", ()) or _looks_aside(node, name, found, results)


def _looks_aside(node: fx.Node, name: str, found: dict[fx.Node, int], results: list[Any]) -> bool:
    """Whether the operation does not look along the axis of the examples, which is at ``found`` in what it takes and at
    ``results`` in what it gives."""
    if name in _TOLD_BY_SHAPES:
        return True
    first = node.all_input_nodes[0]
    axis, rank = found.get(first, _MIXED), _tensors(first)[0].dim() if _tensors(first) else 0
    if name in _SHAPED:
        return list(found) == [first] and _before(first, axis) == _before(node, results[0])
    if name in _FIRST_AXIS:
        return list(found) == [first] and axis == 0 and named_args(node).get("training") in (None, False)
    if name in _NOT_LAST_AXIS:
        return list(found) == [first] and axis < rank - 1
    if name in _ALONG:
        return int(named_args(node)["dim"]) % rank != axis
    inner = any(axis >= _tensors(source)[0].dim() - 2 for source, axis in found.items())
    if name in _PRODUCTS:
        return len(found) == 1 or not inner
    return name == "scaled_dot_product_attention" and not inner


def _tensors(node: fx.Node) -> list[torch.Tensor]:
    value = node.meta.get("val")
    return [v for v in (value if isinstance(value, (tuple, list)) else (value,)) if isinstance(v, torch.Tensor)]


def _axes(node: fx.Node, symbol: str) -> list[int | None]:
    """The axis of the examples in every tensor of a node."""
    return [_axis(tensor.shape, symbol) for tensor in _tensors(node)]


def _batched(node: fx.Node, symbol: str) -> list[int]:
    return [axis for axis in _axes(node, symbol) if axis is not None]


def _axis(shape: Iterable[Any], symbol: str) -> int | None:
    found = {i: str(size) for i, size in enumerate(shape) if isinstance(size, torch.SymInt)}
    if not found:
        return None
    return next(iter(found)) if list(found.values()) == [symbol] else _MIXED


def _before(node: fx.Node, axis: int) -> int:
    return math.prod(int(size) for size in _tensors(node)[0].shape[:axis])
