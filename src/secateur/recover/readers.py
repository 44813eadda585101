"""Readers: the weights whose inputs lost channels, and which of them are affine, so that they can be fitted anew.

Convolutions, transposed convolutions and linear layers are, if their weight is a parameter (or its transpose) that
nothing else uses. What multiplies activations with each other, or computes its weight, is skipped, and says why.

Shapes: as in ``patches``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import fx

from secateur.consumers import affine, caller
from secateur.groups import Coupling
from secateur.homes import Home, home_of
from secateur.nodes import op_name, shape_of
from secateur.patches import Layout, layout_of, matrix
from secateur.plans import Plan

Mask = torch.Tensor | None
_TURNS = frozenset("t numpy_T transpose permute".split())


@dataclass(frozen=True, eq=False)
class Use:
    """One call of a reader: what it reads, and the masks of that."""

    node: fx.Node
    source: fx.Node
    layout: Layout
    masks: Sequence[Mask]


@dataclass(frozen=True, eq=False)
class Reader:
    """A weight that reads channels by affine operations alone. ``rows`` and ``columns``: bool, what stays of the
    outputs ``[G, O]`` and of the inputs ``[I]`` of each partition. ``channels``: int64, the number of the channel that
    each of the ``I`` is of; inputs of one channel, of whichever partition, have one number."""

    name: str
    weight: str
    uses: tuple[Use, ...]
    home: Home
    rows: torch.Tensor
    columns: torch.Tensor
    channels: torch.Tensor

    @property
    def layout(self) -> Layout:
        return self.uses[0].layout

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(G, O, P)`` of what is kept."""
        kernel = 1
        for size in self.layout.kernel:
            kernel *= size
        return self.layout.groups, int(self.rows[0].sum()), int(self.columns.sum()) * kernel


def find_readers(
    coupling: Coupling, plan: Plan, class_keep: torch.Tensor, *, sequential: bool, may_add: bool
) -> tuple[list[Reader], dict[str, str]]:
    """The readers to fit, in graph order, and why others that read removed channels are skipped."""
    touched = _touched(coupling, class_keep)
    uses: dict[str, list[Use]] = {}
    skipped: dict[str, str] = {}
    for node in coupling.graph.captures[0].graph.nodes:
        if node not in coupling.passes[0].readers:
            continue
        sources = [s for s in node.all_input_nodes if shape_of(s) is not None]
        lost = any(m is not None for s in _activations(sources, coupling) for m in _masks(coupling, s, class_keep))
        found = _stored(node, coupling)
        if isinstance(found, str):
            if lost:
                skipped[caller(node)] = found
            continue
        source, weight, layout = found
        use = Use(node, source, layout, _masks(coupling, source, class_keep))
        uses.setdefault(weight, []).append(use)
    readers = []
    for weight, own in uses.items():
        affected = [u for u in own if (sequential and u.source in touched) or any(m is not None for m in u.masks)]
        if not affected:
            continue
        reader = _reader(weight, own, coupling, plan, may_add)
        if isinstance(reader, str):
            skipped[caller(own[0].node)] = reader
        else:
            readers.append(reader)
    return readers, skipped


def _touched(coupling: Coupling, class_keep: torch.Tensor) -> set[fx.Node]:
    """Nodes whose values are not those of the dense network any more."""
    propagation, found = coupling.passes[0], set()
    for node in coupling.graph.captures[0].graph.nodes:
        inputs = node.all_input_nodes
        summing = node in propagation.readers or node in propagation.norms
        if any(i in found for i in inputs) or (
            summing and any(m is not None for i in inputs for m in _masks(coupling, i, class_keep))
        ):
            found.add(node)
    return found


def _activations(sources: Sequence[fx.Node], coupling: Coupling) -> list[fx.Node]:
    return [s for s in sources if s not in coupling.passes[0].weights_only]


