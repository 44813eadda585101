"""A captured pass as a list of steps that can be begun and ended anywhere, to run what one choice of channels changes.

The values are those of ``interpreter.run_masked`` to the last bit, at less cost:

- An elementwise operation writes into its operand where nothing else will ever look at that.
- A layer that sums over removed channels has zeros in its weights rather than in what it reads. A zero times anything
  finite is zero; what is not finite becomes NaN, is carried on to the outputs, and the run is done again with zeros in
  what is read. So this is for layers behind which all operations are known to carry NaN on.

What a run begins with is never written into, in-place operations of the user's among them: their operand is then copied
first, together with all live views of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from secateur.groups import Coupling
from secateur.interpreter import Adapter, Env, Masks, fetched, run_node
from secateur.nodes import named_args, op_name, shape_of

_aten = torch.ops.aten
IN_PLACE: dict[Any, Any] = {
    _aten.relu.default: _aten.relu_.default,
    _aten.leaky_relu.default: _aten.leaky_relu_.default,
    _aten.hardtanh.default: _aten.hardtanh_.default,
    _aten.hardswish.default: _aten.hardswish_.default,
    _aten.hardsigmoid.default: _aten.hardsigmoid_.default,
    _aten.sigmoid.default: _aten.sigmoid_.default,
    _aten.silu.default: _aten.silu_.default,
    _aten.add.Tensor: _aten.add_.Tensor,
    _aten.mul.Tensor: _aten.mul_.Tensor,
}
"""Operations that give the same bits in place."""
CARRIERS = frozenset(
    {"conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "linear"}
    | {"batch_norm", "layer_norm", "group_norm", "instance_norm", "add", "sub", "mul", "relu", "leaky_relu", "hardtanh"}
    | {"hardswish", "sigmoid", "silu", "tanh", "gelu", "elu", "mean", "sum", "amax", "max_pool1d", "max_pool2d"}
    | {"avg_pool1d", "avg_pool2d", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "dropout", "cat", "pad"}
    | {
        "view",
        "reshape",
        "flatten",
        "unflatten",
        "permute",
        "transpose",
        "unsqueeze",
        "squeeze",
        "expand",
        "contiguous",
    }
    | {"clone", "detach", "alias", "lift_fresh_copy", "slice", "select", "chunk", "split", "unbind", "getitem"}
)
"""Operations whose results are NaN wherever they depend on an operand that is."""
_COMMUTATIVE = (_aten.add.Tensor, _aten.mul.Tensor)


@dataclass(frozen=True, eq=False)
class Step:
    """One call. ``fetches``: the parameters and constants that it takes; ``dies``: what nothing needs behind it;
    ``operands``: those of its arguments that its result may be written into."""

    node: fx.Node
    fetches: tuple[fx.Node, ...]
    dies: tuple[fx.Node, ...]
    operands: tuple[fx.Node, ...]
    writes: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Cut:
    """One choice of channels: its ``masks``, and the first step that it changes (the number of steps if none is)."""

    masks: Masks
    start: int

    def __deepcopy__(self, memo: object) -> Cut:
        return self


@dataclass(eq=False)
class Values:
    """What all runs of a call share: the values of ``get_attr`` nodes, zeroed ``weights`` by the step that takes them,
    and the storages of the network's tensors, which nothing writes into."""

    fixed: Mapping[fx.Node, Any]
    adapt: Adapter
    storages: frozenset[int]
    weights: Mapping[fx.Node, Mapping[fx.Node, torch.Tensor]] = field(default_factory=dict)


