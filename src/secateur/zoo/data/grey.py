"""The two sets of small grey images: scikit-learn's digits and Fashion-MNIST (Xiao, Rasul and Vollgraf 2017).

Fashion-MNIST comes in the IDX format of MNIST: four bytes of magic (0, 0, 8 for bytes, the number of dimensions), the
dimensions as big-endian uint32, then the bytes themselves; as a plain file or gzipped.
"""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from secateur.errors import BadData, BadRequest, MissingExtra
from secateur.zoo.data.images import Images, Normalisation, moments, shift_for
from secateur.zoo.data.parts import Parts, checked_labels, in_memory, missing, root_of
from secateur.zoo.data.settings import DataSettings
from secateur.zoo.data.splits import FIXED, draw_in_proportion

DEBIAN = Path("/usr/share/datasets/fashion-mnist")
CLOTHES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
CLOTHES_MOMENTS = ((0.2860,), (0.3530,))
"""Mean and standard deviation over the 60,000 training images, as everyone uses them; a test computes them anew."""
FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
LARGEST = 2**31  # bytes; a header that asks for more is damaged


def open_digits(settings: DataSettings, seed: int) -> Parts:
    """scikit-learn's 1,797 digits: a fifth of them, fixed and in proportion, is the test part.

    Enlarged from 8x8 to 16x16 unless ``size`` says otherwise; shifted by up to an eighth, never mirrored; normalised by
    the mean and deviation of all that is not test.
    """
    _check_channels(settings)
    try:
        from sklearn import datasets
    except ImportError as error:
        raise MissingExtra("the digits come with scikit-learn\n  do: pip install 'secateur[train]'") from error
    raw = datasets.load_digits()
    labels = torch.from_numpy(raw.target).long()
    size = settings.size or 16
    pixels = torch.from_numpy(raw.images).float()[:, None] / 16
    if size != pixels.shape[-1]:
        pixels = functional.interpolate(
            pixels, size=(size, size), mode="bilinear", align_corners=False, antialias=size < pixels.shape[-1]
        )
    test, train = draw_in_proportion(labels, len(labels) // 5, FIXED)
    channels = settings.channels or 1
    normalise = Normalisation(*moments(pixels.__getitem__, train), channels)
    shift = shift_for(size, len(labels), seed=seed, flip=False) if settings.augment == "standard" else None
    images = Images(pixels, labels, normalise, shift)
    return Parts(
        classes=tuple(str(digit) for digit in range(10)),
        shape=(channels, size, size),
        train=(images, train),
        test=(images, test),
    )


def open_fashion(settings: DataSettings, seed: int) -> Parts:
    """60,000 training and 10,000 test images of 28x28, shifted and mirrored where augmented.

    Raises MissingData where the four files are nowhere, BadData where one is damaged.
    """
    _check_channels(settings)
    root = root_of(settings)
    folders = [root / "FashionMNIST" / "raw", root / "raw", root, DEBIAN]
    names = [name for pair in FILES.values() for name in pair]
    found = next((folder for folder in folders if all(_file(folder, name) for name in names)), None)
    if found is None:
        raise missing(
            settings.name,
            [folder / f"{names[0]}[.gz] and three more" for folder in folders],
            f"python -c \"from torchvision.datasets import FashionMNIST; FashionMNIST('{root}', download=True)\"\n"
            "  or: apt install dataset-fashion-mnist",
        )
    train, test = (_labelled(found, *FILES[part]) for part in ("train", "test"))
    return in_memory(settings, train, test, classes=CLOTHES, moments=CLOTHES_MOMENTS, seed=seed)


def read_idx(path: Path, dimensions: int) -> Tensor:
    """The bytes of an IDX file, plain or gzipped, as a uint8 tensor of so many dimensions; BadData if it is damaged."""
    again = "\n  do: get the file anew"
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as stream:
            head = stream.read(4 + 4 * dimensions)
            if head[:4] != bytes((0, 0, 8, dimensions)):
                raise BadData(
                    f"{path} is no IDX file of bytes in {dimensions} dimensions: it starts with "
                    f"{head[:4].hex(' ') or 'nothing'}, not 00 00 08 0{dimensions}{again}"
                )
            if len(head) < 4 + 4 * dimensions:
                raise BadData(f"{path} is truncated in its header{again}")
            shape = struct.unpack(f">{dimensions}I", head[4:])
            size = math.prod(shape)
            body = stream.read(min(size, LARGEST) + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise BadData(f"{path} cannot be read: {error}{again}") from error
    if len(body) != size:
        wrong = "is truncated" if len(body) < size else "is longer than it says"
        raise BadData(f"{path} {wrong}: its header promises {'x'.join(map(str, shape))} bytes{again}")
    if not size:
        raise BadData(f"{path} is empty: its header says {'x'.join(map(str, shape))}{again}")
    return torch.frombuffer(bytearray(body), dtype=torch.uint8).view(*shape)


def _labelled(folder: Path, images_name: str, labels_name: str) -> tuple[Tensor, Tensor]:
    images_path, labels_path = _file(folder, images_name), _file(folder, labels_name)
    assert images_path is not None
    assert labels_path is not None
    images, labels = read_idx(images_path, 3)[:, None], read_idx(labels_path, 1)
    if len(images) != len(labels):
        raise BadData(
            f"{images_path} holds {len(images)} images, but {labels_path.name} holds {len(labels)} labels\n"
            "  do: get both files anew, from one place"
        )
    return images, checked_labels(labels, len(CLOTHES), str(labels_path))


def _file(folder: Path, name: str) -> Path | None:
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)


def _check_channels(settings: DataSettings) -> None:
    if settings.channels not in (None, 1, 3):
        raise BadRequest(
            f"channels={settings.channels}: the grey images of {settings.name} can have 1 channel or 3 equal ones"
        )
