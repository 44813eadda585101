"""The parts of a set, their order and their augmentation: who is in which, and what they depend on."""

from __future__ import annotations

import dataclasses
import gzip
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from made_data import write_fashion, write_folder
from secateur.errors import BadRequest
from secateur.zoo.data import DataSettings, Loader, open_data
from secateur.zoo.data.grey import DEBIAN
from secateur.zoo.data.images import Images, Shift, moments, shift_table
from secateur.zoo.data.splits import draw_in_proportion, limit_to
from secateur.zoo.torchvision_shim import import_torchvision

# the machine that runs this may have a torchvision that does not match its torch
pytestmark = pytest.mark.filterwarnings("ignore::secateur.zoo.torchvision_shim.TorchvisionMismatch")
DIGITS = DataSettings("digits", batch=64)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> DataSettings:
    path = write_folder(tmp_path_factory.mktemp("images"))
    return DataSettings(f"folder:{path}", batch=6, size=24, validation=4)


def read(loader: Loader, epoch: int = 0, start: int = 0) -> tuple[Tensor, Tensor]:
    inputs, targets = zip(*loader.epoch(epoch, start), strict=True)
    return torch.cat(inputs), torch.cat(targets)


def same(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> bool:
    return torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])


# --- parts


def test_parts_never_overlap_and_keep_the_proportions() -> None:
    data = open_data(DIGITS)
    parts = [set(part.members.tolist()) for part in (data.train, data.validation, data.test)]
    assert [len(part) for part in parts] == [1294, 144, 359]
    assert len(set.union(*parts)) == 1797
    shares = torch.bincount(torch.cat([part.targets for part in (data.train, data.validation, data.test)])) / 1797
    for part in (data.train, data.validation, data.test):
        assert (torch.bincount(part.targets) - shares * part.samples).abs().max() <= 1
    assert set(data.calibration.members.tolist()) <= parts[0]


def test_the_seed_does_not_move_an_image_to_another_part() -> None:
    one, other = open_data(DIGITS, seed=0), open_data(DIGITS, seed=1)
    for name in ("train", "validation", "test"):
        assert torch.equal(getattr(one, name).members, getattr(other, name).members)
    assert not torch.equal(one.calibration.members, other.calibration.members)
    assert not same(read(one.train), read(other.train))


@given(st.lists(st.integers(0, 5), min_size=1, max_size=80), st.floats(0, 1), st.integers(0, 3))
def test_draws_are_in_proportion(labels: list[int], fraction: float, seed: int) -> None:
    every = torch.tensor(labels)
    count = int(fraction * len(labels))
    drawn, rest = draw_in_proportion(every, count, seed)
    assert len(drawn) == count
    assert torch.equal(torch.cat([drawn, rest]).sort().values, torch.arange(len(labels)))
    sizes, taken = torch.bincount(every), torch.bincount(every[drawn], minlength=int(every.max()) + 1)
    present = sizes > 0
    if count <= len(labels) - int(present.sum()):
        assert (taken[present] < sizes[present]).all(), "the last of a class was taken"
    if (sizes * (1 - count / len(labels)) >= 1)[present].all():
        assert ((taken - sizes * count / len(labels)).abs() < 1 + 1e-9).all()


def test_what_is_left_to_draw_goes_round() -> None:
    labels = torch.arange(150) % 10
    assert torch.bincount(labels[draw_in_proportion(labels, 25, 0)[0]]).tolist() == [3] * 5 + [2] * 5
    assert torch.bincount(labels[draw_in_proportion(labels, 149, 0)[0]]).tolist() == [15] * 9 + [14]


def test_a_limit_leaves_something_of_every_class() -> None:
    labels = torch.cat([torch.zeros(990, dtype=torch.int64), torch.arange(1, 10)])
    labels = labels[torch.randperm(999, generator=torch.Generator().manual_seed(0))]
    assert torch.bincount(labels[limit_to(labels, 10, 0)]).tolist() == [1] * 10
    assert torch.bincount(labels[limit_to(labels, 100, 0)]).tolist() == [91] + [1] * 9
    with pytest.raises(BadRequest, match="limit=9 is too small: there are 10 classes"):
        limit_to(labels, 9, 0)
    uneven = torch.repeat_interleave(torch.arange(3), torch.tensor([600, 395, 5]))
    # shares of 30, 19.75 and 0.25: the second class was to have 20, which is more above its share than any other
    assert torch.bincount(uneven[limit_to(uneven, 50, 0)]).tolist() == [30, 19, 1]
    # where everybody has a share of one or more, nothing but the share counts
    for limit in (200, 201, 999):
        assert torch.equal(limit_to(uneven, limit, 3), draw_in_proportion(uneven, limit, 3)[0])


