"""Labels and what is done to them, on tensors small enough to see."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import secateur as sc
from networks.common import tensor
from secateur.groups import _names
from secateur.labels import Labels, compress, on_axis, reshape_factor, varying, widen
from secateur.propagation import Call


def call(labels: Labels) -> Any:
    """Enough of a ``Call`` for the functions that only join and lock."""
    marks: list[str] = []
    propagation = SimpleNamespace(readers=marks)
    found = Call.__new__(Call)
    found.labels, found.node = labels, "node"  # type: ignore[assignment]
    found.p = propagation  # type: ignore[assignment]
    found.mark_reader = lambda: marks.append("reader")  # type: ignore[method-assign]
    return found


def classes(labels: Labels, *factors: Tensor) -> list[list[int]]:
    """Free classes of each factor, 0 where it is locked."""
    free = labels.solve().free
    return [free[f].flatten().tolist() for f in factors]


def tied(labels: Labels, a: Tensor, b: Tensor) -> bool:
    one, other = classes(labels, a, b)
    return one == other and 0 not in one


# --------------------------------------------------------------------------------------------------------------- labels


def test_joined_labels_share_a_class_and_others_do_not() -> None:
    labels = Labels()
    a, b, c = labels.fresh(3), labels.fresh(3), labels.fresh(3)
    labels.join(a, b)
    one, two, three = classes(labels, a, b, c)
    assert one == two
    assert set(one).isdisjoint(three)
    assert len(set(one)) == 3


def test_a_lock_spreads_along_joins_and_the_first_reason_stays() -> None:
    labels = Labels()
    a, b = labels.fresh(3), labels.fresh(3)
    labels.join(a, b)
    labels.lock(b[1:2], "early")
    labels.lock(a[1:2], "late")
    found = labels.solve()
    assert [bool(k) for k in found.free[a]] == [True, False, True]
    assert [bool(k) for k in found.free[b]] == [True, False, True]
    reason = int(found.reason[found.component[a[1]]])
    assert labels.locks[reason]() == "early"


def test_to_join_with_zero_is_to_lock() -> None:
    labels = Labels()
    a = labels.fresh(3)
    labels.join(a, torch.tensor([0, a[1], 0]), "nothing there")
    assert [bool(k) for k in classes(labels, a)[0]] == [False, True, False]
    assert labels.locks[0]() == "nothing there"


def test_no_joins_at_all() -> None:
    labels = Labels()
    a = labels.fresh(2)
    assert len(set(classes(labels, a)[0])) == 2


def test_join_along_makes_a_factor_constant_there() -> None:
    labels = Labels()
    a = labels.fresh(6).view(2, 3)
    rest = labels.join_along(a, 0)
    assert rest.shape == (1, 3)
    free = labels.solve().free[a]
    assert torch.equal(free[0], free[1])
    assert varying(compress(free)) == [1]


def test_small_tools() -> None:
    v = torch.arange(1, 4)
    assert on_axis(v, 1, 3).shape == (1, 3, 1)
    assert widen(v.view(3, 1), 4).shape == (1, 1, 3, 1)
    assert compress(v.view(3, 1).expand(3, 5)).shape == (3, 1)
    assert varying(v.view(1, 3, 1)) == [1]


# -------------------------------------------------------------------------------------------------------------- reshape

SHAPES = [
    ((2, 12, 4, 4), (2, 12, 16)),
    ((2, 12, 4, 4), (2, 192)),
    ((2, 192), (2, 12, 4, 4)),
    ((2, 12, 4), (2, 3, 4, 4)),
    ((2, 12, 4), (6, 4, 4)),
    ((2, 3, 4, 5), (2, 12, 5)),
    ((1, 12, 1, 1), (12,)),
    ((12,), (1, 12, 1, 1)),
    ((2, 6, 4), (2, 4, 6)),
    ((6, 4), (4, 6)),
    ((2, 1, 12), (2, 12, 1)),
]


@pytest.mark.parametrize(("old", "new"), SHAPES)
def test_reshape_is_that_of_the_labels_written_out(old: tuple[int, ...], new: tuple[int, ...]) -> None:
    for axis in range(len(old)):
        factor = on_axis(torch.arange(1, old[axis] + 1), axis, len(old))
        got = reshape_factor(factor, old, new)
        assert torch.equal(got.expand(new), factor.expand(old).reshape(new))


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.data())
def test_reshape_of_any_shape(old: list[int], data: st.DataObject) -> None:
    """Cut the factors of all sizes anew, in any grouping, and compare with torch on full tensors."""
    primes = [p for k in old for p in ([2, 2] if k == 4 else [k])]
    new: list[int] = [1]
    for p in primes:
        if data.draw(st.booleans()):
            new.append(p)
        else:
            new[-1] *= p
    axis = data.draw(st.integers(0, len(old) - 1))
    factor = on_axis(torch.arange(1, old[axis] + 1), axis, len(old))
    got = reshape_factor(factor, tuple(old), tuple(new))
    assert torch.equal(got.expand(new), factor.expand(old).reshape(new))


def test_reshape_writes_out_only_what_varies() -> None:
    factor = on_axis(torch.arange(1, 13), 1, 4)
    assert reshape_factor(factor, (64, 12, 32, 32), (64, 3, 4, 1024)).shape == (1, 3, 4, 1)


# ---------------------------------------------------------------------------------------------------------------- merge


def test_merge_ties_channels_that_meet() -> None:
    labels = Labels()
    a, b = labels.fresh(4), labels.fresh(4)
    out = call(labels).merge([([on_axis(a, 1, 3)], (2, 4, 5)), ([on_axis(b, 0, 2)], (4, 1))])
    assert [f.shape for f in out] == [(1, 4, 1)]
    assert tied(labels, a, b)


def test_merge_locks_what_meets_no_channels_but_not_what_is_broadcast() -> None:
    labels = Labels()
    a, b = labels.fresh(4), labels.fresh(4)
    call(labels).merge([([on_axis(a, 1, 3)], (2, 4, 5)), ([], (2, 1, 5))])
    call(labels).merge([([on_axis(b, 1, 3)], (2, 4, 5)), ([], (1, 4, 1))])
    one, other = classes(labels, a, b)
    assert 0 not in one
    assert set(other) == {0}


def test_merge_keeps_factors_of_different_axes_apart() -> None:
    labels = Labels()
    a, b = labels.fresh(4), labels.fresh(3)
    out = call(labels).merge([([on_axis(a, 0, 2)], (4, 1)), ([on_axis(b, 1, 2)], (1, 3))])
    assert sorted(f.shape for f in out) == [(1, 3), (4, 1)]
    assert not tied(labels, a[:3], b)
    assert 0 not in classes(labels, a)[0]


def test_merge_of_a_number() -> None:
    labels = Labels()
    a = labels.fresh(4)
    assert len(call(labels).merge([([on_axis(a, 1, 2)], (2, 4)), ([], ())])) == 1
    assert 0 not in classes(labels, a)[0]


# ------------------------------------------------------------------------------------------------------------- contract


def test_contract_ties_a_letter_of_both_sides_and_passes_the_others_on() -> None:
    labels = Labels()
    x, read, written = labels.fresh(4), labels.fresh(4), labels.fresh(3)
    weight = [on_axis(written, 0, 2), on_axis(read, 1, 2)]
    one = call(labels)
    out = one.contract([([on_axis(x, 1, 2)], (2, 4)), (weight, (3, 4))], ["bi", "oi"], "bo")
    assert tied(labels, x, read)
    assert [torch.equal(f, on_axis(written, 1, 2)) for f in out] == [True]
    assert one.p.readers == ["reader"]


def test_contract_locks_a_letter_of_one_side() -> None:
    labels = Labels()
    read, written = labels.fresh(4), labels.fresh(3)
    weight = [on_axis(written, 0, 2), on_axis(read, 1, 2)]
    call(labels).contract([([], (2, 4)), (weight, (3, 4))], ["bi", "oi"], "bo")
    assert set(classes(labels, read)[0]) == {0}
    assert 0 not in classes(labels, written)[0]


def test_contract_of_a_square_keeps_both_axes() -> None:
    """A Gram matrix carries the same channels twice."""
    labels = Labels()
    x = labels.fresh(4)
    factor = on_axis(x, 0, 2)
    out = call(labels).contract([([factor], (4, 9)), ([factor], (4, 9))], ["cn", "dn"], "cd")
    assert sorted(f.shape for f in out) == [(1, 4), (4, 1)]
    assert 0 not in classes(labels, x)[0]


def test_contract_joins_over_an_axis_it_does_not_sum() -> None:
    """A factor that varies along a summed and a kept axis stays only along the summed one."""
    labels = Labels()
    x, y = labels.fresh(6).view(2, 3), labels.fresh(3)
    call(labels).contract([([x], (2, 3)), ([y], (3,))], ["hd", "d"], "h")
    free = labels.solve().free
    assert torch.equal(free[x[0]], free[x[1]])
    assert torch.equal(free[x[0]], free[y])


# --------------------------------------------------------------------------------------------------------------- groups


class Two(nn.Module):
    """One convolution writes two groups: its halves go different ways."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1)
        self.left, self.right = nn.Conv2d(4, 2, 1), nn.Conv2d(4, 2, 1)
        self.scale = nn.Parameter(torch.ones(6))
        self.last = nn.Linear(6, 2)

    def forward(self, x: Tensor, z: Tensor) -> tuple[Tensor, ...]:
        a, b = self.stem(x).chunk(2, 1)
        return self.left(a), self.right(b), self.last(z * self.scale)


