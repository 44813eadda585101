"""Taps: where a group's feature maps lie in a captured network.

A *map* is what one filter puts out: one of the channel's positions in the output of a convolution or linear layer, its
bias included. Its *activation* is the same map behind the elementwise activation function that follows, through norms,
sums with other branches, pooling and views; where none follows, it is the map that is read next. Both are found by
following the channels' labels through the graph, so that concatenations, residual streams and shared modules need no
code of their own.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import fx

from secateur.capture import Capture
from secateur.core import Group, Slice
from secateur.errors import CannotPrune, nearest
from secateur.groups import Coupling
from secateur.labels import compress, varying
from secateur.layer_weights import forms_of
from secateur.nodes import named_args, op_name, shape_of, source_line

ACTIVATIONS = frozenset(
    """
    relu relu6 gelu silu sigmoid tanh hardswish hardsigmoid hardtanh leaky_relu elu softplus mish celu selu rrelu prelu
    threshold softsign tanhshrink hardshrink softshrink log_sigmoid clamp clamp_min clamp_max special_expit
    """.split()
)
"""Elementwise functions that count as activation functions."""
LAYERS = frozenset(
    """
    conv1d conv2d conv3d convolution conv_transpose1d conv_transpose2d conv_transpose3d linear matmul bmm mm mv addmm
    baddbmm einsum embedding
    """.split()
)
"""Operations that make channels by a weight."""
_RESHAPES = frozenset("view reshape unsqueeze squeeze flatten unflatten permute transpose contiguous clone".split())


@dataclass(frozen=True, eq=False)
class Tap:
    """Maps of a group: what ``value`` holds when a walk stops in front of ``stop``.

    ``axis``: the one that the channels lie on; ``positions [C, m]``: the ``m`` indices of each along it. ``samples``:
    the axis that counts examples, ``None`` where the value is the same for all of them.
    """

    value: fx.Node
    stop: fx.Node
    axis: int
    positions: torch.Tensor
    samples: int | None


def filters_of(group: Group, coupling: Coupling) -> list[Slice]:
    """The slices of ``group`` that are filters: it is written there, by a weight of two or more axes. A vector of which
    the forward computes such a weight counts as well."""
    tensors = coupling.graph.tensors

    def is_filter(name: str) -> bool:
        return tensors[name].dim() >= 2 or any(len(shape_of(form[0]) or ()) >= 2 for form in forms_of(coupling, name))

    return [s for s in group.slices if s.role == "writes" and is_filter(s.tensor)]


def map_taps(coupling: Coupling, group: Group) -> list[Tap]:
    """The maps that the layers in ``group``'s filters put out in the eval pass, in graph order.

    A layer that is called several times has a tap for each call. Raises ``CannotPrune`` where no layer writes the
    group in the eval pass, and where its channels lie on one axis with the examples.
    """
    return [_tap(coupling, group, node, node.next) for node in _written(coupling, group)]


def activation_taps(coupling: Coupling, group: Group) -> list[Tap]:
    """The maps behind the activation functions that follow ``group``'s layers, each once, in graph order. Where a map
    takes several ways, the first activation function on each counts; where no way has any, what is read does.

    Raises ``CannotPrune`` as ``map_taps`` does.
    """
    behind: set[fx.Node] = set()
    read: dict[fx.Node, fx.Node] = {}
    written = _written(coupling, group)
    _follow(coupling, group, written, behind, read)
    in_order = coupling.graph.captures[0].graph.nodes
    if behind:
        return [_tap(coupling, group, node, node.next) for node in in_order if node in behind]
    if read:
        return [_tap(coupling, group, node, read[node]) for node in in_order if node in read]
    return [_tap(coupling, group, node, node.next) for node in written]


def _written(coupling: Coupling, group: Group) -> list[fx.Node]:
    """The nodes whose outputs are the maps of ``group``: its layers, each with its bias."""
    capture, propagation = coupling.graph.captures[0], coupling.passes[0]
    filters = {s.tensor for s in filters_of(group, coupling)}
    found: set[fx.Node] = set()
    todo = [n for n in capture.graph.nodes if n.op == "get_attr" and capture.names.get(str(n.target)) in filters]
    seen = set(todo)
    while todo:
        for user in todo.pop().users:
            if user in seen:
                continue
            seen.add(user)
            if user in propagation.weights_only:
                todo.append(user)
            elif op_name(user) in LAYERS and places(coupling, group, user) is not None:
                kernel_of = _made_kernel(user)
                found.update(_biased(coupling, group, n) for n in kernel_of or [user] if places(coupling, group, n))
    if not found:
        where = f"of {', '.join(map(repr, sorted(filters)))} puts them out" if filters else "writes them"
        raise CannotPrune(
            f"group {group.name!r} has no feature maps: no layer {where} in eval mode\n"
            "  do: exclude it, or use a criterion that looks at weights, such as 'l1'"
        )
    return [n for n in capture.graph.nodes if n in found]


def _made_kernel(node: fx.Node) -> list[fx.Node]:
    """The convolutions whose kernels ``node`` makes for every example anew (a mixture of experts' kernels); mostly
    there are none."""
    found, todo, seen = [], [node], {node}
    while todo:
        source = todo.pop()
        for user in source.users:
            if op_name(user).startswith("conv"):
                if named_args(user)["weight"] is source:
                    found.append(user)
            elif op_name(user) in _RESHAPES and user not in seen:
                seen.add(user)
                todo.append(user)
    return found


def _biased(coupling: Coupling, group: Group, node: fx.Node) -> fx.Node:
    """The addition of a bias that the forward writes out behind a layer, if that is what follows; else the layer."""
    here = places(coupling, group, node)
    if len(node.users) != 1 or here is None:
        return node
    user = next(iter(node.users))
    others = [n for n in user.all_input_nodes if n is not node]
    if op_name(user) != "add" or len(others) != 1 or others[0] not in coupling.passes[0].weights_only:
        return node
    shape, wide = shape_of(node) or (), shape_of(others[0]) or ()
    wide = (1,) * (len(shape) - len(wide)) + tuple(wide)
    vector = len(wide) == len(shape) and all(k == 1 for d, k in enumerate(wide) if d != here[0])
    return user if vector and shape_of(user) == shape else node


def _follow(
    coupling: Coupling,
    group: Group,
    start: Iterable[fx.Node],
    behind: set[fx.Node],
    read: dict[fx.Node, fx.Node],
) -> None:
    """Collect the first activation functions that the maps come to, and, on ways without, what is read by whom."""
    order = {node: i for i, node in enumerate(coupling.graph.captures[0].graph.nodes)}
    todo = list(start)
    seen = set(todo)
    while todo:
        node = todo.pop()
        for user in node.users:
            several = isinstance(user.meta.get("val"), (tuple, list))
            if places(coupling, group, user) is None and not several:
                if user in coupling.passes[0].readers:
                    first = read.get(node)
                    read[node] = user if first is None or order[user] < order[first] else first
            elif op_name(user) in ACTIVATIONS:
                behind.add(user)
            elif user not in seen:
                seen.add(user)
                todo.append(user)


def places(coupling: Coupling, group: Group, node: fx.Node) -> tuple[int, torch.Tensor] | None:
    """The axis of a node's tensor that holds channels of ``group`` and ``[C, m]`` indices along it; ``None`` if the
    node has none of them, or holds no single tensor."""
    number = next((i for i, known in enumerate(coupling.groups) if known.name == group.name), None)
    if number is None:
        close = nearest(group.name, (known.name for known in coupling.groups))
        raise CannotPrune(
            f"{group.name!r} is not one of this network's free groups{close}\n"
            "  do: pass groups of the coupling itself; locked ones cannot be scored"
        )
    factors = coupling.passes[0].factors.get(node, [])
    for factor in factors if isinstance(factors, list) else []:
        classes = coupling.classes.free[factor]
        if not (coupling.group_of[classes.numpy()] == number).any():
            continue
        axes = varying(classes)
        if len(axes) > 1:  # the classes vary along one of them: what was joined to make them rectangular
            classes = compress(classes)
            axes = varying(classes) or axes[-1:]
        flat = classes.reshape(-1).numpy()
        mine = np.flatnonzero(coupling.group_of[flat] == number)
        mine = mine[np.argsort(coupling.channel_of[flat[mine]], kind="stable")]
        return axes[0], torch.from_numpy(mine.reshape(group.channels, -1))
    return None


def _tap(coupling: Coupling, group: Group, value: fx.Node, stop: fx.Node) -> Tap:
    found = places(coupling, group, value)
    assert found is not None
    axis, positions = found
    capture = coupling.graph.captures[0]
    sizes = value.meta["val"].shape
    if isinstance(sizes[axis], torch.SymInt):
        raise CannotPrune(
            f"the feature maps of group {group.name!r} lie on one axis with the examples, at {op_name(value)} in "
            f"{source_line(value)}\n  do: exclude it, or use a criterion that looks at weights, such as 'l1'"
        )
    return Tap(value, stop, axis, positions, examples_axis(capture, value, axis))


def examples_axis(capture: Capture, node: fx.Node, channels: int) -> int | None:
    """The axis of a node's tensor that counts examples, not that of its channels; ``None`` where it is the same for
    all of them. Where the capture does not tell axes apart, the first."""
    if not any(capture.batched):
        return None
    sizes = node.meta["val"].shape
    free = (d for d, size in enumerate(sizes) if isinstance(size, torch.SymInt) or not capture.free)
    return next((d for d in free if d != channels % len(sizes)), None)