def test_validation_and_limit_as_numbers() -> None:
    data = open_data(dataclasses.replace(DIGITS, validation=100, limit=200))
    assert (data.validation.samples, data.train.samples, len(data.train), data.test.samples) == (100, 200, 3, 359)
    assert set(torch.bincount(data.train.targets).tolist()) <= {19, 20, 21}
    other = open_data(dataclasses.replace(DIGITS, validation=100, limit=200), seed=1)
    assert set(other.train.members.tolist()) != set(data.train.members.tolist())
    assert torch.equal(other.validation.members, data.validation.members)
    nothing = open_data(dataclasses.replace(DIGITS, validation=0))
    assert (nothing.validation.samples, len(nothing.validation), list(nothing.validation)) == (0, 0, [])
    assert open_data(dataclasses.replace(DIGITS, limit=10**6)).train.samples == 1294


def test_the_demo_s_digits() -> None:
    data = open_data(DataSettings("digits", size=16, channels=3, batch=64))
    inputs, targets = read(data.validation)
    assert inputs.shape == (144, 3, 16, 16)
    assert inputs.dtype == torch.float32
    assert data.shape == (3, 16, 16)
    assert torch.equal(inputs[:, 0], inputs[:, 2])
    assert data.classes == tuple("0123456789")
    assert targets.dtype == torch.int64
    both = torch.cat([inputs, read(data.calibration)[0]])
    assert abs(float(both.mean())) < 0.01
    assert abs(float(both.std()) - 1) < 0.01
    assert next(iter(open_data(DataSettings("digits", size=8)).test))[0].shape == (128, 1, 8, 8)
    assert open_data("digits").shape == (1, 16, 16)


# --- order and randomness


def test_an_epoch_depends_on_its_number_alone() -> None:
    train = open_data(DIGITS).train
    first = read(train, 3)
    state = torch.get_rng_state()
    assert same(first, read(train, 3))
    assert same(first, read(open_data(DIGITS).train, 3))
    assert torch.equal(state, torch.get_rng_state()), "torch's own generator was drawn from"
    assert not torch.equal(first[1], read(train, 4)[1])
    assert same(read(train), tuple(torch.cat(column) for column in zip(*train, strict=True)))
    assert len(first[1]) == len(train) * 64 < train.samples, "the incomplete batch is dropped"


def test_resuming_gives_the_tail_and_reads_nothing_before_it(folder: DataSettings) -> None:
    for settings in (DIGITS, folder):
        train = open_data(settings).train
        inputs, targets = read(train, 2)
        for start in range(len(train)):
            assert same(read(train, 2, start), (inputs[start * train.batch :], targets[start * train.batch :]))
        assert list(train.epoch(2, len(train))) == []
    calls: list[int] = []

    def item(index: int, epoch: int | None) -> Tensor:
        calls.append(index)
        return torch.zeros(1, 2, 2)

    loader = Loader(Images(item, torch.zeros(10).long(), None), torch.arange(10), batch=2, training=True)
    list(loader.epoch(0, 3))
    assert len(calls) == 4


@pytest.mark.parametrize("name", ["digits", "folder"])
def test_workers_change_nothing(name: str, folder: DataSettings) -> None:
    settings = DIGITS if name == "digits" else folder
    alone, helped = (open_data(dataclasses.replace(settings, workers=workers)).train for workers in (0, 2))
    state = torch.get_rng_state()
    for epoch in (0, 1):
        assert same(read(alone, epoch), read(helped, epoch))
    unfinished = helped.epoch(2)
    half = next(unfinished)
    assert same(read(alone, 3), read(helped, 3)), "a second epoch while the first is being read"
    assert same(half, next(alone.epoch(2)))
    assert same(next(unfinished), next(alone.epoch(2, 1)))
    unfinished.close()
    assert same(read(alone, 4, 1), read(helped, 4, 1))
    assert torch.equal(state, torch.get_rng_state())


def test_an_image_is_augmented_by_its_index_not_by_its_place(folder: DataSettings) -> None:
    for settings in (DIGITS, folder):
        train = open_data(settings).train
        images, some = train._images, train.members[:6]
        together = images.read(some, 5)
        torch.manual_seed(1)
        np.random.seed(1)
        random.seed(1)
        states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
        alone = torch.cat([images.read(some[n : n + 1], 5) for n in (5, 0, 3, 1, 4, 2)])
        assert torch.equal(alone, together[[5, 0, 3, 1, 4, 2]])
        assert torch.equal(states[0], torch.get_rng_state())
        assert np.array_equal(states[1], np.random.get_state()[1])
        assert states[2] == random.getstate()
        assert not torch.equal(together, images.read(some, 6))
        assert not torch.equal(together, images.read(some, None))


