"""Which data, and how they are read: what a recipe's ``data:`` section holds."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from secateur import processes
from secateur.errors import BadRequest, nearest

NAMES = ("digits", "fashion-mnist", "cifar10", "cifar100", "imagenet")
"""The sets that are known by name; ``folder:PATH`` and ``package.module:function`` stand for any other."""

FORMS = "'folder:PATH' or 'package.module:function'"
AUGMENT = ("standard", "none")
IMPORTED = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")


@dataclass(frozen=True)
class DataSettings:
    """Which data, and how they are read.

    ``name``: one of ``NAMES``, ``folder:PATH`` or ``package.module:function``. ``root``: the folder in which the set's
    files are looked for; None: ``data`` in the current one, and where the system keeps them. ``batch``: images in a
    batch over all processes together. ``validation``: how much of the training images is held out, a fraction below 1
    or a whole number of images; 0 for none, and then nothing may be chosen by it. ``augment``: ``standard`` is what the
    literature does to that set, see ``secateur.zoo.data.images`` and ``folders``. ``size``: the height and width of an
    input in pixels, None for the set's own (16 for the digits, 224 for folders). ``channels``: 3 repeats the grey
    images of digits and fashion-mnist in three equal channels. ``limit``: train on at most so many images, drawn in
    proportion of the classes by the seed. ``workers``: processes that read ahead, per training process; 0 reads in the
    training process itself, which is as quick for the sets that lie in memory.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    name: str
    root: str | Path | None = None
    batch: int = 128
    validation: int | float = 0.1
    augment: Literal["standard", "none"] = "standard"
    size: int | None = None
    channels: int | None = None
    limit: int | None = None
    workers: int = 0


def check_settings(settings: DataSettings) -> None:
    """Raises BadRequest for a name that means nothing or a value out of range."""
    name, batch = settings.name, settings.batch
    if name not in NAMES and not name.startswith("folder:") and not IMPORTED.fullmatch(name):
        hint = nearest(name.lower(), NAMES)
        raise BadRequest(f"there is no data set {name!r}{hint}\n  do: write one of {', '.join(NAMES)}, {FORMS}")
    if settings.augment not in AUGMENT:
        raise BadRequest(f"augment={settings.augment!r} means nothing{nearest(str(settings.augment), AUGMENT)}")
    for key, least in (("batch", 1), ("size", 1), ("channels", 1), ("limit", 1), ("workers", 0)):
        value = getattr(settings, key)
        if value is None and key in ("size", "channels", "limit"):
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise BadRequest(f"{key}={value!r}: it must be a whole number of at least {least}")
    held = settings.validation
    if isinstance(held, bool) or not isinstance(held, (int, float)) or not held >= 0:
        raise BadRequest(f"validation={held!r}: it must be a fraction below 1 or a whole number of images")
    if isinstance(held, float) and held >= 1:
        raise BadRequest(
            f"validation={held!r} is too large: as a fraction it must lie below 1\n"
            "  do: write a whole number, such as 5000, to hold out so many images"
        )
    check_batch(batch)


def check_batch(batch: int) -> None:
    """Raises BadRequest where a batch cannot be shared evenly between the processes."""
    if batch % processes.world():
        raise BadRequest(
            f"batch={batch} is shared by {processes.world()} processes, of which each must get equally many images\n"
            f"  do: choose a multiple of {processes.world()}"
        )


def refuse_channels(settings: DataSettings, own: int) -> None:
    """Raises BadRequest where other channels are asked for than colour images have."""
    if settings.channels not in (None, own):
        raise BadRequest(
            f"channels={settings.channels}: the images of {settings.name} have {own}\n"
            "  do: leave channels out; only the grey images of digits and fashion-mnist can be repeated to 3"
        )
