"""Datasets that a function of the user's returns: ``package.module:function``.

The function is called without arguments and returns ``(train, test)``, two map-style datasets of ``(image, label)`` as
torchvision's are, or a ``Data``. An image is

- a PIL image or a uint8 tensor ``[C, H, W]``: augmented and normalised here, by the mean and deviation of (at most
  2,000 of) the training images. Without ``size`` all must be of one size and are shifted and mirrored as CIFAR's are;
  with it they are treated as images in folders are;
- a float tensor ``[C, H, W]``: taken as it is, augmented and normalised by its dataset, if at all. Validation and
  calibration images then come augmented as well, for they are training images.

What a dataset draws from torch's, NumPy's and Python's generators is fixed by (seed, epoch, index), as everything here.
"""

from __future__ import annotations

from collections.abc import Sized
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from secateur.errors import BadData, BadRequest, SecateurError
from secateur.zoo.data.folders import fitted, need_torchvision
from secateur.zoo.data.images import Images, Normalisation, moments, shift_for
from secateur.zoo.data.loaders import Data
from secateur.zoo.data.parts import Parts, everything
from secateur.zoo.data.randomness import generator, preserved, seed_all_
from secateur.zoo.data.settings import DataSettings
from secateur.zoo.names import imported_function

if TYPE_CHECKING:
    from PIL import Image

SAMPLE = 2000


@dataclass(frozen=True, eq=False)
class Dataset:
    """The images of a dataset of the user's, one by one. ``first``: what all must resemble, None: not yet known."""

    items: Any
    name: str
    size: int | None
    seed: int
    augment: bool
    first: Tensor | None = None

    def __call__(self, index: int, epoch: int | None) -> Tensor:
        image = self.image(index, epoch)
        if self.size is not None:
            image = fitted(image, self.size, epoch if self.augment else None, seed=self.seed, index=index)
        elif not isinstance(image, Tensor):
            image = _as_tensor(image)
        first = self.first
        if first is not None and image.shape != first.shape:
            raise BadData(
                f"{self.name}: the image {index} is {list(image.shape)}, the first one {list(first.shape)}\n"
                "  do: set size, and all are scaled to it; convert grey and coloured images to one kind"
            )
        if first is not None and image.dtype != first.dtype:
            raise BadData(
                f"{self.name}: the image {index} is {image.dtype}, the first one to train on is {first.dtype}\n"
                "  do: return images of one kind, to train and to test"
            )
        return image

    def image(self, index: int, epoch: int | None) -> Any:
        """The image as the dataset gives it, in RGB or grey where it is a PIL image."""
        image, _ = self.item(index, epoch)
        if _is_pil(image):
            return image if image.mode == "L" else image.convert("RGB")
        if isinstance(image, Tensor) and image.ndim == 3 and (image.dtype == torch.uint8 or image.is_floating_point()):
            return image
        what = f"{image.dtype} {list(image.shape)}" if isinstance(image, Tensor) else type(image).__name__
        raise BadData(
            f"{self.name}: the image {index} is {what}\n"
            "  do: return PIL images, or tensors [C, H, W] of uint8 or floating point"
        )

    def item(self, index: int, epoch: int | None) -> tuple[Any, Any]:
        """The pair (image, label) as the dataset gives it; call it inside ``preserved``."""
        try:
            seed_all_(self.seed, "dataset", "plain" if epoch is None else epoch, index)
            item = self.items[index]
        except SecateurError:
            raise
        except Exception as error:
            raise BadData(f"{self.name}: reading item {index} raised {type(error).__name__}: {error}") from error
        if not isinstance(item, (tuple, list)) or len(item) != 2:
            raise BadData(f"{self.name}: item {index} is {type(item).__name__}, not a pair (image, label)")
        return item[0], item[1]


