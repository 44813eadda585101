"""The law on random networks under random plans."""

from __future__ import annotations

import pytest
import torch
from hypothesis import event, example, given, settings
from hypothesis import strategies as st

import secateur as sc
from law import assert_law, prepared, random_ratios
from networks import randomise
from strategies import SPECS, RandomNet, Spec

SEEDS = st.integers(0, 2**16)


def check(spec: Spec, seed: int) -> None:
    torch.manual_seed(seed)
    model = randomise(RandomNet(spec), seed)
    inputs = (torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(seed)),)
    graph = prepared(model, inputs)
    groups = sc.find_groups(graph)
    event(f"free groups: {min(10, sum(not g.locked for g in groups))}")
    assert_law(graph, inputs, ratios=random_ratios(groups, seed), seed=seed)


@settings(max_examples=25)
@given(spec=SPECS, seed=SEEDS)
@example(spec=(("split", 3, (("conv", 5, 3),)), ("shuffle", 3, 0), ("residual", (("conv", 4, 1),), 0)), seed=1)
@example(spec=(("pixel_unshuffle",), ("concat", (("conv", 6, 3),), (("glu",),)), ("pixel_shuffle",)), seed=2)
def test_law_on_random_networks(spec: Spec, seed: int) -> None:
    check(spec, seed)


@pytest.mark.slow
@settings(max_examples=300)
@given(spec=SPECS, seed=SEEDS)
def test_law_on_many_random_networks(spec: Spec, seed: int) -> None:
    check(spec, seed)
