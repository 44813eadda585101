"""What training makes small: a loss of the model on a batch, and the mixing of examples (mixup) that may go before.

Shapes: ``B`` examples of a batch, ``K`` classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from secateur.errors import BadRequest
from secateur.graph import as_arguments

Objective = Callable[[nn.Module, Any, Tensor], tuple[Tensor, Tensor]]
"""``(model, inputs, targets)`` to the mean loss over the batch, a scalar, and the class scores ``[B, K]``. It calls the
model itself. ``targets`` are ``[B]`` int64, or ``[B, K]`` probabilities under mixup."""


def cross_entropy(label_smoothing: float = 0.0) -> Objective:
    """The usual objective. Raises BadRequest where the model's output is not ``[B, K]`` or a target is no class of it.

    Targets that are on a GPU are looked at on the first call only, since looking is waiting for it.
    """
    looked = False

    def objective(model: nn.Module, inputs: Any, targets: Tensor) -> tuple[Tensor, Tensor]:
        nonlocal looked
        args, kwargs = as_arguments(inputs)
        scores = model(*args, **kwargs)
        _check_scores(scores, targets)
        if targets.device.type == "cpu" or not looked:
            check_targets(targets, scores.shape[1])
            looked = True
        # in float32 whatever the precision: a sum of exponentials is the last place to save bits
        scores = scores if scores.dtype == torch.float64 else scores.float()
        targets = targets.long() if targets.ndim == 1 else targets
        return nn.functional.cross_entropy(scores, targets, label_smoothing=label_smoothing), scores

    return objective


def mix(inputs: Any, targets: Tensor, classes: int, *, alpha: float, seed: tuple[int, ...]) -> tuple[Any, Tensor]:
    """Each example and its target mixed with another of the batch (mixup, Zhang et al. 2018, section 2).

    ``x' = w x_i + (1 - w) x_j`` with one ``w`` from Beta(alpha, alpha) and a permutation for the batch, both fixed by
    ``seed`` alone. Returns the inputs and targets ``[B, K]`` of probabilities.
    """
    draw = np.random.default_rng(seed)
    weight = float(draw.beta(alpha, alpha))
    order = torch.from_numpy(draw.permutation(len(targets)))

    def mixed(value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_floating_point() and len(value) == len(order):
            return torch.lerp(value[order.to(value.device)], value, weight)
        return value

    if targets.ndim == 1:
        targets = nn.functional.one_hot(targets.long(), classes).to(torch.float32)
    if isinstance(inputs, Mapping):
        return {name: mixed(value) for name, value in inputs.items()}, mixed(targets)
    if isinstance(inputs, (tuple, list)):
        return tuple(mixed(value) for value in inputs), mixed(targets)
    return mixed(inputs), mixed(targets)


def right(scores: Tensor, targets: Tensor) -> Tensor:
    """How many examples score highest in their class, a scalar; with probabilities for targets, the sum of those."""
    best = scores.detach().argmax(1)
    if targets.ndim == 1:
        return (best == targets).sum()
    return targets.gather(1, best[:, None]).sum()


def check_targets(targets: Tensor, classes: int) -> None:
    """Raises BadRequest where a target ``[B]`` is no index of so many classes (an index error otherwise, and on a GPU
    the end of the process)."""
    if targets.ndim == 2 and targets.shape[1] == classes:
        return
    if targets.ndim != 1 or targets.is_floating_point() or targets.dtype == torch.bool:
        raise BadRequest(
            f"targets are {targets.dtype} {list(targets.shape)}, but the model scores {classes} classes\n"
            "  do: pass int64 class indices [B], or an objective of your own"
        )
    low, high = torch.aminmax(targets)
    if int(low) < 0 or int(high) >= classes:
        wrong = int(low) if int(low) < 0 else int(high)
        raise BadRequest(
            f"target {wrong} is out of range: the model scores {classes} classes, numbered from 0 to {classes - 1}\n"
            "  do: check the labels, or build the model with as many classes as the data have"
        )


def _check_scores(scores: object, targets: Tensor) -> None:
    if isinstance(scores, Tensor) and scores.ndim == 2 and len(scores) == len(targets):
        return
    shape = list(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
    raise BadRequest(
        f"training needs class scores [B, K] for {len(targets)} targets, but the model returns {shape}\n"
        "  do: pass objective=, which returns a loss and scores for what this model returns"
    )
