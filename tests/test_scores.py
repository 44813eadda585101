"""Scoring: what a criterion may return, and scores that compare between groups."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.core import Group, GroupView, MapStatistics, OutputMoments, Slice
from secateur.errors import BadRequest, CannotPrune, SecateurWarning
from secateur.pipeline import plan
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


def _statistics(channels: int, value: float = 1.0) -> MapStatistics:
    return MapStatistics(3, *(torch.full((channels, 2), value + k, dtype=torch.float64) for k in range(6)))


def test_evidence_reaches_the_criterion_that_reads_it() -> None:
    evidence = {g.name: {"maps": _statistics(g.channels), "products": torch.arange(g.channels)} for g in GROUPS}
    with pytest.warns(SecateurWarning, match="scores all channels of a group the same"):
        assert score(GROUPS, TENSORS, "mean_std", evidence=evidence)["b"].tolist() == [2.0] * 6
    assert score(GROUPS, TENSORS, "taylor", evidence=evidence)["a"].tolist() == [0, 1, 2, 3]
    seen: list[GroupView] = []

    def mine(view: GroupView) -> torch.Tensor:
        assert view.maps is not None
        seen.append(view)
        return view.maps.mean.fill_(7)[:, 0] + torch.arange(len(view.maps.mean))  # in place: others must not see it

    mine.reads = ("maps", "readers")  # type: ignore[attr-defined]
    score(GROUPS, TENSORS, mine, evidence=evidence)
    assert float(evidence["a"]["maps"].mean.max()) == 1
    assert seen[0].maps is not None
    assert seen[0].maps.samples == 3
    assert [(v.filters.shape[1], v.readers.shape[1], v.products) for v in seen] == [(0, 2, None), (0, 2, None)]


@pytest.mark.parametrize(
    ("criterion", "evidence", "text"),
    [
        ("apoz", None, r"'apoz' reads the activations of group 'a', which were not measured\n  do: pass data= to plan"),
        ("taylor", {"a": {}}, r"'taylor' reads the products of group 'a'.*\n  do: pass data= and loss= to plan"),
        (
            "mean_l1",
            {"a": {"maps": _statistics(5)}},
            r"maps given for group 'a' are of 5 channels, and it has 4\n  do:",
        ),
        ("taylor", {"a": {"products": torch.ones(3)}}, r"the products given for group 'a' are of 3 channels"),
    ],
)
def test_evidence_that_is_missing_or_of_another_group(criterion: str, evidence: Any, text: str) -> None:
    with pytest.raises(BadRequest, match=text):
        score(GROUPS, TENSORS, criterion, evidence=evidence)


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


def test_a_criterion_that_tells_nothing_apart_is_said_to() -> None:
    def mine(view: GroupView) -> torch.Tensor:
        return torch.ones(len(view.filters)) if view.name == "b" else view.filters.sum(1)

    text = (
        r"'mine' scores all channels of a group the same, in 1 of 2 groups \('b'\): .*their first channels stay\n  do:"
    )
    with pytest.warns(SecateurWarning, match=text):
        score(GROUPS, TENSORS, mine)
    score([_group("c", 1)], {"c.weight": torch.ones(1, 2), "next.weight": torch.ones(2, 1)}, "l1")  # nothing to tell


def test_plans_of_criteria_that_say_nothing_warn_the_caller() -> None:
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3), torch.nn.SiLU(), torch.nn.Flatten(), torch.nn.Linear(32, 6), torch.nn.Linear(6, 2)
    )
    x = torch.randn(2, 3, 4, 4)
    with pytest.warns(SecateurWarning, match=r"'apoz' scores .* in 2 of 2 groups \('0', '3'\)") as caught:
        plan(model, x, ratios=0.5, criterion="apoz", data=[x])
    assert caught[0].filename == __file__
    with pytest.warns(SecateurWarning, match=r"'mean_std' scores .* in 1 of 2 groups \('3'\)"):
        plan(model, x, ratios=0.5, criterion="mean_std", data=[x])


def _moments(channels: int) -> OutputMoments:
    gram = torch.eye(channels, dtype=torch.float64)[None]
    one = torch.ones(1, dtype=torch.float64)
    return OutputMoments(("next",), 9 * one, gram, gram.sum(2), channels * one, channels * one)


def test_moments_of_outputs_are_evidence_of_as_many_channels() -> None:
    evidence = {"a": {"outputs": _moments(4)}, "b": {"outputs": _moments(5)}}
    match = r"the outputs given for group 'b' are of 5 channels, and it has 6\n  do: collect them anew"
    with pytest.raises(BadRequest, match=match):
        score(GROUPS, TENSORS, "thinet", evidence=evidence)
    with pytest.raises(BadRequest, match=r"'thinet' reads the outputs of group 'a', which were not measured"):
        score(GROUPS, TENSORS, "thinet", evidence={})


def test_a_users_criterion_may_write_into_the_moments_it_sees() -> None:
    def mine(view: GroupView) -> torch.Tensor:
        assert view.outputs is not None
        found = view.outputs.gram[0].diagonal().clone() + torch.arange(len(view.outputs.target[0]))
        for value in (view.outputs.gram, view.outputs.target, view.outputs.energy):
            value.zero_()
        return found

    mine.reads = ("outputs",)  # type: ignore[attr-defined]
    evidence = {"a": {"outputs": _moments(4)}, "b": {"outputs": _moments(6)}}
    scores = score(GROUPS, TENSORS, mine, evidence=evidence)
    assert scores["a"].tolist() == [1, 2, 3, 4]
    assert torch.equal(evidence["a"]["outputs"].gram, torch.eye(4, dtype=torch.float64)[None])
    assert float(evidence["b"]["outputs"].energy) == 6
