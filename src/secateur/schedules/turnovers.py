"""Which channels a choice of what is zero took in and let go, and how a history of choices is kept with a training run.

Letters: ``S`` choices, ``n`` channels that changed, over all of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from secateur.core import Group, Turnover
from secateur.recover.hooks import State
from secateur.schedules.places import Masks

EPOCHS, CHANGES = "history:epochs", "history:changes"


def turnover(before: Masks, after: Masks, *, epoch: int) -> Turnover:
    """What changed from the masks of what was zero to those of what is; ``before`` may be empty: nothing was."""
    entered, left = {}, {}
    for name, now in after.items():
        then = before.get(name, np.zeros_like(now))
        entered[name] = tuple(np.flatnonzero(now & ~then).tolist())
        left[name] = tuple(np.flatnonzero(then & ~now).tolist())
    return Turnover(epoch, {n: at for n, at in entered.items() if at}, {n: at for n, at in left.items() if at})


def as_state(history: Sequence[Turnover], groups: Sequence[Group]) -> dict[str, torch.Tensor]:
    """The history as tensors: the epoch of every choice ``[S]``, and ``[n, 4]`` of choice, group, channel, and whether
    it entered (1) or left (0). Nothing for an empty history."""
    if not history:
        return {}
    numbers = {group.name: number for number, group in enumerate(groups)}
    rows = [
        (choice, numbers[name], channel, entered)
        for choice, change in enumerate(history)
        for entered, side in ((1, change.entered), (0, change.left))
        for name, channels in side.items()
        for channel in channels
    ]
    return {
        EPOCHS: torch.tensor([change.epoch for change in history], dtype=torch.int64),
        CHANGES: torch.tensor(rows, dtype=torch.int64).reshape(-1, 4),
    }


def from_state(state: State, groups: Sequence[Group]) -> list[Turnover]:
    """What ``as_state`` wrote; an empty history where the state has none."""
    epochs, changes = state.get(EPOCHS), state.get(CHANGES)
    if not isinstance(epochs, torch.Tensor) or not isinstance(changes, torch.Tensor):
        return []
    found: list[tuple[dict[str, list[int]], dict[str, list[int]]]] = [({}, {}) for _ in range(len(epochs))]
    for choice, group, channel, entered in changes.tolist():
        found[choice][0 if entered else 1].setdefault(groups[group].name, []).append(channel)
    return [
        Turnover(epoch, *({name: tuple(channels) for name, channels in side.items()} for side in sides))
        for epoch, sides in zip(epochs.tolist(), found, strict=True)
    ]
