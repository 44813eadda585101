"""Views and criteria against naive loops over the paper's formula."""

from __future__ import annotations

import dataclasses
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import secateur
from secateur.core import Group, GroupView, MapStatistics, OutputMoments, Slice
from secateur.criteria import CRITERIA, EVIDENCE, WEIGHTS, needs_data, needs_loss, reads, resolve
from secateur.errors import BadRequest, CannotPrune
from secateur.views import view


def _each(n: int, k: int = 1) -> np.ndarray:
    return np.arange(n * k, dtype=np.int64).reshape(n, k)


def _view(c: int = 5, f: int = 12, seed: int = 0) -> GroupView:
    make = torch.Generator().manual_seed(seed)
    seen = GroupView("g", torch.randn(c, f, generator=make), torch.randn(c, 7, generator=make), torch.randn(c, 2))
    maps, after = (MapStatistics(9, *torch.rand(6, c, 3, generator=make, dtype=torch.float64)) for _ in range(2))
    products = torch.rand(c, generator=make, dtype=torch.float64)
    seen = dataclasses.replace(seen, maps=maps, activations=after, products=products)
    return dataclasses.replace(seen, outputs=_moments(c, make), samples=_moments(c, make))


def _moments(c: int, make: torch.Generator) -> OutputMoments:
    """Of one reader of 40 samples."""
    z = torch.randn(40, c, generator=make, dtype=torch.float64)
    goal = z.sum(1).square().sum()[None]
    return OutputMoments(("u",), torch.tensor([40.0]), (z.mT @ z)[None], (z.mT @ z).sum(1)[None], goal, goal)


def test_view_flattens_filters_readers_and_scales_channel_by_channel() -> None:
    torch.manual_seed(0)
    tensors = {
        "a.weight": torch.randn(4, 3, 3, 3),
        "a.bias": torch.randn(4),
        "t.weight": torch.randn(2, 6, 2, 2),  # transposed: output channels lie on axis 1, here at an offset
        "bn.weight": torch.randn(4),
        "b.weight": torch.randn(5, 4, 1, 1),
        "fc.weight": torch.randn(7, 8),  # behind a flattened map of two positions
    }
    group = Group(
        "a",
        4,
        (
            Slice("a.weight", 0, _each(4), "writes"),
            Slice("a.bias", 0, _each(4), "writes"),
            Slice("t.weight", 1, _each(4) + 2, "writes"),
            Slice("bn.weight", 0, _each(4), "scales"),
            Slice("b.weight", 1, _each(4)[[2, 0, 3, 1]], "reads"),
            Slice("fc.weight", 1, _each(4, 2), "reads"),
        ),
    )
    seen = view(group, tensors, n_keep=3, seed=9)
    for c, place in enumerate([2, 0, 3, 1]):
        filters = [*tensors["a.weight"][c].flatten().tolist(), *tensors["t.weight"][:, c + 2].flatten().tolist()]
        readers = [*tensors["b.weight"][:, place].flatten().tolist()]
        readers += [*tensors["fc.weight"][:, 2 * c].tolist(), *tensors["fc.weight"][:, 2 * c + 1].tolist()]
        assert seen.filters[c].tolist() == filters
        assert seen.readers[c].tolist() == readers
        assert seen.scales[c].tolist() == [tensors["bn.weight"][c].item()]
    assert (seen.name, seen.n_keep, seen.seed) == ("a", 3, 9)