def test_only_training_is_augmented_and_shuffled(folder: DataSettings) -> None:
    for settings in (DIGITS, folder):
        data = open_data(settings)
        for part in (data.validation, data.test, data.calibration):
            assert same(read(part, 0), read(part, 7))
            assert torch.equal(read(part)[0], part._images.read(part.members, None))
            assert torch.equal(read(part)[1], part.targets)
        plain = open_data(dataclasses.replace(settings, augment="none")).train
        order = torch.cat([indices for _, indices in plain._keys(0, 0)])
        assert torch.equal(read(plain)[0], plain._images.read(order, None))
        assert not torch.equal(order, order.sort().values)


def test_small_images_are_augmented_as_torchvision_does_it() -> None:
    import_torchvision()
    from torchvision.transforms.v2 import functional as v2

    images = torch.randint(0, 256, (40, 3, 32, 32), dtype=torch.uint8)
    shift = Shift(pixels=4, flip=True, count=50, seed=3)
    indices = torch.randperm(50)[:40]
    corners, flips = shift_table(shift, 2)
    assert {0, 8} <= set(corners.flatten().tolist()) <= set(range(9))
    for image, index, moved in zip(images, indices, shift(images, indices, 2), strict=True):
        top, left = corners[index].tolist()
        expected = v2.crop(v2.pad(image, [4]), top, left, 32, 32)
        assert torch.equal(moved, v2.horizontal_flip(expected) if flips[index] else expected)
    unflipped = dataclasses.replace(shift, flip=False)
    where = indices.tolist().index(next(i for i in indices.tolist() if not flips[i]))
    assert torch.equal(unflipped(images, indices, 2)[where], shift(images, indices, 2)[where])


# --- calibration and the first batches


def test_calibration_has_whole_batches(folder: DataSettings) -> None:
    data = open_data(DIGITS)
    assert [len(targets) for _, targets in data.calibration] == [64] * 20
    assert data.calibration.samples == 1280
    loader = Loader(data.train._images, torch.arange(5), batch=64)
    assert [len(targets) for _, targets in loader] == [5]


def test_the_first_batches() -> None:
    data = open_data(DIGITS)
    short = data.train.first(3)
    assert (len(short), short.samples, short.batch) == (3, 192, 64)
    assert same(read(short, 2), tuple(column[:192] for column in read(data.train, 2)))
    assert (len(data.test.first(99)), data.test.first(99).samples) == (6, 359)
    assert same(read(short, 2, 1), tuple(column[64:192] for column in read(data.train, 2)))
    for wrong in (lambda: data.train.first(0), lambda: data.train.epoch(-1), lambda: data.train.epoch(0, -1)):
        with pytest.raises(BadRequest):
            wrong()


# --- settings


def test_settings_are_checked_by_pydantic_as_a_section() -> None:
    section = TypeAdapter(DataSettings)
    assert section.validate_python({"name": "digits", "validation": 500}).validation == 500
    assert isinstance(section.validate_python({"name": "digits", "validation": 500}).validation, int)
    with pytest.raises(ValidationError, match=r"bacth\n.*[Uu]nexpected"):
        section.validate_python({"name": "digits", "bacth": 3})
    assert "validation" in section.json_schema()["properties"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "digit"}, r"there is no data set 'digit'; did you mean 'digits'\?\n  do: write one of digits, fash"),
        ({"name": "CIFAR-10"}, r"no data set 'CIFAR-10'; did you mean 'cifar10'\?"),
        ({"augment": "stadard"}, r"augment='stadard' means nothing; did you mean 'standard'\?"),
        ({"batch": 0}, r"batch=0: it must be a whole number of at least 1"),
        ({"batch": True}, r"batch=True: it must be a whole number"),
        ({"workers": -1}, r"workers=-1: it must be a whole number of at least 0"),
        ({"size": 0}, r"size=0: it must be a whole number of at least 1"),
        ({"limit": 0}, r"limit=0: it must be"),
        ({"limit": 9}, r"limit=9 is too small: there are 10 classes to train on\n  do: choose at least 10"),
        ({"limit": 63}, r"there are 63 images to train on, fewer than one batch of 64\n  do: choose batch=63 or less"),
        ({"batch": 1295}, r"there are 1294 images to train on, fewer than one batch of 1295\n  do: choose batch=1294"),
        ({"validation": 1.0}, r"validation=1.0 is too large: as a fraction it must lie below 1\n  do: write a whole"),
        ({"validation": -0.1}, r"validation=-0.1: it must be a fraction below 1 or a whole number"),
        ({"validation": float("nan")}, r"validation=nan: it must be a fraction"),
        ({"validation": 1e-9}, r"validation=1e-09 of digits's 1438 training images is not a single one"),
        (
            {"validation": 1429},
            r"validation=1429 is too large: digits has 1438 training images of 10 classes, and one ",
        ),
        ({"channels": 2}, r"channels=2: the grey images of digits can have 1 channel or 3"),
        ({"name": "cifar10", "channels": 1}, r"channels=1: the images of cifar10 have 3\n  do: leave channels out"),
        ({"name": "math:sqrt"}, r"'math:sqrt' would import code, which is not allowed here"),
        ({"name": "folder:"}, r"'folder:' names no folder\n  do: write folder:PATH"),
    ],
)
def test_settings_that_mean_nothing(changes: dict[str, object], message: str) -> None:
    with pytest.raises(BadRequest, match=message):
        open_data(dataclasses.replace(DIGITS, **changes))


