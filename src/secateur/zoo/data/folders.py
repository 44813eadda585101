"""Images in folders, one folder for a class: ImageNet's layout, and anybody's.

To train: a window of 8 to 100 % of the area, of a shape between 3:4 and 4:3, scaled to the input's size, every other
one mirrored (Szegedy et al. 2015, section 6; torchvision's v2 ``RandomResizedCrop`` and ``RandomHorizontalFlip``). Not
augmented: the shorter side scaled to 256/224 of the input's size and the middle cut out (He et al. 2016, section 3.4).
Normalised by ImageNet's mean and deviation, whatever the images are: networks with published weights expect them.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from secateur.errors import BadData, BadRequest, MissingData, MissingExtra
from secateur.zoo.data.images import Images, Normalisation
from secateur.zoo.data.parts import Moments, Parts, everything, root_of
from secateur.zoo.data.randomness import seed_all_
from secateur.zoo.data.settings import DataSettings, refuse_channels
from secateur.zoo.data.splits import FIXED, draw_in_proportion
from secateur.zoo.torchvision_shim import import_torchvision

if TYPE_CHECKING:
    from PIL import Image

SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
IMAGENET_MOMENTS: Moments = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""Mean and deviation over ImageNet's training images, as torchvision's weights were trained with."""
VALIDATION, TEST = ("val", "valid", "validation"), ("test",)
LAYOUT = """make it like this, a folder for a class:
  {folder}/train/CLASS/any.jpg
  {folder}/val/CLASS/any.jpg"""


@dataclass(frozen=True, eq=False)
class Files:
    """Image files under ``folder``, read one by one. ``paths`` ``[N]``: bytes, below ``folder`` (an array rather than a
    list, whose million strings every worker would copy by counting references)."""

    folder: str
    paths: np.ndarray
    size: int
    seed: int
    augment: bool

    def __call__(self, index: int, epoch: int | None) -> Tensor:
        """``[3, size, size]`` bytes."""
        image = read_image(os.path.join(self.folder, os.fsdecode(self.paths[index])))
        return fitted(image, self.size, epoch if self.augment else None, seed=self.seed, index=index)


def open_folder(settings: DataSettings, seed: int) -> Parts:
    """The images of ``folder:PATH``; PATH is below ``root`` where that is given.

    With ``train/`` and ``val/`` (or ``test/``) the latter is the test part; with all three, ``val/`` is the validation
    part. Class folders alone are split: a fifth of the images, fixed and in proportion, is the test part.

    Raises MissingData where the folder or a part of it is not there, BadData for classes without images or that differ
    between the parts. A damaged image raises BadData when it is read: looking into a million files takes too long.
    """
    written = settings.name.removeprefix("folder:")
    if not written:
        raise BadRequest(f"{settings.name!r} names no folder\n  do: write folder:PATH")
    folder = Path(written).expanduser()
    return _open(settings, folder if settings.root is None else root_of(settings) / folder, seed)


def open_imagenet(settings: DataSettings, seed: int) -> Parts:
    """``root`` with ``train/`` and ``val/``; ImageNet's val images are the test part. Raises as ``open_folder``."""
    root = root_of(settings)
    for part in ("train", "val"):
        if not (root / part).is_dir():
            raise MissingData(
                f"the images of imagenet were not found\n  looked for {(root / part).absolute()}\n"
                f"  do: get them from image-net.org (torchvision.datasets.ImageNet unpacks them), set root, and "
                f"{LAYOUT.format(folder=root)}"
            )
    return _open(settings, root, seed)


def read_image(path: str) -> Image.Image:
    """The image in a file as RGB, upright; grey, palettes, transparency and 16 bits are converted.

    Raises BadData, naming the file, where it is not an image, truncated or of a kind that has no colours.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as opened:
            opened.load()
            image = ImageOps.exif_transpose(opened)
            if image.mode.startswith("I"):  # 16 bits, in 16 or 32: Pillow would cut them off at 255
                wide = np.clip(np.asarray(image).astype(np.int64), 0, 65535)
                image = Image.fromarray(((wide * 255 + 32767) // 65535).astype(np.uint8))
            elif image.mode == "P":
                image = image.convert("RGBA")
            elif image.mode == "F":
                raise ValueError("its pixels are floating-point numbers of unknown range")
            return image.convert("RGB")
    except Exception as error:  # decoders raise anything on damaged files
        raise BadData(
            f"the image {path} cannot be read ({type(error).__name__}: {error})\n"
            "  do: replace the file or remove it; secateur leaves out no image by itself"
        ) from error


def fitted(image: Image.Image | Tensor, size: int, epoch: int | None, *, seed: int, index: int) -> Tensor:
    """An image as ``[C, size, size]`` bytes: a random window as of ``epoch``, the middle for None.

    Seeds the generators that everyone shares: call it inside ``preserved``.
    """
    transform = _transforms(size)[0 if epoch is None else 1]
    if epoch is None:
        return transform(image)
    seed_all_(seed, "augment", epoch, index)
    return transform(image)


@lru_cache(maxsize=8)
def _transforms(size: int) -> tuple[Any, Any]:
    """torchvision's, without and with augmentation."""
    need_torchvision()
    from torchvision.transforms import v2

    middle = [v2.Resize(max(1, round(size * 256 / 224)), antialias=True), v2.CenterCrop(size)]
    window = [v2.RandomResizedCrop(size, antialias=True), v2.RandomHorizontalFlip()]
    return v2.Compose([*middle, v2.PILToTensor()]), v2.Compose([*window, v2.PILToTensor()])


