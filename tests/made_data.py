"""Small data sets in the true file formats, written by the tests: IDX, both versions of CIFAR, folders of images."""

from __future__ import annotations

import gzip
import io
import struct
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

FASHION = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
Labelled = tuple[np.ndarray, np.ndarray]


def pixels(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def idx(array: np.ndarray) -> bytes:
    return bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write_fashion(folder: Path, train: int = 60, test: int = 20, *, zipped: bool = True) -> Path:
    """Images whose labels go round: 0, 1, ..., 9, 0, ..."""
    folder.mkdir(parents=True, exist_ok=True)
    arrays = [pixels(train, 28, 28), np.arange(train) % 10, pixels(test, 28, 28, seed=1), np.arange(test) % 10]
    for name, array in zip(FASHION, arrays, strict=True):
        raw = idx(array.astype(np.uint8))
        path = folder / (f"{name}.gz" if zipped else name)
        path.write_bytes(gzip.compress(raw) if zipped else raw)
    return folder


def cifar_files(*, classes: int, version: str, each: int = 20) -> tuple[str, dict[str, bytes], list[Labelled]]:
    """The set's folder, its files, and what is in them: five (or one) training files' worth, then the test file's."""
    five = [f"data_batch_{number}" for number in range(1, 6)] if classes == 10 else ["train"]
    parts = [(pixels(each, 3072, seed=n), np.arange(each * n, each * (n + 1)) % classes) for n in range(len(five) + 1)]
    names = [f"class{number}" for number in range(classes)]
    if version == "binary":
        folder = "cifar-10-batches-bin" if classes == 10 else "cifar-100-binary"
        files = {"batches.meta.txt" if classes == 10 else "fine_label_names.txt": "\n".join(names).encode() + b"\n\n"}
        for name, (images, labels) in zip([*five, "test_batch" if classes == 10 else "test"], parts, strict=True):
            coarse = [] if classes == 10 else [labels[:, None] // 5]
            files[f"{name}.bin"] = np.hstack([*coarse, labels[:, None], images]).astype(np.uint8).tobytes()
    else:
        folder = "cifar-10-batches-py" if classes == 10 else "cifar-100-python"
        key = "label" if classes == 10 else "fine_label"
        files = {"batches.meta" if classes == 10 else "meta": python2_pickle({f"{key}_names": names})}
        for name, (images, labels) in zip([*five, "test_batch" if classes == 10 else "test"], parts, strict=True):
            files[name] = python2_pickle({"data": images, f"{key}s": labels.tolist(), "batch_label": [name]})
    return folder, files, parts


def write_files(folder: Path, files: Mapping[str, bytes]) -> Path:
    folder.mkdir(parents=True)
    for name, raw in files.items():
        (folder / name).write_bytes(raw)
    return folder


def write_archive(path: Path, folder: str, files: Mapping[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, raw in files.items():
            member = tarfile.TarInfo(f"{folder}/{name}")
            member.size = len(raw)
            archive.addfile(member, io.BytesIO(raw))
    return path


def python2_pickle(entries: Mapping[str, np.ndarray | Sequence[int] | Sequence[str]]) -> bytes:
    """What Python 2 and the NumPy of 2009 wrote, opcode by opcode: text is bytes, arrays are ``numpy.core``'s."""

    def text(value: str) -> bytes:
        return b"U" + bytes([len(value)]) + value.encode()

    def number(value: int) -> bytes:
        return b"J" + struct.pack("<i", value)

    def array(value: np.ndarray) -> bytes:
        empty = (
            b"cnumpy.core.multiarray\n_reconstruct\n"
            + b"cnumpy\nndarray\n"
            + number(0)
            + b"\x85"
            + text("b")
            + b"\x87R"
        )
        kind = b"cnumpy\ndtype\n" + text("u1") + number(0) + number(1) + b"\x87R"
        kind += b"(" + number(3) + text("|") + b"NNN" + number(-1) + number(-1) + number(0) + b"tb"
        raw = value.tobytes()
        shape = b"(" + b"".join(number(length) for length in value.shape) + b"t"
        return empty + b"(" + number(1) + shape + kind + b"\x89T" + struct.pack("<i", len(raw)) + raw + b"tb"

    out = b"\x80\x02}("
    for key, value in entries.items():
        out += text(key)
        if isinstance(value, np.ndarray):
            out += array(value)
        else:
            out += b"](" + b"".join(number(v) if isinstance(v, int) else text(v) for v in value) + b"e"
    return out + b"u."


def write_folder(root: Path, parts: Sequence[str] = ("train", "val"), classes: Sequence[str] = ("cat", "dog")) -> Path:
    """Twelve PNG and JPEG images of several sizes per class and part."""
    for p, part in enumerate(parts):
        for c, name in enumerate(classes):
            (root / part / name).mkdir(parents=True)
            for n in range(12):
                image = Image.fromarray(pixels(20 + 3 * n, 40 - 2 * n, 3, seed=1000 * p + 100 * c + n))
                image.save(root / part / name / (f"{n:02}.png" if n % 2 else f"{n:02}.JPEG"))
    return root