class Program:
    """The eval pass of a coupling."""

    def __init__(self, coupling: Coupling) -> None:
        self.coupling = coupling
        self.capture = coupling.graph.captures[0]
        nodes = list(self.capture.graph.nodes)
        self.places = [n for n in nodes if n.op == "placeholder"]
        self.fetched = [n for n in nodes if n.op == "get_attr"]
        self.output = nodes[-1]
        last = {source: node for node in nodes for source in node.all_input_nodes}
        self.steps = [_step(n, last) for n in nodes if n.op == "call_function"]
        self._silent = max((i for i, step in enumerate(self.steps) if not _carries(step.node)), default=-1)
        everything = torch.ones(len(coupling.group_of), dtype=torch.bool)
        self.dense = Cut(Masks(coupling, everything), len(self.steps))

    def cut(self, class_keep: torch.Tensor) -> Cut:
        masks = Masks(self.coupling, class_keep)
        start = next((i for i, step in enumerate(self.steps) if masks.read(step.node)), len(self.steps))
        return Cut(masks, start)

    def values(self, state: Mapping[str, torch.Tensor], inputs: Sequence[torch.Tensor]) -> Values:
        adapt = Adapter(self.capture.graph, state, inputs)
        fixed = {node: fetched(self.capture, node, state, adapt) for node in self.fetched}
        return Values(fixed, adapt, frozenset(_storages(fixed.values())))

    def zeroed(self, cut: Cut, values: Values) -> dict[fx.Node, dict[fx.Node, torch.Tensor]]:
        """The weights with zeros where the cut's removed channels are read, for every step where that will do."""
        found = {}
        for step in self.steps[max(cut.start, self._silent + 1) :]:
            weight = _zeroed_weight(step.node, cut.masks, values.fixed)
            if weight is not None:
                found[step.node] = weight
        return found

    def begin(self, inputs: Sequence[torch.Tensor]) -> Env:
        return dict(zip(self.places, inputs, strict=True))

    def advance_(self, env: Env, way: tuple[int, int], values: Values, inputs: Sequence[torch.Tensor]) -> None:
        """Lead ``env`` on in the dense network, from in front of one step to in front of another. Nothing is written
        into ``inputs``, which it began with."""
        self._run_(env, way, self.dense.masks, values, values.storages | _storages(inputs))

    def finish(self, env: Mapping[fx.Node, Any], cut: Cut, values: Values) -> tuple[torch.Tensor, ...]:
        """The outputs, from what is live in front of ``cut.start``; ``env`` stays as it is."""
        held = values.storages | _storages(env.values())
        outputs = self._outputs(dict(env), cut, values, held)
        if values.weights and not all(map(_finite, outputs)):
            plain = Values(values.fixed, values.adapt, values.storages)
            outputs = self._outputs(dict(env), cut, plain, held)
        return tuple(out.clone() if _storages([out]) & held else out for out in outputs)

    def _outputs(self, env: Env, cut: Cut, values: Values, held: frozenset[int]) -> tuple[Any, ...]:
        self._run_(env, (cut.start, len(self.steps)), cut.masks, values, held)
        return tuple(fx.node.map_arg(self.output.args[0], lambda n: env[n] if n in env else values.fixed[n]))

    def _run_(self, env: Env, way: tuple[int, int], masks: Masks, values: Values, held: frozenset[int]) -> None:
        may_write = not _autocast(values.adapt.device)
        for step in self.steps[slice(*way)]:
            node = step.node
            for source in step.fetches:
                env[source] = values.fixed[source]
            if step.writes:
                _unshare_(env, step, held)
            if node in values.weights:
                args, kwargs = _arguments(node, {**env, **values.weights[node]})
                env[node] = values.adapt.call(node, args, kwargs)
            elif may_write and (operand := _writable(step, env, held)) is not None:
                env[node] = _in_place(node, operand, env)
            else:
                env[node] = run_node(masks, node, env, values.adapt)
            for source in (*step.fetches, *step.dies):
                del env[source]


def draws(coupling: Coupling) -> bool:
    """Whether the eval pass draws random numbers, so that it gives something else each time."""
    return any(_draws(node) for node in coupling.graph.captures[0].graph.nodes)


def live_bytes(envs: Iterable[Mapping[fx.Node, Any]]) -> int:
    """What the values take; views of one storage count once."""
    sizes = {}
    for tensor in (t for env in envs for t in _tensors(env.values())):
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
    return sum(sizes.values())


# Steps -----------------------------------------------------------------------------------------------------------


def _step(node: fx.Node, last: Mapping[fx.Node, fx.Node]) -> Step:
    sources = node.all_input_nodes
    fetches = tuple(s for s in sources if s.op == "get_attr")
    dies = [s for s in sources if s.op != "get_attr" and last[s] is node]
    if node not in last:
        dies.append(node)
    return Step(node, fetches, tuple(dies), _operands(node, dies), _written(node))


def _operands(node: fx.Node, dies: Sequence[fx.Node]) -> tuple[fx.Node, ...]:
    """The dying arguments, of the shape of the result, that an in-place form could write into."""
    if node.target not in IN_PLACE or node.kwargs or len(node.args) > (2 if node.target in _COMMUTATIVE else 9):
        return ()
    candidates = node.args if node.target in _COMMUTATIVE else node.args[:1]
    if len(node.all_input_nodes) != sum(isinstance(a, fx.Node) for a in node.args):
        return ()  # it meets itself
    shape = shape_of(node)
    return tuple(a for a in candidates if isinstance(a, fx.Node) and a in dies and shape_of(a) == shape)


def _written(node: fx.Node) -> tuple[str, ...]:
    """The names of the arguments that the captured operation itself writes into."""
    schema = getattr(node.target, "_schema", None)
    if schema is None or not schema.is_mutable:
        return ()
    return tuple(a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write)


def _draws(node: fx.Node) -> bool:
    tags = getattr(node.target, "tags", ())
    if torch.Tag.nondeterministic_seeded not in tags:
        return False
    arguments = named_args(node)
    idle = [name for name in ("train", "training") if name in arguments and arguments[name] is False]
    return not idle and arguments.get("dropout_p", 1) != 0