def test_names_and_order_of_groups() -> None:
    groups = sc.find_groups(Two(), (tensor(2, 3, 4, 4), tensor(2, 6)))
    free = {g.name: g.channels for g in groups if not g.locked}
    assert free == {"stem": 4, "stem#2": 4}
    locked = {g.name: g.locked for g in groups if g.locked}
    assert {"left", "right", "last"} <= set(locked)
    assert len({g.name for g in groups}) == len(groups)
    first, second = (g for g in groups if not g.locked)
    assert [int(s.positions[0, 0]) for s in (first.slices[0], second.slices[0])] == [0, 4]
    assert {s.role for s in first.slices} == {"writes", "follows", "reads"}
    assert [s.tensor for s in first.slices if s.role == "reads"] == ["left.weight"]


def slices(*places: tuple[str, str]) -> list[sc.Slice]:
    return [sc.Slice(name, 0, np.zeros((1, 1), np.int64), role) for name, role in places]  # type: ignore[arg-type]


def test_naming() -> None:
    taken: dict[str, int] = {}
    own = [
        slices(("a.bias", "follows"), ("layer1.0.conv.weight", "writes")),
        slices(("layer1.0.conv.weight", "writes")),
        slices(("head.weight", "reads")),
        slices(("bn.weight", "scales")),
        slices(("gamma", "follows")),
        slices(("block.gamma", "follows")),
        slices(("n.parametrizations.weight.original1", "writes")),
        slices(("weight", "writes")),
    ]
    assert _names(own, taken) == [
        "layer1.0.conv",
        "layer1.0.conv#2",
        "head input",
        "bn",
        "gamma",
        "block.gamma",
        "n",
        "weight",
    ]
    assert _names(own[:1], taken) == ["layer1.0.conv#3"]


