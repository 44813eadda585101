"""``assert_law`` must be able to fail: every promise it checks is broken here once."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

import law
import secateur as sc
from law import assert_law, prepared
from networks import NETWORKS, randomise

Tamper = Callable[[nn.Module, nn.Module], nn.Module]


@pytest.fixture(scope="module")
def graph() -> sc.Graph:
    factory, example, _ = NETWORKS["squeeze_excite"]
    torch.manual_seed(0)
    return prepared(randomise(factory(), seed=1), example())


def shifted(_dense: nn.Module, small: nn.Module) -> nn.Module:
    """One weight off by a millionth."""
    small.get_parameter("head.weight").data[0, 0] += 1e-6
    return small


def frozen(_dense: nn.Module, small: nn.Module) -> nn.Module:
    small.get_parameter("stem.weight").requires_grad_(False)
    return small


def training(_dense: nn.Module, small: nn.Module) -> nn.Module:
    return small.train()


def with_more(_dense: nn.Module, small: nn.Module) -> nn.Module:
    small.register_buffer("extra", torch.zeros(1))
    return small


@pytest.mark.parametrize(
    ("tamper", "message"),
    [
        (shifted, "the law is broken"),
        (frozen, r"no gradient reaches .'stem.weight'."),
        (training, "apply changed the mode"),
        (with_more, "tensors appeared or vanished"),
    ],
)
def test_broken_promises_are_noticed(
    graph: sc.Graph, monkeypatch: pytest.MonkeyPatch, tamper: Tamper, message: str
) -> None:
    honest = sc.apply
    monkeypatch.setattr(sc, "apply", lambda model, plan: tamper(model, honest(model, plan)))
    with pytest.raises(AssertionError, match=message):
        assert_law(graph, graph.args, oracle=True)


def test_nothing_smaller_is_noticed(graph: sc.Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sc, "apply", lambda model, plan: copy.deepcopy(model))
    monkeypatch.setattr(sc, "masked", lambda model, plan: copy.deepcopy(model))
    with pytest.raises(AssertionError, match="nothing shrank"):
        assert_law(graph, graph.args)


def test_a_changed_original_is_noticed(graph: sc.Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    honest, kept = sc.masked, copy.deepcopy(graph.model.state_dict())

    def scribbling(model: nn.Module, plan: sc.Plan) -> nn.Module:
        dense = honest(model, plan)
        graph.model.get_parameter("stem.bias").data[0] += 1e-6
        return dense

    monkeypatch.setattr(sc, "masked", scribbling)
    with pytest.raises(AssertionError, match=r"the original's 'stem\.bias' was changed"):
        assert_law(graph, graph.args)
    graph.model.load_state_dict(kept)


def test_the_second_oracle_sees_what_masked_does_not(graph: sc.Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    """Were ``masked`` and ``apply`` wrong in the same way, zeroed readers would still tell."""
    small = sc.apply(graph.model, sc.plan(graph, criterion="l1", ratios=0.5))
    small.get_parameter("head.bias").data[0] += 1e-6
    monkeypatch.setattr(sc, "apply", lambda model, plan: small)
    monkeypatch.setattr(sc, "masked", lambda model, plan: small)
    with pytest.raises(AssertionError, match="zeroing the readers says otherwise"):
        assert_law(graph, graph.args, oracle=True)


def test_relative_error_tells_shapes_and_non_finite_apart() -> None:
    one = torch.ones(2, 3)
    assert law.relative_error(one, one) == 0.0
    assert law.relative_error({"a": one * 1.5}, {"a": one}) == pytest.approx(0.5)
    assert law.relative_error(one[:1], one) == float("inf")
    assert law.relative_error(one * float("nan"), one) == float("inf")
    assert law.relative_error((), ()) == float("inf")
