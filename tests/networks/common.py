"""What the test networks share: the frame that most of them stand in, example inputs, expectations, randomisation.

Shapes: ``B`` batch, ``C`` channels, ``H W`` map, ``N`` tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Inputs = Tensor | tuple[Tensor, ...] | dict[str, Tensor]


@dataclass(frozen=True)
class Expect:
    """What must become of a network. All names are globs over the modules that write channels.

    ``prunes``: written by at least one free group. ``locks``: written by locked groups only, each with a reason, one of
    which contains ``reason``. A construct with neither may be pruned or locked, as long as the law holds.
    ``oracle``: nothing but convolutions and linear layers reads channels and no norm mixes them, so that zeroing the
    readers' parameters says the same as ``masked``. ``tol``: relative, larger where the network itself rounds.
    """

    prunes: tuple[str, ...] = ()
    locks: tuple[str, ...] = ()
    reason: str = ""
    oracle: bool = False
    tol: float = 1e-9


Network = tuple[Callable[[], nn.Module], Callable[[], Inputs], Expect]


class Sandwich(nn.Module):
    """``stem`` conv, an activation that is not 0 at 0, the construct, ``head`` conv or linear."""

    def __init__(self, middle: nn.Module, *, width: int = 12, out: int | None = None, flat: bool = False) -> None:
        super().__init__()
        out = width if out is None else out
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.middle = middle
        self.head: nn.Module = nn.Linear(out, 5) if flat else nn.Conv2d(out, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.middle(F.softplus(self.stem(x))))


class Apply(nn.Module):
    """A function as a module, for constructs without parameters."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def tensor(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal, always the same for one seed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def image(channels: int = 3, size: int = 8, *, batch: int = 2) -> Callable[[], Inputs]:
    """Makes ``(x,)`` with x of ``[batch, channels, size, size]``."""
    return lambda: (tensor(batch, channels, size, size),)


def tokens(features: int = 6, length: int = 5) -> Callable[[], Inputs]:
    """Makes ``(x,)`` with x of ``[2, length, features]``."""
    return lambda: (tensor(2, length, features),)


def conv(cin: int, cout: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Convolution without bias, batch norm, ReLU; keeps the map at stride 1."""
    c = nn.Conv2d(cin, cout, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(c, nn.BatchNorm2d(cout), nn.ReLU())


def randomise(model: nn.Module, seed: int) -> nn.Module:
    """Gives every norm, bias, scale and constant parameter random values, in place; returns the model.

    Weights that are random already are only scaled so that signals stay of order 1. Nothing is left at 0 or 1, where a
    wrongly sliced tensor would not show.
    """
    g = torch.Generator().manual_seed(seed)

    def uniform(t: Tensor, low: float, high: float) -> None:
        t.copy_(torch.rand(t.shape, generator=g, dtype=torch.float64) * (high - low) + low)

    with torch.no_grad():
        for name, p in model.named_parameters():
            leaf = name.rpartition(".")[2]
            vector = sum(n > 1 for n in p.shape) <= 1
            if not vector and p.numel() > 1 and bool((p != p.flatten()[0]).any()):
                p.mul_(1.7)
            elif (
                vector
                and "bias" not in leaf
                and any(s in leaf for s in ("weight", "gamma", "scale", "gain", "original"))
            ):
                uniform(p, 0.5, 1.5)
            else:
                uniform(p, -0.6, 0.6)
        for name, b in model.named_buffers():
            if name.endswith("running_mean"):
                uniform(b, -0.5, 0.5)
            elif name.endswith("running_var"):
                uniform(b, 0.5, 1.5)
    return model
