"""Scoring: what a criterion may return, and scores that compare between groups."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.core import Group, GroupView, Slice
from secateur.errors import BadRequest, CannotPrune
from secateur.scores import normalise, score


def _group(name: str, n: int) -> Group:
    return Group(
        name,
        n,
        (
            Slice(f"{name}.weight", 0, np.arange(n)[:, None], "writes"),
            Slice("next.weight", 1, np.arange(n)[:, None], "reads"),
        ),
    )


GROUPS = (_group("a", 4), _group("b", 6))
TENSORS = {"a.weight": torch.randn(4, 3), "b.weight": torch.randn(6, 2), "next.weight": torch.randn(2, 6)}


def test_scores_are_float64_one_a_channel() -> None:
    scores = score(GROUPS, TENSORS, "l1")
    assert {name: (s.dtype, len(s)) for name, s in scores.items()} == {"a": (torch.float64, 4), "b": (torch.float64, 6)}
    assert scores["b"].tolist() == pytest.approx(TENSORS["b.weight"].abs().sum(1).tolist(), rel=1e-6)


def test_a_users_criterion_sees_the_whole_view() -> None:
    seen: list[GroupView] = []

    def mine(view: GroupView) -> torch.Tensor:
        seen.append(view)
        return view.readers.sum(1).half()

    scores = score(GROUPS, TENSORS, mine, n_keep={"b": 2}, seed=5)
    assert scores["a"].dtype == torch.float64
    assert [(v.name, v.n_keep, v.seed, v.readers.shape[1]) for v in seen] == [("a", None, 5, 2), ("b", 2, 5, 2)]


@pytest.mark.parametrize(
    ("result", "error", "match"),
    [
        (torch.ones(3), BadRequest, r"'mine' on group 'a' returned the shape \[3\], not \[4\]"),
        (torch.ones(4, 1), BadRequest, r"returned the shape \[4, 1\], not \[4\]"),
        (
            torch.tensor([1, math.nan, math.inf, 0]),
            CannotPrune,
            r"'mine' on group 'a' returned 2 of 4 scores .* finite",
        ),
        (torch.ones(4, dtype=torch.bool), BadRequest, r"returned torch.bool, not real numbers"),
        (torch.ones(4, dtype=torch.complex64), BadRequest, r"returned torch.complex64, not real numbers"),
        ([1, 2, 3, 4], BadRequest, r"returned list, not a tensor of 4 scores"),
        (None, BadRequest, r"returned NoneType, not a tensor"),
    ],
)
def test_what_a_criterion_may_not_return(result: object, error: type[Exception], match: str) -> None:
    def mine(view: GroupView) -> torch.Tensor:
        return result  # type: ignore[return-value]

    with pytest.raises(error, match=match):
        score(GROUPS, TENSORS, mine)


def test_an_error_in_a_users_criterion_says_where_it_happened() -> None:
    def mine(view: GroupView) -> torch.Tensor:
        raise ZeroDivisionError("theirs")

    with pytest.raises(ZeroDivisionError, match="theirs") as caught:
        score(GROUPS, TENSORS, mine)
    assert caught.value.__notes__ == ["while the criterion 'mine' scored the group 'a'"]


FINITE = st.floats(-1.7e308, 1.7e308, allow_nan=False, allow_infinity=False)


@settings(deadline=None)
@given(st.lists(FINITE, min_size=1, max_size=12))
def test_normalised_scores_are_finite_not_negative_of_mean_one_and_in_order(values: list[float]) -> None:
    given_ = torch.tensor(values, dtype=torch.float64)
    normal = normalise({"g": given_})["g"]
    assert bool(torch.isfinite(normal).all())
    assert bool((normal >= 0).all())
    assert normal.mean().item() == pytest.approx(1.0 if any(values) else 0.0, rel=1e-9)
    order = torch.argsort(given_, stable=True)
    assert bool((normal[order].diff() >= 0).all())


def test_normalising_is_free_of_scale_and_keeps_zeros() -> None:
    s = torch.tensor([1.0, 2.0, 3.0])
    normal = normalise({"a": s, "b": s * 1000, "zero": s * 0, "same": -torch.ones(3), "negative": -s})
    assert normal["a"].tolist() == pytest.approx([0.5, 1.0, 1.5], rel=1e-12)
    assert torch.allclose(normal["a"], normal["b"], rtol=1e-12)
    extreme = normalise({"far": torch.tensor([-1.7e308, 1.7e308, 1.7e308], dtype=torch.float64)})["far"]
    assert extreme.tolist() == pytest.approx([0, 1.5, 1.5], rel=1e-12)
    assert normal["zero"].tolist() == [0, 0, 0]
    assert normal["same"].tolist() == [1, 1, 1]
    assert normal["negative"].tolist() == pytest.approx([2.0, 1.0, 0.0], rel=1e-12)
