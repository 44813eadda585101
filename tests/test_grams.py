"""Output moments against loops over channels: what comes through each is found by zeroing all others."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from secateur import correlations, grams
from secateur.patches import Layout

D = torch.float64
CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


@dataclass(frozen=True, eq=False)
class Case:
    """A reader: its layout, input and weight, and how torch itself computes it."""

    layout: Layout
    x: Tensor
    weight: Tensor
    run: Callable[[Tensor], Tensor]

    def channels(self, count: int, columns: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Columns, in order, and which of ``count`` channels they are of, round and round."""
        found = torch.arange(self.x.shape[self.layout.channels_axis]) if columns is None else columns
        return found, torch.arange(len(found)) % count

    def through(self, columns: Tensor) -> Tensor:
        """All outputs, partition by partition as ``patches.outputs`` has them, through these columns alone."""
        kept = torch.zeros_like(self.x)
        if self.layout.kind == "linear":
            kept[..., columns] = self.x[..., columns]
            return self.run(kept).reshape(1, -1, self.run(kept).shape[-1])
        kept[:, columns] = self.x[:, columns]
        y = self.run(kept)
        return y.flatten(2).unflatten(1, (self.layout.groups, -1)).permute(1, 0, 3, 2).flatten(1, 2)

    def parts(self, columns: Tensor, channels: Tensor, count: int) -> Tensor:
        """``[C, G, N, O]``."""
        return torch.stack([self.through(columns[channels == c]) for c in range(count)])


def convolution(
    sizes: tuple[int, ...],
    kernel: tuple[int, ...],
    stride: int = 1,
    dilation: int = 1,
    padding: int | tuple[tuple[int, int], ...] = 0,
    *,
    groups: int = 1,
    inputs: int = 6,
    outputs: int = 4,
    batch: int = 3,
) -> Case:
    rank = len(sizes)
    both = ((padding, padding),) * rank if isinstance(padding, int) else padding
    layout = Layout("conv", False, groups, kernel, (stride,) * rank, (dilation,) * rank, both)
    x = torch.randn(batch, inputs, *sizes, dtype=D)
    weight = torch.randn(outputs, inputs // groups, *kernel, dtype=D)
    flat = [n for pair in reversed(both) for n in pair]
    return Case(
        layout,
        x,
        weight,
        lambda v: CONVOLUTIONS[rank](F.pad(v, flat), weight, stride=stride, dilation=dilation, groups=groups),
    )


def transposed(
    sizes: tuple[int, ...], kernel: tuple[int, ...], stride: int, padding: int, more: int, dilation: int, groups: int
) -> Case:
    rank = len(sizes)
    x, weight = torch.randn(2, 6, *sizes, dtype=D), torch.randn(6, 4, *kernel, dtype=D)
    spans = [dilation * (k - 1) for k in kernel]
    around = tuple((span - padding, span - padding + more) for span in spans)
    layout = Layout("transposed", False, groups, kernel, (stride,) * rank, (dilation,) * rank, around)
    return Case(layout, x, weight, lambda v: TRANSPOSED[rank](v, weight, None, stride, padding, more, groups, dilation))


def linear(shape: tuple[int, ...], outputs: int, *, turned: bool = False) -> Case:
    x, weight = torch.randn(*shape, dtype=D), torch.randn(outputs, shape[-1], dtype=D)
    return Case(Layout("linear", turned), x, weight.mT if turned else weight, lambda v: F.linear(v, weight))


CASES: dict[str, Callable[[], Case]] = {
    "3x3": lambda: convolution((7, 9), (3, 3), padding=1),
    "3x3 valid": lambda: convolution((5, 4), (3, 3)),
    "3x3 as large as the input": lambda: convolution((3, 3), (3, 3)),
    "3x3 on one position": lambda: convolution((1, 1), (3, 3), padding=1),
    "stride 2": lambda: convolution((8, 7), (3, 3), 2, padding=1),
    "stride 3": lambda: convolution((8, 11), (3, 3), 3, padding=1),
    "stride beyond the kernel": lambda: convolution((9, 8), (2, 2), 4),
    "1x1": lambda: convolution((5, 6), (1, 1)),
    "1x1 stride 2": lambda: convolution((5, 6), (1, 1), 2),
    "dilation": lambda: convolution((7, 6), (3, 3), 1, 2, 2),
    "dilation and stride": lambda: convolution((12, 11), (3, 3), 2, 3, 3),
    "dilation beyond the input": lambda: convolution((4, 5), (3, 3), 1, 6, 6),
    "same, even": lambda: convolution((6, 7), (4, 2), padding=((1, 2), (0, 1))),
    "asymmetric": lambda: convolution((6, 7), (3, 3), 2, padding=((0, 1), (2, 0))),
    "5x5": lambda: convolution((9, 8), (5, 5), padding=2),
    "7x7 stride 2": lambda: convolution((9, 8), (7, 7), 2, padding=3),
    "1d": lambda: convolution((11,), (3,), padding=1),
    "1d stride 2": lambda: convolution((11,), (5,), 2, padding=2),
    "3d": lambda: convolution((4, 5, 6), (3, 3, 3), padding=1),
    "3d stride 2": lambda: convolution((4, 5, 6), (3, 2, 3), 2, padding=1),
    "grouped": lambda: convolution((7, 6), (3, 3), padding=1, groups=2),
    "grouped stride 2": lambda: convolution((7, 6), (3, 3), 2, padding=1, groups=3, outputs=6),
    "transposed": lambda: transposed((4, 5), (3, 3), 2, 1, 1, 1, 1),
    "transposed grouped": lambda: transposed((4, 5), (4, 4), 2, 1, 0, 1, 2),
    "transposed dilation": lambda: transposed((4, 5), (3, 2), 3, 0, 0, 2, 1),
    "transposed cropped": lambda: transposed((5, 5), (2, 2), 1, 2, 0, 1, 1),
    "transposed 1d": lambda: transposed((6,), (4,), 2, 1, 0, 1, 1),
    "linear": lambda: linear((5, 12), 7),
    "linear of sequences": lambda: linear((2, 3, 12), 7),
    "linear turned": lambda: linear((4, 12), 5, turned=True),
}
SOME = ["3x3", "stride 2", "grouped", "transposed grouped", "linear"]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def first_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grams, "_costs", lambda *_: (1.0, 1.0, math.inf))


