"""Groups: which channels must go together, found from the labels of a captured graph.

After propagation the joined labels fall into classes; one class is one channel. A factor that still varies along two
axes (a view that split the channels) is made rectangular by joining. A group is the set of classes that occur equally
often in exactly the same tensors, activations included: "written together" is not enough, since removing a part of
such a set could empty one side of a split.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from torch import fx, nn

from secateur.core import Group, Role, Slice
from secateur.errors import CannotPrune
from secateur.graph import Graph, Inputs, trace, with_free_batch
from secateur.labels import Classes, Factors, Labels, compress, varying
from secateur.nodes import shape_of
from secateur.propagation import Propagation, Shared
from secateur.rules import RULES

Prefer = Literal["channels", "module"]


@dataclass(frozen=True, eq=False)
class Coupling:
    """A graph with its groups. ``groups`` can be pruned, ``locked`` cannot and say why (found when asked for).

    ``group_of`` and ``channel_of``: class -> index into ``groups`` (or -1) and channel number in that group.
    ``scatter``: whether sums of residual streams keep their width (``Propagation.scatters``).
    """

    graph: Graph
    groups: tuple[Group, ...]
    locked: Sequence[Group]
    passes: tuple[Propagation, ...]
    parameters: Mapping[str, Factors]
    classes: Classes
    group_of: np.ndarray
    channel_of: np.ndarray
    scatter: bool = False

    def class_keep(self, keep: Mapping[str, Any]) -> torch.Tensor:
        """``[classes]`` bool from kept channel numbers of each group; class 0 (locked) and all others stay."""
        kept = torch.ones(len(self.group_of), dtype=torch.bool)
        for index, group in enumerate(self.groups):
            if group.name in keep:
                stays = np.zeros(group.channels, bool)
                stays[list(keep[group.name])] = True
                members = np.flatnonzero(self.group_of == index)
                kept[torch.from_numpy(members)] = torch.from_numpy(stays[self.channel_of[members]])
        return kept

    @cached_property
    def transformed(self) -> frozenset[str]:
        """The parameters of which the eval pass computes something before a layer reads it: under a parametrisation,
        a view, a concatenation. Most networks have none."""
        capture, computed = self.graph.captures[0], self.passes[0].weights_only
        users = ((str(n.target), n.users) for n in capture.graph.nodes if n.op == "get_attr")
        return frozenset(
            capture.names[target] for target, own in users if target in capture.names and own.keys() & computed
        )

    def masks(self, factors: Factors, rank: int, class_keep: torch.Tensor) -> list[torch.Tensor | None]:
        """For every axis the bool mask ``[size]`` of positions that stay, or ``None`` if all do."""
        masks: list[torch.Tensor | None] = [None] * rank
        for factor in factors:
            stays = class_keep[self.classes.free[factor]]
            if bool(stays.all()):
                continue
            mask = compress(stays.long()).bool()
            axes = varying(mask)
            if len(axes) != 1:
                raise CannotPrune(f"the kept positions of a tensor of {rank} axes do not form a rectangle")
            axis, mask = axes[0], mask.reshape(-1)
            old = masks[axis]
            masks[axis] = mask if old is None else mask & old
        return masks

    def node_masks(self, index: int, node: fx.Node, class_keep: torch.Tensor) -> list[torch.Tensor | None]:
        """``masks`` of a node of pass ``index`` (0 is eval) that holds one tensor."""
        factors = self.passes[index].factors.get(node, [])
        shape = shape_of(node)
        if shape is None or not isinstance(factors, list):
            return []
        return self.masks(factors, len(shape), class_keep)


def find_groups(model: nn.Module | Graph, example_inputs: Inputs | None = None) -> tuple[Group, ...]:
    """Every group of coupled channels of ``model``: those that can be pruned, then those that are locked.

    A locked group's ``locked`` says why, with the operation and the line of the user's code.
    """
    coupling = couple(trace(model, example_inputs))
    return (*coupling.groups, *coupling.locked)


def couple(graph: Graph, prefer: Prefer = "channels", *, scatter: bool = False) -> Coupling:
    """Propagate labels through a captured graph and read off its groups; done once for each graph.

    ``prefer="module"`` joins the parts of every even split and locks what padded channels are added to, so that more
    networks stay plain modules after surgery (``chunk`` cuts at half the *new* width, ``F.pad`` appends as many zeros
    as ever) at the price of less freedom; ``"channels"`` leaves each channel free. ``scatter=True`` lets the sums of
    residual streams keep their width, so that what is added up is cut on its own.
    """
    key = f"{prefer}, scatter" if scatter else prefer
    found = graph.memo.get(key)
    if found is None:
        shared = Shared(Labels(), tie_halves=prefer == "module", scatter=scatter)
        found = graph.memo[key] = _couple(graph, shared)
    return found


def freed(coupling: Coupling) -> Coupling:
    """The same groups on a capture that runs on any number of examples, if the model allows it."""
    graph = with_free_batch(coupling.graph)
    return same_groups(graph, coupling.groups, scatter=coupling.scatter) or coupling


def same_groups(graph: Graph, groups: tuple[Group, ...], *, scatter: bool = False) -> Coupling | None:
    """The coupling of ``graph`` that has just these groups."""
    for prefer in ("channels", "module"):
        coupling = couple(graph, prefer, scatter=scatter)
        if coupling.groups is groups or coupling.groups == groups:
            return coupling
    return None


def _couple(graph: Graph, shared: Shared) -> Coupling:
    labels = shared.labels
    tensors = graph.tensors
    passes = tuple(Propagation(capture, labels, tensors, shared, RULES) for capture in graph.captures)
    labels.here = lambda why: why
    for name, factors in shared.factors.items():
        if name not in graph.used:
            note = f" ({graph.train_note})" if graph.train_note else ""
            for factor in factors:
                labels.lock(factor, f"no captured pass uses this parameter{note}")
    classes = _make_rectangular(labels, passes, shared)
    signature = _signatures(passes, shared, classes)
    roles = shared.roles()
    draft = _collect(shared, classes.free, signature, classes, roles)
    taken: dict[str, int] = {}
    groups = _finished(draft, labels, taken)

    def locked() -> tuple[Group, ...]:
        kernels = torch.from_numpy(np.isin(classes.reason, list(labels.no_channels)))
        held = torch.where((classes.free == 0) & ~kernels[classes.component], classes.component, 0)
        return _finished(_collect(shared, held, signature, classes, roles), labels, taken)

    numbers = (draft.group_of, draft.channel_of)
    return Coupling(graph, groups, _Later(locked), passes, shared.factors, classes, *numbers, shared.scatter)


def _all_factors(passes: tuple[Propagation, ...], shared: Shared) -> Iterator[tuple[object, torch.Tensor]]:
    """Every factor with the tensor it belongs to, in graph order, parameters last."""
    for index, propagation in enumerate(passes):
        for node, result in propagation.factors.items():
            for part, factors in enumerate(result if isinstance(result, tuple) else (result,)):
                for factor in factors:
                    yield (index, node, part), factor
    for name, factors in shared.factors.items():
        for axis, factor in enumerate(factors):
            yield (name, axis), factor


def _make_rectangular(labels: Labels, passes: tuple[Propagation, ...], shared: Shared) -> Classes:
    """Where free classes still vary along several axes of one factor, join over all axes but the last."""
    classes = labels.solve()
    for _, factor in list(_all_factors(passes, shared)):
        if len(varying(factor)) < 2:
            continue
        axes = varying(compress(classes.free[factor]))
        if len(axes) >= 2:
            for axis in axes[:-1]:
                factor = labels.join_along(factor, axis)
            classes = labels.solve()
    return classes


def _signatures(passes: tuple[Propagation, ...], shared: Shared, classes: Classes) -> np.ndarray:
    """A hash per class of the tensors it occurs in and how often; equal for channels of one group."""
    component = classes.component.numpy()
    signature = np.zeros(int(component.max()) + 1, np.uint64)
    random = np.random.default_rng(0)
    tokens: dict[object, np.uint64] = {}
    for key, factor in _all_factors(passes, shared):
        token = tokens.setdefault(key, random.integers(1, 2**63, dtype=np.uint64))
        np.add.at(signature, component[factor.numpy().ravel()], token)
    return signature


class _Later(Sequence[Group]):
    """Groups that are found when somebody looks: who prunes seldom asks for what is locked."""

    def __init__(self, find: Callable[[], tuple[Group, ...]]) -> None:
        self._find = find

    @cached_property
    def _groups(self) -> tuple[Group, ...]:
        return self._find()

    def __len__(self) -> int:
        return len(self._groups)

    def __getitem__(self, index: Any) -> Any:
        return self._groups[index]


@dataclass
class _Draft:
    """Groups while they are collected; ``number``: signature and reason -> place in the lists."""

    group_of: np.ndarray
    channel_of: np.ndarray
    number: dict[tuple[int, int], int]
    sizes: list[int]
    slices: list[list[Slice]]
    reasons: list[int]

    def place(self, c: int, signature: int, reason: int) -> None:
        """Make class ``c`` the next channel of its group."""
        g = self.number.setdefault((signature, reason), len(self.sizes))
        if g == len(self.sizes):
            self.sizes.append(0)
            self.slices.append([])
            self.reasons.append(reason)
        self.group_of[c], self.channel_of[c] = g, self.sizes[g]
        self.sizes[g] += 1


def _collect(
    shared: Shared,
    class_of: torch.Tensor,
    signature: np.ndarray,
    classes: Classes,
    roles: Mapping[tuple[str, int], Role],
) -> _Draft:
    """Groups of the classes that ``class_of`` (label -> class, or 0) selects, in order of their first tensor."""
    unknown = np.full(len(signature), -1, np.int64)
    draft = _Draft(unknown, unknown.copy(), {}, [], [], [])
    lookup = class_of.numpy()
    for name, factors in shared.factors.items():
        for factor in factors:
            axis = varying(factor)[0]
            at = lookup[factor.numpy().ravel()]
            new = at[(at > 0) & (draft.group_of[at] < 0)]
            for c in dict.fromkeys(new.tolist()):
                draft.place(c, int(signature[c]), int(classes.reason[c]))
            group = np.where(at > 0, draft.group_of[at], -1)
            order = np.lexsort((draft.channel_of[at], group))
            order = order[np.searchsorted(group[order], 0) :]
            if not len(order):
                continue
            starts = np.flatnonzero(np.diff(group[order], prepend=-1))
            for positions in np.split(order, starts[1:]):
                g = int(group[positions[0]])
                draft.slices[g].append(Slice(name, axis, positions.reshape(draft.sizes[g], -1), roles[name, axis]))
    return draft


def _finished(draft: _Draft, labels: Labels, taken: dict[str, int]) -> tuple[Group, ...]:
    groups = []
    for name, size, own, reason in zip(
        _names(draft.slices, taken), draft.sizes, draft.slices, draft.reasons, strict=True
    ):
        why = labels.locks[reason]() if reason >= 0 else ""
        groups.append(Group(name, size, tuple(own), _first_writer(own).positions.shape[1], why))
    return tuple(groups)


def _first_writer(slices: list[Slice]) -> Slice:
    return next((s for s in slices if s.role == "writes"), slices[0])


def _names(slices: list[list[Slice]], taken: dict[str, int]) -> list[str]:
    """The module that writes a group first, ``#2``, ``#3`` ... where that name is taken; ``conv1 input`` for channels
    that are only read."""
    names = []
    for own in slices:
        writer = _first_writer(own)
        base, _, leaf = writer.tensor.replace(".parametrizations.weight.original", ".weight").rpartition(".")
        if not base or not leaf.startswith(("weight", "bias")):
            base = writer.tensor
        if writer.role == "reads":
            base += " input"
        taken[base] = taken.get(base, 0) + 1
        names.append(base if taken[base] == 1 else f"{base}#{taken[base]}")
    return names
