"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009) from the files that their author publishes, in folders or as archives.

The *binary* version is read where it is: records of one label byte (CIFAR-100: a coarse and a fine one) and 3x32x32
pixel bytes. Else the *Python* version: pickled dictionaries, as torchvision downloads them. A pickle can run any code,
so it is read by an unpickler that knows nothing but arrays and bytes, whoever the file came from.
"""

from __future__ import annotations

import io
import pickle
import tarfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from secateur.errors import BadData, MissingData
from secateur.zoo.data.parts import Moments, Parts, checked_labels, in_memory, missing, root_of
from secateur.zoo.data.settings import DataSettings, refuse_channels

PIXELS = 3 * 32 * 32
AGAIN = "\n  do: get the file anew"


@dataclass(frozen=True)
class Version:
    """Where one of the two versions of a set keeps what: the archive, the folder in it, the files in that."""

    archive: str
    folder: str
    train: tuple[str, ...]
    test: str
    names: str


@dataclass(frozen=True)
class Facts:
    """One of the two sets. ``moments``: mean and deviation over the 50,000 training images, as everyone uses them."""

    binary: Version
    python: Version
    classes: int
    label_bytes: int
    label_keys: tuple[str, str]
    moments: Moments
    torchvision: str


FIVE = tuple(f"data_batch_{number}" for number in range(1, 6))
SETS: Mapping[str, Facts] = {
    "cifar10": Facts(
        binary=Version(
            "cifar-10-binary.tar.gz",
            "cifar-10-batches-bin",
            tuple(f"{name}.bin" for name in FIVE),
            "test_batch.bin",
            "batches.meta.txt",
        ),
        python=Version("cifar-10-python.tar.gz", "cifar-10-batches-py", FIVE, "test_batch", "batches.meta"),
        classes=10,
        label_bytes=1,
        label_keys=("labels", "label_names"),
        moments=((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
        torchvision="CIFAR10",
    ),
    "cifar100": Facts(
        binary=Version(
            "cifar-100-binary.tar.gz", "cifar-100-binary", ("train.bin",), "test.bin", "fine_label_names.txt"
        ),
        python=Version("cifar-100-python.tar.gz", "cifar-100-python", ("train",), "test", "meta"),
        classes=100,
        label_bytes=2,
        label_keys=("fine_labels", "fine_label_names"),
        moments=((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
        torchvision="CIFAR100",
    ),
}


def open_cifar(settings: DataSettings, seed: int) -> Parts:
    """50,000 training and 10,000 test images of 3x32x32, shifted and mirrored where augmented.

    Raises MissingData where neither version's files are found or one of them is not there, BadData for a damaged one.
    """
    refuse_channels(settings, 3)
    facts = SETS[settings.name]
    root = root_of(settings)
    looked = []
    for version in (facts.binary, facts.python):
        inside = [root] if root.name == version.folder else []
        for place in (*inside, root / version.folder, root / version.archive):
            looked.append(place)
            if place.exists():
                return _parts(settings, facts, version, place, seed)
    raise missing(
        settings.name,
        looked,
        f"python -c \"from torchvision.datasets import {facts.torchvision} as C; C('{root}', download=True)\"",
    )


def _parts(settings: DataSettings, facts: Facts, version: Version, place: Path, seed: int) -> Parts:
    wanted = (*version.train, version.test, version.names)
    files = _folder_files(place, wanted) if place.is_dir() else _archive_files(place, version, wanted)
    for name in wanted[:-1]:
        if name not in files:
            raise MissingData(
                f"{place} is a part of {settings.name} only: it holds no {name}\n"
                f"  do: unpack {version.archive} there anew, all of it"
            )
    read = _read_binary if version is facts.binary else _read_python
    parts = [read(files[name], facts, f"{place}/{name}") for name in (*version.train, version.test)]
    images, labels = (torch.cat(column) for column in zip(*parts[:-1], strict=True))
    classes = _class_names(files.get(version.names), facts, version, place)
    return in_memory(settings, (images, labels), parts[-1], classes=classes, moments=facts.moments, seed=seed)


def _folder_files(folder: Path, wanted: tuple[str, ...]) -> dict[str, bytes]:
    try:
        return {name: (folder / name).read_bytes() for name in wanted if (folder / name).is_file()}
    except OSError as error:
        raise BadData(f"{error.filename} cannot be read: {error.strerror or error}") from error


def _archive_files(path: Path, version: Version, wanted: tuple[str, ...]) -> dict[str, bytes]:
    """The wanted files of an archive, in memory: nothing is unpacked to disk."""
    files = {}
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                folder, _, name = member.name.removeprefix("./").rpartition("/")
                if folder == version.folder and name in wanted and member.isfile():
                    stream = archive.extractfile(member)
                    assert stream is not None
                    files[name] = stream.read()
    except (OSError, EOFError, tarfile.TarError, zlib.error) as error:
        raise BadData(f"{path} cannot be read: {error}{AGAIN}") from error
    return files


def _read_binary(raw: bytes, facts: Facts, where: str) -> tuple[Tensor, Tensor]:
    record = facts.label_bytes + PIXELS
    if not raw or len(raw) % record:
        raise BadData(f"{where} is truncated: {len(raw)} bytes are no whole number of records of {record}{AGAIN}")
    rows = torch.frombuffer(bytearray(raw), dtype=torch.uint8).view(-1, record)
    labels = checked_labels(rows[:, facts.label_bytes - 1], facts.classes, where)
    return rows[:, facts.label_bytes :].reshape(-1, 3, 32, 32), labels


def _read_python(raw: bytes, facts: Facts, where: str) -> tuple[Tensor, Tensor]:
    batch = _unpickle(raw, where)
    pixels, labels = batch.get("data"), batch.get(facts.label_keys[0])
    if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or pixels.ndim != 2 or pixels.shape[1] != PIXELS:
        raise BadData(f"{where} has no array of N x {PIXELS} bytes called 'data'{AGAIN}")
    if not isinstance(labels, list) or not all(type(label) is int for label in labels) or len(labels) != len(pixels):
        raise BadData(f"{where} has no {len(pixels)} whole numbers called {facts.label_keys[0]!r}{AGAIN}")
    images = torch.from_numpy(pixels.copy()).view(-1, 3, 32, 32)
    return images, checked_labels(torch.tensor(labels), facts.classes, where)


def _class_names(raw: bytes | None, facts: Facts, version: Version, place: Path) -> tuple[str, ...]:
    """The classes' names as the set's own file gives them, their numbers where it is not there."""
    if raw is None:
        return tuple(str(number) for number in range(facts.classes))
    where = f"{place}/{version.names}"
    if version is facts.binary:
        names = raw.decode("utf-8", "replace").split()
    else:
        listed = _unpickle(raw, where).get(facts.label_keys[1])
        names = [_text(name) for name in listed] if isinstance(listed, list) else []
    if len(names) != facts.classes:
        raise BadData(f"{where} names {len(names)} classes, not {facts.classes}{AGAIN}")
    return tuple(names)


def _unpickle(raw: bytes, where: str) -> dict[str, Any]:
    """The dictionary in a pickle of arrays, bytes and plain values, its keys as text; BadData for anything else."""
    try:
        value = _Arrays(io.BytesIO(raw), encoding="bytes").load()
    except BadData as error:
        raise BadData(f"{where} {error}") from None
    except Exception as error:  # a damaged pickle can raise anything
        raise BadData(f"{where} cannot be read ({type(error).__name__}: {error}){AGAIN}") from error
    if not isinstance(value, dict):
        raise BadData(f"{where} holds {type(value).__name__}, not a dictionary{AGAIN}")
    return {_text(key): entry for key, entry in value.items()}


def _text(value: object) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def _latin_1(text: str, encoding: str = "latin1") -> bytes:
    """What Python 3 pickles bytes as for Python 2: text of one character per byte."""
    if encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError(f"bytes written as {encoding!r}")
    return text.encode("latin1")


def _from_buffer(raw: bytes, kind: np.dtype[Any], shape: tuple[int, ...], order: Literal["C", "F"]) -> np.ndarray:
    """What NumPy pickles an array as since protocol 5."""
    return np.frombuffer(raw, dtype=kind).reshape(shape, order=order)


class _Arrays(pickle.Unpickler):
    """Knows NumPy's arrays and bytes; a pickle that names anything else, such as ``os.system``, is refused."""

    def find_class(self, module: str, name: str) -> Any:
        if name == "_reconstruct" and module in ("numpy.core.multiarray", "numpy._core.multiarray"):
            return np.empty(0).__reduce__()[0]
        if name == "_frombuffer" and module in ("numpy.core.numeric", "numpy._core.numeric"):
            return _from_buffer
        if module == "numpy" and name in ("ndarray", "dtype"):
            return getattr(np, name)
        if (module, name) == ("_codecs", "encode"):
            return _latin_1
        raise BadData(
            f"asks for {module}.{name}, which no CIFAR file does: it was not read\n"
            "  do: do not trust where it came from; get the file anew"
        )
