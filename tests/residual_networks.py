"""A small residual network of plain blocks, for tests of what is scattered and folded.

Shapes: ``B`` batch, ``C`` channels, ``H W`` map.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import secateur as sc
from law import to_double
from networks.common import randomise, tensor

X = to_double(tensor(2, 3, 9, 9))
"""Odd, so that a stride of 2 has uneven borders."""


def conv(cin: int, cout: int, kernel: int = 3, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(cin, cout, kernel, stride, kernel // 2, bias=False)


class Block(nn.Module):
    """Two convolutions beside an identity, or beside a projection where the width changes."""

    def __init__(self, cin: int, cout: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(cin, cout, 3, stride), nn.BatchNorm2d(cout)
        self.conv2, self.bn2 = conv(cout, cout), nn.BatchNorm2d(cout)
        projection = nn.Sequential(conv(cin, cout, 1, stride), nn.BatchNorm2d(cout))
        self.down: nn.Module = nn.Identity() if cin == cout and stride == 1 else projection

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.down(x))


class ResNet(nn.Module):
    """Stem, a block of 8 channels, one of 12 at half the size, a linear layer: ``[B, 3, H, W] -> [B, 5]``."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = conv(3, 8), nn.BatchNorm2d(8)
        self.a, self.b = Block(8, 8), Block(8, 12, 2)
        self.fc = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.b(self.a(F.relu(self.norm(self.stem(x))))).mean((2, 3)))


GROUPS = ("stem", "a.conv1", "a.conv2", "b.conv1", "b.conv2", "b.down.0")
"""What ``residual="scatter"`` prunes, each on its own."""
BRANCHES = {"stem": "norm", "a.conv2": "a.bn2", "b.conv2": "b.bn2", "b.down.0": "b.down.1"}
"""The groups that are added up, and the modules that scatter them."""


def network(seed: int = 0) -> ResNet:
    torch.manual_seed(seed)
    model = ResNet()
    randomise(model, seed)
    return model.double().eval()


@functools.cache
def graph() -> sc.Graph:
    """One capture for all tests that leave the network as it is."""
    return sc.trace(network(), X)


@functools.cache
def _text(constants: str, ratio: float, seed: int) -> str:
    options: Any = {"residual": "scatter", "constants": constants, "seed": seed}
    return sc.plan(graph(), criterion="random", ratios=ratio, **options).to_json()


def plan_of(constants: str = "drop", *, ratio: float = 0.4, seed: int = 0) -> sc.Plan:
    """A scattering plan for ``network()`` that remembers no capture; random channels."""
    return sc.Plan.from_json(_text(constants, ratio, seed))


@functools.cache
def shared(constants: str = "drop") -> tuple[sc.Plan, Any]:
    """Plan and pruned network, to be looked at only."""
    plan = plan_of(constants)
    return plan, sc.apply(graph().model, plan)


def gone(plan: sc.Plan, group: str) -> list[int]:
    channels = next(g.channels for g in plan.groups if g.name == group)
    return sorted(set(range(channels)) - set(plan.keep[group]))
