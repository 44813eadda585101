"""Greedy selection against the paper's loop, written out by hand for each kind of network; and the order of turns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import secateur as sc
from law import assert_law, prepared
from networks.common import tensor
from secateur.groups import couple
from secateur.selection import forward_order, front_to_back

X = tensor(2, 3, 8, 8)


def top(scores: Tensor, count: int) -> tuple[int, ...]:
    """The indices of the ``count`` largest scores, one at a time; of equal ones the lowest index."""
    left, found = scores.tolist(), []
    for _ in range(count):
        best = max(range(len(left)), key=lambda j: (left[j], -j))
        found.append(best)
        left[best] = -1.0
    return tuple(sorted(found))


def norms(weight: Tensor, inputs: Any = None) -> Tensor:
    """``s_j``: the sum of ``|W[j, c]|`` over the input channels in ``inputs`` (all if not given), [O] float64."""
    total = torch.zeros(weight.shape[0], dtype=torch.float64)
    for j in range(weight.shape[0]):
        for c in range(weight.shape[1]) if inputs is None else inputs:
            total[j] += weight[j, c].detach().abs().double().sum()
    return total


def check(net: nn.Module, ratios: Any, expected: Mapping[str, tuple[int, ...]], x: Tensor = X) -> sc.Plan:
    """Greedy selection keeps what is ``expected``, and something else than independent selection; the law holds."""
    graph = prepared(net, x)
    greedy = sc.plan(graph, ratios=ratios, greedy=True)
    alone = sc.plan(graph, ratios=ratios)
    assert dict(greedy.keep) == dict(expected)
    assert dict(alone.keep) != dict(expected), "the network does not tell greedy from independent selection"
    assert {n: len(k) for n, k in greedy.keep.items()} == {n: len(k) for n, k in alone.keep.items()}
    assert greedy.made_by["greedy"] is True
    assert "greedy" not in alone.made_by
    assert_law(graph, x, greedy)
    return greedy


def conv(cin: int, cout: int, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(cin, cout, 3, padding=1, **options)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


# The paper's loop --------------------------------------------------------------------------------------------------


def test_a_chain() -> None:
    net = nn.Sequential(conv(3, 8), nn.BatchNorm2d(8), nn.ReLU(), conv(8, 12), nn.ReLU(), conv(12, 10), nn.ReLU())
    net.append(conv(10, 4))
    kept: dict[str, tuple[int, ...]] = {}
    inputs: Any = range(3)
    for name, width in (("0", 4), ("3", 6), ("5", 5)):
        kept[name] = inputs = top(norms(net.get_submodule(name).weight, inputs), width)
    check(net, 0.5, kept)


class Concatenated(nn.Module):
    """The third convolution reads the first's channels behind the second's, and some of the second's twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = conv(3, 8), conv(3, 6), conv(20, 10), conv(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        a, b = F.relu(self.a(x)), F.relu(self.b(x))
        return self.d(F.relu(self.c(torch.cat([b, a, b], 1))))


def test_through_a_concatenation() -> None:
    net = Concatenated()
    a, b = top(norms(net.a.weight), 4), top(norms(net.b.weight), 3)
    inputs = [*b, *(6 + i for i in a), *(14 + i for i in b)]
    check(net, 0.5, {"a": a, "b": b, "c": top(norms(net.c.weight, inputs), 5)})


class Streamed(nn.Module):
    """A residual stream of two writers, with a block that reads it and writes back, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner, self.back = conv(3, 8), conv(8, 10), conv(10, 8)
        self.last, self.head = conv(8, 12), conv(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(x + self.back(F.relu(self.inner(x))))
        return self.head(F.relu(self.last(x)))


def test_a_residual_stream_has_its_turn_where_it_is_first_written() -> None:
    net = Streamed()
    stream = top(norms(net.stem.weight) + norms(net.back.weight), 4)  # nothing of `inner` is gone yet
    inner = top(norms(net.inner.weight, stream), 5)
    last = top(norms(net.last.weight, stream), 6)
    check(net, 0.5, {"stem": stream, "inner": inner, "last": last})
    # the paper's own rule: with only the inside of a block pruned, its input is whole, and both selections agree
    ratios = {"inner": 0.5}
    graph = sc.trace(net, X.double())
    assert sc.plan(graph, ratios=ratios, greedy=True).keep == sc.plan(graph, ratios=ratios).keep


def test_grouped_convolutions_lose_the_same_slices_in_every_partition() -> None:
    net = nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 12, groups=2), nn.ReLU(), conv(12, 10), nn.ReLU(), conv(10, 4))
    first = norms(net[0].weight)
    pairs = top(first[:4] + first[4:], 2)  # channel c of the group is filter c and filter c + 4
    middle = norms(net[2].weight, pairs)  # each partition reads its own four
    twins = top(middle[:6] + middle[6:], 3)
    last = top(norms(net[4].weight, [*twins, *(6 + i for i in twins)]), 5)
    check(net, 0.5, {"0": pairs, "2": twins, "4": last})


def test_a_linear_layer_behind_a_flattened_map() -> None:
    net = nn.Sequential(conv(3, 8), nn.ReLU(), nn.MaxPool2d(4), nn.Flatten(), nn.Linear(32, 12), nn.ReLU())
    net.append(nn.Linear(12, 4))
    maps = top(norms(net[0].weight), 4)
    features = top(norms(net[4].weight, [4 * c + k for c in maps for k in range(4)]), 6)
    check(net, 0.5, {"0": maps, "4": features})


def test_transposed_and_depthwise_convolutions() -> None:
    net = nn.Sequential(
        conv(3, 8), nn.ReLU(), conv(8, 8, groups=8), nn.ReLU(), nn.ConvTranspose2d(8, 10, 2, 2), nn.ReLU(), conv(10, 4)
    )
    first = top(norms(net[0].weight) + norms(net[2].weight), 4)
    turned = net[4].weight.transpose(0, 1)  # [O, I, 2, 2]
    check(net, 0.5, {"0": first, "4": top(norms(turned, first), 5)})


class Backwards(nn.Module):
    """Registered in another order than run."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.second, self.first = conv(10, 4), conv(8, 10), conv(3, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.second(F.relu(self.first(x)))))


