"""``plan``: what it asks of the data and of the loss, what it leaves unmeasured, and what it writes down."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import secateur as sc
from bare_loop import X, batches, chain, small
from law import assert_law
from secateur.criteria import thinet_with
from secateur.plans import fingerprint
from secateur.sensitivities import GroupCurve, Sensitivity
from turns_by_hand import pursued_by_loops, removed_by_loops, rows_of

DATA = list(batches(0, 2))


class Counted:
    """Batches that count how often they are read."""

    def __init__(self) -> None:
        self.reads = 0

    def __iter__(self) -> Any:
        self.reads += 1
        yield from DATA


def naive_maps(net: nn.Module, layer: str) -> Tensor:
    """What ``layer`` puts out on all of ``DATA``, ``[N, C, H, W]``, by a hook."""
    found: list[Tensor] = []
    handle = net.get_submodule(layer).register_forward_hook(lambda m, i, o: found.append(o.detach()))
    with torch.no_grad():
        for x, _ in DATA:
            net.eval()(x)
    handle.remove()
    return torch.cat(found).double()


def top(scores: Tensor, count: int) -> tuple[int, ...]:
    return tuple(sorted(scores.argsort(descending=True, stable=True)[:count].tolist()))


# Data and loss -----------------------------------------------------------------------------------------------------


def test_activations_decide() -> None:
    net = chain()
    found = sc.plan(net, X, criterion="mean_mean", ratios=0.5, data=DATA)
    for name, width in (("a.0", 4), ("b.0", 6), ("c.0", 8)):
        assert found.keep[name] == top(naive_maps(net, name).mean((0, 2, 3)), width)
    assert found.keep != sc.plan(net, X, ratios=0.5).keep


@pytest.mark.parametrize("name", ["thinet", "thinet_omp"])
def test_outputs_of_the_next_layers_decide(name: str) -> None:
    net = chain().double().eval()
    data = [x.double() for x, _ in DATA]
    found = sc.plan(net, X.double(), criterion=name, ratios=0.5, data=data)
    groups = {group.name: group for group in found.groups}
    for group, width in (("a.0", 4), ("b.0", 6), ("c.0", 8)):
        layer = {"a.0": "b.0", "b.0": "c.0", "c.0": "head"}[group]
        parts, target = rows_of(net, groups, group, {}, data)
        assert parts.shape[1] == net.get_submodule(layer).weight.shape[1]
        gone = removed_by_loops(parts, target, groups[group].channels - width)
        want = [c for c in range(groups[group].channels) if c not in gone]
        assert list(found.keep[group]) == (want if name == "thinet" else sorted(pursued_by_loops(parts, target, width)))
    assert_law(sc.trace(net, X.double()), X.double(), found)


def test_samples_depend_on_the_seed_and_on_how_many_are_drawn() -> None:
    net = chain()
    keeps = [
        sc.plan(net, X, criterion=criterion, ratios=0.5, data=DATA, seed=seed).keep
        for criterion, seed in (("thinet_sampled", 0), ("thinet_sampled", 0), ("thinet_sampled", 1))
    ]
    assert keeps[0] == keeps[1] != keeps[2]
    few, many = (thinet_with(statistics="samples", locations=n) for n in (2, 2000))
    ratios = {"b.0": 6, "c.0": 8}
    plans = [sc.plan(net, X, criterion=name, ratios=ratios, data=DATA).keep for name in (few, many, "thinet")]
    assert plans[0] != plans[1] == plans[2]  # many draws come to what all outputs say


def test_one_group_alone_is_cut_as_sensitivity_does() -> None:
    net, judged = chain(), []
    for criterion in ("thinet", "thinet_sequential"):
        found = sc.sensitivity(
            net, X, lambda m: float(m(X).mean()), criterion=criterion, ratios=(0.5,), groups="b.0", data=DATA
        )
        judged.append((found.curves[0].scores, found.curves[0].importance))
    assert judged[0] == judged[1]


def test_data_are_read_once_for_the_dense_network_and_once_for_turns() -> None:
    net, budget = chain(), sc.Budget(keep=0.6)
    for criterion, options, reads in (
        ("thinet", {"ratios": 0.5}, 1),
        ("thinet", {"budget": budget}, 1),
        ("thinet_sequential", {"ratios": 0.5}, 1),
        ("thinet_sequential", {"budget": budget}, 2),
    ):
        data = Counted()
        sc.plan(net, X, criterion=criterion, data=data, **options)  # type: ignore[arg-type]
        assert data.reads == reads, (criterion, options)


def test_gradients_decide_and_leave_no_trace() -> None:
    net = chain().eval()
    scores = torch.zeros(12, dtype=torch.float64)
    for x, y in DATA:
        net.zero_grad()
        F.cross_entropy(net(x), y).backward()
        weight = net.b[0].weight
        scores += (weight.grad * weight).detach().double().sum((1, 2, 3)) ** 2 / len(DATA)
    net.zero_grad(set_to_none=True)
    found = sc.plan(net, X, criterion="taylor", ratios={"b.0": 0.5}, data=DATA, loss=F.cross_entropy)
    assert found.keep["b.0"] == top(scores, 6)
    assert all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize("kind", ["exclude", "ratios", "widths", "residual"])
def test_what_stays_whole_is_not_measured(kind: str) -> None:
    seen = []

    def mine(view: sc.GroupView, /) -> Tensor:
        seen.append(view.name)
        return view.maps.mean.sum(1)  # type: ignore[union-attr]

    mine.reads = ("maps",)  # type: ignore[attr-defined]
    net = small()
    every = {g.name for g in sc.find_groups(net, X) if not g.locked}
    options: dict[str, dict[str, Any]] = {
        "exclude": {"ratios": 0.5, "exclude": ["stem*", "grouped*"]},
        "ratios": {"ratios": {"wide*": 0.5}},
        "widths": {"budget": sc.Budget(keep=0.7), "ratios": {"stem.0": 4, "grouped.0": 0}},
        "residual": {"ratios": 0.5, "residual": "inner"},
    }
    data = Counted()
    found = sc.plan(net, X, criterion=mine, data=data, **options[kind])
    cut = {g.name for g in found.groups if len(found.keep[g.name]) < g.channels}
    assert cut <= set(seen) < every
    assert cut == set(seen) or kind == "widths"  # there a budget might have cut more than it did
    assert data.reads == 1


def test_where_nothing_is_cut_no_data_are_read() -> None:
    data = Counted()
    found = sc.plan(chain(), X, criterion="apoz", data=data, ratios={"*": 0})
    assert data.reads == 0
    assert all(len(found.keep[g.name]) == g.channels for g in found.groups)


def mine(view: sc.GroupView, /) -> Tensor:
    assert view.products is not None
    return view.products


mine.reads = ("products",)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"criterion": "apoz"}, "criterion 'apoz' looks at activations\n  do: give data=, batches to measure them on$"),
        (
            {"criterion": "taylor"},
            "criterion 'taylor' looks at products\n  do: give data=, .*, and loss=, a function of outputs and targets$",
        ),
        (
            {"criterion": "taylor", "data": DATA},
            "criterion 'taylor' looks at gradients, and nothing says of what\n  do: give loss=.*cross_entropy",
        ),
        ({"criterion": mine, "data": DATA}, "criterion 'mine' looks at gradients"),
        ({"criterion": "taylr"}, "there is no criterion 'taylr'; did you mean 'taylor'"),
    ],
)
def test_data_and_loss_that_are_missing(options: dict[str, Any], text: str) -> None:
    with pytest.raises(sc.BadRequest, match=text):
        sc.plan(chain(), X, ratios=0.5, **options)


def test_a_bad_request_is_said_before_any_data_are_read() -> None:
    data = Counted()
    with pytest.raises(sc.BadRequest, match="no group is called"):
        sc.plan(chain(), X, criterion="apoz", data=data, ratios={"d.0": 0.5})
    with pytest.raises(sc.BadRequest, match="no group is called"):
        sc.plan(chain(), X, criterion="apoz", data=data, ratios=0.5, exclude="d.0")
    assert data.reads == 0


# Sensitivity -------------------------------------------------------------------------------------------------------


def sensitivity(net: nn.Module, drops: dict[str, tuple[float, float, float]]) -> Sensitivity:
    """Measured at ratios 0.25, 0.5, 0.75."""
    channels = {g.name: g.channels for g in sc.find_groups(net, X) if not g.locked}
    curves = tuple(
        GroupCurve(
            name, channels[name], "8x8", tuple(channels[name] * k // 4 for k in (3, 2, 1)), tuple(0.9 - d for d in drop)
        )
        for name, drop in drops.items()
    )
    return Sensitivity(fingerprint(net), "l1", (0.25, 0.5, 0.75), 0.9, curves, {"seed": 3})


def test_a_budget_is_met_where_least_is_lost() -> None:
    net = chain()
    steep, flat = (0.3, 0.5, 0.8), (0.0, 0.001, 0.002)
    budget = sc.Budget(keep=0.55)
    found = {}
    for robust in ("a.0", "b.0", "c.0"):
        drops = {name: flat if name == robust else steep for name in ("a.0", "b.0", "c.0")}
        plan = found[robust] = sc.plan(net, X, budget=budget, sensitivity=sensitivity(net, drops))
        assert 0.99 * 0.55 <= sc.count(sc.apply(net, plan), X).macs / sc.count(net, X).macs <= 0.55
        widths = {g.name: len(plan.keep[g.name]) / g.channels for g in plan.groups}
        assert min(widths, key=lambda name: widths[name]) == robust
        assert plan.made_by["sensitivity"] == {"criterion": "l1", "seed": 3}
    assert len({tuple(map(len, p.keep.values())) for p in found.values()}) == 3
    again = sc.Plan.from_json(found["a.0"].to_json())
    assert again == found["a.0"]


def test_groups_that_were_not_measured_stay_whole_beside_a_sensitivity() -> None:
    net = chain()
    known = sensitivity(net, {"b.0": (0.0, 0.1, 0.2)})
    plan = sc.plan(net, X, budget=sc.Budget(keep=0.8), sensitivity=known, ratios={"a.0": 6}, greedy=True)
    assert [len(plan.keep[name]) for name in ("a.0", "c.0")] == [6, 16]
    assert len(plan.keep["b.0"]) < 12
    with pytest.raises(sc.Unreachable, match="no group is narrower than the sensitivity analysis has tried it"):
        sc.plan(net, X, budget=sc.Budget(keep=0.2), sensitivity=known)


def test_a_sensitivity_of_another_network_is_refused() -> None:
    known = sensitivity(chain(), {"b.0": (0.0, 0.1, 0.2)})
    with pytest.raises(sc.WrongModel, match="the network that the sensitivity was found on"):
        sc.plan(small(), X, budget=sc.Budget(keep=0.8), sensitivity=known)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"ratios": 0.5}, r"there is none\n  do: give budget=sc.Budget\(keep=0.5\), or ratios=sc.ratios_from"),
        (
            {"budget": sc.Budget(keep=0.5), "allocation": "uniform"},
            "allocation='uniform' and a sensitivity both say .*\n  do: give one of them",
        ),
        (
            {"budget": sc.Budget(keep=0.5), "sensitivity": "curves.json"},
            r"sensitivity is what sc.sensitivity returned, not str\n  do: read a file with sc.Sensitivity.from_json",
        ),
    ],
    ids=str,
)
def test_wrong_uses_of_a_sensitivity(options: dict[str, Any], text: str) -> None:
    net = chain()
    known = sensitivity(net, {"b.0": (0.0, 0.1, 0.2)})
    with pytest.raises(sc.BadRequest, match=text):
        sc.plan(net, X, **{"sensitivity": known, **options})


# What is written down ----------------------------------------------------------------------------------------------


def test_a_plan_says_how_it_was_made() -> None:
    plain = sc.plan(chain(), X, ratios=0.5)
    assert plain.made_by.keys() == {"secateur", "criterion", "allocation", "prefer", "seed", "ratios"}
    plan = sc.plan(
        chain(), X, criterion=mine, ratios={"a*": 0.5}, data=DATA, loss=F.cross_entropy, residual="inner", exclude="c.0"
    )
    made = {name: plan.made_by[name] for name in ("criterion", "ratios", "residual", "exclude")}
    assert made == {"criterion": "mine", "ratios": {"a*": 0.5}, "residual": "inner", "exclude": "c.0"}


def test_who_compares_criteria_may_give_all_of_them_the_same() -> None:
    graph = sc.trace(chain(), X)
    plain = sc.plan(graph, ratios=0.5)

    class Unread(list[Any]):
        def __iter__(self) -> Any:
            raise AssertionError("a criterion that looks at weights only reads no data")

    assert sc.plan(graph, ratios=0.5, data=Unread(DATA), loss=F.cross_entropy).keep == plain.keep


def test_a_sensitivity_of_groups_that_the_network_has_not() -> None:
    graph = sc.trace(chain(), X)
    found = sc.sensitivity(graph, None, lambda net: 1.0, ratios=(0.5,))
    first, *rest = found.curves
    budget = sc.Budget(keep=0.9)
    for curve, text in (
        (replace(first, group="other"), "has a group 'other' of .* channels, and this network none of that name"),
        (
            replace(first, channels=first.channels + 2),
            f"'{first.group}' of .*, and this network one of {first.channels}",
        ),
    ):
        with pytest.raises(sc.WrongModel, match=text):
            sc.plan(graph, budget=budget, sensitivity=replace(found, curves=(curve, *rest)))
    with pytest.raises(sc.BadRequest, match="greedy='no' is neither True nor False"):
        sc.plan(graph, ratios=0.5, greedy="no")  # type: ignore[arg-type]
