"""Networks that differ from the dense one in a single group, run from where they differ.

``Suffixes`` makes such networks one after the other. Each is a module that recognises the inputs of a call if an
earlier network was called with them, and starts from the activations in front of the group's first reader, which are
held for every batch as long as they take no more than so many bytes. For what it does not recognise, or has no room
for, it starts from the front: always right, only slower. In order of depth, what is held moves on from group to group,
so that a whole sweep runs the dense network once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from secateur.groups import Coupling, freed
from secateur.interpreter import Env, run_masked
from secateur.masks import register
from secateur.nests import unflatten
from secateur.nodes import shape_of
from secateur.plans import Plan, fingerprint, input_specs
from secateur.sensitivities.parts import treats_examples_apart
from secateur.sensitivities.programs import Cut, Program, Values, draws, live_bytes
from secateur.surgery import apply

Tensors = list[torch.Tensor]
Keep = Mapping[str, tuple[int, ...]]
PART_BYTES = 2**21
"""Batches are run in parts whose largest map takes about so much for each thread: more does not stay in a cache."""
SMALLEST_PART = 8


@dataclass(eq=False)
class _Batch:
    """The inputs of a call, copied, with what is live of each of their parts in front of step ``at``."""

    inputs: Tensors
    context: object
    envs: list[Env]
    at: int
    size: int = 0
    used: bool = True


class Suffixes:
    """Makes networks of ``coupling`` that compute what ``masked`` does, with at most ``most`` bytes of activations held
    between their calls."""

    def __init__(self, coupling: Coupling, most: int) -> None:
        self.coupling = freed(coupling)
        self.most = most
        capture = self.coupling.graph.captures[0]
        self.runs = capture.free  # else a batch of another size than the example's needs the user's own forward
        self.quick = self.runs and not draws(self.coupling)
        self.program = Program(self.coupling)
        self.cut = self.program.dense
        self._apart = treats_examples_apart(capture)
        self._template = Network(self, self.cut)
        self._dense: dict[torch.device | None, dict[str, torch.Tensor]] = {}
        self._weights: dict[object, Any] = {}
        self._held: list[_Batch] = []
        self._next = 0
        self._parts: dict[object, int] = {}

    def start(self, group: str) -> int:
        """How deep in the network the first reader of a group is: the order in which to take the groups."""
        channels = next(g.channels for g in self.coupling.groups if g.name == group)
        return self.program.cut(self.coupling.class_keep({group: range(1, channels)})).start

    def network(self, keep: Keep) -> nn.Module:
        """A new network with only these channels of the groups in ``keep``, which nothing that was done to earlier ones
        has touched. Those still compute what they did, but slowly."""
        if not self.runs:
            return apply(self.coupling.graph, plan_for(self.coupling, keep))
        self._held = [batch for batch in self._held if batch.used]
        for batch in self._held:
            batch.used = False
        self._next = 0
        self.cut = self.program.cut(self.coupling.class_keep(keep))
        self._weights.clear()
        network: Network = _twin(self._template)
        network.begin_(self, self.cut)
        return network

    def outputs(self, state: Mapping[str, torch.Tensor], inputs: Tensors, cut: Cut) -> tuple[torch.Tensor, ...]:
        """What the network with ``cut`` computes of ``inputs``."""
        quick = self.quick and cut is self.cut and not torch.is_grad_enabled() and all(map(_keeps_layout, inputs))
        # nothing that is held may lie in tensors which the user has in hand: the dense ones stand in for those
        own = self._trusted(state) if quick else None
        if own is None:
            return run_masked(self.coupling, cut.masks.class_keep, state, inputs)
        values = self.program.values(own, inputs)
        parts = self._part_size(inputs, values)
        device = values.adapt.device
        if device not in self._weights:
            self._weights[device] = self.program.zeroed(cut, values)
        batch = self._at(cut.start, inputs, parts, values)
        values.weights = self._weights[device]
        found = [self.program.finish(env, cut, values) for env in batch.envs]
        return found[0] if len(found) == 1 else tuple(map(torch.cat, zip(*found, strict=True)))

    def __deepcopy__(self, memo: object) -> Suffixes:
        return self

    # What is held --------------------------------------------------------------------------------------------------

    def _at(self, start: int, inputs: Tensors, part: int, values: Values) -> _Batch:
        """The batch with what is live in front of step ``start``."""
        context = _context(inputs)
        batch = self._take(inputs, context)
        if batch is None or batch.at > start:
            batch = _Batch([t.clone() for t in inputs], context, [], 0)
            batch.envs = [self.program.begin(tensors) for tensors in _split(batch.inputs, part)]
        for env in batch.envs:
            self.program.advance_(env, (batch.at, start), values, batch.inputs)
        batch.at, batch.used = start, True
        batch.size = live_bytes(batch.envs) + sum(t.nbytes for t in batch.inputs)
        if start < len(self.program.steps) and sum(b.size for b in self._held) + batch.size <= self.most:
            self._held.insert(self._next, batch)
            self._next += 1
        return batch

    def _take(self, inputs: Tensors, context: object) -> _Batch | None:
        """The batch of these inputs out of those that are held: most likely the one behind the last."""
        count = len(self._held)
        for offset in range(count):
            index = (self._next + offset) % count
            batch = self._held[index]
            if batch.context == context and all(map(torch.equal, batch.inputs, inputs)):
                self._next = index
                return self._held.pop(index)
        return None

    # Whose weights -------------------------------------------------------------------------------------------------

    def _dense_on(self, devices: set[torch.device]) -> dict[str, torch.Tensor]:
        """The dense network's tensors, which nobody else has in hand: where the user has them, or on one device."""
        device = devices.pop() if len(devices) == 1 else None
        if device not in self._dense:
            # once made, they are not to be tensors of inference mode, even if that is on
            with torch.inference_mode(False), torch.no_grad():
                own = self._template.tensors()
                self._dense[device] = {name: t.detach().to(device or t.device) for name, t in own.items()}
        return self._dense[device]

    def _trusted(self, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor] | None:
        """The dense network's tensors if ``state`` is like them, bit for bit; None if not.

        All values are compared each time: there are ways to write that leave no trace, ``.data`` and ``.numpy()``.
        """
        own = self._dense_on({tensor.device for tensor in state.values()})
        return own if all(_same(tensor, own[name]) for name, tensor in state.items()) else None

    # Parts of batches ----------------------------------------------------------------------------------------------

    def _part_size(self, inputs: Tensors, values: Values) -> int:
        """How many examples are run at a time; 0 for all. Small parts are quicker, and taken if examples have nothing
        to do with each other and, of this shape, whole and in parts give the same bits."""
        key = _context(inputs)
        if key not in self._parts:
            size = self._likely_size(inputs)
            self._parts[key] = size if size and self._same_in_parts(inputs, size, values) else 0
        return self._parts[key]

    def _likely_size(self, inputs: Tensors) -> int:
        if not self._apart or inputs[0].device.type != "cpu":
            return 0
        count = len(inputs[0])
        largest = max((_bytes_of_example(step.node) for step in self.program.steps), default=0)
        size = max(SMALLEST_PART, PART_BYTES * torch.get_num_threads() // max(1, largest))
        return size if size < count and all(len(t) == count for t in inputs) else 0

    def _same_in_parts(self, inputs: Tensors, size: int, values: Values) -> bool:
        everything, *parts = (self._run_dense(tensors, values) for tensors in (inputs, *_split(inputs, size)))
        joined = tuple(map(torch.cat, zip(*parts, strict=True)))
        return all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(everything, joined, strict=True))

    def _run_dense(self, inputs: Sequence[torch.Tensor], values: Values) -> tuple[torch.Tensor, ...]:
        env, dense = self.program.begin(inputs), self.program.dense
        self.program.advance_(env, (0, dense.start), values, inputs)
        return self.program.finish(env, dense, values)


