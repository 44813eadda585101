"""Residual streams: which groups meet other activations in an elementwise sum, and what the residual rules make of it.

- *coupled*: all that meets goes together, and is scored as one group.
- *inner*: only channels that meet nothing are free, those inside the blocks. Li et al., "Pruning Filters for Efficient
  ConvNets" (ICLR 2017), section 3.4, on ResNets for CIFAR; ThiNet on ResNet-50.
- *projection*: a group that meets is scored by the shortcut projection of its first sum alone, since the identity maps
  matter more than what is added to them; a stream without a projection stays whole. Li et al., section 3.4, on
  ResNet-34.
- *scatter*: a sum keeps its width, and each layer that adds to it is pruned on its own; what is left of its output is
  added in where it belongs. He et al. (FPGM, CVPR 2019), whose code prunes every layer of a residual block.

An activation is *another* one if another layer takes part in it: ``x + x * norm(x)`` and a depthwise ``x + conv(x)``
change the channels of one layer, and nothing meets there. Nor does it in what is no sum of two operands: a maximum, a
product, ``cat([x[None], y[None]]).sum(0)``. All is read off the captured graph: no module is looked at, and no name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import fx

from secateur.core import Group
from secateur.groups import Coupling
from secateur.nodes import named_args, op_name, shape_of, source_line

RULES = ("coupled", "inner", "projection", "scatter")
SUMS = frozenset("add sub rsub addcmul addcdiv lerp".split())
"""Operations that add their operands up, element by element."""
PRODUCTS_ADDED = frozenset("addmm baddbmm addmv".split())
"""Operations that add a new product to their first operand."""
_CONVOLUTIONS = ("conv", "linear")


@dataclass(frozen=True, eq=False)
class Sum:
    """An elementwise sum ``node`` of activations of different layers; ``groups``: the free groups that meet there."""

    node: fx.Node
    operands: tuple[fx.Node, ...]
    groups: frozenset[str]


@dataclass(frozen=True)
class Shortcut:
    """The projection of a residual stream: its ``weight``, and all ``tensors`` that its branch fetches."""

    weight: str
    tensors: frozenset[str]


def meeting_sums(coupling: Coupling) -> set[str]:
    """The names of the free groups whose channels meet another activation in an elementwise sum."""
    return {name for found in _sums(coupling) for name in found.groups}


def projections(coupling: Coupling) -> dict[str, str]:
    """``{group: weight}`` for the groups that meet in sums: the shortcut projection of the first one.

    Of the branches from the fork to the sum it is the one with the fewest convolutions, if a single weight there writes
    the group. A group whose first sum has no such branch (an identity, zero-padded channels, branches that are alike)
    is left out.
    """
    return {name: shortcut.weight for name, shortcut in _shortcuts(coupling).items()}


def scored_by_projection(coupling: Coupling) -> dict[str, Group]:
    """The groups of ``projections``, each with no writers and scales but those of its shortcut's branch."""
    found = _shortcuts(coupling)
    return {group.name: _narrowed(group, found[group.name]) for group in coupling.groups if group.name in found}


def kept_whole(coupling: Coupling, residual: str) -> dict[str, str]:
    """``{group: why}`` of the free groups that the residual rule leaves whole."""
    if residual not in ("inner", "projection"):
        return {}
    projected = _shortcuts(coupling) if residual == "projection" else {}
    whole: dict[str, str] = {}
    for found in _sums(coupling):
        for name in sorted(found.groups - projected.keys()):
            why = "prunes only what meets in no sum" if residual == "inner" else "needs a shortcut projection there"
            whole.setdefault(name, f"it meets other channels in the sum at {source_line(found.node)}, and {why}")
    return {name: f"residual={residual!r} leaves it whole: {why}" for name, why in whole.items()}


def _narrowed(group: Group, shortcut: Shortcut) -> Group:
    kept = (s for s in group.slices if s.role == "reads" or s.tensor in shortcut.tensors)
    return replace(group, slices=tuple(kept))


# Sums ------------------------------------------------------------------------------------------------------------


