"""Costs as polynomials of kept counts, against sums written out by hand."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.costs import Dim, evaluate, evaluate_many, make_cost, marginals
from secateur.errors import BadRequest

Terms = list[tuple[float, list[Dim]]]
N_GROUPS = 4
DIMS = st.tuples(
    st.integers(0, 5).map(float),
    st.dictionaries(st.integers(0, N_GROUPS - 1), st.integers(0, 3).map(float), max_size=3),
)
TERMS = st.lists(st.tuples(st.integers(-3, 50).map(float), st.lists(DIMS, max_size=3)), max_size=6)
KEEP = st.lists(st.integers(0, 600), min_size=N_GROUPS, max_size=N_GROUPS)


def _by_hand(terms: Terms, keep: list[int]) -> float:
    """In Python's own integers: exact at any size."""
    return sum(
        int(c) * math.prod(int(fixed) + sum(int(m) * keep[g] for g, m in uses.items()) for fixed, uses in dims)
        for c, dims in terms
    )


@settings(deadline=None)
@given(TERMS, KEEP)
def test_integers_are_exact(terms: Terms, keep: list[int]) -> None:
    assert evaluate(make_cost(terms), np.array(keep)) == _by_hand(terms, keep)


@settings(deadline=None)
@given(TERMS, KEEP, st.lists(st.integers(-9, 9), min_size=N_GROUPS, max_size=N_GROUPS))
def test_marginals_are_the_exact_differences(terms: Terms, keep: list[int], steps: list[int]) -> None:
    cost = make_cost(terms)

    def without(g: int, step: int) -> list[int]:
        return [k - step * (i == g) for i, k in enumerate(keep)]

    ones = [_by_hand(terms, keep) - _by_hand(terms, without(g, 1)) for g in range(N_GROUPS)]
    many = [_by_hand(terms, keep) - _by_hand(terms, without(g, steps[g])) for g in range(N_GROUPS)]
    assert marginals(cost, np.array(keep)).tolist() == ones
    assert marginals(cost, np.array(keep), np.array(steps)).tolist() == many


def test_one_group_in_two_factors_is_quadratic() -> None:
    cost = make_cost([(9.0, [(0, {0: 1}), (0, {0: 1})]), (100.0, [])])
    assert evaluate(cost, np.array([4])) == 9 * 16 + 100
    assert marginals(cost, np.array([4])).tolist() == [9 * (16 - 9)]
    assert marginals(cost, np.array([4]), np.array([-2])).tolist() == [9 * (16 - 36)]


def test_li_vgg16_by_hand() -> None:
    """CIFAR VGG-16 of Li et al. and its pruned version A: their table 2, recounted to the integer."""
    widths = [64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512]
    sides = [32, 32, 16, 16, 8, 8, 8, 4, 4, 4, 2, 2, 2]
    into: list[Dim] = [(3.0, {}), *((0.0, {i: 1.0}) for i in range(12))]
    convs = [[into[i], (0.0, {i: 1.0})] for i in range(13)]
    head: Terms = [(512.0, [(0.0, {12: 1.0})]), (5120.0, [])]
    macs = make_cost([(9.0 * side**2, dims) for side, dims in zip(sides, convs, strict=True)] + head)
    params = make_cost([(9.0, dims) for dims in convs] + head)
    assert (evaluate(macs, np.array(widths)), evaluate(params, np.array(widths))) == (313463808, 14977728)
    pruned = np.array([32, *widths[1:7], *[256] * 6])
    assert (evaluate(macs, pruned), evaluate(params, pruned)) == (206279680, 5390176)
    real = evaluate(macs, np.array(widths) * 0.7)
    exact = 9 * 1024 * 3 * 44.8 + 0.49 * (313463808 - 9 * 1024 * 3 * 64 - 512 * 512 - 5120) + 0.7 * 512 * 512 + 5120
    assert real == pytest.approx(exact, rel=1e-12)


def test_equal_dims_and_terms_are_shared() -> None:
    cost = make_cost(
        [(2.0, [(0, {0: 1}), (1, {1: 2})]), (3.0, [(1, {1: 2.0, 0: 0}), (0, {0: 1})]), (1.0, [(0, {0: 1})])]
    )
    assert (len(cost.fixed), len(cost.coefficients)) == (3, 2)
    assert evaluate(cost, np.array([4, 3])) == 5 * 4 * 7 + 4


def test_many_choices_at_once_and_groups_that_cost_nothing() -> None:
    cost = make_cost([(2.0, [(3, {1: 1})])])
    assert evaluate_many(cost, np.array([[0, 1, 5], [0, 4, 9]])).tolist() == [8, 14]
    assert marginals(cost, np.array([7, 4, 9])).tolist() == [0, 2, 0]
    empty = make_cost([])
    assert (evaluate(empty, np.array([3])), marginals(empty, np.array([3])).tolist()) == (0.0, [0.0])
    with pytest.raises(BadRequest, match="the cost depends on 2 groups, but 1 kept counts were given"):
        evaluate(cost, np.array([3]))


def test_a_large_network_takes_milliseconds() -> None:
    """1,500 terms and widths over 500 groups; the bounds leave a factor of ten for a busy machine."""
    rng = np.random.default_rng(0)
    terms: Terms = [
        (float(rng.integers(1, 99)), [(0.0, {i % 500: 1.0}), (3.0, {int(g): 1.0 for g in rng.integers(0, 500, 9)})])
        for i in range(1500)
    ]
    cost, keep = make_cost(terms), np.full(500, 32)
    taken_s = []
    for _ in range(5):
        start = time.perf_counter()
        marginals(cost, keep)
        evaluate(cost, keep)
        taken_s.append(time.perf_counter() - start)
    assert min(taken_s) < 0.03
