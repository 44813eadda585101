"""What the reader of a set hands over, before anything is held out of it; and how sets that lie in memory become that.

Shapes: ``N`` images, ``C`` channels, ``H`` and ``W`` height and width.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from secateur.errors import BadData, MissingData
from secateur.zoo.data.images import Images, Normalisation, resized, shift_for
from secateur.zoo.data.settings import DataSettings

Moments = tuple[tuple[float, ...], tuple[float, ...]]
"""Mean and standard deviation of each channel, pixels between 0 and 1."""


@dataclass(frozen=True, eq=False)
class Parts:
    """Images to train on and the set's own test images, each with the places ``[N]`` that belong to that part.

    ``validation``: where the set brings its own; None: some of the training images are to be held out.
    """

    classes: tuple[str, ...]
    shape: tuple[int, int, int]
    train: tuple[Images, Tensor]
    test: tuple[Images, Tensor]
    validation: tuple[Images, Tensor] | None = None


def everything(images: Images) -> tuple[Images, Tensor]:
    """All of ``images``."""
    return images, torch.arange(len(images.labels))


def in_memory(
    settings: DataSettings,
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    *,
    classes: tuple[str, ...],
    moments: Moments,
    seed: int,
) -> Parts:
    """Parts of images ``[N, C, H, W]`` as bytes with labels ``[N]``, mirrored and shifted where augmented."""
    own = train[0].shape[1]
    channels = settings.channels or own
    mean, std = moments
    normalise = Normalisation(mean, std, channels)
    pixels = resized(train[0], settings.size)
    shift = None
    if settings.augment == "standard":
        shift = shift_for(pixels.shape[-1], len(pixels), seed=seed, flip=True)
    return Parts(
        classes=classes,
        shape=(channels, *pixels.shape[-2:]),
        train=everything(Images(pixels, train[1], normalise, shift)),
        test=everything(Images(resized(test[0], settings.size), test[1], normalise)),
    )


def root_of(settings: DataSettings) -> Path:
    """The folder in which a set's files are looked for."""
    return Path("data" if settings.root is None else settings.root).expanduser()


def missing(name: str, looked: Iterable[Path], do: str) -> MissingData:
    """The error for a set that is nowhere: where it was looked for, and how to get it."""
    places = "".join(f"\n  looked for {path.absolute()}" for path in looked)
    return MissingData(f"the images of {name} were not found{places}\n  do: {do}")


def checked_labels(labels: Tensor, classes: int, where: str) -> Tensor:
    """``labels`` ``[N]`` as int64, or BadData where one is not that of a class."""
    labels = labels.long()
    wrong = ((labels < 0) | (labels >= classes)).nonzero()[:, 0]
    if len(wrong):
        first = int(wrong[0])
        raise BadData(
            f"{where}: sample {first} has the label {int(labels[first])}, but there are {classes} classes, "
            f"0 to {classes - 1}\n  do: get the file anew; it is damaged or of another set"
        )
    return labels
