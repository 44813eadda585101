"""The networks that calibration is tested on, ready to be measured, with data and a loss."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from networks import randomise
from secateur.graph import trace
from secateur.groups import Coupling, couple

D = torch.float64


def LOSS(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets.long())


class Chain(nn.Module):
    """conv, batch norm, in-place ReLU; conv, ReLU without a norm; a linear layer behind a flattened map."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.n, self.b = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(6, 4, 3, stride=2)
        self.c, self.d = nn.Linear(16, 7), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.b(F.relu_(self.n(self.a(x))))), 2)
        return self.d(self.c(x.flatten(1)))


class Stream(nn.Module):
    """A residual stream with a projection; the activation stands behind the sums."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.p = nn.Conv2d(3, 5, 3, padding=1), nn.Conv2d(5, 6, 1, stride=2)
        self.a, self.b, self.n = nn.Conv2d(5, 4, 3, 2, 1), nn.Conv2d(4, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.c, self.e = nn.Conv2d(6, 3, 3, padding=1), nn.Conv2d(3, 6, 3, padding=1)
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.sums(F.relu(self.stem(x)))[1].mean((2, 3)))

    def sums(self, x: Tensor) -> list[Tensor]:
        y = F.relu(self.p(x) + self.n(self.b(F.relu(self.a(x)))))
        return [y, F.gelu(y + self.e(F.relu(self.c(y))))]


@functools.cache
def ready(build: Callable[[], nn.Module], *shape: int) -> tuple[nn.Module, Coupling]:
    """A network in eval mode with its groups, the same for every test: capturing takes most of the time."""
    torch.manual_seed(0)
    model = randomise(build().double(), 1).eval()
    return model, couple(trace(model, torch.zeros(shape or (2, 3, 8, 8), dtype=D)))


def images(*sizes: int, side: int = 8) -> list[Tensor]:
    make = torch.Generator().manual_seed(0)
    return [torch.randn(n, 3, side, side, dtype=D, generator=make) for n in sizes]