@pytest.mark.parametrize(
    ("given", "seen"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_view_widens_halves_and_keeps_the_rest(given: torch.dtype, seen: torch.dtype) -> None:
    weight = torch.randn(4, 3).to(given).requires_grad_()
    matrix = view(Group("a", 4, (Slice("w", 0, _each(4), "writes"),)), {"w": weight}).filters
    assert matrix.dtype == seen
    assert not matrix.requires_grad
    assert torch.equal(matrix, weight.detach().to(seen))


def test_view_leaves_out_integers_and_unwanted_matrices_unless_nothing_writes_the_group() -> None:
    tensors = {"w": torch.randn(4, 3), "r": torch.randn(2, 4), "index": torch.arange(4)}
    writes, reads = Slice("w", 0, _each(4), "writes"), Slice("r", 1, _each(4), "reads")
    seen = view(Group("a", 4, (writes, reads, Slice("index", 0, _each(4), "scales"))), tensors, fields=("filters",))
    assert [tuple(m.shape) for m in (seen.filters, seen.readers, seen.scales)] == [(4, 3), (4, 0), (4, 0)]
    seen = view(Group("a", 4, (reads, Slice("index", 0, _each(4), "scales"))), tensors, fields=("filters",))
    assert [tuple(m.shape) for m in (seen.filters, seen.readers, seen.scales)] == [(4, 0), (4, 2), (4, 0)]


def test_view_names_the_tensor_that_is_not_finite_or_not_there() -> None:
    weight = torch.ones(4, 3)
    weight[1, 1], weight[2] = math.nan, math.inf
    group = Group("a", 4, (Slice("w", 0, _each(4), "writes"),))
    with pytest.raises(CannotPrune, match=r"^'w' holds 4 of 12 values that are not finite.*\n  its channels .* 'a'"):
        view(group, {"w": weight})
    with pytest.raises(CannotPrune, match=r"group 'a' lies in the tensor 'w', which is not among the 1 tensors given"):
        view(group, {"x": weight})
    huge = torch.full((4, 3), 3e38)  # the sum overflows, the values do not
    assert torch.equal(view(group, {"w": huge}).filters, huge)


@pytest.mark.parametrize("seed", range(3))
def test_norms_equal_the_naive_loops(seed: int) -> None:
    seen = _view(6, 17, seed)
    rows = seen.filters.tolist()
    l1 = [sum(abs(w) for w in row) for row in rows]
    l2 = [math.sqrt(sum(w * w for w in row)) for row in rows]
    assert CRITERIA["l1"](seen).tolist() == pytest.approx(l1, rel=1e-12)
    assert CRITERIA["l2"](seen).tolist() == pytest.approx(l2, rel=1e-12)
    assert CRITERIA["largest"](seen).tolist() == pytest.approx([-s for s in l1], rel=1e-12)


def test_norms_fall_back_to_readers_then_scales_then_refuse() -> None:
    seen = _view()
    no_filters = dataclasses.replace(seen, filters=torch.empty(5, 0))
    assert torch.equal(CRITERIA["l1"](no_filters), seen.readers.double().abs().sum(1))
    only_scales = dataclasses.replace(no_filters, readers=torch.empty(5, 0))
    assert torch.equal(CRITERIA["l1"](only_scales), seen.scales.double().abs().sum(1))
    with pytest.raises(CannotPrune, match="group 'g' has no weights to take a norm of"):
        CRITERIA["l2"](dataclasses.replace(only_scales, scales=torch.empty(5, 0)))


def test_random_depends_on_seed_and_name_alone() -> None:
    seen = _view()
    first = CRITERIA["random"](seen)
    torch.manual_seed(123)
    assert torch.equal(first, CRITERIA["random"](_view(seed=4)))
    assert not torch.equal(first, CRITERIA["random"](dataclasses.replace(seen, seed=1)))
    assert not torch.equal(first, CRITERIA["random"](dataclasses.replace(seen, name="h")))
    assert first.shape == (5,)
    assert CRITERIA["random"](dataclasses.replace(seen, seed=-1)).shape == (5,)


@pytest.mark.parametrize("name", CRITERIA)
def test_every_criterion_reads_only_what_it_says(name: str) -> None:
    seen = _view()
    unread = {field: getattr(seen, field)[:, :0] for field in WEIGHTS if field not in reads(name)}
    unread |= {field: None for field in EVIDENCE if field not in reads(name)}
    found = CRITERIA[name](seen)
    assert torch.equal(found, CRITERIA[name](dataclasses.replace(seen, **unread)))
    assert (found.shape, found.dtype) == ((5,), torch.float64)
    (field,) = reads(name)
    if name != "random":
        other = getattr(_view(seed=7), field)
        assert not torch.equal(found, CRITERIA[name](dataclasses.replace(seen, **{field: other})))


STATISTICS = {
    "mean_mean": lambda s, c, m: s.mean[c, m],
    "mean_std": lambda s, c, m: s.std[c, m],
    "mean_l1": lambda s, c, m: s.l1[c, m],
    "mean_l2": lambda s, c, m: s.l2[c, m],
    "var_l2": lambda s, c, m: max(s.l2_squared[c, m] - s.l2[c, m] ** 2, 0),
}


@pytest.mark.parametrize("name", STATISTICS)
def test_map_criteria_are_means_over_the_maps_of_a_channel(name: str) -> None:
    seen = _view()
    want = [sum(float(STATISTICS[name](seen.maps, c, m)) for m in range(3)) / 3 for c in range(5)]
    assert CRITERIA[name](seen).tolist() == pytest.approx(want, rel=1e-12)


def test_apoz_scale_and_taylor_equal_the_naive_loops() -> None:
    seen = _view()
    assert seen.activations is not None
    zeros = seen.activations.zeros.tolist()
    assert CRITERIA["apoz"](seen).tolist() == pytest.approx([1 - sum(row) / 3 for row in zeros], rel=1e-12)
    scales = [(abs(a) + abs(b)) / 2 for a, b in seen.scales.tolist()]
    assert CRITERIA["bn_scale"](seen).tolist() == pytest.approx(scales, rel=1e-12)
    assert torch.equal(CRITERIA["taylor"](seen), seen.products)


def _distances(rows: torch.Tensor) -> list[float]:
    return [sum(math.sqrt(float(((a - b) ** 2).sum())) for b in rows) for a in rows]


def _hybrid(rows: torch.Tensor) -> list[float]:
    def angle(a: torch.Tensor, b: torch.Tensor) -> float:
        length = float(a.norm() * b.norm())
        return abs(float(a @ b)) / length if length else 0.0

    return [sum(float(a.norm() * b.norm()) * (1 - angle(a, b)) for b in rows) for a in rows]


@pytest.mark.parametrize("block", [1, 17, 2**22])
def test_distances_equal_the_naive_loops(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("secateur.criteria.sums.BLOCK", block)
    seen = _view(7, 11)
    rows = seen.filters.double()
    assert CRITERIA["fpgm"](seen).tolist() == pytest.approx(_distances(rows), rel=1e-12)
    assert CRITERIA["whc"](seen).tolist() == pytest.approx(_hybrid(rows), rel=1e-12)


def test_distances_of_filters_that_are_far_out_nearly_equal_equal_or_zero() -> None:
    make = torch.Generator().manual_seed(0)
    base = torch.randn(1, 40, generator=make, dtype=torch.float64)
    near = 1e4 + base + 1e-7 * torch.randn(6, 40, generator=make, dtype=torch.float64)
    mixed = torch.cat([near, near[:2], base, torch.zeros(2, 40), -base])
    for rows in (near, mixed, torch.zeros(3, 4, dtype=torch.float64), torch.ones(3, 4, dtype=torch.float64)):
        seen = GroupView("g", rows, torch.empty(len(rows), 0), torch.empty(len(rows), 0))
        assert CRITERIA["fpgm"](seen).tolist() == pytest.approx(_distances(rows), rel=1e-9)
    lengths = rows.new_tensor([[3.0, 0, 0], [0, 0, 0], [0, 2, 0], [-5, 0, 0]])
    seen = GroupView("g", lengths, torch.empty(4, 0), torch.empty(4, 0))
    assert CRITERIA["whc"](seen).tolist() == [6, 0, 16, 10]


def test_the_smallest_sum_of_distances_is_the_one_in_the_middle() -> None:
    rows = torch.tensor([[0.0], [10.0], [4.0], [5.0], [5.5]])
    scores = CRITERIA["fpgm"](GroupView("g", rows, rows[:, :0], rows[:, :0]))
    assert scores.tolist() == [24.5, 25.5, 12.5, 11.5, 12.0]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fpgm", "whc"])
def test_distances_of_a_wide_layer_stay_within_a_gibibyte(name: str) -> None:
    code = f"""
import resource, torch
from secateur.core import GroupView
from secateur.criteria import CRITERIA
torch.set_num_threads(1)
CRITERIA[{name!r}](GroupView("g", torch.randn(64, 32), torch.empty(64, 0), torch.empty(64, 0)))
w = torch.randn(4096, 4608, generator=torch.Generator().manual_seed(0))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
scores = CRITERIA[{name!r}](GroupView("g", w, torch.empty(4096, 0), torch.empty(4096, 0)))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
direct = (w[7].double() - w.double()).square().sum(1).sqrt().sum()
assert {name!r} != "fpgm" or abs(float(scores[7] / direct) - 1) < 1e-10
"""
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=_environment())
    assert told.returncode == 0, told.stderr
    assert int(told.stdout) < 2**20  # KiB


def _environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(secateur.__file__).parent.parent)}


