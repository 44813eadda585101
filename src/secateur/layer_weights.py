"""Layer weights: what layers really read, where the forward computes it from parameters.

Under a parametrisation (weight norm, weight standardisation, a mask, kernels that are added up) a parameter is not the
weight of its layer, and its own size may mean nothing: the direction of weight norm has any length. Criteria are
therefore shown the tensor that reaches the layer, in place of the parameters that it is computed of. What only moves a
parameter's values about (a view, a transpose, a concatenation) leaves it as it is.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import fx

from secateur.core import Group, Role, Slice
from secateur.groups import Coupling
from secateur.interpreter import Adapter, fetched
from secateur.labels import compress, varying
from secateur.nodes import named_args, op_name
from secateur.views import FIELDS

MOVES = frozenset(
    """
    view reshape _unsafe_view view_as unsqueeze squeeze flatten unflatten permute transpose t movedim swapaxes numpy_T
    mT contiguous clone alias detach expand expand_as select slice narrow split split_with_sizes chunk unbind getitem
    cat concat stack to _to_copy index_select
    """.split()
)
"""Operations that move values about and change none."""
_OUT_FIRST = frozenset("conv1d conv2d conv3d linear".split())
"""Layers whose weight has outputs on axis 0 and inputs on axis 1."""


def forms_of(coupling: Coupling, name: str) -> list[list[fx.Node]]:
    """In what forms layers of the eval pass read the parameter ``name``, none where they do not. A form is the node
    that a layer reads and, where that only moves values about, the ones that compute these; the parameter's own
    ``get_attr`` node alone where nothing is computed."""
    capture, computed = coupling.graph.captures[0], coupling.passes[0].weights_only
    own = [n for n in capture.graph.nodes if n.op == "get_attr" and capture.names.get(str(n.target)) == name]
    below, todo = set(own), list(own)
    while todo:
        new = [user for user in todo.pop().users if user in computed and user not in below]
        below.update(new)
        todo += new
    forms: list[list[fx.Node]] = []
    for end in capture.graph.nodes:
        if end in below and any(user not in computed and _gives_tensors(user) for user in end.users):
            made = _computing(end, below)
            form = [end, *(n for n in made if n is not end)] if made else own[:1]
            if form not in forms:
                forms.append(form)
    return forms


def _computing(end: fx.Node, below: Collection[fx.Node]) -> list[fx.Node]:
    """The nodes among ``below`` whose values ``end`` has, moved about; none where they are those of the parameter."""
    found: list[fx.Node] = []
    seen, todo = {end}, [end]
    while todo:
        node = todo.pop()
        if node.op == "get_attr":
            continue
        if op_name(node) not in MOVES:
            found.append(node)
            continue
        sources = [n for n in node.all_input_nodes if n in below and n not in seen]
        seen.update(sources)
        todo += sources
    return found


def _gives_tensors(node: fx.Node) -> bool:
    return node.op == "output" or isinstance(node.meta.get("val"), (torch.Tensor, tuple, list))


def as_read(
    coupling: Coupling, groups: Iterable[Group], fields: Collection[str] = FIELDS
) -> tuple[list[Group], dict[str, torch.Tensor]]:
    """The groups with their ``writes`` and ``reads`` slices where layers read them, and the tensors, by name, that
    these slices lie in: the network's own, and what its forward computes of them.

    Nothing is computed where ``fields`` asks for no weights.
    """
    groups, tensors = list(groups), dict(coupling.graph.tensors)
    if not set(fields) & set(FIELDS) or not coupling.transformed:
        return groups, tensors
    pieces = [slices_read(coupling, group) for group in groups]
    values = evaluated(coupling, {node for own in pieces for _, node in own if node is not None})
    names: dict[fx.Node, str] = {}
    for node, value in values.items():  # a layer that is called twice computes its weight twice
        twin = next((n for n in names if values[n].shape == value.shape and torch.equal(values[n], value)), None)
        names[node] = names[twin] if twin else f"what {node.name} computes"
        tensors[names[node]] = value
    found = []
    for group, own in zip(groups, pieces, strict=True):
        slices = [piece if node is None else replace(piece, tensor=names[node]) for piece, node in own]
        found.append(replace(group, slices=tuple(dict.fromkeys(slices))))
    return found, tensors


def slices_read(coupling: Coupling, group: Group) -> list[tuple[Slice, fx.Node | None]]:
    """The slices of ``group``, each with the node whose value it lies in, ``None`` for the tensor itself. What is
    computed of several parameters is there once. Channels that the computed weight does not have (those inside a
    product of two matrices) are left in their parameter."""
    found: list[tuple[Slice, fx.Node | None]] = []
    seen: set[tuple[fx.Node, int, Role]] = set()
    for piece in group.slices:
        forms = []
        if piece.role in ("writes", "reads") and piece.tensor in coupling.transformed:
            forms = forms_of(coupling, piece.tensor)
        places = [_place(coupling, group, piece, form) for form in forms if form[0].op != "get_attr"]
        if len(places) < len(forms) or not any(places):
            found.append((piece, None))
        for there, node in filter(None, places):
            if (node, there.axis, there.role) not in seen:
                seen.add((node, there.axis, there.role))
                found.append((there, node))
    return found


def _place(coupling: Coupling, group: Group, piece: Slice, form: Sequence[fx.Node]) -> tuple[Slice, fx.Node] | None:
    """The first node of a form that has the channels, and where."""
    places = ((_moved(coupling, group, piece, node), node) for node in form)
    return next(((there, node) for there, node in places if there is not None), None)


def _moved(coupling: Coupling, group: Group, piece: Slice, node: fx.Node) -> Slice | None:
    """Where the channels of ``piece`` lie in what ``node`` gives."""
    factors = coupling.passes[0].factors.get(node, [])
    number = next(i for i, known in enumerate(coupling.groups) if known.name == group.name)
    axes = {}
    for factor in factors if isinstance(factors, list) else []:
        classes = compress(coupling.classes.free[factor])
        along = classes.reshape(-1).numpy()
        if len(varying(classes)) == 1 and (coupling.group_of[along] == number).any():
            axes[varying(classes)[0]] = along
    if not axes:
        return None
    layer = next((u for u in node.users if op_name(u) in _OUT_FIRST and named_args(u)["weight"] is node), None)
    axis = piece.axis if piece.axis in axes else next(iter(axes))
    if layer is not None and len(axes) > 1:  # a layer of the stream reads and writes the same channels
        axis = 0 if piece.role == "writes" else 1
    role: Role = piece.role if layer is None else ("writes" if axis == 0 else "reads")
    along = axes[axis]
    mine = np.flatnonzero(coupling.group_of[along] == number)
    mine = mine[np.argsort(coupling.channel_of[along[mine]], kind="stable")]
    return Slice(piece.tensor, axis, mine.reshape(group.channels, -1), role)


def evaluated(coupling: Coupling, nodes: Collection[fx.Node]) -> Mapping[fx.Node, torch.Tensor]:
    """What ``nodes`` of the eval pass, which depend on parameters alone, give; on the network's own device, with floats
    in the network's dtype. Nothing of the network's is changed."""
    capture, propagation = coupling.graph.captures[0], coupling.passes[0]
    tensors = {name: tensor.detach() for name, tensor in coupling.graph.tensors.items()}
    adapt = Adapter(capture.graph, tensors, ())
    needed: set[fx.Node] = set()
    todo = list(nodes)
    while todo:
        node = todo.pop()
        if node in needed:
            continue
        needed.add(node)
        if node in propagation.constants:
            continue
        todo += node.all_input_nodes
        todo += [user for user in node.users if user in propagation.weights_only and _writes(user)]
    last = {source: node for node in capture.graph.nodes if node in needed for source in node.all_input_nodes}
    env: dict[fx.Node, torch.Tensor] = {}
    with torch.no_grad():
        for node in capture.graph.nodes:
            if node not in needed:
                continue
            if node in propagation.constants:
                value = propagation.constants[node]
                env[node] = value.to(adapt.device) if isinstance(value, torch.Tensor) else value
            elif node.op == "get_attr":
                value = fetched(capture, node, tensors, adapt)
                env[node] = value.clone() if any(map(_writes, needed)) else value
            else:
                args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), lambda n: env[n])
                env[node] = adapt.call(node, args, kwargs)
            for source in node.all_input_nodes:
                if last[source] is node and source not in nodes:
                    del env[source]
    return {node: env[node] for node in nodes}


def _writes(node: fx.Node) -> bool:
    """Whether a call changes one of its arguments in place."""
    schema = getattr(node.target, "_schema", None)
    return bool(schema is not None and schema.is_mutable)
