"""Which groups meet in sums, which projection speaks for a stream, and what the residual rules leave whole."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import secateur as sc
from law import assert_law, prepared, random_ratios
from networks.common import randomise, tensor
from secateur.groups import couple
from secateur.residuals import kept_whole, meeting_sums, projections, scored_by_projection
from secateur.schedules.options import start_of
from secateur.zoo.names import build
from secateur.zoo.resnet import BasicBlock, cifar_resnet

pytestmark = pytest.mark.filterwarnings("ignore::secateur.zoo.torchvision_shim.TorchvisionMismatch")
X = tensor(2, 3, 32, 32)


def torchvision_models() -> Any:
    from secateur.zoo.torchvision_shim import import_torchvision

    return import_torchvision().models


def torchvision_resnet(block: str) -> nn.Module:
    models = torchvision_models()
    return models.ResNet(getattr(models.resnet, block), [1, 2, 1, 1], num_classes=7)


def inverted() -> nn.Module:
    return torchvision_models().MobileNetV2(7, inverted_residual_setting=[[1, 8, 1, 1], [4, 12, 3, 2], [4, 16, 1, 2]])


def dense() -> nn.Module:
    return torchvision_models().DenseNet(8, (2, 2), 16, num_classes=7)


BUILDERS: dict[str, Callable[[], nn.Module]] = {
    "padded": lambda: cifar_resnet(14),
    "projected": lambda: cifar_resnet(14, shortcut="projection"),
    "torchvision basic": lambda: torchvision_resnet("BasicBlock"),
    "torchvision bottleneck": lambda: torchvision_resnet("Bottleneck"),
    "torchvision mobilenet": inverted,
    "torchvision densenet": dense,
    "timm:resnet10t": lambda: build("timm:resnet10t", num_classes=7),
    "timm:resnet26d": lambda: build("timm:resnet26d", num_classes=7),
}
PROJECTED = {
    "padded": {},
    "projected": {f"layer{i}.0.conv2": f"layer{i}.0.downsample.0.weight" for i in (2, 3)},
    "torchvision basic": {f"layer{i}.0.conv2": f"layer{i}.0.downsample.0.weight" for i in (2, 3, 4)},
    "torchvision bottleneck": {f"layer{i}.0.conv3": f"layer{i}.0.downsample.0.weight" for i in (1, 2, 3, 4)},
    "torchvision mobilenet": {},
    "torchvision densenet": {},
    # an average pooling stands in front of the 1x1 convolution, and the stem is three convolutions
    "timm:resnet10t": {f"layer{i}.0.conv2": f"layer{i}.0.downsample.1.weight" for i in (2, 3, 4)},
    "timm:resnet26d": {f"layer{i}.0.conv3": f"layer{i}.0.downsample.1.weight" for i in (1, 2, 3, 4)},
}


@cache
def graph_of(name: str) -> sc.Graph:
    torch.manual_seed(0)
    return prepared(randomise(BUILDERS[name](), 1), X)


def writers(group: sc.Group) -> set[str]:
    return {s.tensor.removesuffix(".weight") for s in group.slices if s.role == "writes"}


def stream_layers(model: nn.Module) -> set[str]:
    """The layers that write into a residual sum, by the names that everybody gives them."""
    found = {name for name, _ in model.named_modules() if name.endswith((".downsample.0", ".downsample.1"))}
    for name, block in model.named_modules():
        if type(block).__name__ in ("BasicBlock", "Bottleneck"):
            found.add(f"{name}.conv3" if hasattr(block, "conv3") else f"{name}.conv2")
        if type(block).__name__ == "InvertedResidual" and block.use_res_connect:
            found.add(f"{name}.conv.{len(block.conv) - 2}")
    return found


@pytest.fixture(params=[pytest.param(n, marks=pytest.mark.slow if n == "timm:resnet26d" else ()) for n in BUILDERS])
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


# What is found -----------------------------------------------------------------------------------------------------


def test_what_meets_in_sums(name: str) -> None:
    graph = graph_of(name)
    coupling, layers = couple(graph), stream_layers(graph.model)
    expected = {group.name for group in coupling.groups if writers(group) & layers}
    assert meeting_sums(coupling) == expected
    assert bool(expected) is (name != "torchvision densenet")
    assert len(expected) < len(coupling.groups)


def test_projections_of_streams(name: str) -> None:
    coupling = couple(graph_of(name))
    assert projections(coupling) == PROJECTED[name]
    assert projections(coupling).keys() <= meeting_sums(coupling)


def test_a_projected_group_has_one_writer_and_that_ones_norm() -> None:
    coupling = couple(graph_of("timm:resnet10t"))
    group = scored_by_projection(coupling)["layer2.0.conv2"]
    before = next(g for g in coupling.groups if g.name == "layer2.0.conv2")
    assert writers(group) == {"layer2.0.downsample.1"}
    assert {s.tensor for s in group.slices if s.role == "scales"} == {"layer2.0.downsample.2.weight"}
    assert [s for s in group.slices if s.role == "reads"] == [s for s in before.slices if s.role == "reads"]
    assert (group.name, group.channels, group.partitions) == (before.name, before.channels, before.partitions)
    assert len(writers(before)) == 2


class Two(nn.Module):
    """Two convolutions of equal width, put together by a function, and a head."""

    def __init__(self, together: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(3, 6, 3, padding=1)
        self.head, self.together = nn.Conv2d(6, 4, 1), together

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.together(self.a(x), self.b(x)))


@pytest.mark.parametrize(
    ("together", "meets"),
    [
        (lambda a, b: a + b, True),
        (lambda a, b: F.relu(a) - b.sigmoid(), True),
        (lambda a, b: sum([a, b]), True),
        (lambda a, b: a.clone().add_(b, alpha=0.5), True),
        (lambda a, b: 1.0 - a + b, True),
        (lambda a, b: torch.lerp(a, b, 0.3), True),
        (lambda a, b: torch.addcmul(a, a.tanh(), b), True),
        (lambda a, b: torch.stack([a, b]).sum(0), True),
        (lambda a, b: torch.stack([a, b], -1).mean(-1), True),
        (lambda a, b: a * b.sigmoid() + b, True),
        (lambda a, b: a + b.mean((2, 3), keepdim=True), True),
        (lambda a, b: a * b, False),
        (torch.maximum, False),
        (lambda a, b: torch.stack([a, b]).amax(0), False),
        (lambda a, b: 0.5 * a * (1 + torch.tanh(0.8 * (a + 0.04 * a**3))) * b, False),  # an activation by hand
        (lambda a, b: (a - a.mean((2, 3), keepdim=True)) * b, False),  # a norm by hand
        (lambda a, b: (a + 3) * b, False),
    ],
)
def test_what_a_sum_is(together: Callable[[Tensor, Tensor], Tensor], meets: bool) -> None:
    coupling = couple(sc.trace(Two(together), X))
    assert [writers(g) for g in coupling.groups] == [{"a", "b"}]
    assert meeting_sums(coupling) == ({"a"} if meets else set())


class Depthwise(nn.Module):
    """``x + depthwise(x)`` and a global response norm: sums in which the channels of one layer meet themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.depth = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.gain, self.shift = nn.Parameter(torch.ones(6, 1, 1)), nn.Parameter(torch.zeros(6, 1, 1))
        self.head = nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.stem(x))
        x = x + self.depth(x)
        x = self.gain * (x * x.std((2, 3), keepdim=True)) + self.shift + x
        return self.head(x)