def _masks(coupling: Coupling, node: fx.Node, class_keep: torch.Tensor) -> Sequence[Mask]:
    return coupling.node_masks(0, node, class_keep)


def _stored(node: fx.Node, coupling: Coupling) -> tuple[fx.Node, str, Layout] | str:
    """Input, weight and layout of an affine reader whose weight is a parameter or its transpose, or why it is none."""
    call = affine(node, coupling)
    if isinstance(call, str):
        return call
    weight, turned = call.weight, False
    while weight.op != "get_attr" and op_name(weight) in _TURNS and len(shape_of(weight) or ()) == 2:
        if op_name(weight) != "permute" or list(cast(list[int], weight.args[1])) == [1, 0]:
            turned = not turned
        weight = cast(fx.Node, weight.args[0])
    stored = coupling.graph.captures[0].names.get(str(weight.target)) if weight.op == "get_attr" else None
    if stored is None or stored not in dict(coupling.graph.model.named_parameters()):
        return "its weight is computed from other tensors"
    return call.source, stored, layout_of(node, turned)


def _reader(weight: str, uses: list[Use], coupling: Coupling, plan: Plan, may_add: bool) -> Reader | str:
    capture = coupling.graph.captures[0]
    calls, todo, nodes = {u.node for u in uses}, [n for n in capture.graph.nodes if n.op == "get_attr"], set()
    todo = [n for n in todo if capture.names.get(str(n.target)) == weight]
    while todo:
        for user in todo.pop().users:
            if op_name(user) in _TURNS and user not in calls:
                todo.append(user)
            else:
                nodes.add(user)
    if nodes != calls:
        return "its weight is used for something else as well"
    layouts = {u.layout for u in uses}
    if len({(one.kind, one.turned, one.groups) for one in layouts}) > 1:
        return "its weight is used by different operations"
    for use in uses:
        shape = shape_of(use.source) or ()
        if any(m is not None and len(m) != n for m, n in zip(use.masks, shape, strict=True)):
            return "its input was captured in another shape"
    layout = uses[0].layout
    whole = matrix(torch.zeros(plan.model[weight]), layout)
    stays = _stays(plan, weight, layout)
    rows, columns = stays.any(2), stays.any(1)
    if bool((columns != columns[:1]).any()) or len({int(n) for n in rows.sum(1)}) > 1:
        return "its partitions keep different inputs"
    home = home_of([u.node for u in uses], weight, coupling, may_add=may_add)
    assert whole.shape[:3] == stays.shape
    channels = _channels(coupling, weight, layout, len(columns[0]))
    return Reader(caller(uses[0].node), weight, tuple(uses), home, rows, columns[0], channels)


def _channels(coupling: Coupling, weight: str, layout: Layout, inputs: int) -> torch.Tensor:
    """The number of the channel that each input of a partition is of. What cannot be pruned is by itself."""
    axis = 1 if layout.kind == "conv" or (layout.kind == "linear" and not layout.turned) else 0
    found = torch.arange(inputs)
    count = inputs
    for group in coupling.groups:
        for part in group.slices:
            if (part.tensor, part.axis) == (weight, axis):
                # of a transposed convolution the axis holds all partitions, whose same positions are one channel
                own = torch.from_numpy(part.positions) % inputs
                found[own] = count + torch.arange(group.channels)[:, None].expand_as(own)
                count += group.channels
    return torch.unique(found, return_inverse=True)[1]


def _stays(plan: Plan, weight: str, layout: Layout) -> torch.Tensor:
    """Bool ``[G, O, I]``: what is kept of a weight."""
    kept = torch.ones(plan.model[weight], dtype=torch.bool)
    for axis, positions in plan.kept().get(weight, {}).items():
        mask = torch.zeros(kept.shape[axis], dtype=torch.bool)
        mask[torch.from_numpy(positions)] = True
        kept &= mask.reshape([-1 if d == axis else 1 for d in range(kept.dim())])
    return matrix(kept, layout).any(3)
