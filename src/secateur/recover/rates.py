"""The learning rate of every step, as a pure function of the settings: nothing about it needs to be saved."""

from __future__ import annotations

import math

from secateur.recover.settings import Training


def rate(training: Training, step: int, steps_per_epoch: int) -> float:
    """The learning rate of step ``step`` (from 0) of a training run whose epochs have ``steps_per_epoch`` steps.

    With ``rewind``, step 0 is the first of the last so many epochs of the schedule, warm-up and all.
    """
    total = training.epochs * steps_per_epoch
    skipped = training.epochs - (training.epochs if training.rewind is None else training.rewind)
    step += skipped * steps_per_epoch
    rising = training.warmup * steps_per_epoch
    return training.lr * _shape(training, step, total) * (min(1.0, (step + 1) / rising) if rising else 1.0)


def _shape(training: Training, step: int, total: int) -> float:
    """What the schedule makes of a peak rate of 1 at ``step`` of ``total``."""
    fraction = step / total
    if training.schedule == "constant":
        return 1.0
    if training.schedule == "step":
        # rounded: 0.07 of 100 steps is 7 of them, not the first beyond 7.000000000000001
        return training.gamma ** sum(step >= round(milestone * total) for milestone in training.milestones)
    rise = 0.3 if training.schedule == "one-cycle" else 0.0
    if fraction < rise:
        return 1 / 25 + (1 - 1 / 25) * (1 - math.cos(math.pi * fraction / rise)) / 2
    return (1 + math.cos(math.pi * (fraction - rise) / (1 - rise))) / 2