class Network(nn.Module):
    """The dense network with tensors of its own, which computes its eval pass with the channels of one cut."""

    def __init__(self, suffixes: Suffixes, cut: Cut) -> None:
        super().__init__()
        register(self, {name: _copy(tensor) for name, tensor in suffixes.coupling.graph.tensors.items()})
        self.begin_(suffixes, cut)

    def begin_(self, suffixes: Suffixes, cut: Cut) -> None:
        # not plain attributes: the user's modules may bear any name
        self.__dict__["_suffixes"], self.__dict__["_cut"] = suffixes, cut
        holders = dict(self.named_modules())
        names = [(name, name.rpartition(".")) for name in suffixes.coupling.graph.tensors]
        self.__dict__["_places"] = {name: (holders[path], leaf) for name, (path, _, leaf) in names}

    def tensors(self) -> dict[str, torch.Tensor]:
        """As they are now, by name."""
        places: dict[str, tuple[nn.Module, str]] = self.__dict__["_places"]
        return {name: _tensor_at(*place) for name, place in places.items()}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        suffixes: Suffixes = self.__dict__["_suffixes"]
        graph = suffixes.coupling.graph
        out = suffixes.outputs(self.tensors(), graph.inputs.flat(args, kwargs), self.__dict__["_cut"])
        return unflatten(graph.captures[0].skeleton, out)


