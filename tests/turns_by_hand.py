"""ThiNet's search by hand: parts of outputs in plain torch, by hooks and zeroed weights, and loops over their rows."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from secateur.core import Group

Keep = dict[str, tuple[int, ...]]


def removed_by_loops(parts: Tensor, target: Tensor, count: int) -> list[int]:
    """Luo et al., ICCV 2017, algorithm 1: ``parts [n, C]``, ``target [n]``; the ``count`` channels that go, in order.
    Every cost is taken from the rows themselves."""
    gone: list[int] = []
    for _ in range(count):
        costs = {}
        for j in range(parts.shape[1]):
            if j not in gone:
                left = [c for c in range(parts.shape[1]) if c != j and c not in gone]
                costs[j] = float((target - parts[:, left].sum(1)).square().sum())
        gone.append(min(costs, key=lambda j: (costs[j], -j)))
    return gone


def pursued_by_loops(parts: Tensor, target: Tensor, count: int) -> list[int]:
    """Luo et al., TPAMI 2018: orthogonal matching pursuit; the ``count`` channels that stay, in order."""
    kept: list[int] = []
    rest = target
    for _ in range(count):
        costs = {}
        for j in range(parts.shape[1]):
            if j not in kept:
                column = parts[:, j]
                costs[j] = float((rest - column @ rest / (column @ column) * column).square().sum())
        kept.append(min(costs, key=lambda j: (costs[j], j)))
        weights = torch.linalg.lstsq(parts[:, kept], target[:, None]).solution
        rest = target - (parts[:, kept] @ weights)[:, 0]
    return kept


@contextmanager
def recorded(net: nn.Module, names: Sequence[str]) -> Iterator[dict[str, list[tuple[Tensor, Tensor]]]]:
    """Input and output, without bias, of every call of the modules."""
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in names}
    handles = []
    for name in names:

        def look(layer: nn.Module, args: tuple[Tensor, ...], out: Tensor, name: str = name) -> None:
            seen[name].append((args[0].detach().clone(), bare(layer, args[0])))

        handles.append(net.get_submodule(name).register_forward_hook(look))
    with torch.no_grad():
        yield seen
    for handle in handles:
        handle.remove()


def bare(layer: nn.Module, x: Tensor) -> Tensor:
    """What a layer gives but for its bias."""
    twin = copy.deepcopy(layer)
    if twin.bias is not None:
        nn.init.zeros_(twin.bias)  # type: ignore[arg-type]
    return nn.Module.__call__(_unhooked(twin), x).detach()


def _unhooked(layer: nn.Module) -> nn.Module:
    layer._forward_hooks.clear()
    return layer


def without(net: nn.Module, groups: Mapping[str, Group], keep: Keep) -> nn.Module:
    """A copy in which the weights that read removed channels are zero."""
    twin = copy.deepcopy(net)
    parameters = dict(twin.named_parameters())
    for name, kept in keep.items():
        gone = [c for c in range(groups[name].channels) if c not in kept]
        for part in groups[name].slices:
            if part.role == "reads":
                with torch.no_grad():
                    parameters[part.tensor].index_fill_(part.axis, torch.from_numpy(part.positions[gone].ravel()), 0)
    return twin


def rows_of(
    net: nn.Module, groups: Mapping[str, Group], name: str, keep: Keep, data: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """``parts [n, C]`` and ``target [n]`` of all readers of a group, each divided by the root of its energy, where the
    channels that ``keep`` leaves out are gone."""
    small = without(net, groups, keep)
    reads = [s for s in groups[name].slices if s.role == "reads"]
    layers = [s.tensor.removesuffix(".weight") for s in reads]
    with recorded(net, layers) as dense:
        for x in data:
            net(x)
    with recorded(small, layers) as pruned:
        for x in data:
            small(x)
    parts, targets = [], []
    for piece, layer in zip(reads, layers, strict=True):
        stay = filters_left(groups, keep, piece.tensor, net.get_submodule(layer))
        axis = 1 if isinstance(net.get_submodule(layer), nn.Conv2d) else -1
        own = [[], []]
        for (_, y), (x, now) in zip(dense[layer], pruned[layer], strict=True):
            through = torch.stack([only(small.get_submodule(layer), x, piece.axis, p) for p in piece.positions], -1)
            t = y - (now - through.sum(-1))
            own[0].append(through.movedim(axis % y.dim(), 0)[stay].reshape(-1, len(piece.positions)))
            own[1].append(t.movedim(axis, 0)[stay].reshape(-1))
        energy = sum(float(y.movedim(axis, 0)[stay].square().sum()) for _, y in dense[layer]) ** 0.5
        parts.append(torch.cat(own[0]) / energy)
        targets.append(torch.cat(own[1]) / energy)
    return torch.cat(parts), torch.cat(targets)


def filters_left(groups: Mapping[str, Group], keep: Keep, tensor: str, layer: nn.Module) -> Tensor:
    """The filters of a layer that are still there."""
    stay = torch.ones(layer.weight.shape[0], dtype=torch.bool)
    for name, kept in keep.items():
        gone = np.setdiff1d(np.arange(groups[name].channels), kept)
        for part in groups[name].slices:
            if part.role == "writes" and part.tensor == tensor:
                stay[torch.from_numpy(part.positions[gone].ravel())] = False
    return stay


def only(layer: nn.Module, x: Tensor, axis: int, positions: np.ndarray) -> Tensor:
    """What comes through some of a layer's inputs."""
    twin = copy.deepcopy(layer)
    with torch.no_grad():
        mask = torch.zeros(twin.weight.shape[axis])
        mask[torch.from_numpy(positions)] = 1
        shape = [1] * twin.weight.dim()
        shape[axis] = -1
        twin.weight.mul_(mask.to(twin.weight.dtype).reshape(shape))
        return bare(twin, x)