def test_turns_are_those_of_the_forward_pass() -> None:
    net = Backwards()
    assert forward_order(couple(sc.trace(net, X))) == ["first", "second"]
    first = top(norms(net.first.weight), 4)
    check(net, 0.5, {"first": first, "second": top(norms(net.second.weight, first), 5)})


# What it goes by ---------------------------------------------------------------------------------------------------


def chain() -> nn.Sequential:
    return nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 12), nn.ReLU(), conv(12, 10), nn.ReLU(), conv(10, 4))


def test_widths_of_a_budget_are_those_of_independent_selection() -> None:
    graph = sc.trace(chain(), X)
    budget = sc.Budget(keep=0.4)
    alone, greedy = sc.plan(graph, budget=budget), sc.plan(graph, budget=budget, greedy=True)
    assert {n: len(k) for n, k in greedy.keep.items()} == {n: len(k) for n, k in alone.keep.items()}
    assert greedy.keep != alone.keep


def test_groups_that_stay_whole_are_left_alone_and_leave_their_readers_alone() -> None:
    net = chain()
    with torch.no_grad():
        net[0].weight[0, 0, 0, 0] = float("nan")  # nobody looks at what is excluded
    found = sc.plan(net, X, ratios=0.5, exclude="0", greedy=True).keep
    assert found["0"] == tuple(range(8))
    assert found["2"] == top(norms(net[2].weight), 6)
    assert found["4"] == top(norms(net[4].weight, found["2"]), 5)


def test_the_weights_of_the_user_are_not_touched() -> None:
    net = chain()
    before = {name: t.clone() for name, t in net.state_dict().items()}
    sc.plan(net, X, ratios=0.7, greedy=True)
    assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())


def test_a_criterion_of_ones_own_sees_zeros_and_how_many_stay() -> None:
    seen = {}

    def mine(view: sc.GroupView, /) -> Tensor:
        seen[view.name] = (view.n_keep, int((view.filters == 0).sum()))
        return view.filters.abs().sum(1)

    graph = sc.trace(chain(), X)
    sc.plan(graph, criterion=mine, ratios=0.5, greedy=True)
    assert seen == {"0": (4, 0), "2": (6, 12 * 4 * 9), "4": (5, 10 * 6 * 9)}


def test_front_to_back_alone() -> None:
    coupling = couple(sc.trace(chain(), X))
    judged = {group.name: group for group in coupling.groups}
    found = front_to_back(coupling, judged, {"0": 4, "4": 5}, "l1")
    plan = sc.plan(coupling.graph, ratios={"0": 4, "4": 5}, greedy=True)
    assert found == dict(plan.keep)
    assert found["2"] == tuple(range(12))


def test_half_precision_and_large_weights() -> None:
    net = chain().half()
    found = sc.plan(net, X, ratios=0.5, greedy=True)
    assert sum(map(len, found.keep.values())) == 15
    assert all(p.dtype == torch.float16 for p in net.parameters())


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            {"criterion": "random"},
            "greedy means nothing to criterion 'random', which looks at nothing: .*leave greedy out",
        ),
        ({"criterion": "bn_scale"}, "criterion 'bn_scale', which looks at scales: .*such as 'l1'"),
        ({"criterion": "apoz", "data": [X]}, "criterion 'apoz', which looks at activations: "),
        ({"criterion": "mean_std", "data": [X]}, "criterion 'mean_std', which looks at maps: "),
        (
            {"criterion": "taylor", "data": [(X, X)], "loss": F.mse_loss},
            "criterion 'taylor', which looks at products: ",
        ),
        ({"criterion": sc.CRITERIA["random"]}, "criterion 'random'"),
    ],
)
def test_criteria_to_which_greedy_means_nothing(options: dict[str, Any], text: str) -> None:
    with pytest.raises(sc.BadRequest, match=f"(?s){text}"):
        sc.plan(chain(), X, ratios=0.5, greedy=True, **options)


@pytest.mark.parametrize("criterion", ["l2", "largest", "fpgm", "whc"])
def test_criteria_to_which_greedy_means_something(criterion: str) -> None:
    net = chain()
    found = sc.plan(net, X, ratios=0.5, greedy=True, criterion=criterion).keep
    with torch.no_grad():  # by hand: leave the slices out, and plan the next layer independently
        net[2].weight[:, [i for i in range(8) if i not in found["0"]]] = 0
        assert sc.plan(net, X, ratios={"2": 0.5}, criterion=criterion).keep["2"] == found["2"]
        net[4].weight[:, [i for i in range(12) if i not in found["2"]]] = 0
        assert sc.plan(net, X, ratios={"4": 0.5}, criterion=criterion).keep["4"] == found["4"]