def need_torchvision() -> None:
    """Raises MissingExtra where torchvision cannot be imported."""
    try:
        import_torchvision()
    except (ImportError, OSError, RuntimeError) as error:
        raise MissingExtra(
            f"images in files are scaled by torchvision, which cannot be imported ({type(error).__name__}: {error})\n"
            "  do: pip install 'secateur[train]'"
        ) from error


def _open(settings: DataSettings, folder: Path, seed: int) -> Parts:
    refuse_channels(settings, 3)
    need_torchvision()
    if not folder.is_dir():
        raise MissingData(
            f"there is no folder {folder.absolute()}\n  do: check the path, or {LAYOUT.format(folder=folder)}"
        )
    below = {name.lower(): name for name in _folders_in(folder)}
    if "train" not in below:
        return _split(settings, folder, seed)
    parts = {"train": _listed(settings, folder / below["train"], seed)}
    for part, names in (("validation", VALIDATION), ("test", TEST)):
        name = next((below[name] for name in names if name in below), None)
        if name is not None:
            parts[part] = _listed(settings, folder / name, seed)
            _compare(parts["train"][0], parts[part][0], folder / below["train"], folder / name)
    if len(parts) == 1:
        raise MissingData(
            f"{folder} has train/, but neither val/ nor test/\n  do: {LAYOUT.format(folder=folder)}\n"
            "  or name the folder train/ itself: class folders alone are split into parts"
        )
    classes, train = parts["train"]
    validation = everything(parts["validation"][1]) if "validation" in parts and "test" in parts else None
    test = parts.get("test") or parts["validation"]
    return Parts(classes, _shape(settings), everything(train), everything(test[1]), validation)


def _split(settings: DataSettings, folder: Path, seed: int) -> Parts:
    classes, images = _listed(settings, folder, seed)
    test, train = draw_in_proportion(images.labels, len(images.labels) // 5, FIXED)
    if not len(test):
        raise BadData(f"{folder} holds only {len(images.labels)} images: they cannot be split into parts")
    return Parts(classes, _shape(settings), (images, train), (images, test))


def _listed(settings: DataSettings, folder: Path, seed: int) -> tuple[tuple[str, ...], Images]:
    """The classes of a folder and its images, both in the order of their names."""
    classes = _folders_in(folder)
    found = [_images_below(folder / name, folder) for name in classes]
    if not classes:
        loose = [name for name in os.listdir(folder) if _is_image(name)]
        what = f"{len(loose)} images, but no class folders" if loose else "no class folders"
        raise BadData(f"{folder} holds {what}\n  do: put the images of each class into a folder of its own there")
    empty = [name for name, files in zip(classes, found, strict=True) if not files]
    if empty:
        shown = ", ".join(empty[:5]) + (f" and {len(empty) - 5} more" if len(empty) > 5 else "")
        raise BadData(
            f"{folder} holds {len(classes)} class folders, {len(empty)} of them without an image: {shown}\n"
            f"  do: fill them or remove them; images end in {' '.join(SUFFIXES)}"
        )
    labels = torch.repeat_interleave(torch.arange(len(classes)), torch.tensor([len(files) for files in found]))
    files = Files(
        folder=str(folder),
        paths=np.array([path for paths in found for path in paths]),
        size=settings.size or 224,
        seed=seed,
        augment=settings.augment == "standard",
    )
    return tuple(classes), Images(files, labels, Normalisation(*IMAGENET_MOMENTS, 3))


def _folders_in(folder: Path) -> list[str]:
    """The names of the folders in a folder in their order, hidden ones left out."""
    try:
        return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and entry.name[0] != ".")
    except OSError as error:
        raise BadData(f"{folder} cannot be read: {error.strerror or error}") from error


def _images_below(folder: Path, above: Path) -> list[bytes]:
    names = []
    for where, _, files in os.walk(folder, followlinks=True):
        names += [os.path.relpath(os.path.join(where, name), above) for name in files if _is_image(name)]
    return [os.fsencode(name) for name in sorted(names)]


def _is_image(name: str) -> bool:
    return name.lower().endswith(SUFFIXES) and not name.startswith(".")


def _compare(ours: Sequence[str], theirs: Sequence[str], our_folder: Path, their_folder: Path) -> None:
    if list(ours) == list(theirs):
        return
    lines = "".join(
        f"\n  only in {folder}: {', '.join(sorted(only)[:5])}" + (f" and {len(only) - 5} more" if len(only) > 5 else "")
        for folder, only in ((our_folder, set(ours) - set(theirs)), (their_folder, set(theirs) - set(ours)))
        if only
    )
    raise BadData(f"the classes of {our_folder} and {their_folder} are not the same{lines}\n  do: make them the same")


def _shape(settings: DataSettings) -> tuple[int, int, int]:
    size = settings.size or 224
    return (3, size, size)
