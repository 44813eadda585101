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

from secateur.capture import Capture
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
    adapt = Adapter(capture.graph, state, inputs)
    masks = Masks(coupling, class_keep, index)
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
            env[node] = fetched(capture, node, state, adapt)
        elif node.op == "output":
            return tuple(fx.node.map_arg(node.args[0], lambda n: env[n]))
        else:
            env[node] = run_node(masks, node, env, adapt)
            if node in added:
                env[node] = env[node] + added[node]
        for source in node.all_input_nodes:
            if last_use[source] is node:
                del env[source]
    raise AssertionError("a captured graph ends in an output node")


class Masks:
    """What one choice of channels masks in pass ``index`` of a coupling. Each node is looked up once."""

    def __init__(self, coupling: Coupling, class_keep: torch.Tensor, index: int = 0) -> None:
        self.coupling, self.class_keep, self.index = coupling, class_keep, index
        self._of: dict[fx.Node, Sequence[Mask]] = {}
        self._read: dict[fx.Node, dict[fx.Node, Sequence[Mask]]] = {}

    def of(self, node: fx.Node) -> Sequence[Mask]:
        """For every axis of what ``node`` gives the mask ``[size]`` of positions that stay, ``None`` if all do."""
        if node not in self._of:
            self._of[node] = self.coupling.node_masks(self.index, node, self.class_keep)
        return self._of[node]

    def read(self, node: fx.Node) -> dict[fx.Node, Sequence[Mask]]:
        """The sources of a reader or norm of which not all is read; none for any other node."""
        if node not in self._read:
            self._read[node] = self._find_read(node)
        return self._read[node]

    def _find_read(self, node: fx.Node) -> dict[fx.Node, Sequence[Mask]]:
        propagation = self.coupling.passes[self.index]
        if not any(node in kind for kind in (propagation.readers, propagation.norms, propagation.scatters)):
            return {}
        sources = [s for s in node.all_input_nodes if shape_of(s) is not None]
        if node not in propagation.norms and op_name(node).startswith(_READ_FIRST_ONLY):
            sources = sources[:1]
        return {s: self.of(s) for s in sources if any(mask is not None for mask in self.of(s))}


def fetched(capture: Capture, node: fx.Node, state: Mapping[str, torch.Tensor], adapt: Adapter) -> Any:
    """The value of a ``get_attr`` node."""
    name = capture.names.get(str(node.target))
    return state[name] if name else adapt.constant(capture.constants.get(str(node.target)))


def run_node(masks: Masks, node: fx.Node, env: Mapping[fx.Node, Any], adapt: Adapter) -> Any:
    """What a call gives on the values in ``env``, with what ``masks`` removes out of what it reads."""
    if masks.index and "dropout" in op_name(node):
        return env[node.all_input_nodes[0]]
    read = masks.read(node)
    if read and node in masks.coupling.passes[masks.index].norms:
        return _norm(masks, node, env, adapt)
    masked = {source: zeroed(env[source], found) for source, found in read.items()}
    args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), lambda n: masked[n] if n in masked else env[n])
    return adapt.call(node, args, kwargs)


def zeroed(value: torch.Tensor, masks: Sequence[Mask]) -> torch.Tensor:
    """``value`` with zeros at the positions that do not stay."""
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


def _norm(masks: Masks, node: fx.Node, env: Mapping[fx.Node, Any], adapt: Adapter) -> Any:
    """Statistics over the kept channels: cut, compute, put back in place."""
    if op_name(node) == "group_norm":
        arguments = named_args(node)
        values = {k: env[v] if isinstance(v, fx.Node) else v for k, v in arguments.items()}
        return _group_norm(values, masks.of(arguments["input"])[1])
    small = {s: cut(env[s], masks.of(s)) for s in node.all_input_nodes if s in env}
    args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), lambda n: small[n])
    if op_name(node) in ("layer_norm", "rms_norm"):
        x, normalized = cast(torch.Tensor, args[0]), cast(list[int], args[1])
        args = (x, list(x.shape[-len(normalized) :]), *args[2:])
    value = adapt.call(node, args, kwargs)
    if isinstance(value, (tuple, list)):
        return value
    return _scattered(value, masks.of(node))


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


class Adapter:
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