def second_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grams, "_costs", lambda *_: (1.0, 1.0, 0.0))


def always_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    first_way(monkeypatch)
    monkeypatch.setattr(correlations, "TRANSFORM", -1e6)
    correlations._tiling.cache_clear()


def never_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    first_way(monkeypatch)
    monkeypatch.setattr(correlations, "TRANSFORM", 1e9)
    monkeypatch.setattr(correlations, "COPY", -1e6)
    correlations._tiling.cache_clear()


WAYS = {"moments": first_way, "outputs": second_way, "tiles": always_tiles, "boxes": never_tiles}


@pytest.fixture(params=WAYS)
def _way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> object:
    WAYS[request.param](monkeypatch)
    yield
    correlations._tiling.cache_clear()


def added(case: Case, columns: Tensor, channels: Tensor, count: int, **options: Tensor) -> grams.Sums:
    sums = grams.Sums.of(columns, channels, count, torch.device("cpu"))
    grams.add_moments_(sums, case.x, case.weight, case.layout, **options)
    grams.finish_([sums])
    return sums


def close(found: Tensor, wanted: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance * float(wanted.abs().max()))


@pytest.mark.usefixtures("_way")
@pytest.mark.parametrize("name", CASES)
def test_moments_are_those_of_the_outputs(name: str) -> None:
    case = CASES[name]()
    check(case, *case.channels(case.x.shape[case.layout.channels_axis]))


@pytest.mark.usefixtures("_way")
@pytest.mark.parametrize("name", SOME)
def test_channels_of_several_columns(name: str) -> None:
    """Which may lie in several partitions."""
    case = CASES[name]()
    check(case, *case.channels(3))


