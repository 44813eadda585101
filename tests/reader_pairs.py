"""A layer that is pruned, an activation, and the reader under test, of every kind of affine operation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import secateur as sc

D = torch.float64


class Pair(nn.Module):
    """One layer that is pruned, an activation, the reader under test."""

    def __init__(self, writer: nn.Module, reader: nn.Module, between: Callable[[Tensor], Tensor] = F.softplus) -> None:
        super().__init__()
        self.writer, self.reader, self.between = writer, reader, between

    def forward(self, x: Tensor) -> Tensor:
        return self.reader(self.between(self.writer(x)))


def flat(x: Tensor) -> Tensor:
    return F.softplus(x).flatten(1)


PAIRS: dict[str, tuple[Callable[[], Pair], tuple[int, ...]]] = {
    "padding": (lambda: Pair(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 5, 3, padding=1)), (3, 7, 6)),
    "stride": (lambda: Pair(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 5, 3, stride=2, padding=2)), (3, 7, 8)),
    "dilation": (lambda: Pair(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 5, (2, 3), dilation=2)), (3, 7, 8)),
    "groups": (lambda: Pair(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 6, 3, padding=1, groups=2)), (3, 5, 5)),
    "conv1d": (lambda: Pair(nn.Conv1d(3, 8, 3), nn.Conv1d(8, 4, 3, padding=1)), (3, 12)),
    "conv3d": (lambda: Pair(nn.Conv3d(2, 6, 1), nn.Conv3d(6, 3, 2, padding=1)), (2, 3, 4, 3)),
    "transposed": (
        lambda: Pair(nn.Conv2d(3, 8, 1), nn.ConvTranspose2d(8, 4, 3, stride=2, padding=1, output_padding=1)),
        (3, 4, 5),
    ),
    "transposed groups": (lambda: Pair(nn.Conv2d(3, 8, 1), nn.ConvTranspose2d(8, 4, 2, groups=2)), (3, 4, 5)),
    "flatten": (lambda: Pair(nn.Conv2d(3, 6, 1), nn.Linear(24, 5), flat), (3, 2, 2)),
    "linear": (lambda: Pair(nn.Linear(4, 9), nn.Linear(9, 5)), (6, 4)),
}


def pruned(model: nn.Module, x: Tensor, ratios: Any = 0.5) -> tuple[sc.Plan, nn.Module]:
    plan = sc.plan(model, x, ratios=ratios)
    return plan, sc.apply(model, plan)


def made(name: str) -> tuple[Pair, list[Tensor]]:
    torch.manual_seed(0)
    factory, shape = PAIRS[name]
    model = factory().double().eval()
    return model, [torch.randn(n, *shape, dtype=D) for n in (40, 23)]


def rows_of(reader: nn.Module, h: Tensor) -> Tensor:
    """Outputs ``[N, O]`` of a reader, samples and positions in rows."""
    return reader(h).movedim(-1 if isinstance(reader, nn.Linear) else 1, -1).flatten(0, -2).detach()
