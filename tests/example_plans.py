"""A small network and plans for it, made by hand: what the tests of plans, artefacts and optimisers share."""

from __future__ import annotations

import contextlib
import copy
import functools
import resource
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from secateur.core import Edit, Group, Slice
from secateur.graph import trace
from secateur.groups import find_groups
from secateur.plans import Plan, fingerprint, input_specs
from secateur.surgery import apply

X = torch.randn(2, 3, 2, 2, generator=torch.Generator().manual_seed(0))


def network() -> nn.Sequential:
    """Two convolutions and a linear layer behind a flattened 2x2 map; input ``[B, 3, 2, 2]``."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3, padding=1), nn.Flatten(),
        nn.Linear(24, 5),
    )  # fmt: skip


def column(channels: int, *, k: int = 1, start: int = 0) -> np.ndarray:
    return start + np.arange(channels * k).reshape(channels, k)


def first_group(channels: int = 8) -> Group:
    places = [("0.weight", 0, "writes"), ("0.bias", 0, "follows"), ("1.weight", 0, "scales"), ("1.bias", 0, "follows"),
              ("1.running_mean", 0, "follows"), ("1.running_var", 0, "follows"), ("3.weight", 1, "reads")]  # fmt: skip
    return Group("0", channels, tuple(Slice(t, a, column(channels), r) for t, a, r in places))  # type: ignore[arg-type]


def second_group(channels: int = 6) -> Group:
    return Group("3", channels, (
        Slice("3.weight", 0, column(channels), "writes"),
        Slice("3.bias", 0, column(channels), "follows"),
        Slice("5.weight", 1, column(channels, k=4), "reads"),
    ))  # fmt: skip


def plan(**changes: Any) -> Plan:
    fields: dict[str, Any] = {
        "groups": (first_group(), second_group()),
        "keep": {"0": (0, 1, 2, 5, 7), "3": (1, 4)},
        "model": fingerprint(network()),
        "inputs": input_specs((torch.zeros(1, 3, 2, 2),)),
        "made_by": {"criterion": "l1", "ratios": {"*": 0.5}, "secateur": "0.1.0"},
    }
    return Plan(**{**fields, **changes})


def shuffled(group: Group, part: int, positions: np.ndarray) -> Group:
    slices = list(group.slices)
    slices[part] = replace(slices[part], positions=positions)
    return replace(group, slices=tuple(slices))


def full() -> Plan:
    """A plan with something in every field, reserved ones too, and positions that are no regular grid."""
    irregular = np.random.default_rng(0).permutation(24).reshape(6, 4)
    stripes = {"0": np.random.default_rng(1).random((8, 3, 3)) > 0.5}
    edits = (Edit("attribute", "0", "splits", (2, 3)), Edit("attribute", "", "width", 5), Edit("graph", ""))
    return plan(groups=(first_group(), shuffled(second_group(), 2, irregular)), constants={"0": "fold", "3": "drop"},
                stripes=stripes, residual="scatter", edits=edits)  # fmt: skip


def random_plan(model: nn.Module, example: Any, *, ratio: float = 0.5, seed: int = 0) -> Plan:
    """A plan by ``find_groups`` that removes ``ratio`` of every group, chosen at random."""
    graph = trace(model, example)
    groups = tuple(group for group in find_groups(graph) if not group.locked)
    rng = np.random.default_rng(seed)
    keep = {
        g.name: np.sort(rng.permutation(g.channels)[: max(1, int(g.channels * (1 - ratio)))]) for g in groups
    }  # fmt: skip
    inputs = input_specs(graph.args, graph.kwargs)
    return Plan(groups, keep, fingerprint(model), inputs, {"criterion": "random"}, graph=graph)  # type: ignore[arg-type]


def trained(seed: int = 0) -> nn.Module:
    """The network with every parameter and buffer at random."""
    torch.manual_seed(seed)
    model = network()
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.is_floating_point():
            nn.init.uniform_(tensor, 0.1, 1.0)
    return model.eval()


@functools.cache
def cut(seed: int) -> tuple[nn.Module, Plan]:
    model = trained()
    plan = random_plan(model, X, seed=seed)
    return apply(model, plan), plan


def pruned(seed: int = 0) -> tuple[nn.Module, Plan]:
    """A pruned network of the test's own, and its plan."""
    small, plan = cut(seed)
    return copy.deepcopy(small), plan


def same(a: nn.Module, b: nn.Module) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return list(left) == list(right) and all(
        torch.equal(left[k], right[k]) and left[k].dtype == right[k].dtype for k in left
    )


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@contextlib.contextmanager
def no_file_beyond(limit: int) -> Iterator[None]:
    """No file of this process may grow past ``limit`` bytes: the operating system says so, as on a full disk."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
