"""From the name of a set to its parts: read, validation held out, limited, in loaders."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from secateur.zoo.data.cifar import open_cifar
from secateur.zoo.data.folders import open_folder, open_imagenet
from secateur.zoo.data.grey import open_digits, open_fashion
from secateur.zoo.data.images import Images
from secateur.zoo.data.imported import open_imported
from secateur.zoo.data.loaders import Data, Loader
from secateur.zoo.data.parts import Parts
from secateur.zoo.data.randomness import generator
from secateur.zoo.data.settings import NAMES, DataSettings, check_settings
from secateur.zoo.data.splits import hold_out, limit_to

READERS: Mapping[str, Callable[[DataSettings, int], Parts]] = {
    "digits": open_digits,
    "fashion-mnist": open_fashion,
    "cifar10": open_cifar,
    "cifar100": open_cifar,
    "imagenet": open_imagenet,
}
assert tuple(READERS) == NAMES


def open_data(settings: DataSettings | str, *, seed: int = 0, allow_import: bool = False) -> Data:
    """The parts of a set of labelled images; a name alone means that set with the default settings.

    ``seed`` fixes the order of every epoch, augmentation, and which images ``limit`` leaves; which images are held out
    for validation, or for test where a set has no test images of its own, never changes: choose ratios and epochs on
    ``validation`` and nothing on ``test``. ``allow_import=True`` lets ``package.module:function`` import code.
    Nothing is downloaded.

    Raises BadRequest for settings that mean nothing or contradict the set, MissingData where its files are not found,
    BadData where they are damaged, MissingExtra where a library is needed that is not installed.
    """
    if isinstance(settings, str):
        settings = DataSettings(settings)
    check_settings(settings)
    if settings.name in READERS:
        parts = READERS[settings.name](settings, seed)
    elif settings.name.startswith("folder:"):
        parts = open_folder(settings, seed)
    else:
        made = open_imported(settings, seed, allow_import=allow_import)
        if isinstance(made, Data):
            return made
        parts = made
    return _loaded(settings, parts, seed)


def _loaded(settings: DataSettings, parts: Parts, seed: int) -> Data:
    images, members = parts.train
    validation = parts.validation
    if validation is None:
        held, rest = hold_out(images.labels[members], settings.validation, settings.name)
        validation, members = (images, members[held]), members[rest]
    members = members[limit_to(images.labels[members], settings.limit, seed)]

    def loader(of: tuple[Images, Tensor], training: bool = False) -> Loader:
        return Loader(of[0], of[1], batch=settings.batch, training=training, seed=seed, workers=settings.workers)

    train = loader((images, members), training=True)
    shuffled = members[torch.randperm(len(members), generator=generator(seed, "calibration"))]
    normalise = images.normalise
    return Data(
        name=settings.name,
        classes=parts.classes,
        shape=parts.shape,
        train=train,
        validation=loader(validation),
        test=loader(parts.test),
        calibration=loader((images, shuffled[: len(train) * settings.batch])),
        mean=() if normalise is None else normalise.mean,
        std=() if normalise is None else normalise.std,
    )
