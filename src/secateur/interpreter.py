"""The interpreter of captured graphs: a plan's masks on the dense network, with any values of its tensors.

Where an operation sums over channels, the removed ones among its inputs are zero; where a normalisation takes
statistics over channels, it takes them over the kept ones, group norm over the *dense* partition. ``walk`` can be
stopped and looked at on the way, which is how statistics of activations are taken, of any network and without hooks.
"""

from __future__ import annotations

from collections.abc import Container, Generator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, cast

import torch
from torch import fx

from secateur.groups import Coupling
from secateur.nodes import named_args, op_name, shape_of

Mask = torch.Tensor | None
Env = dict[fx.Node, Any]
"""The values of the nodes that some later node still needs."""
Walk = Generator[tuple[fx.Node, Env], None, tuple[torch.Tensor, ...]]
CASTS = frozenset({"to", "_to_copy"})
"""Where a forward names a dtype itself: never below float32, whatever the weights are in."""
_READ_FIRST_ONLY = ("conv", "linear")


def run_masked(
    coupling: Coupling,
    class_keep: torch.Tensor,
    state: Mapping[str, torch.Tensor],
    inputs: Sequence[torch.Tensor],
    index: int = 0,
) -> tuple[torch.Tensor, ...]:
    """Pass ``index`` of the graph on ``inputs`` with the parameters in ``state``; returns its flat outputs.

    In a train pass (``index=1``) dropout does nothing, and the running statistics in ``state`` move.
    """
    walking = walk(coupling, class_keep, state, inputs, index)
    try:
        next(walking)
    except StopIteration as end:
        return cast(tuple[torch.Tensor, ...], end.value)
    raise AssertionError("a walk that watches nothing does not stop")


def walk(
    coupling: Coupling,
    class_keep: torch.Tensor,
    state: Mapping[str, torch.Tensor],
    inputs: Sequence[torch.Tensor],
    index: int = 0,
    watch: Container[fx.Node] = (),
    added: Mapping[fx.Node, torch.Tensor] = MappingProxyType({}),
) -> Walk:
    """``run_masked`` as a generator that stops in front of every node in ``watch`` and hands out the node and all live
    values.

    It returns the flat outputs; whoever stops listening has run no more of the network than what was needed. What is
    changed in the tensors of ``state`` in place, or in ``added``, counts from the next node on. ``added``: a constant,
    shaped to broadcast, that is added to what a node gives (a bias that the captured network has not).
    """
    capture = coupling.graph.captures[index]
    adapt = _Adapter(capture.graph, state, inputs)
    env: Env = {}
    queue = list(inputs)
    del inputs  # a walk that waits holds what is live, and no more
    last_use = {source: node for node in capture.graph.nodes for source in node.all_input_nodes}
    for node in capture.graph.nodes:
        if node in watch:
            yield node, env
        if node.op == "placeholder":
            env[node] = queue.pop(0)
        elif node.op == "get_attr":
            name = capture.names.get(str(node.target))
            env[node] = state[name] if name else adapt.constant(capture.constants.get(str(node.target)))
        elif node.op == "output":
            return tuple(fx.node.map_arg(node.args[0], lambda n: env[n]))
        else:
            env[node] = _run_node(coupling, index, node, class_keep, env, adapt)
            if node in added:
                env[node] = env[node] + added[node]
        for source in node.all_input_nodes:
            if last_use[source] is node:
                del env[source]
    raise AssertionError("a captured graph ends in an output node")


def _run_node(
    coupling: Coupling, index: int, node: fx.Node, class_keep: torch.Tensor, env: dict[fx.Node, Any], adapt: _Adapter
) -> Any:
    propagation = coupling.passes[index]
    if index and "dropout" in op_name(node):
        return env[node.all_input_nodes[0]]
    if node in propagation.norms:
        return _norm(coupling, index, node, class_keep, env, adapt)
    read: dict[fx.Node, torch.Tensor] = {}
    if node in propagation.readers:
        sources = [s for s in node.all_input_nodes if shape_of(s) is not None]
        if op_name(node).startswith(_READ_FIRST_ONLY):
            sources = sources[:1]
        for source in sources:
            read[source] = _zeroed(env[source], coupling.node_masks(index, source, class_keep))
    args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), lambda n: read[n] if n in read else env[n])
    return adapt.call(node, args, kwargs)


def _zeroed(value: torch.Tensor, masks: Sequence[Mask]) -> torch.Tensor:
    for axis, mask in enumerate(masks):
        if mask is not None:
            shape = [1] * value.dim()
            shape[axis] = -1
            value = torch.where(mask.to(value.device).reshape(shape), value, torch.zeros((), dtype=value.dtype))
    return value