def _sums(coupling: Coupling) -> list[Sum]:
    """The sums of the eval pass in which free groups meet, in graph order."""
    layers = coupling.passes[0].layers
    found = []
    for node in coupling.graph.captures[0].graph.nodes:
        operands = [n for n in _operands(node) if layers[n]]
        if len({layers[n] for n in operands}) < 2:
            continue
        classes = [_classes(coupling, n) for n in operands]
        met = np.unique(np.concatenate([np.intersect1d(a, b) for i, a in enumerate(classes) for b in classes[:i]]))
        groups = np.unique(coupling.group_of[met])
        names = frozenset(coupling.groups[g].name for g in groups[groups >= 0])
        if names:
            found.append(Sum(node, tuple(operands), names))
    return found


def _operands(node: fx.Node) -> list[fx.Node]:
    """The tensors that ``node`` adds up; none if it is no sum."""
    if node.op != "call_function":
        return []
    name = op_name(node)
    if name in SUMS:
        return [n for n in dict.fromkeys(node.all_input_nodes) if shape_of(n) is not None]
    if name in PRODUCTS_ADDED:
        return [next(n for n in node.all_input_nodes if shape_of(n) is not None), node]
    if name in ("sum", "mean"):
        stacked = node.all_input_nodes[0]
        if stacked.op == "call_function" and op_name(stacked) == "stack" and _over_stack(node, stacked):
            return list(dict.fromkeys(stacked.all_input_nodes))
    return []


def _over_stack(node: fx.Node, stacked: fx.Node) -> bool:
    """Whether a sum runs over the axis that its operands were stacked along."""
    rank = len(shape_of(stacked) or ())
    dim = named_args(node).get("dim")
    axes = [] if dim is None else list(dim) if isinstance(dim, (list, tuple)) else [dim]
    return not axes or named_args(stacked)["dim"] % rank in [axis % rank for axis in axes]


def _classes(coupling: Coupling, node: fx.Node) -> np.ndarray:
    """The free classes on ``node``, sorted."""
    factors = coupling.passes[0].factors.get(node, [])
    if not isinstance(factors, list) or not factors:
        return np.zeros(0, np.int64)
    classes = torch.cat([coupling.classes.free[factor.reshape(-1)] for factor in factors]).unique().numpy()
    return np.asarray(classes[classes > 0])


# Projections -----------------------------------------------------------------------------------------------------


def _shortcuts(coupling: Coupling) -> dict[str, Shortcut]:
    first: dict[str, Sum] = {}
    for found in _sums(coupling):
        for name in found.groups:
            first.setdefault(name, found)
    shortcuts: dict[str, Shortcut] = {}
    branches: dict[fx.Node, set[fx.Node] | None] = {}
    for group in coupling.groups:
        if group.name in first:
            at = first[group.name]
            if at.node not in branches:
                branches[at.node] = _shortest_branch(at)
            shortcut = _projection(coupling, group, branches[at.node])
            if shortcut is not None:
                shortcuts[group.name] = shortcut
    return shortcuts


def _shortest_branch(at: Sum) -> set[fx.Node] | None:
    """The nodes of the branch with the fewest convolutions, from the fork to the sum; ``None`` where several have."""
    reached = [_ancestors([operand]) for operand in at.operands if operand is not at.node]
    if len(reached) < 2:
        return None
    common = set.intersection(*reached)
    branches = sorted((own - common for own in reached), key=_convolutions)
    return branches[0] if _convolutions(branches[0]) < _convolutions(branches[1]) else None


def _ancestors(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """``nodes`` and all that they are computed from."""
    waiting, seen = list(nodes), set[fx.Node]()
    while waiting:
        node = waiting.pop()
        if node not in seen:
            seen.add(node)
            waiting.extend(node.all_input_nodes)
    return seen


def _convolutions(branch: Iterable[fx.Node]) -> int:
    return sum(node.op == "call_function" and op_name(node).startswith(_CONVOLUTIONS) for node in branch)


def _projection(coupling: Coupling, group: Group, branch: set[fx.Node] | None) -> Shortcut | None:
    """The projection of ``group``, if a single weight of the branch writes it."""
    names: Mapping[str, str] = coupling.graph.captures[0].names
    fetched = {str(node.target) for node in branch or () if node.op == "get_attr"}
    tensors = frozenset(names[target] for target in fetched if target in names)
    shapes = coupling.graph.tensors
    weights = [s.tensor for s in group.slices if s.role == "writes" and s.tensor in tensors]
    weights = [name for name in dict.fromkeys(weights) if shapes[name].dim() >= 2]
    return Shortcut(weights[0], tensors) if len(weights) == 1 else None