def test_channels_that_only_meet_themselves() -> None:
    coupling = couple(sc.trace(Depthwise(), X))
    assert [g.name for g in coupling.groups] == ["stem"]
    assert meeting_sums(coupling) == set()


class Shortcuts(nn.Module):
    """A stream that begins with two branches."""

    def __init__(self, body: nn.Module, shortcut: nn.Module) -> None:
        super().__init__()
        self.stem, self.body, self.shortcut = nn.Conv2d(3, 6, 3, padding=1), body, shortcut
        self.later, self.head = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(self.body(x) + self.shortcut(x))
        return self.head(F.relu(x + self.later(x)))


def one(cin: int, cout: int, kernel: int = 1) -> nn.Conv2d:
    return nn.Conv2d(cin, cout, kernel, padding=kernel // 2)


def test_which_branch_is_the_projection() -> None:
    def found(body: nn.Module, shortcut: nn.Module) -> dict[str, str]:
        return projections(couple(sc.trace(Shortcuts(body, shortcut), X)))

    body = nn.Sequential(one(6, 5, 3), nn.ReLU(), one(5, 8, 3))
    two = nn.Sequential(nn.BatchNorm2d(6), one(6, 8), nn.BatchNorm2d(8), nn.Dropout(0.1))
    assert list(found(body, one(6, 8)).values()) == ["shortcut.weight"]
    assert list(found(one(6, 8), body).values()) == ["body.weight"]  # told by the convolutions, not by name or order
    assert list(found(body, two).values()) == ["shortcut.1.weight"]
    assert found(body, nn.Sequential(one(6, 8), nn.ReLU(), one(8, 8))) == {}  # as long as the body
    longer = nn.Sequential(*body, nn.ReLU(), one(8, 8))
    depthwise = nn.Sequential(one(6, 8), nn.Conv2d(8, 8, 3, padding=1, groups=8))
    assert found(longer, depthwise) == {}  # two layers write the stream there
    assert found(nn.Sequential(one(6, 6), nn.ReLU(), one(6, 8)), nn.ZeroPad2d((0, 0, 0, 0, 0, 2))) == {}
    normed = nn.utils.parametrizations.weight_norm(one(6, 8))
    assert list(found(body, normed).values()) == ["shortcut.parametrizations.weight.original1"]


# What is planned ---------------------------------------------------------------------------------------------------


def naive_top(weight: Tensor, keep: int) -> tuple[int, ...]:
    scores = [float(weight[j].detach().double().abs().sum()) for j in range(len(weight))]
    ranked = sorted(range(len(weight)), key=lambda j: (-scores[j], j))
    return tuple(sorted(ranked[:keep]))


def cut(plan: sc.Plan) -> set[str]:
    return {g.name for g in plan.groups if len(plan.keep[g.name]) < g.channels}


def test_inner_leaves_streams_whole_and_all_else_free(name: str) -> None:
    graph = graph_of(name)
    plan = sc.plan(graph, ratios=0.5, residual="inner")
    every = {group.name for group in plan.groups}
    assert cut(plan) == every - meeting_sums(couple(graph))
    assert (plan.residual, plan.made_by["residual"]) == ("inner", "inner")
    coupled = sc.plan(graph, ratios=0.5)
    assert (coupled.residual, coupled.made_by.get("residual")) == ("coupled", None)
    assert all(plan.keep[name] == coupled.keep[name] for name in cut(plan))


def test_projections_decide_for_their_stage(name: str) -> None:
    graph = graph_of(name)
    plan = sc.plan(graph, ratios=0.3, residual="projection")
    assert (plan.residual, plan.made_by["residual"]) == ("coupled", "projection")
    whole = meeting_sums(couple(graph)) - PROJECTED[name].keys()
    assert cut(plan) == {group.name for group in plan.groups} - whole
    coupled = sc.plan(graph, ratios=0.3)
    for group in plan.groups:
        if group.name in PROJECTED[name]:
            wanted = naive_top(graph.tensors[PROJECTED[name][group.name]], math.floor(group.channels * 0.7 + 1e-9))
            assert plan.keep[group.name] == wanted
        elif group.name not in whole:
            assert plan.keep[group.name] == coupled.keep[group.name]
    if PROJECTED[name]:
        assert any(plan.keep[group] != coupled.keep[group] for group in PROJECTED[name])


@pytest.mark.parametrize("residual", ["inner", "projection"])
@pytest.mark.parametrize("name", ["projected", "torchvision bottleneck", "torchvision densenet"])
def test_the_law(name: str, residual: Any) -> None:
    graph = graph_of(name)
    whole = kept_whole(couple(graph), residual)
    ratios = {n: r for n, r in random_ratios(couple(graph).groups, 3, 0.2, 0.7).items() if n not in whole}
    assert_law(graph, X, sc.plan(graph, ratios=ratios, residual=residual))


@pytest.mark.slow
@pytest.mark.parametrize("residual", ["inner", "projection"])
def test_the_law_everywhere(name: str, residual: Any) -> None:
    graph = graph_of(name)
    whole = kept_whole(couple(graph), residual)
    for seed in (0, 1):
        ratios = {n: r for n, r in random_ratios(couple(graph).groups, seed).items() if n not in whole}
        assert_law(graph, X, sc.plan(graph, ratios=ratios, residual=residual), seed=seed)


@pytest.mark.slow
@pytest.mark.parametrize("full", ["torchvision:resnet50", "torchvision:densenet121", "timm:resnet50", "zoo:resnet56"])
def test_whole_networks(full: str) -> None:
    graph = prepared(randomise(build(full), 1), X)
    coupling = couple(graph)
    layers = stream_layers(graph.model)
    assert meeting_sums(coupling) == {group.name for group in coupling.groups if writers(group) & layers}
    assert len(projections(coupling)) == (4 if "resnet50" in full else 0)
    assert_law(graph, X, sc.plan(graph, ratios=0.4, residual="inner"))


def test_an_inner_plan_is_saved_and_loaded(tmp_path: Path) -> None:
    graph = graph_of("projected")
    plan = sc.plan(graph, ratios=0.5, residual="inner", greedy=True)
    again = sc.Plan.from_json(plan.to_json())
    assert again == plan
    assert again.residual == "inner"
    small = sc.apply(graph, again)
    sc.save(tmp_path / "net", small, plan)
    loaded = sc.load(tmp_path / "net", BUILDERS["projected"]().double()).eval()
    with torch.no_grad():
        assert torch.equal(loaded(X.double()), small(X.double()))
        torch.testing.assert_close(sc.masked(graph, again)(X.double()), small(X.double()), rtol=1e-9, atol=1e-12)


def test_a_budget_is_met_from_the_inside_alone() -> None:
    graph = graph_of("projected")
    dense = sc.count(graph.model, X.double()).macs
    plan = sc.plan(graph, budget=sc.Budget(keep=0.6), residual="inner")
    assert 0.99 * 0.6 <= sc.count(sc.apply(graph, plan), X.double()).macs / dense <= 0.6
    assert not cut(plan) & meeting_sums(couple(graph))


def test_the_norms_of_a_projection_decide_for_bn_scale_too() -> None:
    graph = graph_of("torchvision basic")
    plan = sc.plan(graph, criterion="bn_scale", ratios={"layer3.0.conv2": 0.5}, residual="projection")
    scale = graph.tensors["layer3.0.downsample.1.weight"]
    assert plan.keep["layer3.0.conv2"] == naive_top(scale[:, None], 128)


def test_maps_of_a_projection_decide_for_activation_criteria() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), BasicBlock(6, 8, inner=6, stride=1), nn.ReLU(), nn.Conv2d(8, 4, 1)
    ).eval()
    data = [tensor(5, 3, 8, 8, seed=s) for s in (1, 2)]
    with torch.no_grad():
        maps = torch.cat([net[2].downsample[0](net[:2](x)) for x in data]).double()
    plan = sc.plan(net, data[0], criterion="mean_l1", ratios={"2.conv2": 0.5}, residual="projection", data=data)
    assert plan.keep["2.conv2"] == naive_top(maps.abs().sum((2, 3)).mean(0)[:, None], 4)


