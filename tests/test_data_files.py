"""Every set from files in its true format, and every way in which files can be wrong."""

from __future__ import annotations

import dataclasses
import gzip
import pickle
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from made_data import (
    FASHION,
    cifar_files,
    idx,
    pixels,
    python2_pickle,
    write_archive,
    write_fashion,
    write_files,
    write_folder,
)
from secateur.errors import BadData, BadRequest, MissingData
from secateur.zoo.data import Data, DataSettings, grey, open_data
from secateur.zoo.data.cifar import SETS
from secateur.zoo.data.folders import read_image
from secateur.zoo.torchvision_shim import import_torchvision

pytestmark = pytest.mark.filterwarnings("ignore::secateur.zoo.torchvision_shim.TorchvisionMismatch")


def raw_test_images(data: Data) -> Tensor:
    """The bytes of the test images again, from the inputs."""
    inputs = torch.cat([inputs for inputs, _ in data.test])
    mean, std = torch.tensor(data.mean).view(-1, 1, 1), torch.tensor(data.std).view(-1, 1, 1)
    return ((inputs * std + mean) * 255).round().byte()


# --- Fashion-MNIST


@pytest.fixture
def without_debian(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(grey, "DEBIAN", tmp_path / "debian")
    return tmp_path


@pytest.mark.parametrize(("below", "zipped"), [("", True), ("raw", False), ("FashionMNIST/raw", True)])
def test_fashion_mnist_wherever_it_lies(without_debian: Path, below: str, zipped: bool) -> None:
    write_fashion(without_debian / below, zipped=zipped)
    data = open_data(DataSettings("fashion-mnist", root=without_debian, batch=10))
    assert torch.equal(raw_test_images(data)[:, 0], torch.from_numpy(pixels(20, 28, 28, seed=1)))
    assert data.test.targets.tolist() == [*range(10), *range(10)]
    assert data.classes[9] == "Ankle boot"


def test_fashion_mnist_from_debian_s_package(without_debian: Path) -> None:
    write_fashion(without_debian / "debian")
    assert open_data(DataSettings("fashion-mnist", root="elsewhere", batch=10)).test.samples == 20


def test_fashion_mnist_that_is_nowhere(without_debian: Path) -> None:
    write_fashion(without_debian)
    (without_debian / f"{FASHION[3]}.gz").unlink()
    with pytest.raises(MissingData) as caught:
        open_data(DataSettings("fashion-mnist", root=without_debian))
    text = str(caught.value)
    for place in ("FashionMNIST/raw", "raw", "", "debian"):
        assert f"looked for {without_debian / place / FASHION[0]}[.gz] and three more\n" in text
    assert f"FashionMNIST('{without_debian}', download=True)" in text
    assert "apt install dataset-fashion-mnist" in text


@pytest.mark.parametrize(
    ("number", "raw", "message"),
    [
        (0, b"\x00\x00\x0d\x03" + bytes(40), r"is no IDX file of bytes in 3 dimensions: it starts with 00 00 0d 03"),
        (0, b"", r"is no IDX file .* it starts with nothing"),
        (0, idx(pixels(60, 28, 28))[:10], r"is truncated in its header"),
        (0, idx(pixels(60, 28, 28))[:-1], r"is truncated: its header promises 60x28x28 bytes\n  do: get the file anew"),
        (0, idx(pixels(60, 28, 28)) + b"\0", r"is longer than it says"),
        (0, idx(pixels(0, 28, 28)), r"is empty: its header says 0x28x28"),
        (0, b"\x00\x00\x08\x03" + b"\xff" * 12, r"is truncated: its header promises 4294967295x4294967295x"),
        (0, idx(pixels(59, 28, 28)), r"holds 59 images, but train-labels-idx1-ubyte.gz holds 60 labels"),
        (1, idx(np.full(60, 10, np.uint8)), r"sample 0 has the label 10, but there are 10 classes, 0 to 9"),
        (1, idx(pixels(60, 1)), r"is no IDX file of bytes in 1 dimensions"),
    ],
)
def test_damaged_idx_files(without_debian: Path, number: int, raw: bytes, message: str) -> None:
    path = write_fashion(without_debian) / f"{FASHION[number]}.gz"
    path.write_bytes(gzip.compress(raw))
    with pytest.raises(BadData, match=message) as caught:
        open_data(DataSettings("fashion-mnist", root=without_debian))
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    "damage", [lambda raw: raw[: len(raw) // 2], lambda raw: b"not gzip at all", lambda raw: raw[:-6]]
)
def test_damaged_gzip(without_debian: Path, damage: Callable[[bytes], bytes]) -> None:
    path = write_fashion(without_debian) / f"{FASHION[0]}.gz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(BadData, match=r"train-images-idx3-ubyte.gz cannot be read"):
        open_data(DataSettings("fashion-mnist", root=without_debian))


# --- CIFAR


@pytest.mark.parametrize("version", ["binary", "python"])
@pytest.mark.parametrize("classes", [10, 100])
@pytest.mark.parametrize("how", ["folder", "root", "archive"])
def test_cifar_in_every_form(tmp_path: Path, classes: int, version: str, how: str) -> None:
    folder, files, parts = cifar_files(classes=classes, version=version, each=20 if classes == 10 else 200)
    if how == "archive":
        write_archive(tmp_path / getattr(SETS[f"cifar{classes}"], version).archive, folder, files)
    else:
        write_files(tmp_path / folder, files)
    root = tmp_path / folder if how == "root" else tmp_path
    data = open_data(DataSettings(f"cifar{classes}", root=root, batch=10))
    images, labels = parts[-1]
    assert torch.equal(raw_test_images(data), torch.from_numpy(images).view(-1, 3, 32, 32))
    assert data.test.targets.tolist() == labels.tolist()
    stored = data.train._images
    assert torch.equal(stored.labels, torch.from_numpy(np.concatenate([each for _, each in parts[:-1]])))
    assert isinstance(stored.pixels, Tensor)
    assert torch.equal(stored.pixels[-1].flatten(), torch.from_numpy(parts[-2][0][-1]))
    assert data.classes == tuple(f"class{n}" for n in range(classes))
    assert data.shape == (3, 32, 32)


def test_our_reading_of_cifar_is_torchvision_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import_torchvision()
    from torchvision.datasets import CIFAR10

    monkeypatch.setattr(CIFAR10, "_check_integrity", lambda self: True)  # ours are not the original's checksums
    folder, files, _ = cifar_files(classes=10, version="python")
    write_files(tmp_path / folder, files)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    theirs = CIFAR10(tmp_path, train=False)
    data = open_data(DataSettings("cifar10", root=tmp_path, batch=10))
    assert torch.equal(raw_test_images(data).permute(0, 2, 3, 1), torch.from_numpy(theirs.data))
    assert data.test.targets.tolist() == theirs.targets
    assert list(data.classes) == theirs.classes


def test_cifar_that_is_nowhere(tmp_path: Path) -> None:
    with pytest.raises(MissingData) as caught:
        open_data(DataSettings("cifar100", root=tmp_path))
    for name in ("cifar-100-binary", "cifar-100-binary.tar.gz", "cifar-100-python", "cifar-100-python.tar.gz"):
        assert f"looked for {tmp_path / name}\n" in str(caught.value)
    assert f"import CIFAR100 as C; C('{tmp_path}', download=True)" in str(caught.value)


def test_cifar_of_which_a_file_is_missing(tmp_path: Path) -> None:
    folder, files, _ = cifar_files(classes=10, version="binary")
    path = write_files(tmp_path / folder, files)
    (path / "batches.meta.txt").unlink()
    assert open_data(DataSettings("cifar10", root=tmp_path, batch=10)).classes == tuple("0123456789")
    (path / "data_batch_3.bin").unlink()
    with pytest.raises(
        MissingData, match=r"is a part of cifar10 only: it holds no data_batch_3.bin\n  do: unpack cifar-10"
    ):
        open_data(DataSettings("cifar10", root=tmp_path))


class Evil:
    def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
        return print, ("code from a data file was run",)


@pytest.mark.parametrize(
    ("version", "name", "raw", "message"),
    [
        (
            "binary",
            "data_batch_2.bin",
            bytes(3073 * 2 - 1),
            r"data_batch_2.bin is truncated: 6145 bytes are no whole numb",
        ),
        ("binary", "test_batch.bin", b"", r"test_batch.bin is truncated: 0 bytes"),
        (
            "binary",
            "test_batch.bin",
            bytes([10]) + bytes(3072),
            r"test_batch.bin: sample 0 has the label 10, but there",
        ),
        ("binary", "batches.meta.txt", b"cat\ndog\n", r"batches.meta.txt names 2 classes, not 10"),
        (
            "python",
            "test_batch",
            pickle.dumps(Evil()),
            r"test_batch asks for builtins.print, which no CIFAR file does: it",
        ),
        ("python", "test_batch", b"cos\nsystem\n(S'true'\ntR.", r"asks for os.system, which no CIFAR file does"),
        ("python", "test_batch", b"garbage", r"test_batch cannot be read \(UnpicklingError"),
        ("python", "test_batch", python2_pickle({"data": pixels(2, 3072)})[:3000], r"test_batch cannot be read"),
        ("python", "test_batch", pickle.dumps([1]), r"test_batch holds list, not a dictionary"),
        ("python", "test_batch", python2_pickle({"data": pixels(2, 99)}), r"no array of N x 3072 bytes called 'data'"),
        (
            "python",
            "test_batch",
            python2_pickle({"data": pixels(2, 3072), "labels": [1]}),
            r"no 2 whole numbers called 'la",
        ),
        (
            "python",
            "test_batch",
            python2_pickle({"data": pixels(1, 3072), "labels": [-1]}),
            r"has the label -1, but there",
        ),
    ],
)
def test_damaged_cifar(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], version: str, name: str, raw: bytes, message: str
) -> None:
    folder, files, _ = cifar_files(classes=10, version=version)
    write_files(tmp_path / folder, {**files, name: raw})
    with pytest.raises(BadData, match=message):
        open_data(DataSettings("cifar10", root=tmp_path))
    assert capsys.readouterr().out == ""


def test_a_python_3_pickle_of_cifar_is_read_too(tmp_path: Path) -> None:
    folder, files, _ = cifar_files(classes=10, version="python")
    for protocol in (2, 5):
        raw = pickle.dumps({b"data": pixels(20, 3072), b"labels": list(range(10)) * 2}, protocol=protocol)
        root = tmp_path / str(protocol)
        write_files(root / folder, {**files, "test_batch": raw})
        data = open_data(DataSettings("cifar10", root=root, batch=10))
        assert torch.equal(raw_test_images(data).flatten(1), torch.from_numpy(pixels(20, 3072)))


def test_a_damaged_archive(tmp_path: Path) -> None:
    folder, files, _ = cifar_files(classes=10, version="binary")
    path = write_archive(tmp_path / "cifar-10-binary.tar.gz", folder, files)
    path.write_bytes(path.read_bytes()[:9000])
    with pytest.raises(BadData, match=r"cifar-10-binary.tar.gz cannot be read"):
        open_data(DataSettings("cifar10", root=tmp_path))


# --- folders


def test_a_folder_with_train_and_val(tmp_path: Path) -> None:
    write_folder(tmp_path)
    (tmp_path / "train" / "cat" / "notes.txt").write_text("no image")
    settings = DataSettings(f"folder:{tmp_path}", batch=5, size=32, validation=4)
    data = open_data(settings)
    assert data.classes == ("cat", "dog")
    assert [part.samples for part in (data.train, data.validation, data.test)] == [20, 4, 24]
    assert data.shape == (3, 32, 32)
    assert data.train._images is data.validation._images
    assert data.train._images is not data.test._images
    assert torch.bincount(data.validation.targets).tolist() == [2, 2]
    inputs, _ = next(iter(data.test))
    assert inputs.shape == (5, 3, 32, 32)
    assert open_data(dataclasses.replace(settings, name=f"folder:{tmp_path.name}", root=tmp_path.parent)).shape[1] == 32
    imagenet = open_data(dataclasses.replace(settings, name="imagenet", root=tmp_path))
    assert torch.equal(next(iter(imagenet.train))[0], next(iter(data.train))[0])
    assert open_data(DataSettings(f"folder:{tmp_path}", batch=5)).shape == (3, 224, 224)


def test_a_folder_is_prepared_as_torchvision_does_it(tmp_path: Path) -> None:
    import_torchvision()
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2

    write_folder(tmp_path)
    data = open_data(DataSettings(f"folder:{tmp_path}", batch=22, size=28))
    steps = [v2.Resize(32), v2.CenterCrop(28), v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
    transform = v2.Compose([*steps, v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))])
    theirs = ImageFolder(tmp_path / "val", transform)
    inputs, targets = (torch.cat(column) for column in zip(*data.test, strict=True))
    assert targets.tolist() == theirs.targets
    assert torch.allclose(inputs, torch.stack([image for image, _ in theirs]), rtol=1e-5, atol=1e-5)