# Storages --------------------------------------------------------------------------------------------------------


def _tensors(values: Iterable[Any]) -> Iterable[torch.Tensor]:
    for value in values:
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(item, torch.Tensor):
                yield item


def _storages(values: Iterable[Any]) -> frozenset[int]:
    return frozenset(t.untyped_storage().data_ptr() for t in _tensors(values))


def _writable(step: Step, env: Env, held: frozenset[int]) -> fx.Node | None:
    """The operand that the result may be written into: its storage is nobody else's."""
    for node in step.operands:
        value = env[node]
        if not isinstance(value, torch.Tensor) or not value.is_floating_point() or not value.is_contiguous():
            continue
        others = [env[a] for a in step.node.args if isinstance(a, fx.Node) and a is not node]
        if any(o.dtype != value.dtype or o.shape != value.shape or o.stride() != value.stride() for o in others):
            continue
        at = value.untyped_storage().data_ptr()
        if at not in held and at not in _storages(v for n, v in env.items() if n is not node):
            return node
    return None


def _in_place(node: fx.Node, operand: fx.Node, env: Env) -> torch.Tensor:
    args, _ = _arguments(node, env)
    rest = [a for source, a in zip(node.args, args, strict=True) if source is not operand]
    result: torch.Tensor = IN_PLACE[node.target](env[operand], *rest)
    return result


def _unshare_(env: Env, step: Step, held: frozenset[int]) -> None:
    """Before a captured operation writes into something that a run began with: a copy of its storage for all that is
    live in it."""
    arguments = named_args(step.node)
    targets = [env[n] for name in step.writes if isinstance(n := arguments[name], fx.Node)]
    for at in _storages(targets) & held:
        copies: dict[int, torch.UntypedStorage] = {}
        for node, value in list(env.items()):
            if isinstance(value, (tuple, list)):
                env[node] = type(value)(_on_copy(item, at, copies) for item in value)
            else:
                env[node] = _on_copy(value, at, copies)


def _on_copy(value: Any, at: int, copies: dict[int, torch.UntypedStorage]) -> Any:
    if not isinstance(value, torch.Tensor) or value.untyped_storage().data_ptr() != at:
        return value
    if at not in copies:
        copies[at] = value.untyped_storage().clone()
    view = torch.empty(0, dtype=value.dtype, device=value.device)
    return view.set_(copies[at], value.storage_offset(), value.shape, value.stride())


# Values ----------------------------------------------------------------------------------------------------------


def _arguments(node: fx.Node, env: Mapping[fx.Node, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    found: tuple[tuple[Any, ...], dict[str, Any]] = fx.node.map_arg((node.args, dict(node.kwargs)), lambda n: env[n])
    return found


def _finite(value: Any) -> bool:
    return not isinstance(value, torch.Tensor) or bool(torch.isfinite(value).all())


def _carries(node: fx.Node) -> bool:
    """Whether nothing that is NaN can get lost in a call: its result, and all that depends on it, would be NaN."""
    value = node.meta.get("val")
    floating = all(t.is_floating_point() for t in _tensors([value]))
    return op_name(node) == "sym_size" or (op_name(node) in CARRIERS and floating)


def _autocast(device: torch.device) -> bool:
    return torch.is_autocast_enabled(device.type)


def _zeroed_weight(node: fx.Node, masks: Masks, fixed: Mapping[fx.Node, Any]) -> dict[fx.Node, torch.Tensor] | None:
    """For a convolution or linear layer that reads removed channels: its weight without them, if the weight is the
    network's own and only the channels of what is read are masked."""
    name = op_name(node)
    read = masks.read(node)
    if not read or not (name == "linear" or name.startswith("conv")):
        return None
    arguments = named_args(node)
    source, weight = arguments["input"], arguments["weight"]
    found = read.get(source)
    if found is None or weight is source or weight not in fixed:
        return None
    own: torch.Tensor = fixed[weight]
    axis = len(found) - 1 if name == "linear" else len(found) - (own.dim() - 1)
    if any((mask is not None) != (i == axis) for i, mask in enumerate(found)):
        return None
    mask = found[axis]
    assert mask is not None
    mask = mask.to(own.device)
    if "transpose" in name:
        mask = mask.view(-1, *[1] * (own.dim() - 1))
    else:  # [O, I / G, ...]: the outputs of a partition read the inputs of theirs
        parts = arguments.get("groups", 1)
        mask = (
            mask.view(parts, -1)
            .repeat_interleave(own.shape[0] // parts, 0)
            .view(*own.shape[:2], *[1] * (own.dim() - 2))
        )
    return {weight: torch.where(mask, own, torch.zeros((), dtype=own.dtype, device=own.device))}