def plan_for(coupling: Coupling, keep: Keep) -> Plan:
    """The plan that keeps these channels, and all of every other group."""
    graph = coupling.graph
    every = {g.name: keep.get(g.name, tuple(range(g.channels))) for g in coupling.groups}
    inputs = input_specs(graph.args, graph.kwargs)
    return Plan(coupling.groups, every, fingerprint(graph.model), inputs=inputs, graph=graph)


def _twin(module: nn.Module) -> Any:
    """A copy of a module that nobody has done anything to: that is quicker than to build one."""
    twin = module.__new__(type(module))
    fields = {name: value.copy() if isinstance(value, dict) else value for name, value in module.__dict__.items()}
    fields["_parameters"] = {name: _copy(tensor) for name, tensor in module._parameters.items() if tensor is not None}
    fields["_buffers"] = {name: _copy(tensor) for name, tensor in module._buffers.items() if tensor is not None}
    fields["_modules"] = {name: _twin(part) for name, part in module.named_children()}
    twin.__dict__.update(fields)
    return twin


def _tensor_at(holder: nn.Module, leaf: str) -> torch.Tensor:
    """A tensor of a module, found even if the module has something else under its name, or computes it by now."""
    found: Any = holder._parameters.get(leaf)
    found = holder._buffers.get(leaf) if found is None else found
    return cast(torch.Tensor, getattr(holder, leaf) if found is None else found)


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    value = tensor.detach().clone()
    return nn.Parameter(value, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else value


def _same(tensor: torch.Tensor, own: torch.Tensor) -> bool:
    """Whether a layer would compute the same of both: the memory layout counts, and a tensor of another class may be
    anything."""
    plain = type(tensor) in (torch.Tensor, nn.Parameter)
    alike = plain and tensor.dtype == own.dtype and tensor.device == own.device and tensor.stride() == own.stride()
    return alike and torch.equal(tensor, own)


def _split(inputs: Tensors, size: int) -> list[Tensors]:
    return [list(part) for part in zip(*(t.split(size) for t in inputs), strict=True)] if size else [list(inputs)]


def _context(inputs: Tensors) -> object:
    """What else, besides values, decides what a network computes."""
    kind = inputs[0].device.type
    cast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    kinds = tuple((t.shape, t.stride(), t.dtype, t.device) for t in inputs)
    return kinds, torch.is_inference_mode_enabled(), cast, torch.get_num_threads()


def _keeps_layout(tensor: torch.Tensor) -> bool:
    """Whether a copy lies in memory as the tensor does: not if it has gaps or repeats."""
    return torch.empty_like(tensor, device="meta").stride() == tensor.stride()


def _bytes_of_example(node: torch.fx.Node) -> int:
    """Of what a node gives for one example, if it gives one tensor with the examples in front."""
    value, shape = node.meta.get("val"), shape_of(node)
    return math.prod(shape[1:]) * value.element_size() if isinstance(value, torch.Tensor) and shape else 0