def test_a_folder_with_all_three_parts_or_none(tmp_path: Path) -> None:
    write_folder(tmp_path / "three", ("train", "Valid", "test"))
    data = open_data(DataSettings(f"folder:{tmp_path / 'three'}", batch=5, size=16, validation=4))
    assert [part.samples for part in (data.train, data.validation, data.test)] == [24, 24, 24]
    alone = write_folder(tmp_path / "alone") / "train"
    data = open_data(DataSettings(f"folder:{alone}", batch=5, size=16))
    assert [part.samples for part in (data.train, data.validation, data.test)] == [18, 2, 4]
    members = [set(part.members.tolist()) for part in (data.train, data.validation, data.test)]
    assert len(set.union(*members)) == 24
    assert torch.equal(
        data.test.members, open_data(DataSettings(f"folder:{alone}", batch=5, size=16), seed=9).test.members
    )


def _remove(path: Path) -> None:
    shutil.rmtree(path)


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (_remove, MissingData, r"there is no folder .*\n  do: check the path, or make it like this"),
        (
            lambda root: _remove(root / "val"),
            MissingData,
            r"has train/, but neither val/ nor test/\n  do: make it like",
        ),
        (
            lambda root: _remove(root / "val" / "dog"),
            BadData,
            r"classes of .* are not the same\n  only in .*train: dog\n",
        ),
        (
            lambda root: (root / "train" / "emu").mkdir(),
            BadData,
            r"3 class folders, 1 of them without an image: emu\n  do",
        ),
        (
            lambda root: (_remove(root / "val" / "cat"), _remove(root / "val" / "dog")),
            BadData,
            r"holds no class folders",
        ),
        (
            lambda root: _flatten(root / "val"),
            BadData,
            r"val holds 24 images, but no class folders\n  do: put the images",
        ),
    ],
)
def test_folders_that_do_not_fit(
    tmp_path: Path, change: Callable[[Path], object], kind: type[Exception], message: str
) -> None:
    root = write_folder(tmp_path / "set")
    change(root)
    with pytest.raises(kind, match=message):
        open_data(DataSettings(f"folder:{root}", batch=5, size=16))


