"""How to train, as plain data: what a recipe's ``train:`` and ``finetune:`` sections hold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

OPTIMIZERS = ("sgd", "adamw")
SCHEDULES = ("cosine", "one-cycle", "step", "constant")
PRECISIONS = ("fp32", "bf16", "fp16")


@dataclass(frozen=True)
class Training:
    """How to train. ``lr`` is the peak rate; ``schedule`` runs over all steps of ``epochs``:

    - ``cosine`` from ``lr`` to 0; ``one-cycle`` up from ``lr`` / 25 over the first 30 % and down to 0 (both by cosine);
      ``step`` multiplies by ``gamma`` at each of ``milestones`` (fractions of all steps); ``constant``.
    - ``warmup``: over so many epochs the rate rises linearly to what the schedule says.
    - ``rewind``: train only the last so many epochs of the schedule (learning-rate rewinding, Renda et al. 2020);
      None: all ``epochs``.

    ``weight_decay`` spares biases and norms (every parameter of one axis) unless ``decay_norms``. ``mixup`` is the
    parameter of its Beta distribution (Zhang et al. 2018), 0 for none. ``clip`` bounds the gradient's norm.
    ``accumulate`` batches make one step. ``ema`` is the decay of an exponential moving average of the weights; where it
    is set, the average is what is evaluated and kept. ``freeze_norms`` leaves batch norm in eval mode. ``keep="best"``
    ends with the weights of the epoch that evaluated highest (the earliest of equals), ``"last"`` with those of the
    last. ``seed`` fixes the order of data, augmentation, dropout and mixup.
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
