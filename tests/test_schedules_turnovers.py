"""Zeroing that loses nothing: filters alone, each residual branch by itself, and a history of what changed."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import secateur as sc
from bare_loop import X, batches, chain, same_weights, sgd, small, train
from law import call, relative_error, to_double
from networks import NETWORKS, randomise
from networks.common import conv
from secateur.core import GroupView, MapStatistics, OutputMoments, Turnover
from secateur.criteria import CRITERIA, resolve
from secateur.plans import named_tensors
from secateur.schedules import Zeroing, iterative, layer_by_layer, starting_point, zero_, zeroing
from secateur.schedules.rankings import among_the_rest

X64 = X.double()
DATA = list(batches(0, 2))


def parts(model: nn.Module, plan: sc.Plan, filters: bool) -> list[Tensor]:
    """What removed channels own of the filters, or of everything else that makes them, by a naive loop."""
    tensors, found = named_tensors(model), []
    for group in plan.groups:
        for c in sorted(set(range(group.channels)) - set(plan.keep[group.name])):
            for part in group.slices:
                tensor = tensors[part.tensor]
                if part.role != "reads" and isinstance(tensor, nn.Parameter):
                    if (part.role == "writes" and tensor.dim() >= 2) == filters:
                        found += [tensor.detach().select(part.axis, int(p)) for p in part.positions[c]]
    return found


def gap(net: nn.Module, plan: sc.Plan) -> float:
    """How far the smaller network is from the zeroed one, on images of other sizes than the example's too."""
    pruned = sc.apply(net, plan)
    images = [torch.randn(3, 3, *size, dtype=torch.float64) for size in ((8, 8), (11, 6))]
    return max(relative_error(pruned(x), net(x)) for x in images)


# Constants -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("soft", "residual"), [(False, "scatter"), (True, "scatter"), (False, "coupled")], ids=str)
def test_folded_the_zeroed_network_computes_what_the_smaller_one_does(soft: bool, residual: Any) -> None:
    net = small().double()
    progress = zeroing(net, X64, criterion="fpgm", ratios=0.4, soft=soft, residual=residual, constants="fold")
    progress.select_()
    train(net, progress.hooks, sgd(net), range(2))
    plan = progress.plan()
    assert plan.residual == residual
    assert set(plan.constants.values()) == {"fold"}
    assert sc.Plan.from_json(plan.to_json()) == plan
    assert gap(net, plan) < 1e-9
    before = copy.deepcopy(net)
    assert progress.finish_().keep == plan.keep
    assert same_weights(net, before)  # there is nothing else to zero
    assert gap(net, replace(plan, constants={})) > 1e-3  # what would be lost


@pytest.mark.parametrize("soft", [False, True])
def test_folded_norms_and_biases_learn_on(soft: bool) -> None:
    net = chain()
    progress = zeroing(net, X, ratios=0.5, soft=soft, constants="fold")
    progress.select_()
    plan = progress.plan()
    assert not any(bool(t.any()) for t in parts(net, plan, filters=True))
    before = [t.clone() for t in parts(net, plan, filters=False)]
    assert before
    seen: list[bool] = []

    def look(model: nn.Module) -> None:
        seen.extend(bool(t.any()) for t in parts(model, plan, filters=True))
        if len(before) == len(learnt):
            return
        learnt.extend(bool((a != b).all()) for a, b in zip(parts(model, plan, filters=False), before, strict=True))

    learnt: list[bool] = []
    train(net, progress.hooks, sgd(net), range(1), seen=look)
    assert all(learnt)
    assert any(seen) == soft


def test_constants_are_folded_in_the_groups_that_are_asked_for() -> None:
    net = chain().eval().double()
    progress = zeroing(net, X64, ratios=0.5, constants={"b.0": "fold"})
    progress.select_()
    plan = progress.plan()
    gone = {name: sorted(set(range(len(net.get_submodule(name).weight))) - set(k)) for name, k in plan.keep.items()}
    assert not net.a[1].weight[gone["a.0"]].any()
    assert net.b[1].weight[gone["b.0"]].all()
    assert not net.b[0].weight[gone["b.0"]].any()
    assert gap(net, plan) < 1e-9