# What is refused ---------------------------------------------------------------------------------------------------


def test_asking_for_what_stays_whole() -> None:
    graph = graph_of("padded")
    with pytest.raises(sc.CannotPrune) as caught:
        sc.plan(graph, ratios={"layer2.0.conv2": 0.5, "layer2.1.conv1": 0.5}, residual="inner")
    text = str(caught.value)
    assert text.startswith(
        "ratios: 'layer2.0.conv2' asks for group 'layer2.0.conv2' (16 channels)\n  residual='inner' "
    )
    assert "leaves it whole: it meets other channels in the sum at resnet.py:" in text
    assert "return F.relu(y + (x if self.downsample is None else self.downsample(x)))" in text
    assert text.endswith("do: leave it out, or take residual='coupled', where it is free")
    with pytest.raises(sc.CannotPrune, match=r"residual='projection' leaves it whole: .* needs a shortcut projection"):
        sc.plan(graph, ratios={"*.conv2": 0.5}, residual="projection")


def test_globs_and_whole_widths_pass_over_what_stays_whole() -> None:
    graph = graph_of("padded")
    plan = sc.plan(graph, ratios={"layer2*": 0.5, "conv1": 16, "layer3.0.conv2": 0}, residual="inner")
    assert cut(plan) == {f"layer2.{i}.conv1" for i in range(2)}
    assert cut(sc.plan(graph, ratios=0.5, exclude=["conv1", "layer3*"], residual="inner")) == {
        f"layer{s}.{i}.conv1" for s in (1, 2) for i in range(2)
    }


def test_an_unreachable_budget_names_the_rule() -> None:
    graph = graph_of("padded")
    with pytest.raises(sc.Unreachable, match=r"\d groups locked \('conv1': residual='inner' leaves it whole: it meets"):
        sc.plan(graph, budget=sc.Budget(keep=0.01), residual="inner")


@pytest.mark.parametrize(
    ("residual", "text"),
    [
        ("scattered", "there is no residual rule 'scattered'; did you mean 'scatter'"),
        ("iner", "there is no residual rule 'iner'; did you mean 'inner'"),
        (None, "there is no residual rule None"),
    ],
)
def test_rules_that_are_not_there(residual: Any, text: str) -> None:
    with pytest.raises(sc.BadRequest, match=text):
        sc.plan(graph_of("padded"), ratios=0.5, residual=residual)


def test_schedules_know_what_stays_whole() -> None:
    graph = graph_of("padded")
    start = start_of(graph, {"residual": "inner"})
    assert start.whole.keys() == meeting_sums(couple(graph))
    assert (start.cost, start_of(graph, {}).whole) == (start_of(graph, {}).cost, {})