def check(case: Case, columns: Tensor, channels: Tensor) -> None:
    count = int(channels.max()) + 1
    z = case.parts(columns, channels, count).flatten(1)
    found = added(case, columns, channels, count)
    close(found.gram, z @ z.mT)
    close(found.target, z @ z.sum(0))
    assert float(found.goal) == pytest.approx(float(z.sum(0).square().sum()), rel=1e-10)
    assert float(found.energy) == pytest.approx(float(z.sum(0).square().sum()), rel=1e-10)
    assert float(found.samples) == z.shape[1]


@pytest.mark.usefixtures("_way")
@pytest.mark.parametrize("name", SOME)
def test_some_columns_in_any_order(name: str) -> None:
    """As behind a concatenation: partitions and channels have different numbers of them, or none."""
    case = CASES[name]()
    width = case.x.shape[case.layout.channels_axis]
    columns = torch.randperm(width)[: width - 2]
    channels = torch.tensor([2, 0, 1, 2, 2, 0, 1, 1, 2, 0][: len(columns)])
    z = case.parts(columns, channels, 4).flatten(1)
    found = added(case, columns, channels, 4)
    close(found.gram, z @ z.mT)
    assert float(found.gram[3].abs().max()) == 0
    everything = case.through(torch.arange(width))
    assert float(found.energy) == pytest.approx(float(everything.square().sum()), rel=1e-10)
    assert float(found.goal) == pytest.approx(float(z.sum(0).square().sum()), rel=1e-10)


@pytest.mark.parametrize("name", CASES)
def test_another_target(name: str) -> None:
    case = CASES[name]()
    columns, channels = case.channels(3, torch.randperm(case.x.shape[case.layout.channels_axis])[:5])
    z = case.parts(columns, channels, 3)
    t = torch.randn(z.shape[1:], dtype=D)
    found = added(case, columns, channels, 3, t=t, energy=torch.tensor(7.0, dtype=D))
    close(found.gram, z.flatten(1) @ z.flatten(1).mT)
    close(found.target, z.flatten(1) @ t.flatten())
    assert float(found.goal) == pytest.approx(float(t.square().sum()), rel=1e-12)
    assert float(found.energy) == 7