@pytest.mark.parametrize("name", ["batch_norm", "residual_stage", "inverted_residual"])
@pytest.mark.parametrize("constants", ["drop", "fold"])
def test_zero_honours_the_plans_constants(name: str, constants: Any) -> None:
    make, inputs, _ = NETWORKS[name]
    model, x = randomise(make(), 0).eval().double(), to_double(inputs())
    plan = sc.plan(model, x, ratios=0.5, constants=constants)
    zero_(model, plan)
    zeros = [not bool(t.any()) for t in parts(model, plan, filters=False)]
    assert zeros
    assert all(zeros) if constants == "drop" else not any(zeros)
    if constants == "fold":  # the activation there is not zero at zero: nothing but a fold could be right
        assert relative_error(call(sc.apply(model, plan), x), call(model, x)) < 1e-9


def test_what_has_no_filters_of_its_own_is_refused() -> None:
    make, inputs, _ = NETWORKS["weight_norm"]
    graph = sc.trace(randomise(make(), 0).eval(), inputs())
    with pytest.raises(sc.CannotPrune, match="constants='fold' cannot be carried out for stem") as error:
        zeroing(graph, ratios=0.5, constants="fold")
    assert "do: drop its constants, with constants={'stem': 'drop', '*': 'fold'}" in str(error.value)
    with pytest.raises(sc.CannotPrune, match="constants='fold' cannot be carried out for stem"):
        zero_(graph.model, sc.plan(graph, ratios=0.5, constants="fold"))
    assert zeroing(graph, ratios={"middle": 0.0, "stem": 0.5}, constants={"middle": "fold"}).plan()


