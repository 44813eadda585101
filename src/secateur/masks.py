"""``masked``: the dense network in which removed channels are never read.

It runs the captured graph with the parameters untouched. Where an operation sums over channels, the removed ones among
its inputs are zero; where a normalisation takes statistics over channels, it takes them over the kept ones, group norm
over the *dense* partition. This is the meaning of a plan, against which every smaller network is checked.
"""

from __future__ import annotations

import copy
from collections.abc import Container, Mapping, Sequence
from typing import Any, cast

import torch
from torch import fx, nn

from secateur.core import Group
from secateur.errors import BadPlan, WrongModel
from secateur.graph import Graph, trace, with_free_batch
from secateur.graph import unwrap as unwrap_model
from secateur.groups import Coupling, couple
from secateur.nests import unflatten
from secateur.nodes import named_args, op_name, shape_of
from secateur.plans import Plan, check_model

Mask = torch.Tensor | None
CASTS = frozenset({"to", "_to_copy"})
"""Where a forward names a dtype itself: never below float32, whatever the weights are in."""
_READ_FIRST_ONLY = ("conv", "linear")


def masked(model: nn.Module | Graph, plan: Plan) -> nn.Module:
    """A module that computes ``model``'s eval pass with the channels that ``plan`` removes masked at their readers.

    Same inputs and outputs as ``model``; its parameters are copies, nothing of the user's is shared or changed.
    Raises ``WrongModel`` if the plan belongs to another network, ``BadPlan`` if it asks for what this release reserves.
    """
    return Masked(freed(coupling_for(model, plan)), plan)


def freed(coupling: Coupling) -> Coupling:
    """The same groups on a capture that runs on any number of examples, if the model allows it."""
    graph = with_free_batch(coupling.graph)
    return same_groups(graph, coupling.groups) or coupling


def same_groups(graph: Graph, groups: tuple[Group, ...]) -> Coupling | None:
    """The coupling of ``graph`` that has just these groups."""
    for prefer in ("channels", "module"):
        coupling = couple(graph, prefer)
        if coupling.groups is groups or coupling.groups == groups:
            return coupling
    return None


def coupling_for(model: nn.Module | Graph, plan: Plan) -> Coupling:
    """The groups of ``model``, sure to be the ones that ``plan`` speaks of. Reuses the plan's own capture."""
    dense = model.model if isinstance(model, Graph) else unwrap_model(model)
    check_model(plan, dense)
    _refuse_reserved(plan)
    if isinstance(model, Graph):
        graph = model
    elif plan.graph is not None and plan.graph.model is dense:
        graph = plan.graph
    else:
        floats = [p.dtype for p in dense.parameters() if p.is_floating_point()]
        graph = trace(dense, example_from(plan, floats[0] if floats else torch.float32))
    coupling = same_groups(graph, plan.groups)
    if coupling is None:
        coupling = couple(graph)
        mine, theirs = {g.name: g for g in coupling.groups}, {g.name: g for g in plan.groups}
        odd = next(n for n in [*theirs, *mine] if mine.get(n) != theirs.get(n))
        raise WrongModel(
            f"the plan's group {odd!r} is wired differently in this model, although all tensors have the same shapes\n"
            "  do: use the model that the plan was made for, or plan again"
        )
    return coupling


def _refuse_reserved(plan: Plan) -> None:
    wanted = [
        name
        for name, used in (
            ("constants='fold'", "fold" in plan.constants.values()),
            ("stripes", bool(plan.stripes)),
            ("residual='scatter'", plan.residual == "scatter"),
        )
        if used
    ]
    if wanted:
        raise BadPlan(
            f"the plan asks for {', '.join(wanted)}, which its schema reserves and this release cannot carry out\n"
            "  do: use a release that can, or plan again without"
        )


def example_from(plan: Plan, dtype: torch.dtype = torch.float32) -> Any:
    """Random inputs of the shapes that the plan was made with; floats of the model's ``dtype``."""
    generator = torch.Generator().manual_seed(0)

    def make(spec: Any) -> Any:
        if isinstance(spec, list):
            return tuple(make(s) for s in spec)
        if isinstance(spec, Mapping) and set(spec) == {"shape", "dtype"}:
            kind = getattr(torch, spec["dtype"])
            if kind.is_floating_point:
                return torch.randn(spec["shape"], generator=generator).to(dtype)
            return torch.zeros(spec["shape"], dtype=kind)
        if isinstance(spec, Mapping) and set(spec) == {"value"}:
            return spec["value"]
        return {key: make(s) for key, s in spec.items()}

    if not plan.inputs:
        raise BadPlan("the plan does not say what inputs it was made with\n  do: pass a Graph from sc.trace instead")
    args, kwargs = make(plan.inputs["args"]), make(plan.inputs["kwargs"])
    return kwargs if kwargs and not args else args


class Masked(nn.Module):
    """The dense graph of a coupling, interpreted with a plan's masks. Always the eval pass."""

    def __init__(self, coupling: Coupling, plan: Plan) -> None:
        super().__init__()
        # not plain attributes: the user's modules may bear any name
        self.__dict__["_secateur"] = (coupling, plan, coupling.class_keep(plan.keep))
        register(self, {name: _own(t) for name, t in coupling.graph.tensors.items()})

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        coupling, _, keep = self.__dict__["_secateur"]
        state = {**dict(self.named_parameters()), **dict(self.named_buffers())}
        out = run_masked(coupling, keep, state, coupling.graph.inputs.flat(args, kwargs))
        return unflatten(coupling.graph.captures[0].skeleton, out)

    def __deepcopy__(self, memo: dict[int, Any]) -> Masked:
        coupling, plan, _ = self.__dict__["_secateur"]
        twin = Masked(coupling, plan)
        for name, tensor in [*self.named_parameters(), *self.named_buffers()]:
            *path, leaf = name.split(".")
            holder = twin.get_submodule(".".join(path))
            own: dict[str, Any] = holder._parameters if leaf in holder._parameters else holder._buffers
            own[leaf] = copy.deepcopy(tensor, memo)
        return twin.train(self.training)


def _own(tensor: torch.Tensor) -> torch.Tensor:
    value = tensor.detach().clone()
    return nn.Parameter(value, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else value


def register(root: nn.Module, tensors: Mapping[str, torch.Tensor], transient: Container[str] = ()) -> None:
    """Give ``root`` parameters and buffers under dotted names, on plain modules in between; ``transient`` names are
    buffers that the state_dict leaves out."""
    for name, tensor in tensors.items():
        *path, leaf = name.split(".")
        holder = root
        for part in path:
            if part not in holder._modules:
                holder.add_module(part, nn.Module())
            holder = holder.get_submodule(part)
        if isinstance(tensor, nn.Parameter):
            holder.register_parameter(leaf, tensor)
        else:
            holder.register_buffer(leaf, tensor, persistent=name not in transient)


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
    capture = coupling.graph.captures[index]
    adapt = _Adapter(capture.graph, state, inputs)
    env: dict[fx.Node, Any] = {}
    queue = list(inputs)
    last_use = {source: node for node in capture.graph.nodes for source in node.all_input_nodes}
    for node in capture.graph.nodes:
        if node.op == "placeholder":
            env[node] = queue.pop(0)
        elif node.op == "get_attr":
            name = capture.names.get(str(node.target))
            env[node] = state[name] if name else adapt.constant(capture.constants.get(str(node.target)))
        elif node.op == "output":
            return tuple(fx.node.map_arg(node.args[0], lambda n: env[n]))
        else:
            env[node] = _run_node(coupling, index, node, class_keep, env, adapt)
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
