"""Drawing samples in proportion of their classes: the validation part, a test part where a set has none, a limit.

Shapes: ``N`` samples, ``K`` classes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from secateur.errors import BadRequest
from secateur.zoo.data.randomness import generator

FIXED = 0
"""The seed of every split into parts: who belongs to which part never changes with the seed of a run."""


def draw_in_proportion(labels: Tensor, count: int, seed: int, *, of_each: bool = False) -> tuple[Tensor, Tensor]:
    """``count`` positions into ``labels`` ``[N]``, every class in proportion, and all other positions, both ascending.

    Each class gives the whole part of its share; what is left to give goes to the largest remainders, of equal ones to
    the lower class. No class gives its last sample unless all are drawn. Within a class the draw is by ``seed``.

    ``of_each``: every class gives one sample at least, the last one too; those that have most above their share give
    the fewer for it. There must be as many to draw as classes.
    """
    sizes = torch.bincount(labels) if len(labels) else torch.zeros(0, dtype=torch.int64)
    if count >= len(labels):
        return torch.arange(len(labels)), torch.arange(0)
    most = (sizes - 1).clamp(min=0)
    shares = sizes.double() * count / len(labels)
    taken = shares.floor().long().minimum(most)
    order = torch.argsort(shares - taken, descending=True, stable=True).tolist()
    while (left := count - int(taken.sum())) > 0:
        open_ = [k for k in order if taken[k] < most[k]] or [k for k in order if taken[k] < sizes[k]]
        for k in open_[:left]:
            taken[k] += 1
    if of_each:
        for k in ((taken == 0) & (sizes > 0)).nonzero()[:, 0].tolist():
            spare = (taken - shares).masked_fill(taken < 2, -math.inf)
            taken[int(spare.argmax())] -= 1
            taken[k] = 1
    shuffled = torch.randperm(len(labels), generator=generator(seed, "draw"))
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    for k in range(len(sizes)):
        own = shuffled[labels[shuffled] == k]
        chosen[own[: int(taken[k])]] = True
    return chosen.nonzero()[:, 0], (~chosen).nonzero()[:, 0]


def hold_out(labels: Tensor, validation: float, name: str) -> tuple[Tensor, Tensor]:
    """Positions ``(validation, training)``; see ``DataSettings.validation``. The same whatever the seed of the run.

    Raises BadRequest where validation would leave no image of some class to train on, or takes none at all.
    """
    total, classes = len(labels), int((torch.bincount(labels) > 0).sum())
    count = validation if isinstance(validation, int) else math.floor(total * validation + 0.5)
    if validation and not count:
        raise BadRequest(
            f"validation={validation!r} of {name}'s {total} training images is not a single one\n"
            "  do: choose a larger fraction, or a whole number of images"
        )
    if count > total - classes:
        raise BadRequest(
            f"validation={validation!r} is too large: {name} has {total} training images of {classes} classes, "
            f"and one of each class must stay to train on\n  do: hold out at most {total - classes}"
        )
    return draw_in_proportion(labels, count, FIXED)


def limit_to(labels: Tensor, limit: int | None, seed: int) -> Tensor:
    """Positions of at most ``limit`` samples, in proportion of the classes, but at least one of each, by ``seed``; all
    of them for None.

    Raises BadRequest where there are fewer than classes.
    """
    classes = int((torch.bincount(labels) > 0).sum())
    if limit is None or limit >= len(labels):
        return torch.arange(len(labels))
    if limit < classes:
        raise BadRequest(
            f"limit={limit} is too small: there are {classes} classes to train on\n"
            f"  do: choose at least {classes}, better a hundred times as many"
        )
    return draw_in_proportion(labels, limit, seed, of_each=True)[0]