# --- the real Fashion-MNIST, where Debian's package is installed


@pytest.mark.skipif(not DEBIAN.is_dir(), reason="dataset-fashion-mnist is not installed")
def test_the_real_fashion_mnist(tmp_path: Path) -> None:
    import_torchvision()
    from torchvision.datasets import FashionMNIST

    data = open_data("fashion-mnist")
    assert [part.samples for part in (data.train, data.validation, data.test)] == [54000, 6000, 10000]
    assert torch.bincount(data.validation.targets).tolist() == [600] * 10
    assert torch.bincount(data.test.targets).tolist() == [1000] * 10
    pixels = data.train._images.pixels
    assert isinstance(pixels, Tensor)
    mean, std = moments(pixels.__getitem__, torch.arange(60000))
    assert round(mean[0], 4) == data.mean[0] == 0.2860
    assert round(std[0], 4) == data.std[0] == 0.3530
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for path in DEBIAN.glob("*.gz"):
        with gzip.open(path) as packed, (raw / path.stem).open("wb") as plain:
            shutil.copyfileobj(packed, plain)
    theirs = FashionMNIST(tmp_path, train=False)
    ours = data.test._images
    assert torch.equal(ours.pixels[:, 0], theirs.data)
    assert torch.equal(ours.labels, theirs.targets)
    assert list(data.classes) == theirs.classes


def test_fashion_mnist_at_another_size(tmp_path: Path) -> None:
    write_fashion(tmp_path)
    data = open_data(DataSettings("fashion-mnist", root=tmp_path, size=32, channels=3, batch=10))
    assert data.shape == (3, 32, 32)
    assert next(iter(data.train))[0].shape == (10, 3, 32, 32)
    assert (data.train.samples, data.validation.samples, data.test.samples) == (54, 6, 20)


def test_images_of_each_class_are_the_first_of_a_fixed_order() -> None:
    calibration = open_data(DataSettings("digits", batch=50), seed=3).calibration
    few = calibration.of_each_class(4)
    assert (few.samples, len(few), few.batch) == (40, 1, 50)
    assert few.targets.bincount().tolist() == [4] * 10
    members, labels = calibration.members.tolist(), calibration.targets.tolist()
    wanted = [
        m for place, (m, label) in enumerate(zip(members, labels, strict=True)) if labels[:place].count(label) < 4
    ]
    assert few.members.tolist() == wanted
    (inputs, targets), *none = few
    assert not none
    assert torch.equal(targets, few.targets)
    assert torch.equal(
        inputs[:3], torch.cat([batch[0] for batch in calibration])[[members.index(m) for m in wanted[:3]]]
    )
    assert calibration.first(2).of_each_class(1).samples == 10


def test_images_of_each_class_that_are_not_there() -> None:
    data = open_data(DataSettings("digits", batch=50, limit=100))
    with pytest.raises(
        BadRequest, match=r"per_class=11: of class \d there are only \d+ images among these 100\n  do: ask"
    ):
        data.calibration.of_each_class(11)
    for loader, count in ((data.train, 1), (data.calibration, 0)):
        with pytest.raises(BadRequest, match=rf"of_each_class\({count}\): it must be at least one image"):
            loader.of_each_class(count)
