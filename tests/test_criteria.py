"""Views and criteria against naive loops over the paper's formula."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from secateur.core import Group, GroupView, Slice
from secateur.criteria import CRITERIA, READS, resolve
from secateur.errors import BadRequest, CannotPrune
from secateur.views import view


def _each(n: int, k: int = 1) -> np.ndarray:
    return np.arange(n * k, dtype=np.int64).reshape(n, k)


def _view(c: int = 5, f: int = 12, seed: int = 0) -> GroupView:
    make = torch.Generator().manual_seed(seed)
    return GroupView("g", torch.randn(c, f, generator=make), torch.randn(c, 7, generator=make), torch.randn(c, 1))


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
    for c, reads in enumerate([2, 0, 3, 1]):
        filters = [*tensors["a.weight"][c].flatten().tolist(), *tensors["t.weight"][:, c + 2].flatten().tolist()]
        readers = [*tensors["b.weight"][:, reads].flatten().tolist()]
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
    unread = {f: getattr(seen, f)[:, :0] for f in ("filters", "readers", "scales") if f not in READS[CRITERIA[name]]}
    assert torch.equal(CRITERIA[name](seen), CRITERIA[name](dataclasses.replace(seen, **unread)))


def test_resolve_takes_names_and_functions_and_suggests_the_nearest() -> None:
    assert resolve("l1") is CRITERIA["l1"]
    assert resolve(len) is len  # type: ignore[arg-type, comparison-overlap]
    with pytest.raises(BadRequest, match=r"there is no criterion 'randon'; did you mean 'random'\?"):
        resolve("randon")
    with pytest.raises(BadRequest, match=r"a criterion is a name or a function .* not 3"):
        resolve(3)  # type: ignore[arg-type]
