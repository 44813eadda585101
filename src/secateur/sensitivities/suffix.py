"""Networks that differ from the dense one in a single group, run from where they differ.

``Suffixes`` makes such networks one after the other. Each is a module that recognises the inputs of a call if an
earlier network was called with them, and starts from the activations in front of the group's first reader, which are
held for every batch as long as they take no more than so many bytes. For what it does not recognise, or has no room
for, it starts from the front: always right, only slower. In order of depth, what is held moves on from group to group,
so that a whole sweep runs the dense network once.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from secateur.groups import Coupling, freed
from secateur.interpreter import Env, run_masked
from secateur.masks import register
from secateur.nests import unflatten
from secateur.nodes import shape_of
from secateur.plans import Plan, fingerprint, input_specs
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
        self.network_: Network | None = None
        self._trusted: dict[str, object] = {}
        self._weights: dict[object, Any] = {}
        self._held: list[_Batch] = []
        self._next = 0
        self._parts: dict[object, int] = {}

    def start(self, group: str) -> int:
        """How deep in the network the first reader of a group is: the order in which to take the groups."""
        channels = next(g.channels for g in self.coupling.groups if g.name == group)
        return self.program.cut(self.coupling.class_keep({group: range(1, channels)})).start

    def network(self, keep: Keep) -> nn.Module:
        """The network with only these channels of the groups in ``keep``. The one before is not to be used any more."""
        if not self.runs:
            return apply(self.coupling.graph, plan_for(self.coupling, keep))
        if self.network_ is None or not self._trusts(self.network_.tensors()):
            self.network_ = Network(self)
            self._trusted = {name: _mark(tensor) for name, tensor in self.network_.tensors().items()}
            self._held.clear()
        self._held = [batch for batch in self._held if batch.used]
        for batch in self._held:
            batch.used = False
        self._next = 0
        self.cut = self.network_.__dict__["_cut"] = self.program.cut(self.coupling.class_keep(keep))
        self._weights.clear()
        return self.network_

    def outputs(self, state: Mapping[str, torch.Tensor], inputs: Tensors, cut: Cut) -> tuple[torch.Tensor, ...]:
        """What the network with ``cut`` computes of ``inputs``."""
        if not self.quick or cut is not self.cut or torch.is_grad_enabled() or not self._trusts(state):
            return run_masked(self.coupling, cut.masks.class_keep, state, inputs)
        values = self.program.values(state, inputs)
        parts = self._part_size(inputs, values)
        device = values.adapt.device
        if device not in self._weights:
            self._weights[device] = self.program.zeroed(cut, values)
        batch = self._at(cut.start, inputs, parts, values)
        values.weights = self._weights[device]
        found = [self.program.finish(env, cut, values) for env in batch.envs]
        return found[0] if len(found) == 1 else tuple(map(torch.cat, zip(*found, strict=True)))

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

    def _trusts(self, state: Mapping[str, torch.Tensor]) -> bool:
        """Whether the tensors are those of the dense network: what somebody has touched since it was looked last (a
        counter that was put back, a network that was moved to another device) is compared."""
        own: dict[str, torch.Tensor] = {}
        for name, tensor in state.items():
            mark = _mark(tensor)
            if self._trusted.get(name) != mark:
                own = own or self.coupling.graph.tensors
                if tensor.dtype != own[name].dtype or not torch.equal(tensor.to(own[name].device), own[name]):
                    return False
                self._trusted[name] = mark
        return True

    # Parts of batches ----------------------------------------------------------------------------------------------

    def _part_size(self, inputs: Tensors, values: Values) -> int:
        """How many examples are run at a time; 0 for all. Small parts are quicker, and taken if the dense network gives
        the same bits then, which it does not if examples have to do with each other."""
        key = tuple(t.stride() for t in inputs), _context(inputs), torch.get_num_threads()
        if key not in self._parts:
            size = self._likely_size(inputs)
            self._parts[key] = size if size and self._same(inputs, size, values) else 0
        return self._parts[key]

    def _likely_size(self, inputs: Tensors) -> int:
        capture = self.coupling.graph.captures[0]
        if not all(capture.batched) or inputs[0].device.type != "cpu":
            return 0
        count = len(inputs[0])
        largest = max((_bytes_of_example(step.node) for step in self.program.steps), default=0)
        size = max(SMALLEST_PART, PART_BYTES * torch.get_num_threads() // max(1, largest))
        return size if size < count and all(len(t) == count for t in inputs) else 0

    def _same(self, inputs: Tensors, size: int, values: Values) -> bool:
        dense = self.program.dense
        everything, *parts = (self._dense(tensors, values, dense) for tensors in (inputs, *_split(inputs, size)))
        if not all(isinstance(t, torch.Tensor) and t.dim() and len(t) == len(inputs[0]) for t in everything):
            return False
        joined = tuple(map(torch.cat, zip(*parts, strict=True)))
        return all(map(torch.equal, everything, joined))

    def _dense(self, inputs: Sequence[torch.Tensor], values: Values, dense: Cut) -> tuple[torch.Tensor, ...]:
        env = self.program.begin(inputs)
        self.program.advance_(env, (0, dense.start), values, inputs)
        return self.program.finish(env, dense, values)


class Network(nn.Module):
    """The dense network with copies of its tensors, which computes its eval pass with the channels of one cut."""

    def __init__(self, suffixes: Suffixes) -> None:
        super().__init__()
        # not plain attributes: the user's modules may bear any name
        self.__dict__["_suffixes"], self.__dict__["_cut"] = suffixes, suffixes.cut
        own = {name: _own(t) for name, t in suffixes.coupling.graph.tensors.items()}
        register(self, own)
        self.__dict__["_places"] = {name: _place(self, name) for name in own}

    def tensors(self) -> dict[str, torch.Tensor]:
        """As they are now, by name."""
        places: dict[str, tuple[dict[str, Any], str]] = self.__dict__["_places"]
        return {name: holder[leaf] for name, (holder, leaf) in places.items()}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        suffixes: Suffixes = self.__dict__["_suffixes"]
        graph = suffixes.coupling.graph
        out = suffixes.outputs(self.tensors(), graph.inputs.flat(args, kwargs), self.__dict__["_cut"])
        return unflatten(graph.captures[0].skeleton, out)

    def __deepcopy__(self, memo: dict[int, Any]) -> Network:
        twin = Network(self.__dict__["_suffixes"])
        twin.__dict__["_cut"] = self.__dict__["_cut"]
        for name, tensor in self.tensors().items():
            holder, leaf = _place(twin, name)
            holder[leaf] = copy.deepcopy(tensor, memo)
        return twin.train(self.training)


def plan_for(coupling: Coupling, keep: Keep) -> Plan:
    """The plan that keeps these channels, and all of every other group."""
    graph = coupling.graph
    every = {g.name: keep.get(g.name, tuple(range(g.channels))) for g in coupling.groups}
    inputs = input_specs(graph.args, graph.kwargs)
    return Plan(coupling.groups, every, fingerprint(graph.model), inputs=inputs, graph=graph)


def _place(root: nn.Module, name: str) -> tuple[dict[str, Any], str]:
    """The dict that holds a tensor, and its key there."""
    path, _, leaf = name.rpartition(".")
    holder = root.get_submodule(path)
    return (holder._parameters if leaf in holder._parameters else holder._buffers), leaf


def _own(tensor: torch.Tensor) -> torch.Tensor:
    value = tensor.detach().clone()
    return nn.Parameter(value, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else value


def _split(inputs: Tensors, size: int) -> list[Tensors]:
    return [list(part) for part in zip(*(t.split(size) for t in inputs), strict=True)] if size else [list(inputs)]


def _mark(tensor: torch.Tensor) -> object:
    """What changes when somebody writes into a tensor, or puts other values into its place."""
    return id(tensor), tensor.data_ptr(), None if tensor.is_inference() else tensor._version


def _context(inputs: Tensors) -> object:
    """What else, besides values, decides what a network computes."""
    kind = inputs[0].device.type
    cast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    return tuple((t.shape, t.dtype, t.device) for t in inputs), torch.is_inference_mode_enabled(), cast


def _bytes_of_example(node: torch.fx.Node) -> int:
    """Of what a node gives for one example, if it gives one tensor with the examples in front."""
    value, shape = node.meta.get("val"), shape_of(node)
    return math.prod(shape[1:]) * value.element_size() if isinstance(value, torch.Tensor) and shape else 0