def _flatten(folder: Path) -> None:
    for path in list(folder.glob("*/*")):
        path.rename(folder / f"{path.parent.name}-{path.name}")
    for name in ("cat", "dog"):
        (folder / name).rmdir()


def test_imagenet_that_is_nowhere(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    with pytest.raises(MissingData, match=r"looked for .*/val\n  do: get them from image-net.org .*\n  .*train/CLASS"):
        open_data(DataSettings("imagenet", root=tmp_path))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_image_is_named_when_it_is_read(tmp_path: Path, workers: int) -> None:
    root = write_folder(tmp_path)
    path = root / "val" / "cat" / "03.png"
    path.write_bytes(path.read_bytes()[:200])
    data = open_data(DataSettings(f"folder:{root}", batch=2, size=16, workers=workers))
    batches = iter(data.test)
    next(batches)
    with pytest.raises(BadData) as caught:
        next(batches)
    assert str(caught.value).startswith(f"the image {path} cannot be read (")
    assert str(caught.value).endswith("do: replace the file or remove it; secateur leaves out no image by itself")
    path.write_text("no image")
    with pytest.raises(BadData, match="UnidentifiedImageError"):
        list(data.test)


def test_images_of_every_kind_become_rgb(tmp_path: Path) -> None:
    colours = Image.fromarray(pixels(4, 6, 3))
    grey_ = Image.fromarray(pixels(4, 6))
    deep = np.arange(24, dtype=np.uint16).reshape(4, 6) * 2849  # 0 to 65527
    clear = colours.quantize(8)
    clear.info["transparency"] = bytes(range(8))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    images: dict[str, tuple[Image.Image, dict[str, Any], np.ndarray]] = {
        "grey": (grey_, {}, np.repeat(np.asarray(grey_)[:, :, None], 3, 2)),
        "alpha": (colours.convert("RGBA"), {}, np.asarray(colours)),
        "palette": (clear, {"transparency": bytes(range(8))}, np.asarray(clear.convert("RGBA"))[:, :, :3]),
        "deep": (Image.fromarray(deep), {}, np.repeat(np.round(deep / 257).astype(np.uint8)[:, :, None], 3, 2)),
        "bits": (grey_.convert("1"), {}, np.repeat(np.asarray(grey_.convert("1").convert("L"))[:, :, None], 3, 2)),
        "turned": (colours, {"exif": exif}, np.rot90(np.asarray(colours), -1)),
    }
    for name, (image, options, expected) in images.items():
        image.save(tmp_path / f"{name}.png", **options)
        seen = read_image(str(tmp_path / f"{name}.png"))
        assert seen.mode == "RGB"
        assert np.array_equal(np.asarray(seen), expected), name
    Image.fromarray(np.zeros((4, 6), np.float32)).save(tmp_path / "floats.tiff")
    with pytest.raises(BadData, match="floating-point numbers of unknown range"):
        read_image(str(tmp_path / "floats.tiff"))


# --- the user's own function


class Pairs:
    """Ten classes in turn; ``made`` makes the image of an index."""

    def __init__(self, count: int, made: Callable[[int], Any], label: Callable[[int], Any] = lambda n: n % 10) -> None:
        self.count, self.made, self.label = count, made, label

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        if index >= self.count:
            raise IndexError(index)
        return self.made(index), self.label(index)


def own(monkeypatch: pytest.MonkeyPatch, made: object, **settings: Any) -> Data:
    module = SimpleNamespace(images=made if callable(made) else lambda: made)
    monkeypatch.setitem(__import__("sys").modules, "own_images", module)
    return open_data(DataSettings("own_images:images", **{"batch": 10, **settings}), allow_import=True)


def picture(index: int) -> Image.Image:
    return Image.fromarray(pixels(12, 12, 3, seed=index))


def test_datasets_of_pil_images(monkeypatch: pytest.MonkeyPatch) -> None:
    data = own(monkeypatch, (Pairs(60, picture), Pairs(20, picture)))
    assert data.shape == (3, 12, 12)
    assert [part.samples for part in (data.train, data.validation, data.test)] == [54, 6, 20]
    assert data.classes == tuple("0123456789")
    inputs = torch.cat([inputs for inputs, _ in data.validation] + [inputs for inputs, _ in data.train])
    assert abs(float(inputs.mean())) < 0.5
    assert torch.equal(raw_test_images(data)[3], torch.from_numpy(pixels(12, 12, 3, seed=3)).permute(2, 0, 1))
    first, again = (torch.cat([inputs for inputs, _ in data.train.epoch(epoch)]) for epoch in (1, 1))
    assert torch.equal(first, again)
    sized = own(monkeypatch, (Pairs(60, picture), Pairs(20, picture)), size=8)
    assert next(iter(sized.train))[0].shape == (10, 3, 8, 8)


def test_datasets_of_tensors_and_what_they_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    def noisy(index: int) -> Tensor:
        return index + torch.rand(1, 4, 4) + np.random.rand() + random.random()

    data = own(monkeypatch, (Pairs(40, noisy), Pairs(20, noisy)))
    assert data.mean == ()
    one, same, other = (torch.cat([inputs for inputs, _ in data.train.epoch(epoch)]) for epoch in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one.sort(0).values, other.sort(0).values)
    images, some = data.train._images, torch.tensor([7, 3, 5])
    assert torch.equal(images.read(some, 1)[1:2], images.read(some[1:2], 1))
    flat = Pairs(40, lambda n: torch.full((1, 4, 4), n, dtype=torch.uint8))
    assert own(monkeypatch, (flat, flat)).shape == (1, 4, 4)
    assert next(iter(own(monkeypatch, (flat, flat), size=6).train))[0].shape == (10, 1, 6, 6)
    with pytest.raises(BadData, match=r"the image 0 is torch\.float.*, the first one to train on is torch\.uint8"):
        list(own(monkeypatch, (flat, Pairs(20, noisy))).test)
    assert own(monkeypatch, data) is data
    with pytest.raises(BadRequest, match="are floats, which are taken as they are"):
        own(monkeypatch, (Pairs(40, noisy), Pairs(20, noisy)), size=8)


@pytest.mark.parametrize(
    ("made", "kind", "message"),
    [
        (3, BadRequest, r"own_images:images returned int, not \(train, test\), two datasets with a length and items"),
        ((Pairs(40, picture), iter([])), BadRequest, r"returned tuple, not \(train, test\)"),
        (lambda: 1 / 0, BadRequest, r"calling own_images:images\(\) raised ZeroDivisionError"),
        ((Pairs(0, picture), Pairs(20, picture)), BadData, r"own_images:images, train is empty"),
        (
            (Pairs(40, lambda n: [1]), Pairs(20, picture)),
            BadData,
            r"the image 0 is list\n  do: return PIL images, or ten",
        ),
        ((Pairs(40, lambda n: 1 / 0), Pairs(20, picture)), BadData, r"reading item 0 raised ZeroDivisionError"),
        ((Pairs(40, picture, lambda n: "cat"), Pairs(20, picture)), BadData, r"a label is no whole number"),
        ((Pairs(40, picture, lambda n: n - 1), Pairs(20, picture)), BadData, r"sample 0 has the label -1, below 0"),
        (
            (Pairs(40, picture), Pairs(20, picture, lambda n: 11)),
            BadData,
            r"test images have a label 11, the training ima",
        ),
        (([(1, 2, 3)] * 40, Pairs(20, picture)), BadData, r"item 0 is tuple, not a pair \(image, label\)"),
    ],
)
def test_functions_that_return_something_else(
    monkeypatch: pytest.MonkeyPatch, made: object, kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        own(monkeypatch, made)


def test_own_images_of_several_sizes_ask_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def growing(index: int) -> Image.Image:
        return Image.fromarray(pixels(12 + index // 30, 12, seed=index))

    pair = (Pairs(29, growing), Pairs(40, growing))
    data = own(monkeypatch, pair)
    with pytest.raises(
        BadData, match=r"test: the image 30 is \[1, 13, 12\], the first one \[1, 12, 12\]\n  do: set size"
    ):
        list(data.test)
    assert len(list(own(monkeypatch, pair, size=8).test)) == 4


def test_an_import_that_is_not_there() -> None:
    with pytest.raises(BadRequest, match="there is no module 'no_such_module'"):
        open_data("no_such_module:images", allow_import=True)
    with pytest.raises(BadRequest, match="has no function 'sqrtt'; did you mean 'sqrt'"):
        open_data("math:sqrtt", allow_import=True)
