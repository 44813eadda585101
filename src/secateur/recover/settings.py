"""How to train, as plain data: what a recipe's ``train:`` and ``finetune:`` sections hold."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Literal

from secateur.errors import BadRequest, nearest

OPTIMIZERS = ("sgd", "adamw")
SCHEDULES = ("cosine", "one-cycle", "step", "constant")
PRECISIONS = ("fp32", "bf16", "fp16")
KEEPS = ("best", "last")


@dataclass(frozen=True)
class Training:
    """How to train. ``lr`` is the peak rate; ``schedule`` runs over all steps of ``epochs``:

    - ``cosine`` from ``lr`` to 0; ``one-cycle`` up from ``lr`` / 25 over the first 30 % and down to 0 (both by cosine);
      ``step`` multiplies by ``gamma`` at each of ``milestones`` (fractions of all steps); ``constant``.
    - ``warmup``: over so many epochs the rate rises linearly to what the schedule says.
    - ``rewind``: train only the last so many epochs of the schedule (learning-rate rewinding, Renda et al. 2020);
      None: all ``epochs``.

    ``optimizer="sgd"`` has Nesterov's ``momentum`` (plain where that is 0); ``"adamw"`` uses ``momentum`` as its first
    beta. ``weight_decay`` spares biases and norms (every parameter of one axis) unless ``decay_norms``. ``mixup`` is
    the parameter of its Beta distribution (Zhang et al. 2018), 0 for none. ``clip`` bounds the gradient's norm.
    ``accumulate`` batches make one step. ``ema`` is the decay of an exponential moving average of the weights; where it
    is set, the average is what is evaluated and kept. ``freeze_norms`` leaves batch norm in eval mode (its weight and
    bias still learn). ``keep="best"`` ends with the weights of the epoch that evaluated highest (the earliest of
    equals), ``"last"`` with those of the last. ``seed`` fixes the order of data, augmentation, dropout and mixup.
    """

    epochs: int = 10
    lr: float = 0.1
    optimizer: Literal["sgd", "adamw"] = "sgd"
    momentum: float = 0.9
    weight_decay: float = 5e-4
    decay_norms: bool = False
    schedule: Literal["cosine", "one-cycle", "step", "constant"] = "cosine"
    milestones: tuple[float, ...] = (0.5, 0.75)
    gamma: float = 0.1
    warmup: float = 0.0
    rewind: int | None = None
    label_smoothing: float = 0.0
    mixup: float = 0.0
    clip: float | None = None
    accumulate: int = 1
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    ema: float | None = None
    freeze_norms: bool = False
    keep: Literal["best", "last"] = "last"
    seed: int = 0


def check_training(training: Training) -> None:
    """Raises BadRequest for the first setting that is out of range or misspelt."""
    t = training
    epochs = t.epochs if _whole(t.epochs, 1) else 0
    for name, value, known in (
        ("optimizer", t.optimizer, OPTIMIZERS),
        ("schedule", t.schedule, SCHEDULES),
        ("precision", t.precision, PRECISIONS),
        ("keep", t.keep, KEEPS),
    ):
        if value not in known:
            raise BadRequest(f"training: unknown {name} {value!r}{nearest(str(value), known)}")
    rules: tuple[tuple[str, bool, str], ...] = (
        ("epochs", _whole(t.epochs, 1), "a whole number, at least 1"),
        ("lr", _number(t.lr) and t.lr > 0, "a number above 0"),
        ("momentum", _number(t.momentum) and 0 <= t.momentum < 1, "in [0, 1)"),
        ("weight_decay", _number(t.weight_decay) and t.weight_decay >= 0, "at least 0"),
        ("milestones", _rising(t.milestones), "fractions of all steps in (0, 1), rising"),
        ("gamma", _number(t.gamma) and 0 < t.gamma <= 1, "in (0, 1]"),
        ("warmup", _number(t.warmup) and 0 <= t.warmup <= epochs, "epochs, from 0 to all of them"),
        ("rewind", t.rewind is None or (_whole(t.rewind, 1) and t.rewind <= epochs), "from 1 to epochs, or None"),
        ("label_smoothing", _number(t.label_smoothing) and 0 <= t.label_smoothing < 1, "in [0, 1)"),
        ("mixup", _number(t.mixup) and t.mixup >= 0, "at least 0; 0 is none, 0.2 is usual"),
        ("clip", t.clip is None or (_number(t.clip) and t.clip > 0), "above 0, or None"),
        ("accumulate", _whole(t.accumulate, 1), "a whole number of batches, at least 1"),
        ("ema", t.ema is None or (_number(t.ema) and 0 < t.ema < 1), "in (0, 1), or None; 0.999 is usual"),
        ("seed", _whole(t.seed, 0) and t.seed < 2**63, "a whole number, at least 0"),
    )
    for name, right, wanted in rules:
        if not right:
            raise BadRequest(f"cannot train with {name}={getattr(t, name)!r}\n  do: {name} is {wanted}")


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _whole(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _rising(values: object) -> bool:
    if not isinstance(values, (tuple, list)) or not all(_number(value) for value in values):
        return False
    ends = [0.0, *values, 1.0]
    return all(a < b for a, b in itertools.pairwise(ends))