@pytest.mark.usefixtures("_way")
@pytest.mark.parametrize("name", ["3x3", "stride 2", "linear", "transposed"])
def test_batches_held_back_or_not(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[name]()
    columns, channels = case.channels(6)
    want = added(case, columns, channels, 6)
    for hold, piece, block in ((0, 2**30, 1), (2**24, 1, 2**30)):
        for constant, value in (("HOLD", hold), ("PIECE", piece), ("BLOCK", block)):
            monkeypatch.setattr(grams, constant, value)
        sums = grams.Sums.of(columns, channels, 6, torch.device("cpu"))
        for part in case.x.split(1):
            own, weight = part.clone(), case.weight.clone()
            grams.add_moments_(sums, own, weight, case.layout)
            for tensor in (own, weight):  # what the network does to them later does not matter
                tensor.fill_(torch.nan)
        grams.finish_([sums])
        for one, other in zip(sums.tensors(), want.tensors(), strict=True):
            close(one, other)


def test_a_target_beside_none() -> None:
    """Inputs that were held back for another purpose are added first."""
    case = CASES["3x3"]()
    columns, channels = case.channels(6)
    z = case.parts(columns, channels, 6)
    t = torch.randn(z.shape[1:], dtype=D)
    sums = grams.Sums.of(columns, channels, 6, torch.device("cpu"))
    grams.add_moments_(sums, case.x, case.weight, case.layout)
    grams.add_moments_(sums, case.x, case.weight, case.layout, t=t)
    grams.finish_([sums])
    flat = z.flatten(1)
    close(sums.gram, 2 * flat @ flat.mT)
    close(sums.target, flat @ (flat.sum(0) + t.flatten()))
    assert float(sums.energy) == pytest.approx(2 * float(flat.sum(0).square().sum()), rel=1e-10)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("block", [grams.BLOCK, 1])
def test_draws_are_some_of_the_outputs(name: str, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grams, "BLOCK", block)
    case = CASES[name]()
    width = case.x.shape[case.layout.channels_axis]
    columns, channels = case.channels(3, torch.randperm(width)[: width - 1])
    z, y = case.parts(columns, channels, 4), case.through(torch.arange(width))
    parts, rows, filters = y.shape
    drawn = torch.randint(parts * filters, (9,)), torch.randint(rows, (9,))
    at = drawn[0] // filters, drawn[1], drawn[0] % filters
    for t in (None, torch.randn(9, dtype=D)):
        sums = grams.Sums.of(columns, channels, 4, torch.device("cpu"))
        grams.add_draws_(sums, case.x, case.weight, case.layout, draws=drawn, t=t)
        mine = z[(slice(None), *at)]
        goal = mine.sum(0) if t is None else t
        close(sums.gram, mine @ mine.mT)
        close(sums.target, mine @ goal)
        assert float(sums.goal) == pytest.approx(float(goal.square().sum()), rel=1e-10)
        assert float(sums.energy) == pytest.approx(float(y[at].square().sum()), rel=1e-10)
        assert float(sums.samples) == 9


class Largest(TorchDispatchMode):
    """How many numbers the largest tensor has that is made, views of ``known`` aside."""

    def __init__(self, known: Tensor) -> None:
        super().__init__()
        self.known, self.found = known.untyped_storage().data_ptr(), 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.untyped_storage().data_ptr() != self.known:
            self.found = max(self.found, result.numel())
        return result


@pytest.mark.parametrize("name", ["3x3", "stride 2", "transposed"])
def test_draws_make_no_patches_but_their_own(name: str) -> None:
    case = CASES[name]()
    x = case.x.repeat(1, 1, *[20] * len(case.layout.kernel))
    columns, channels = case.channels(6)
    sums = grams.Sums.of(columns, channels, 6, torch.device("cpu"))
    with Largest(x) as largest:
        grams.add_draws_(sums, x, case.weight, case.layout, draws=(torch.zeros(5).long(), torch.arange(5)))
    assert largest.found <= 5 * 6 * math.prod(case.layout.kernel) < x.numel() / 10


def test_samples_of_a_sequence_are_on_the_axis_that_counts_them() -> None:
    x = torch.zeros(4, 3, 6)
    layout = Layout("linear")
    assert grams.places_of(x, layout, 0).tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]]
    assert grams.places_of(x, layout, 1).tolist() == [[0, 3, 6, 9], [1, 4, 7, 10], [2, 5, 8, 11]]
    assert grams.places_of(x, layout).tolist() == [[*range(12)]]
    assert grams.places_of(x[0], layout, 0).tolist() == [[0], [1], [2]]


def test_single_precision_is_summed_in_double() -> None:
    case = convolution((14, 14), (3, 3), padding=1, inputs=32, outputs=32, batch=8)
    columns, channels = case.channels(32)
    x, weight = case.x.float(), case.weight.float()
    narrow = Case(case.layout, x, weight, case.run)
    wide = Case(case.layout, x.double(), weight.double(), case.run)
    assert narrow.x.dtype == torch.float32
    close(added(narrow, columns, channels, 32).gram, added(wide, columns, channels, 32).gram, 1e-13)


@pytest.mark.parametrize(
    ("tile", "sums"), [(t, r) for t, r in itertools.product(range(2, 12), range(1, 12)) if t + r <= 13]
)
def test_tiles_lose_no_digits(tile: int, sums: int) -> None:
    back, left, right = correlations._transforms(tile, sums)
    g, h = torch.rand(500, tile, dtype=D), torch.rand(500, tile + sums - 1, dtype=D)
    found = back @ ((left @ g.mT) * (right @ h.mT)).sum(1)
    wanted = torch.stack([(g * h[:, d : d + tile]).sum() for d in range(sums)])
    close(found, wanted, 1e-12)


def test_a_3x3_kernel_needs_thirteen_sums() -> None:
    geometry = correlations.geometry_of((7, 7), Layout("conv", False, 1, (3, 3), (1, 1), (1, 1), ((1, 1), (1, 1))))
    assert len(geometry.keys) == 13
    assert geometry.matrices[1] == 9 + 12 * 3  # 45 of 81 pairs of kernel positions
