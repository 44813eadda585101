"""The law and the expected coupling, construct by construct, over ``networks.NETWORKS``."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import NamedTuple

import pytest
import torch

import secateur as sc
from law import assert_law, prepared, random_ratios
from networks import NETWORKS, VARIANTS, Expect, Inputs, randomise


class Case(NamedTuple):
    graph: sc.Graph
    inputs: Inputs
    expect: Expect
    groups: tuple[sc.Group, ...]


def build(name: str) -> Case:
    factory, example, expect = NETWORKS[name]
    torch.manual_seed(0)
    model, inputs = randomise(factory(), seed=1), example()
    graph = prepared(model, inputs)
    return Case(graph, inputs, expect, sc.find_groups(graph))


CASES = [pytest.param(name, marks=pytest.mark.slow if name in VARIANTS else ()) for name in NETWORKS]


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return build(request.param)


def writers(group: sc.Group) -> set[str]:
    """The modules that write a group's channels: the one that names it, and the owners of its ``writes`` slices."""
    owners = {s.tensor.rpartition(".")[0] for s in group.slices if s.role == "writes"}
    return owners | {group.name.partition("#")[0]}


def matching(groups: tuple[sc.Group, ...], pattern: str) -> list[sc.Group]:
    return [g for g in groups if any(fnmatchcase(w, pattern) for w in writers(g))]


def test_what_is_free_and_what_is_locked(case: Case) -> None:
    names = [g.name for g in case.groups]
    for pattern in case.expect.prunes:
        found = matching(case.groups, pattern)
        reasons = [g.locked for g in found]
        assert any(not g.locked for g in found), f"{pattern!r} should be free; groups: {names}; reasons: {reasons}"
    for pattern in case.expect.locks:
        found = matching(case.groups, pattern)
        assert found, f"no group for {pattern!r} among {names}"
        assert all(g.locked for g in found), f"{pattern!r} should be locked"
    reasons = [g.locked for g in case.groups if g.locked]
    assert all(r.strip() for r in reasons)
    if case.expect.reason:
        assert any(case.expect.reason in r for r in reasons), f"no reason names {case.expect.reason!r}: {reasons}"


def test_variants_are_networks() -> None:
    assert set(NETWORKS) >= VARIANTS


def test_names_tell_groups_apart(case: Case) -> None:
    names = [g.name for g in case.groups]
    assert len(set(names)) == len(names), (
        f"two groups bear one name: {sorted({n for n in names if names.count(n) > 1})}"
    )


def test_law_at_half(case: Case) -> None:
    assert_law(case.graph, case.inputs, ratios=0.5, oracle=case.expect.oracle, tol=case.expect.tol)


@pytest.mark.parametrize("seed", [1, 2])
def test_law_at_random_ratios(case: Case, seed: int) -> None:
    ratios = random_ratios(case.groups, seed)
    assert_law(case.graph, case.inputs, ratios=ratios, seed=seed, oracle=case.expect.oracle, tol=case.expect.tol)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3, 13))
def test_law_at_more_random_ratios(case: Case, seed: int) -> None:
    ratios = random_ratios(case.groups, seed, 0.0, 0.97)
    assert_law(case.graph, case.inputs, ratios=ratios, seed=seed, oracle=case.expect.oracle, tol=case.expect.tol)