class Divided(nn.Module):
    """Divides by the length of what its first filters write, and by no other."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 1, bias=False), nn.Conv2d(8, 6, 1), nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return self.c(self.b(y / y.square().sum((2, 3), keepdim=True).sqrt()))


def test_filters_that_cannot_be_zero_are_refused() -> None:
    net = Divided().eval()
    plan = sc.plan(net, X, ratios=0.5, constants="fold")
    before = copy.deepcopy(net)
    for refused in (lambda: zeroing(net, X, ratios=0.5, constants="fold"), lambda: zero_(net, plan)):
        with pytest.raises(sc.CannotPrune, match="NaN as soon as whole channels are zero"):
            refused()
    assert same_weights(net, before)


def test_what_is_wrong_with_constants_is_said_at_once() -> None:
    with pytest.raises(sc.BadRequest, match="no group of the network matches 'z'"):
        zeroing(chain(), X, ratios=0.5, constants={"z": "fold"})
    with pytest.raises(sc.BadRequest, match="no group of the network matches 'z'"):
        starting_point(chain(), X, ratios=0.5, constants={"z": "fold"})


def test_cuts_by_turns_fold_too() -> None:
    """Names of groups are those of the first network, also where a cut has left nothing of one."""
    net = chain().eval()
    options: dict[str, Any] = {"ratios": {"b.0": 0.99, "c.0": 0.5}, "constants": {"b.0": "drop", "*": "fold"}}
    for result in (
        iterative(net, X, steps=3, between=lambda m, i: None, **options),
        layer_by_layer(net, X, between=lambda m, i: None, **options),
    ):
        made = sc.record(result)
        assert made is not None
        assert made.plan.constants["c.0"] == "fold"
        assert made.plan.constants.get("b.0", "drop") == "drop"
        assert {name: len(kept) for name, kept in made.plan.keep.items()} == {"a.0": 8, "b.0": 1, "c.0": 8}


def test_branches_are_not_cut_by_turns() -> None:
    with pytest.raises(sc.BadRequest, match="residual='scatter' rewires the last module of each branch") as error:
        iterative(small().eval(), X, ratios=0.5, steps=2, between=lambda m, i: None, residual="scatter")
    assert "do: cut once; zero channels while training (zeroing) and cut then" in str(error.value)
    once = iterative(small().eval(), X, ratios=0.5, steps=1, between=lambda m, i: None, residual="scatter")
    made = sc.record(once)
    assert made is not None
    assert made.plan.residual == "scatter"


# Residual branches -----------------------------------------------------------------------------------------------


def test_every_branch_is_zeroed_by_itself() -> None:
    net = small().double()
    progress = zeroing(net, X64, criterion="fpgm", ratios=0.5, residual="scatter", constants="fold", grow=2)
    optimizer, widths = sgd(net), []
    for epoch in range(3):
        train(net, progress.hooks, optimizer, range(epoch, epoch + 1))
        widths.append({name: int(mask.sum()) for name, mask in progress._removed.items()})
    assert {"stem.0", "block.conv2", "wide.conv2", "wide.shortcut.0"} < set(widths[0])
    assert [w["block.conv2"] for w in widths] == [3, 4, 4]
    assert len({tuple(progress.plan().keep[name]) for name in ("stem.0", "block.conv2")}) == 2
    assert gap(net, progress.plan()) < 1e-9


def test_a_growing_part_of_branches_is_soft_too() -> None:
    net = small()
    budget = sc.Budget(keep=0.5)
    progress = zeroing(net, X, criterion="fpgm", budget=budget, soft=True, residual="scatter", constants="fold", grow=2)
    costs = []
    for epoch in range(2):
        train(net, progress.hooks, sgd(net), range(epoch, epoch + 1))
        now = replace(progress.plan(), keep={n: tuple(np.flatnonzero(~m)) for n, m in progress._removed.items()})
        costs.append(sc.count(sc.apply(net, now), X).macs / sc.count(net, X).macs)
    assert 0.5**0.5 * 0.95 < costs[0] <= 0.5**0.5
    assert 0.5 * 0.95 < costs[1] <= 0.5


# History ---------------------------------------------------------------------------------------------------------


def told(progress: Zeroing) -> list[dict[str, set[int]]]:
    """What the history says was zero after every choice."""
    zero: dict[str, set[int]] = {name: set() for name in progress.channels}
    found = []
    for choice in progress.history:
        for name, own in zero.items():
            came, went = set(choice.entered.get(name, ())), set(choice.left.get(name, ()))
            assert not came & own
            assert went <= own
            zero[name] = (own | came) - went
        found.append({name: set(own) for name, own in zero.items()})
    return found


@pytest.mark.parametrize("soft", [False, True])
def test_the_history_tells_every_choice(soft: bool) -> None:
    net = chain()
    progress = zeroing(net, X, criterion="l2", ratios=0.5, soft=soft, every=2, grow=4)
    assert progress.history == ()
    progress.select_()
    optimizer, seen = sgd(net, lr=0.5), [{name: set(np.flatnonzero(m)) for name, m in progress._removed.items()}]
    for epoch in range(6):
        train(net, progress.hooks, optimizer, range(epoch, epoch + 1))
        if epoch % 2:
            seen.append({name: set(np.flatnonzero(mask)) for name, mask in progress._removed.items()})
    assert told(progress) == seen
    assert [choice.epoch for choice in progress.history] == [0, 2, 4, 6]
    assert not progress.history[0].entered  # grown from nothing
    assert progress.channels == {"a.0": 8, "b.0": 12, "c.0": 16}
    left = [choice for choice in progress.history if choice.left]
    assert bool(left) == soft
    before = progress.history
    progress.finish_()
    assert progress.history == before  # chosen already, and zero


class Wide(nn.Module):
    """Enough filters for a median to be told from."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = conv(3, 48), conv(48, 64), nn.Linear(64, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.a(x)).mean((2, 3)))


