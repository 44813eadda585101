"""A small, honest training loop: SGD with momentum under a schedule, cross-entropy, the best or the last weights.

It is enough to train a network on a small set of images and to fine-tune a pruned one, and it is no more than that:
your own loop is as good, since a pruned network is an ordinary module. "Best" is chosen on the evaluation you pass,
which must therefore not be the test set.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sized
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from secateur.core import Evaluate
from secateur.errors import BadRequest, nearest

SCHEDULES = ("cosine", "one-cycle", "constant")


@dataclass(frozen=True)
class Recipe:
    """How to train. ``lr`` is the peak rate. Schedules run over all steps: ``cosine`` from ``lr`` to 0, ``one-cycle``
    up from ``lr`` / 25 over the first 30 % and down to 0 (both by cosine), ``constant``.

    ``weight_decay`` spares biases and norms (every parameter of one axis). ``clip`` bounds the gradient's norm.
    ``keep="best"`` ends with the weights of the epoch that evaluated highest (the earliest of equals), ``"last"`` with
    those of the last. ``seed`` fixes dropout and whatever the data draws from torch's generator.
    """

    epochs: int = 10
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    schedule: Literal["cosine", "one-cycle", "constant"] = "cosine"
    label_smoothing: float = 0.0
    clip: float | None = None
    keep: Literal["best", "last"] = "last"
    seed: int = 0


@dataclass(frozen=True)
class Epoch:
    """One epoch: mean training loss and accuracy (in train mode, while learning), and what ``evaluate`` said."""

    number: int
    loss: float
    train_accuracy: float
    score: float | None = None


Progress = Callable[[int, int, float], None]
"""Called after each step with (steps done, steps in all, loss of this batch)."""


def fit_(
    model: nn.Module,
    data: Iterable[Any],
    recipe: Recipe | None = None,
    *,
    evaluate: Evaluate | None = None,
    progress: Progress | None = None,
) -> list[Epoch]:
    """Trains ``model`` in place and returns what each epoch gave; the model is left in eval mode.

    ``data``: re-iterable, read once an epoch, of ``(inputs [B, ...], targets [B])``; the model returns scores
    ``[B, K]``. torch's global random state is left as it was found. Interrupted (Ctrl-C), it leaves the weights as
    they are.

    Raises BadRequest for settings out of range, ``keep="best"`` without ``evaluate``, data that is empty or can be
    read only once, and a loss that is no longer finite.
    """
    recipe = recipe or Recipe()
    _check(recipe, data, evaluate)
    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed)
        return _fit(model, data, recipe, evaluate, progress)


def _fit(
    model: nn.Module, data: Iterable[Any], recipe: Recipe, evaluate: Evaluate | None, progress: Progress | None
) -> list[Epoch]:
    steps = recipe.epochs * _length(data)
    optimizer = torch.optim.SGD(
        parameter_groups(model, recipe.weight_decay), lr=recipe.lr, momentum=recipe.momentum, nesterov=True
    )
    history: list[Epoch] = []
    best: tuple[float, dict[str, torch.Tensor]] | None = None
    done = 0
    for number in range(1, recipe.epochs + 1):
        model.train()
        loss_sum, right, seen = 0.0, 0, 0
        for inputs, targets in data:
            for group in optimizer.param_groups:
                group["lr"] = rate(recipe, done / steps)
            scores = model(inputs)
            loss = nn.functional.cross_entropy(scores, targets, label_smoothing=recipe.label_smoothing)
            if not math.isfinite(loss.item()):
                raise BadRequest(f"the loss is {loss.item()} at step {done + 1}\n  do: lower lr, or set clip=1.0")
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            if recipe.clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
            optimizer.step()
            done += 1
            loss_sum += loss.item() * len(targets)
            right += int((scores.detach().argmax(1) == targets).sum())
            seen += len(targets)
            if progress is not None:
                progress(done, steps, loss.item())
        model.eval()
        score = None if evaluate is None else float(evaluate(model))
        history.append(Epoch(number, loss_sum / seen, right / seen, score))
        if recipe.keep == "best" and score is not None and (best is None or score > best[0]):
            best = score, {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if best is not None:
        model.load_state_dict(best[1])
    return history


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameters that learn, in two groups: those that decay, and those of one axis (biases, norms), which do not."""
    learning = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in learning if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in learning if p.ndim <= 1], "weight_decay": 0.0},
    ]


def rate(recipe: Recipe, fraction: float) -> float:
    """The learning rate at ``fraction`` (0 to 1) of all steps."""
    if recipe.schedule == "constant":
        return recipe.lr
    rise = 0.3 if recipe.schedule == "one-cycle" else 0.0
    if fraction < rise:
        low = recipe.lr / 25
        return low + (recipe.lr - low) * (1 - math.cos(math.pi * fraction / rise)) / 2
    return recipe.lr * (1 + math.cos(math.pi * (fraction - rise) / (1 - rise))) / 2


def _check(recipe: Recipe, data: Iterable[Any], evaluate: Evaluate | None) -> None:
    if recipe.epochs < 1 or recipe.lr <= 0 or not 0 <= recipe.label_smoothing < 1:
        raise BadRequest(
            f"cannot train with epochs={recipe.epochs}, lr={recipe.lr}, label_smoothing={recipe.label_smoothing}\n"
            "  do: epochs at least 1, lr above 0, label_smoothing in [0, 1)"
        )
    if recipe.schedule not in SCHEDULES:
        raise BadRequest(f"unknown schedule {recipe.schedule!r}{nearest(recipe.schedule, SCHEDULES)}")
    if recipe.keep == "best" and evaluate is None:
        raise BadRequest("keep='best' has nothing to choose by\n  do: pass evaluate=, a function of the model")
    if iter(data) is data:
        raise BadRequest("data can be read only once, and training reads it every epoch\n  do: pass a DataLoader")


def _length(data: Iterable[Any]) -> int:
    steps = len(data) if isinstance(data, Sized) else sum(1 for _ in data)
    if not steps:
        raise BadRequest("there is nothing to train on: data has no batches")
    return steps