def cut(value: torch.Tensor, masks: Sequence[Mask]) -> torch.Tensor:
    """Only the positions that stay."""
    for axis, mask in enumerate(masks):
        if mask is not None:
            value = value.index_select(axis, torch.nonzero(mask).flatten().to(value.device))
    return value


def _scattered(value: torch.Tensor, masks: Sequence[Mask]) -> torch.Tensor:
    """The inverse of ``cut``: removed positions are zero."""
    for axis, mask in enumerate(masks):
        if mask is not None:
            shape = list(value.shape)
            shape[axis] = len(mask)
            full = value.new_zeros(shape)
            value = full.index_copy(axis, torch.nonzero(mask).flatten().to(value.device), value)
    return value


def _norm(
    coupling: Coupling, index: int, node: fx.Node, class_keep: torch.Tensor, env: dict[fx.Node, Any], adapt: _Adapter
) -> Any:
    """Statistics over the kept channels: cut, compute, put back in place."""
    if op_name(node) == "group_norm":
        arguments = named_args(node)
        masks = coupling.node_masks(index, arguments["input"], class_keep)
        return _group_norm({k: env[v] if isinstance(v, fx.Node) else v for k, v in arguments.items()}, masks[1])
    small = {s: cut(env[s], coupling.node_masks(index, s, class_keep)) for s in node.all_input_nodes if s in env}
    args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), lambda n: small[n])
    if op_name(node) in ("layer_norm", "rms_norm"):
        x, normalized = cast(torch.Tensor, args[0]), cast(list[int], args[1])
        args = (x, list(x.shape[-len(normalized) :]), *args[2:])
    value = adapt.call(node, args, kwargs)
    if isinstance(value, (tuple, list)):
        return value
    return _scattered(value, coupling.node_masks(index, node, class_keep))


def _group_norm(arguments: Mapping[str, Any], mask: Mask) -> torch.Tensor:
    """Group norm from its definition: mean and variance over the kept channels of each part of the dense partition."""
    x, parts = arguments["input"], arguments["num_groups"]
    channels = x.shape[1]
    mask = torch.ones(channels, dtype=torch.bool) if mask is None else mask
    part_of = torch.arange(channels) * parts // channels
    out = torch.zeros_like(x)
    per_channel = [1, -1] + [1] * (x.dim() - 2)
    per_sample = [-1] + [1] * (x.dim() - 1)
    for part in range(parts):
        here = torch.nonzero(mask & (part_of == part)).flatten().to(x.device)
        if len(here):
            z = x[:, here]
            mean = z.flatten(1).mean(1).view(per_sample)
            variance = z.flatten(1).var(1, unbiased=False).view(per_sample)
            z = (z - mean) / (variance + arguments["eps"]).sqrt()
            if arguments["weight"] is not None:
                z = z * arguments["weight"][here].view(per_channel)
            if arguments["bias"] is not None:
                z = z + arguments["bias"][here].view(per_channel)
            out = out.index_copy(1, here, z)
    return out


class _Adapter:
    """Runs captured calls in another floating dtype or on another device than they were captured in."""

    def __init__(self, graph: fx.Graph, state: Mapping[str, torch.Tensor], inputs: Sequence[torch.Tensor]) -> None:
        captured = next((d for n in graph.nodes if (d := _float_dtype(n.meta.get("val")))), torch.float32)
        now = [t for t in [*state.values(), *inputs] if t.is_floating_point()]
        self.dtypes = {captured: now[0].dtype} if now else {}
        self.device = now[0].device if now else torch.device("cpu")

    def _value(self, value: Any) -> Any:
        if isinstance(value, torch.dtype):
            return self.dtypes.get(value, value)
        return self.device if isinstance(value, torch.device) else value

    def call(self, node: fx.Node, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        cast_ = op_name(node) in CASTS

        def value(v: Any) -> Any:
            new = self._value(v)
            return torch.promote_types(new, torch.float32) if cast_ and new is not v and v in self.dtypes else new

        return node.target(*map(value, args), **{k: value(v) for k, v in kwargs.items()})  # type: ignore[operator]

    def constant(self, value: torch.Tensor | None) -> torch.Tensor | None:
        if value is None:
            return None
        value = value.to(self.device)
        return value.to(self.dtypes.get(value.dtype, value.dtype)) if value.is_floating_point() else value


def _float_dtype(value: Any) -> torch.dtype | None:
    return value.dtype if isinstance(value, torch.Tensor) and value.is_floating_point() else None