def test_partitions_count_the_filters_of_one_channel() -> None:
    grouped = nn.Sequential(nn.Conv2d(3, 12, 1), nn.Conv2d(12, 24, 1, groups=4), nn.Conv2d(24, 2, 1))
    found = {g.name: (g.channels, g.partitions) for g in sc.find_groups(grouped, tensor(2, 3, 4, 4)) if not g.locked}
    assert found == {"0": (3, 4), "1": (6, 4)}
    flat = nn.Sequential(nn.Conv2d(3, 6, 1), nn.Flatten(), nn.Linear(96, 8), nn.Linear(8, 2))
    groups = {g.name: g for g in sc.find_groups(flat, tensor(2, 3, 4, 4)) if not g.locked}
    read = next(s for s in groups["0"].slices if s.role == "reads")
    assert read.positions.shape == (6, 16)
    assert read.positions[1].tolist() == list(range(16, 32))


def test_an_operation_without_a_rule_locks_what_goes_in() -> None:
    class Unknown(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.special.i0(self.a(x))
            return self.b(h)

    group = next(g for g in sc.find_groups(Unknown(), tensor(2, 3, 4, 4)) if g.name == "a")
    assert "it feeds something not understood: no rule is known for the operation 'special_i0'" in group.locked
    assert "test_propagation.py" in group.locked
