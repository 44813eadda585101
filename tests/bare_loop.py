"""A plain PyTorch loop as a user would write it, calling hooks at their places, and a small network to train in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from networks.architectures import Basic
from networks.common import conv, randomise, tensor
from secateur.recover.hooks import Hooks

CLASSES = 4
X = tensor(2, 3, 8, 8)


class Small(nn.Module):
    """Batch norm and ReLU throughout: a residual stream of three writers, a grouped convolution, a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 8)
        self.block = Basic(8, 8)
        self.grouped = conv(8, 12, groups=2)
        self.wide = Basic(12, 16, stride=2)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.wide(self.grouped(self.block(self.stem(x)))).mean((2, 3)))


def small(seed: int = 0) -> Small:
    """A fresh ``Small`` with nothing left at 0 or 1, in train mode."""
    torch.manual_seed(seed)
    net = Small()
    randomise(net, seed)
    return net


class Chain(nn.Module):
    """Three layers one after the other: quick to capture."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = conv(3, 8), conv(8, 12), conv(12, 16)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.c(self.b(self.a(x))).mean((2, 3)))


def chain(seed: int = 0) -> Chain:
    """A fresh ``Chain``, as ``small``."""
    torch.manual_seed(seed)
    net = Chain()
    randomise(net, seed)
    return net


def batches(epoch: int, steps: int = 3, *, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches of an epoch from ``start`` on; they depend on the epoch's number alone."""
    for step in range(start, steps):
        g = torch.Generator().manual_seed(1000 * epoch + step)
        yield torch.randn(8, 3, 8, 8, generator=g), torch.randint(0, CLASSES, (8,), generator=g)


def sgd(model: nn.Module, lr: float = 0.05) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=1e-2)


def train(
    model: nn.Module,
    hooks: Hooks,
    optimizer: torch.optim.Optimizer,
    epochs: range,
    *,
    seen: Callable[[nn.Module], None] | None = None,
) -> None:
    """Train by the hooks' contract, in the model's own precision; ``seen`` is called after every step."""
    dtype = next(model.parameters()).dtype
    for epoch in epochs:
        model.train()
        for x, y in batches(epoch):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x.to(dtype)), y)
            if hooks.penalty is not None:
                loss = loss + hooks.penalty(model)
            loss.backward()
            if hooks.after_backward is not None:
                hooks.after_backward(model)
            optimizer.step()
            if hooks.after_step is not None:
                hooks.after_step(model)
            if seen is not None:
                seen(model)
        model.eval()
        if hooks.after_epoch is not None:
            hooks.after_epoch(model)


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    """Whether all tensors of both are equal, bit for bit."""
    theirs = b.state_dict()
    return all(torch.equal(t, theirs[name]) for name, t in a.state_dict().items())
