"""What a method does inside somebody's training loop, as plain callables.

A loop calls them where their names say, on the plain module (not on a wrapper of it); ours does, and any other can:

    loss = criterion(model(x), y) + (hooks.penalty(model) if hooks.penalty else 0)
    loss.backward();   hooks.after_backward and hooks.after_backward(model)
    optimizer.step();  hooks.after_step and hooks.after_step(model)
    ...                hooks.after_epoch and hooks.after_epoch(model)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

Act = Callable[[nn.Module], None]
State = Mapping[str, "torch.Tensor | int | float | str"]


@dataclass(frozen=True)
class Hooks:
    """``penalty``: a scalar that is added to the loss. ``after_backward``: when the gradients are there, unscaled and
    summed over the processes. ``after_step``: when the optimiser has stepped. ``after_epoch``: when an epoch is over,
    before it is evaluated. ``state`` and ``restore``: what a resumed run needs to go on as if never interrupted
    (tensors come back on the CPU)."""

    penalty: Callable[[nn.Module], torch.Tensor] | None = None
    after_backward: Act | None = None
    after_step: Act | None = None
    after_epoch: Act | None = None
    state: Callable[[], State] | None = None
    restore: Callable[[State], None] | None = None
