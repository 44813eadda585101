"""The last feature map of a network, and the head behind it, found on the captured graph by what the calls do.

A head begins where a map becomes one position (an average, or a convolution that sees the whole of it at once) or one
vector, on the way that everything goes; the last map is what stands in front of that and of all pooling.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from torch import fx

from secateur.errors import CannotPrune
from secateur.graph import Graph
from secateur.nodes import named_args, op_name, shape_of, source_line

RESHAPES = frozenset("flatten view reshape _unsafe_view squeeze unflatten".split())
_POOLS = re.compile(r"(adaptive_)?(avg|max)_pool[123]d(_with_indices)?")
PASSED = frozenset("dropout feature_dropout alpha_dropout clone contiguous detach alias identity".split())
AFFINE = re.compile(r"conv(_transpose)?[123]d|linear|addmm|mm|matmul")
_TURNS = frozenset("permute transpose movedim".split())


@dataclass(frozen=True, eq=False)
class Head:
    """What lies behind the last feature map ``value [B, channels, ...]``: the calls of ``tail``, in order, of which the
    last puts out ``[B, classes]``."""

    value: fx.Node
    tail: tuple[fx.Node, ...]
    channels: int
    classes: int


def find_head(graph: Graph) -> Head:
    """The head of a captured network. Raises ``CannotPrune`` where there is none that one linear layer could replace:
    several outputs, outputs that are no class scores, or no place where a feature map becomes a vector."""
    live = _live(graph)
    spine = _spine(live)
    scores = spine[-1] if spine else None
    if scores is None or scores is not live[-1] or len(shape_of(scores) or ()) != 2:
        raise not_understood("it does not end in one tensor of class scores [B, K]")
    collapse = next((node for node in spine if collapses(node) and _no_kernels(live, node)), None)
    if collapse is None:
        raise not_understood("at no point does a feature map become one number a channel, or one vector")
    value = _before_pools(source_of(collapse), spine)
    tail = live[live.index(value) + 1 :]
    if not any(AFFINE.fullmatch(op_name(node)) for node in tail):
        last = next((node for node in reversed(spine) if op_name(node).startswith("conv")), None)
        if last is None:
            raise not_understood("there is no convolution on its way")
        value = _before_pools(source_of(last), spine)
        tail = live[live.index(value) + 1 :]
    before = live[: live.index(value) + 1]
    convolutions = [i for i, node in enumerate(before) if op_name(node).startswith("conv")]
    shape = shape_of(value) or ()
    if len(shape) < 3 or not convolutions:
        raise not_understood(f"what it reads ({source_line(value)}) is no feature map of a convolution")
    turned = [node for node in before[convolutions[-1] :] if op_name(node) in _TURNS]
    if turned and not op_name(collapse).startswith("adaptive"):
        raise not_understood(f"the axes of its feature map change places ({source_line(turned[-1])})")
    return Head(value, tuple(tail), shape[1], (shape_of(scores) or ())[1])


def not_understood(
    why: str, do: str = "replace the head in your own code, and pass the network as it is then"
) -> Exception:
    return CannotPrune(f"the head of this network cannot be replaced by pooling: {why}\n  do: {do}")


def _live(graph: Graph) -> list[fx.Node]:
    """The calls of the eval pass that depend on the inputs and that its outputs depend on, the inputs first, in order.
    Empty where there are several outputs."""
    nodes, moving = list(graph.captures[0].graph.nodes), moving_nodes(graph)
    (end,) = [node for node in nodes if node.op == "output"]
    if len(end.all_input_nodes) != 1:
        return []
    wanted, todo = set(end.all_input_nodes), list(end.all_input_nodes)
    while todo:
        for source in todo.pop().all_input_nodes:
            if source not in wanted:
                wanted.add(source)
                todo.append(source)
    return [node for node in nodes if node in moving and node in wanted]


def moving_nodes(graph: Graph) -> set[fx.Node]:
    """The inputs and all that depends on them."""
    found: set[fx.Node] = set()
    for node in graph.captures[0].graph.nodes:
        if node.op == "placeholder" or any(source in found for source in node.all_input_nodes):
            found.add(node)
    return found


def _spine(live: list[fx.Node]) -> list[fx.Node]:
    """The nodes through which everything goes: what lies behind one depends on what lies before it only through it."""
    place = {node: i for i, node in enumerate(live)}
    found, furthest = [], 0
    for i, node in enumerate(live):
        if furthest <= i:
            found.append(node)
        furthest = max([furthest, *(place[user] for user in node.users if user in place)])
    return found


def collapses(node: fx.Node) -> bool:
    """Whether a call makes one position of a map, or one vector of it."""
    call = _call_of(node)
    if call.op != "call_function" or not call.all_input_nodes:
        return False
    name, given, made = op_name(call), shape_of(source_of(call)) or (), shape_of(node) or ()
    if len(given) < 3 or given[:1] != made[:1]:
        return False
    if name in RESHAPES:
        return len(made) == 2
    single = math.prod(made[2:]) == 1
    if name == "mean":
        axes = named_args(call)["dim"]
        return axes is not None and {axis % len(given) for axis in axes} == set(range(2, len(given)))
    if name.startswith("adaptive"):
        return single
    if _POOLS.fullmatch(name) or re.fullmatch(r"conv[123]d", name):
        window = named_args(call)["kernel_size"] if "pool" in name else list((shape_of(_weight(call)) or ())[2:])
        whole = [int(k) for k in window] == list(given[2:]) or list(window) * (len(given) - 2) == list(given[2:])
        return single and whole and math.prod(given[2:]) > 1 and not _padded(call)
    return False


def _padded(node: fx.Node) -> bool:
    padding = named_args(node)["padding"]
    return padding != "valid" and padding != 0 and any(padding)


def _weight(node: fx.Node) -> fx.Node:
    return named_args(node)["weight"]


def _no_kernels(live: list[fx.Node], node: fx.Node) -> bool:
    """Whether behind ``node`` no convolution looks at more than one position."""
    behind = live[live.index(node) + 1 :]
    return all(
        math.prod((shape_of(_weight(n)) or ())[2:]) == 1 for n in behind if re.fullmatch(r"conv.*[123]d", op_name(n))
    )


def source_of(node: fx.Node) -> fx.Node:
    """What a call reads first."""
    return node.all_input_nodes[0]


def _call_of(node: fx.Node) -> fx.Node:
    """The call that gives ``node``: itself, or the pooling whose places are thrown away."""
    source = source_of(node) if op_name(node) == "getitem" else node
    return source if _POOLS.fullmatch(op_name(source)) else node


def _before_pools(node: fx.Node, spine: list[fx.Node]) -> fx.Node:
    while node in spine and (_POOLS.fullmatch(op_name(_call_of(node))) or op_name(node) in PASSED):
        node = source_of(_call_of(node))
    return node