@pytest.mark.parametrize(
    ("name", "lost", "error", "text"),
    [
        ("mean_l1", {"maps": None}, BadRequest, r"the view of group 'g' has no maps: .*\n  do: pass data="),
        ("apoz", {"activations": None}, BadRequest, r"the view of group 'g' has no activations: .*\n  do: pass data="),
        ("thinet", {"outputs": None}, BadRequest, r"the view of group 'g' has no outputs: .*\n  do: pass data="),
        ("thinet_sampled", {"samples": None}, BadRequest, r"group 'g' has no samples: .*\n  do: pass data="),
        ("taylor", {"products": None}, BadRequest, r"'g' has no products of .*\n  do: pass data= and loss="),
        ("bn_scale", {"scales": torch.empty(5, 0)}, CannotPrune, r"group 'g' has no scales: .*\n  do: exclude it"),
    ],
)
def test_criteria_without_what_they_read_say_so(
    name: str, lost: dict[str, Any], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        CRITERIA[name](dataclasses.replace(_view(), **lost))


def test_what_criteria_need() -> None:
    assert [name for name in CRITERIA if needs_data(name)] == [
        *("mean_mean", "mean_std", "mean_l1", "mean_l2", "var_l2", "apoz", "taylor"),
        *("thinet", "thinet_omp", "thinet_sampled", "thinet_sampled_omp", "thinet_sequential"),
    ]
    assert [name for name in CRITERIA if needs_loss(name)] == ["taylor"]
    assert reads("l1") == ("filters",)
    with pytest.raises(BadRequest, match="there is no criterion 'taylr'; did you mean 'taylor'"):
        needs_data("taylr")


def test_a_function_of_the_users_says_what_it_reads() -> None:
    def mine(view: GroupView) -> torch.Tensor:
        return view.filters.sum(1)

    assert reads(mine) == ("filters", "readers", "scales")
    assert not needs_data(mine)
    mine.reads = ("products", "filters")  # type: ignore[attr-defined]
    assert reads(mine) == ("filters", "products")
    assert needs_data(mine)
    assert needs_loss(mine)
    mine.reads = "maps"  # type: ignore[attr-defined]
    assert reads(mine) == ("maps",)
    for wrong in ("grams", ("filters", "grams"), 3):
        mine.reads = wrong  # type: ignore[attr-defined]
        with pytest.raises(BadRequest, match=r"criterion 'mine' says that it reads .*\n  do: set its attribute reads"):
            reads(mine)


def test_resolve_takes_names_and_functions_and_suggests_the_nearest() -> None:
    assert resolve("l1") is CRITERIA["l1"]
    assert resolve(len) is len  # type: ignore[arg-type, comparison-overlap]
    with pytest.raises(BadRequest, match=r"there is no criterion 'randon'; did you mean 'random'\?"):
        resolve("randon")
    with pytest.raises(BadRequest, match=r"a criterion is a name or a function .* not 3"):
        resolve(3)  # type: ignore[arg-type]