def open_imported(settings: DataSettings, seed: int, *, allow_import: bool) -> Parts | Data:
    """What the function returns, as parts; a ``Data`` as it is.

    Raises BadRequest where importing is not allowed or the function is not there, fails, or returns anything else;
    BadData for labels that are no classes.
    """
    name = settings.name
    if not allow_import:
        raise BadRequest(
            f"{name!r} would import code, which is not allowed here (allow_import=False)\n"
            "  do: allow the import if you trust where the name comes from"
        )
    if settings.channels is not None:
        raise BadRequest(f"channels={settings.channels}: {name} decides on its channels itself\n  do: leave it out")
    try:
        made = imported_function(name)()
    except SecateurError:
        raise
    except Exception as error:
        raise BadRequest(f"calling {name}() raised {type(error).__name__}: {error}") from error
    if isinstance(made, Data):
        return made
    pair = made if isinstance(made, (tuple, list)) and len(made) == 2 else ()
    if not pair or not all(isinstance(part, Sized) and hasattr(part, "__getitem__") for part in pair):
        raise BadRequest(
            f"{name} returned {type(made).__name__}, not (train, test), two datasets with a length and items\n"
            "  do: return two map-style datasets of (image, label), or a secateur.zoo.data.Data"
        )
    if settings.size is not None:
        need_torchvision()
    with preserved():
        return _parts(settings, seed, pair)


def _parts(settings: DataSettings, seed: int, pair: Any) -> Parts:
    augment = settings.augment == "standard"
    train, test = (
        Dataset(items, f"{settings.name}, {part}", settings.size, seed, augment)
        for items, part in zip(pair, ("train", "test"), strict=True)
    )
    labels = [_labels(train), _labels(test)]
    classes = _classes(pair[0], labels, settings.name)
    first = train(0, None)
    shape = (int(first.shape[0]), int(first.shape[1]), int(first.shape[2]))
    train, test = (replace(d, first=first) for d in (train, test))
    normalise = shift = None
    if first.dtype == torch.uint8:
        chosen = torch.randperm(len(labels[0]), generator=generator("moments"))[:SAMPLE]
        measured = moments(lambda part: torch.stack([train(index, None) for index in part.tolist()]), chosen)
        normalise = Normalisation(*measured, shape[0])
        if augment and settings.size is None:
            shift = shift_for(max(shape[1:]), len(labels[0]), seed=seed, flip=True)
    elif settings.size is not None:
        raise BadRequest(
            f"size={settings.size}: the images of {settings.name} are floats, which are taken as they are\n"
            "  do: leave size out, or return PIL images"
        )
    return Parts(
        classes,
        shape,
        everything(Images(train, labels[0], normalise, shift)),
        everything(Images(test, labels[1], normalise)),
    )


def _labels(data: Dataset) -> Tensor:
    """Every label ``[N]``: the dataset's ``targets`` or ``labels`` where it has them, else by reading all items."""
    count = len(data.items)
    if not count:
        raise BadData(f"{data.name} is empty")
    listed = getattr(data.items, "targets", getattr(data.items, "labels", None))
    if not isinstance(listed, (list, tuple, Tensor, np.ndarray)) or len(listed) != count:
        listed = [data.item(index, None)[1] for index in range(count)]
    try:
        labels = torch.tensor([int(label) for label in listed])
    except (TypeError, ValueError, RuntimeError) as error:
        raise BadData(f"{data.name}: a label is no whole number: {error}") from error
    if int(labels.min()) < 0:
        raise BadData(f"{data.name}: sample {int(labels.argmin())} has the label {int(labels.min())}, below 0")
    return labels


def _classes(items: Any, labels: list[Tensor], name: str) -> tuple[str, ...]:
    named = getattr(items, "classes", None)
    highest = [int(part.max()) for part in labels]
    if isinstance(named, (list, tuple)):
        if max(highest) >= len(named):
            raise BadData(f"{name}: there is a label {max(highest)}, but there are {len(named)} classes")
        return tuple(str(each) for each in named)
    if highest[1] > highest[0]:
        raise BadData(f"{name}: the test images have a label {highest[1]}, the training images none above {highest[0]}")
    return tuple(str(number) for number in range(highest[0] + 1))


def _is_pil(image: object) -> bool:
    """Whether it is a PIL image; without importing PIL, which is not there where nobody uses it."""
    return any(kind.__module__ == "PIL.Image" for kind in type(image).__mro__)


def _as_tensor(image: Image.Image) -> Tensor:
    """A PIL image as ``[C, H, W]`` bytes."""
    pixels = torch.from_numpy(np.array(image))
    return pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1).contiguous()