@pytest.mark.parametrize("at_start", [False, True])
def test_a_hard_choice_by_medians_stays_what_it_was_first(at_start: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The paper's criterion chooses zeroed filters again by itself: they are many, and lie together in the middle."""
    torch.manual_seed(0)
    net = Wide()
    monkeypatch.setattr("secateur.schedules.zeros.gone_first", None)  # which would see to it, were it needed
    progress = zeroing(net, X, criterion="fpgm", ratios=0.4, constants="fold")
    if at_start:
        progress.select_()
    before = copy.deepcopy(net)
    train(net, progress.hooks, sgd(net), range(4))
    assert not same_weights(net, before)
    assert len(progress.history) == 4 + at_start
    first, *later = progress.history
    assert {name: len(own) for name, own in first.entered.items()} == {"a.0": 20, "b.0": 26}
    assert all(not choice.entered and not choice.left for choice in later)


def test_a_soft_choice_by_medians_changes() -> None:
    torch.manual_seed(0)
    net = Wide()
    progress = zeroing(net, X, criterion="fpgm", ratios=0.4, constants="fold", soft=True)
    train(net, progress.hooks, sgd(net, lr=0.5), range(4))
    assert any(choice.left for choice in progress.history[1:])
    assert told(progress)[-1] == {name: set(np.flatnonzero(mask)) for name, mask in progress._removed.items()}


@pytest.mark.parametrize("soft", [False, True])
def test_a_choice_at_the_end_is_in_the_history(soft: bool) -> None:
    """Of weights that were trained, or averaged, since the last choice."""
    net = chain()
    progress = zeroing(net, X, ratios=0.5, soft=soft, every=2)
    progress.select_()
    train(net, progress.hooks, sgd(net, lr=0.5), range(1))
    with torch.no_grad():
        net.b[0].weight += 1e-3 * torch.randn(net.b[0].weight.shape)
    final = progress.finish_()
    assert [choice.epoch for choice in progress.history] == [0, 1]
    assert told(progress)[-1] == {name: set(range(progress.channels[name])) - set(k) for name, k in final.keep.items()}
    assert progress.finish_() == final
    assert len(progress.history) == 2


@pytest.mark.parametrize("soft", [False, True])
def test_the_history_survives_an_interruption(soft: bool) -> None:
    def make(net: nn.Module) -> Zeroing:
        return zeroing(net, X, criterion="fpgm", ratios=0.5, soft=soft, constants="fold", residual="scatter")

    net = small()
    progress = make(net)
    progress.select_()
    optimizer = sgd(net, lr=0.5)
    train(net, progress.hooks, optimizer, range(2))
    assert progress.hooks.state is not None
    saved = copy.deepcopy((net.state_dict(), optimizer.state_dict(), dict(progress.hooks.state())))
    train(net, progress.hooks, optimizer, range(2, 4))
    again = small(3)
    resumed = make(again)
    resumed.select_()
    late = sgd(again, lr=0.5)
    again.load_state_dict(saved[0])
    late.load_state_dict(saved[1])
    assert resumed.hooks.restore is not None
    resumed.hooks.restore(saved[2])
    assert resumed.history == progress.history[:3]
    train(again, resumed.hooks, late, range(2, 4))
    assert resumed.history == progress.history
    assert len(progress.history) == 5
    assert any(choice.left for choice in progress.history) == soft
    assert same_weights(again, net)
    assert resumed.plan() == progress.plan()


def test_a_history_without_changes_is_kept_too() -> None:
    net = chain()
    progress, resumed = (zeroing(net, X, ratios=0.5, grow=2) for _ in range(2))
    progress.select_()
    assert progress.history == (Turnover(0, {}, {}),)
    state, restore = progress.hooks.state, resumed.hooks.restore
    assert state is not None
    assert restore is not None
    restore(state())
    assert resumed.history == progress.history
    json.dumps([vars(choice) for choice in progress.history])  # plain values


# Without what is zero --------------------------------------------------------------------------------------------


def naive_fpgm(filters: Tensor) -> list[float]:
    flat = filters.double().flatten(1)
    return [sum(float((one - other).norm()) for other in flat) for one in flat]


@pytest.mark.parametrize("zeros", [0, 5, 32])
def test_distances_among_the_filters_that_are_not_zero(zeros: int) -> None:
    weight = torch.randn(32, 27, generator=torch.Generator().manual_seed(0)) + 1.0
    weight[torch.randperm(32, generator=torch.Generator().manual_seed(1))[:zeros]] = 0
    seen = GroupView("a", weight, weight[:, :0], weight[:, :0], n_keep=20)
    alive = weight.any(1)
    found = among_the_rest("fpgm")(seen)
    if zeros in (0, 32):
        torch.testing.assert_close(found, resolve("fpgm")(seen))
        return
    torch.testing.assert_close(found[alive], torch.tensor(naive_fpgm(weight[alive]), dtype=torch.float64))
    assert bool((found[~alive] == 0).all())
    assert found[alive].argsort().tolist() != resolve("fpgm")(seen)[alive].argsort().tolist()  # or it would not matter


def test_the_rest_of_what_was_measured_is_shown_too() -> None:
    draw = torch.Generator().manual_seed(0)
    weight, alive = torch.randn(6, 4, generator=draw), torch.tensor([0, 2, 3, 5])
    weight[[1, 4]] = 0
    maps = MapStatistics(8, *(torch.rand(6, 2, generator=draw).double() for _ in range(6)))
    gram, target = torch.rand(3, 6, 6, generator=draw).double(), torch.rand(3, 6, generator=draw).double()
    outputs = OutputMoments(("r", "s", "t"), torch.ones(3), gram, target, torch.ones(3), torch.ones(3))
    products = torch.rand(6, generator=draw)
    seen: list[GroupView] = []

    def criterion(view: GroupView, /) -> Tensor:
        seen.append(view)
        return -torch.arange(1.0, 5.0)

    criterion.reads = ("maps", "outputs", "products")  # type: ignore[attr-defined]
    wrapped = among_the_rest(criterion)
    assert wrapped.reads == ("filters", "maps", "products", "outputs")  # type: ignore[attr-defined]
    view = GroupView("g", weight, weight, weight[:, :1], 5, 0, maps=maps, outputs=outputs, products=products)
    scores = wrapped(view)
    assert scores[alive].tolist() == [-1, -2, -3, -4]
    assert bool((scores[[1, 4]] < -4).all())
    (few,) = seen
    assert few.n_keep == 4
    for one, whole in ((few.filters, weight), (few.readers, weight), (few.products, products)):
        assert one is not None
        assert torch.equal(one, whole[alive])
    assert few.maps is not None
    assert few.maps.samples == 8
    assert torch.equal(few.maps.zeros, maps.zeros[alive])
    assert few.outputs is not None
    assert torch.equal(few.outputs.gram, gram[:, alive][:, :, alive])
    assert torch.equal(few.outputs.target, target[:, alive])
    assert few.outputs.readers == outputs.readers


def test_growing_zeros_are_no_part_of_the_distances() -> None:
    net = Wide()
    torch.manual_seed(0)
    nn.init.normal_(net.b[0].weight, 0.05, 0.05)
    progress = zeroing(net, X, criterion="fpgm", ratios={"b.0": 0.75}, grow=2, exclude_zeroed=True)
    train(net, progress.hooks, sgd(net), range(1))
    gone = set(np.flatnonzero(progress._removed["b.0"]).tolist())
    assert len(gone) == 32
    left = sorted(set(range(64)) - gone)
    seen: list[Tensor] = []
    hooks = replace(progress.hooks, after_epoch=lambda m: seen.append(m.b[0].weight.detach().clone()))
    train(net, hooks, sgd(net), range(1, 2))
    assert progress.hooks.after_epoch is not None
    progress.hooks.after_epoch(net)
    scores = naive_fpgm(seen[0][left])
    order = [left[i] for i in np.argsort(scores, kind="stable")]
    assert set(progress.history[-1].entered["b.0"]) == set(order[:16])
    assert progress.plan().made_by["criterion"] == "fpgm"
    counted = naive_fpgm(seen[0])
    assert set(order[:16]) != set(sorted(left, key=lambda channel: counted[channel])[:16])


@pytest.mark.parametrize(
    ("criterion", "exclude_zeroed"),
    [("fpgm", True), ("taylor", True), ("thinet_sequential", False), ("thinet_sequential", True)],
    ids=str,
)
def test_what_went_stays_gone_under_criteria_of_every_kind(criterion: str, exclude_zeroed: bool) -> None:
    net = chain()
    options: dict[str, Any] = {"criterion": criterion, "data": DATA, "loss": F.cross_entropy}
    progress = zeroing(net, X, ratios=0.5, grow=2, exclude_zeroed=exclude_zeroed, **options)
    train(net, progress.hooks, sgd(net), range(2))
    assert not any(choice.left for choice in progress.history)
    assert {name: len(own) for name, own in told(progress)[-1].items()} == {"a.0": 4, "b.0": 6, "c.0": 8}
    assert progress.plan().made_by["criterion"] == criterion
    assert criterion in CRITERIA


def test_what_is_measured_front_to_back_still_is() -> None:
    net = chain()
    options: dict[str, Any] = {"data": DATA, "ratios": 0.5}
    progress = zeroing(net, X, criterion="thinet_sequential", exclude_zeroed=True, **options)
    wanted, once = (sc.plan(net, X, criterion=name, **options) for name in ("thinet_sequential", "thinet"))
    assert progress.plan().keep == wanted.keep != once.keep
