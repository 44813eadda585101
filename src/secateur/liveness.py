"""How much memory a network's activations need at once, as a function of how many channels each group keeps.

The captured graph is gone through in order. A tensor is alive from the operation that makes it to the last one that
reads it, or to the end if it is an output; what is alive at an operation, all together, is what it needs, and the
operation that needs most says what the network does. Views share the storage of what they look at, and operations in
place make none. Inputs, parameters and buffers are not counted, nor is what nobody reads, nor what an operation
allocates and frees inside itself. ``memory.py`` measures the same on a real forward pass.

What is alive at one operation is a sum of products of widths: the maximum over all of them is a ``Peak``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx

from secateur.capture import Capture
from secateur.costs import Peak, Term, make_peak
from secateur.groups import Coupling
from secateur.nodes import op_name
from secateur.operations import captured_batch, dims_of


@dataclass(frozen=True)
class Life:
    """A storage: the node that makes it (``part`` of its results, if they are several), and the numbers of that node
    and of the last one that reads it."""

    node: fx.Node
    part: int | None
    first: int
    last: int


def memory_of(coupling: Coupling, batch: int = 1) -> Peak:
    """The bytes of activations that a forward pass in eval mode on ``batch`` examples needs at once, as a function of
    the kept counts of ``coupling.groups``.

    Equal, to the byte, to that of the network which ``apply`` makes of those counts. What is added to scatter narrow
    branches and to fold constants is not foreseen.
    """
    capture = coupling.graph.captures[0]
    examples, captured = captured_batch(coupling.graph)
    # networks in half precision are captured in float32, and run in their own
    own = next((p.element_size() for p in coupling.graph.model.parameters() if p.is_floating_point()), 4)
    moments: list[list[Term]] = [[] for _ in capture.graph.nodes]
    for life in lives_of(capture):
        value = life.node.meta["val"] if life.part is None else life.node.meta["val"][life.part]
        element = min(own, 4) if value.dtype == torch.float32 else value.element_size()
        scale = batch / captured if life.node in examples else 1
        dims = dims_of(coupling, life.node, life.part)
        fixed = math.prod(positions for positions, uses in dims if not uses)
        term = element * scale * fixed, [dim for dim in dims if dim[1]]
        for moment in range(life.first, life.last + 1):
            moments[moment].append(term)
    return make_peak(moments)


def lives_of(capture: Capture) -> list[Life]:
    """All storages that the nodes of a pass make and that are read."""
    nodes = list(capture.graph.nodes)
    number = {node: i for i, node in enumerate(nodes)}
    storages = _storages(nodes)
    made: dict[int, tuple[fx.Node, int | None]] = {}
    last: dict[int, int] = {}
    for i, node in enumerate(nodes):
        for storage, part in storages[node].items():
            made.setdefault(storage, (node, part))
        if op_name(node) != "getitem":  # which takes one of several results and reads none
            for source in node.all_input_nodes:
                last |= dict.fromkeys(storages[source], i)
    return [
        Life(node, part, number[node], last[storage])
        for storage, (node, part) in made.items()
        if storage in last and node.op not in ("placeholder", "get_attr")
    ]


def _storages(nodes: Sequence[fx.Node]) -> dict[fx.Node, dict[int, int | None]]:
    """The storages of what each node gives, and which of its several results lies there, if they are several.

    They are told apart on the fake tensors of the capture, which do not show that dropout in eval mode hands on what it
    is given.
    """
    found: dict[fx.Node, dict[int, int | None]] = {}
    same: dict[int, int] = {}  # the storage that dropout seems to make: that of what it is given
    for node in nodes:
        value = node.meta.get("val")
        parts = list(enumerate(value)) if isinstance(value, (tuple, list)) else [(None, value)]
        own = {_storage(v): part for part, v in parts if isinstance(v, torch.Tensor)}
        if node.op == "call_function" and "dropout" in op_name(node):
            given = next(iter(found[node.all_input_nodes[0]]))
            same |= {storage: given for storage in own if storage != given}
        found[node] = {same.get(storage, storage): part for storage, part in own.items()}
    return found


def _storage(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
