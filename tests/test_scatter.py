"""``residual="scatter"``: each layer that adds to a stream is cut on its own, and the stream keeps its width."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import secateur as sc
from law import assert_law, fresh, prepared, random_ratios, relative_error, restored
from networks import NETWORKS, randomise
from networks.common import tensor
from residual_networks import BRANCHES, GROUPS, ResNet, X, gone, graph, network, plan_of, shared
from secateur.recover import compensate_, recalibrate_
from secateur.wiring import Wired
from secateur.zoo.names import build

pytestmark = pytest.mark.filterwarnings(
    "ignore::secateur.zoo.torchvision_shim.TorchvisionMismatch", "ignore:the captured graph:secateur.SecateurWarning"
)
BOTH = pytest.mark.parametrize("constants", ["drop", "fold"])

# What a plan says ----------------------------------------------------------------------------------------------------


def test_each_layer_of_a_stream_is_a_group_of_its_own() -> None:
    plan = plan_of()
    assert plan.residual == "scatter"
    assert tuple(group.name for group in plan.groups) == GROUPS
    assert {s.tensor.rpartition(".")[0] for g in plan.groups if g.name == "b.down.0" for s in g.slices} == {
        "b.down.0",
        "b.down.1",
    }
    assert sc.Plan.from_json(plan.to_json()) == plan
    coupled = sc.plan(graph(), ratios=0.4)
    assert [group.name for group in coupled.groups] == ["stem", "a.conv1", "b.conv1", "b.conv2"]


def test_what_reads_a_stream_keeps_its_inputs() -> None:
    """The sum has its full width: nothing behind it is cut."""
    small = shared()[1]
    assert small.fc.weight.shape == (5, 12)
    assert small.b.conv1.weight.shape == (7, 8, 3, 3)
    assert small.b.down[0].weight.shape == (7, 8, 1, 1)
    assert small.a.conv1.weight.shape == (4, 4, 3, 3)  # the narrow stem is gathered: no sum lies between
    assert small.a.conv2.weight.shape == (4, 4, 3, 3)


def test_locked_streams_say_why() -> None:
    from secateur.groups import couple

    reasons = [group.locked for group in couple(graph(), scatter=True).locked]
    assert any("residual='scatter' adds into the full width of a residual stream" in reason for reason in reasons)


def test_the_edits_are_those_of_the_branches() -> None:
    plan = sc.record(shared()[1]).plan  # type: ignore[union-attr]
    scatters = {edit.target: edit for edit in plan.edits if edit.kind == "scatter"}
    assert set(scatters) == set(BRANCHES.values())
    for group, module in BRANCHES.items():
        value = scatters[module].value
        assert isinstance(value, tuple)
        assert tuple(i for i, place in enumerate(value) if place >= 0) == plan.keep[group]
        assert scatters[module].axis == 1
    (gather,) = (edit for edit in plan.edits if edit.kind == "gather")
    assert (gather.target, gather.value) == ("a.conv1", plan.keep["stem"])


# The law -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [1, 2])
def test_the_law_on_blocks(seed: int) -> None:
    groups = plan_of().groups
    plan = sc.plan(graph(), criterion="random", ratios=random_ratios(groups, seed), residual="scatter", seed=seed)
    small = assert_law(graph(), X, plan)
    assert sc.record(small).tier == "attributes"  # type: ignore[union-attr]


def by_hooks(model: nn.Module, plan: sc.Plan, x: Tensor) -> Tensor:
    """The dense network, the removed channels of every branch zero where it is handed on, and where the stem is read
    by the first block alone; of the layers inside of blocks, zero in front of what reads them. Knows no engine."""

    def zero(channels: list[int]) -> Callable[..., Tensor]:
        return lambda _, __, out: out.index_fill(1, torch.tensor(channels), 0.0)

    handles = [
        model.get_submodule(module).register_forward_hook(zero(gone(plan, group))) for group, module in BRANCHES.items()
    ]
    for block in ("a", "b"):
        inner = model.get_submodule(f"{block}.bn1")
        handles.append(inner.register_forward_hook(zero(gone(plan, f"{block}.conv1"))))
    with torch.no_grad():
        found = model(x)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("size", [(9, 9), (8, 14), (1, 3)])
def test_the_same_network_by_hooks(size: tuple[int, int]) -> None:
    plan, small = shared()
    x = tensor(3, 3, *size, seed=4).double()
    want = by_hooks(graph().model, plan, x)
    assert relative_error(small(x), want) < 1e-12
    assert relative_error(graph().model(x), want) > 1e-3


SUMMING = "cat_then_add option_a_pad layer_scale".split()


def sweep(name: str, seed: int) -> None:
    factory, example, expect = NETWORKS[name]
    torch.manual_seed(0)
    model, inputs = randomise(factory(), seed=1), example()
    captured = prepared(model, inputs)
    options: Any = {"criterion": "random", "residual": "scatter", "seed": seed}
    groups = sc.plan(captured, ratios=0.0, residual="scatter").groups
    plan = sc.plan(captured, ratios=random_ratios(groups, seed) if groups else 0.5, **options)
    assert_law(captured, inputs, plan, seed=seed, tol=expect.tol)


@pytest.mark.parametrize("name", SUMMING)
def test_the_law_where_things_are_added(name: str) -> None:
    sweep(name, 1)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("name", [n for n in NETWORKS if n not in SUMMING])
def test_the_law_everywhere(name: str, seed: int) -> None:
    sweep(name, seed)


REAL = {
    "zoo:resnet20": 8,
    "zoo:resnet56": 8,
    "torchvision:resnet18": 32,
    "torchvision:resnet50": 32,
    "torchvision:mobilenet_v2": 32,
    "torchvision:regnet_y_400mf": 32,
    "torchvision:efficientnet_b0": 32,
    "torchvision:densenet121": 32,
    "timm:resnet18": 32,
    "timm:resnetv2_50": 32,
    "timm:ecaresnet26t": 32,
    "timm:convnext_atto": 32,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_the_law_on_real_networks(name: str) -> None:
    torch.manual_seed(0)
    model, x = build(name), tensor(2, 3, REAL[name], REAL[name]).double()
    captured = sc.trace(randomise(model, 1).double().eval(), x)
    groups = sc.plan(captured, ratios=0.0, residual="scatter").groups
    for ratios in (0.5, random_ratios(groups, 1)):
        plan = sc.plan(captured, criterion="random", ratios=ratios, residual="scatter")
        small, dense = sc.apply(model, plan), sc.masked(model, plan)
        for batch in (1, 3):
            with torch.no_grad():
                assert relative_error(small(fresh(x, batch, 2)), dense(fresh(x, batch, 2))) <= 1e-9


# Which way -----------------------------------------------------------------------------------------------------------


class Root(nn.Module):
    """A block written out at the root, with an activation that is not 0 at 0 in front of the sum."""

    def __init__(self, act: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.act, self.stem, self.a, self.head = act, nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.stem(x))
        return self.head(self.act(self.a(h) + h))


@pytest.mark.parametrize(("act", "tier"), [(torch.relu, "attributes"), (F.softplus, "graph")], ids=["relu", "softplus"])
def test_zeros_pass_only_through_what_is_zero_at_zero(act: Callable[[Tensor], Tensor], tier: str) -> None:
    torch.manual_seed(0)
    model = Root(act).double().eval()
    captured = sc.trace(model, X)
    plan = sc.plan(captured, ratios=0.5, residual="scatter")
    small = assert_law(captured, X, plan)
    assert sc.record(small).tier == tier  # type: ignore[union-attr]


@pytest.mark.parametrize("flat", [False, True])
def test_gathering_behind_a_move_of_the_channels(flat: bool) -> None:
    """The narrow stem is flattened, or its channels moved, before a branch reads it: axis and places differ."""

    class Moved(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, width = nn.Conv2d(3, 4, 3, 4), 16 if flat else 4
            self.a, self.head = nn.Linear(width, width), nn.Linear(width, 5)

        def forward(self, x: Tensor) -> Tensor:
            h = self.stem(x)
            h = h.flatten(1) if flat else h.flatten(2).transpose(1, 2)
            return self.head(torch.relu(self.a(h) + h))

    torch.manual_seed(0)
    model = Moved().double().eval()
    captured = sc.trace(model, X)
    plan = sc.plan(captured, ratios=0.5, residual="scatter")
    small: Any = assert_law(captured, X, plan)
    (edit,) = (e for e in sc.record(small).plan.edits if e.kind == "gather")  # type: ignore[union-attr]
    assert (edit.axis, len(edit.value)) == ((1, 8) if flat else (2, 2))


def test_a_module_called_with_names() -> None:
    class Named(Root):
        def forward(self, x: Tensor) -> Tensor:
            h = self.stem(input=x)
            return self.head(input=torch.relu(self.a(input=h) + h))

    torch.manual_seed(0)
    model = Named(torch.relu).double().eval()
    captured = sc.trace(model, X)
    small = assert_law(captured, X, sc.plan(captured, ratios=0.5, residual="scatter"))
    assert sc.record(small).tier == "attributes"  # type: ignore[union-attr]
    assert isinstance(small.get_submodule("a"), Wired)


# What stays as it was ------------------------------------------------------------------------------------------------


@BOTH
def test_modules_names_and_tensors_stay(constants: str) -> None:
    small = shared(constants)[1]
    model = graph().model
    assert type(small) is type(model)
    assert [n for n, _ in small.named_modules()] == [n for n, _ in model.named_modules()]
    assert [n for n, _ in small.named_parameters()] == [n for n, _ in model.named_parameters()]
    more = set(small.state_dict()) - set(model.state_dict())
    scattered = {f"{module}.scatter_constants" for module in BRANCHES.values()}
    assert more >= scattered if constants == "fold" else not more
    assert isinstance(small.a.bn2, (Wired, nn.BatchNorm2d))
    assert all(isinstance(small.get_submodule(n), type(m)) for n, m in model.named_modules())
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())


@BOTH
def test_copies_pickles_and_states(constants: str) -> None:
    small = shared(constants)[1]
    want = small(X)
    twins = [copy.deepcopy(small), pickle.loads(pickle.dumps(small))]
    other = sc.apply(network(seed=7), plan_of(constants))
    assert relative_error(other(X), want) > 1e-3
    other.load_state_dict(small.state_dict())
    for twin in (*twins, other):
        assert torch.equal(twin(X), want)
        assert isinstance(twin.a.bn2, Wired)
        assert isinstance(twin.a.bn2, nn.BatchNorm2d)
    with torch.no_grad():
        twins[0].a.bn2.weight.zero_()
    assert torch.equal(small(X), want)


@BOTH
def test_a_saved_folder_gives_it_back(constants: str, tmp_path: Path) -> None:
    small = sc.apply(network(), plan_of(constants)).float()
    x = X.float()
    sc.save(tmp_path / "small", small, sc.record(small).plan)  # type: ignore[union-attr]
    loaded: Any = sc.load(tmp_path / "small", ResNet())
    assert torch.equal(loaded.eval()(x), small(x))
    assert sc.record(loaded).plan == sc.record(small).plan  # type: ignore[union-attr]
    again = sc.apply(network(), sc.record(loaded).plan).float()  # type: ignore[union-attr]
    assert relative_error(again(x), small(x)) < 1e-6


@BOTH
def test_plans_with_edits_are_strict_json(constants: str) -> None:
    plan = sc.record(shared(constants)[1]).plan  # type: ignore[union-attr]
    text = plan.to_json()
    assert sc.Plan.from_json(text) == plan
    assert pickle.loads(pickle.dumps(plan)) == plan
    document = json.loads(text)
    wired = [i for i, e in enumerate(document["edits"]) if e["kind"] in ("scatter", "gather", "constant")]
    assert wired
    for index in wired:
        for change in (
            {"value": None},
            {"value": []},
            {"value": [0, 0, 0]},
            {"name": "weight"},
            {"axis": -1},
            {"axis": 10**6},
            {"value": [2**40]},
            {"value": [-2, 0]},
            {"value": "0"},
            {"value": [0.5]},
            {"kind": "stripes"},
            {"more": 1},
            {"value": 3},
            {"value": [-1, -1]},
            {"value": [1, 0]},
        ):
            bad = copy.deepcopy(document)
            bad["edits"][index] |= change
            with pytest.raises(sc.BadPlan):
                sc.Plan.from_json(json.dumps(bad))
    document["edits"].append(document["edits"][wired[0]])
    with pytest.raises(sc.BadPlan, match="rewired twice"):
        sc.Plan.from_json(json.dumps(document))


@BOTH
def test_kinds_of_numbers_and_memory(constants: str) -> None:
    model = network()
    small = sc.apply(model, plan_of(constants))
    want = small(X)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.1)):
        other = copy.deepcopy(small).to(dtype)
        found = other(X.to(dtype))
        assert found.dtype == dtype
        assert relative_error(found, want) < tolerance
        cut = sc.apply(network().to(dtype), plan_of(constants))
        assert relative_error(cut(X.to(dtype)), want) < tolerance
        assert {t.dtype for t in cut.state_dict().values() if t.is_floating_point()} == {dtype}
    last = sc.apply(model.to(memory_format=torch.channels_last), plan_of(constants))  # type: ignore[call-overload]
    assert relative_error(last(X.contiguous(memory_format=torch.channels_last)), want) < 1e-12


def test_hooks_see_the_full_width_and_modes_stay() -> None:
    model = network()
    seen: list[int] = []
    model.a.bn2.register_forward_hook(lambda _, __, out: seen.append(out.shape[1]))
    model.train()
    model.a.bn2.eval()
    small: Any = sc.apply(model, plan_of())
    assert {n: m.training for n, m in small.named_modules()} == {n: m.training for n, m in model.named_modules()}
    seen.clear()
    small(X)
    assert seen == [8]
    assert not any(isinstance(m, Wired) for m in model.modules())


# Training ------------------------------------------------------------------------------------------------------------


@BOTH
def test_gradients_are_those_of_the_masked_network(constants: str) -> None:
    model = network()
    plan = plan_of(constants)
    small, dense = sc.apply(model, plan), sc.masked(model, plan)
    for net in (small, dense):
        net(X).square().sum().backward()
    kept, wanted = plan.kept(), dict(dense.named_parameters())
    for name, parameter in small.named_parameters():
        want = wanted[name].grad
        assert want is not None
        for axis, positions in kept.get(name, {}).items():
            want = want.index_select(axis, torch.from_numpy(positions))
        assert parameter.grad is not None, name
        assert relative_error(parameter.grad, want) < 1e-9, name


def test_it_trains_and_its_optimiser_moves_over() -> None:
    model, plan = network().train(), plan_of()
    old = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    model(X).square().sum().backward()
    old.step()
    small = sc.apply(model, plan)
    new = sc.rebind(old, small, plan, model=model)
    losses = []
    for _ in range(20):
        new.zero_grad()
        loss = small(X).square().sum()
        loss.backward()
        new.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
    assert small.get_submodule("a.bn2").num_batches_tracked == 1 + 20


def test_train_mode_is_that_of_the_dense_network() -> None:
    """Batch statistics are taken of what is left, in front of the scatter."""
    model, plan = network().train(), plan_of()
    small = sc.apply(model, plan)
    with restored(model):
        want = by_hooks(model, plan, X)
    with torch.no_grad():
        assert relative_error(small(X), want) < 1e-12


def test_recovery_works_on_it() -> None:
    model, plan = network(), plan_of()
    data = [tensor(16, 3, 9, 9, seed=seed).double() for seed in range(3)]

    def error(small: nn.Module) -> float:
        with torch.no_grad():
            return sum(float((small(x) - model(x)).square().mean()) for x in data)

    small = sc.apply(model, plan)
    before = error(small)
    compensate_(small, model, plan, data, batchnorm=False)
    assert error(small) < 0.1 * before
    again = sc.apply(model, plan)
    mean = again.get_submodule("a.bn2").running_mean.clone()  # type: ignore[union-attr, operator]
    recalibrate_(again, data)
    assert not torch.equal(again.get_submodule("a.bn2").running_mean, mean)  # type: ignore[arg-type]


# More rounds ---------------------------------------------------------------------------------------------------------


def test_a_second_cut_inside_of_blocks() -> None:
    model = network()
    first = sc.apply(model, plan_of())
    plan = sc.plan(first, X, ratios={"*conv1": 0.5, "*": 0.0}, residual="inner")
    second = sc.apply(first, plan)
    assert relative_error(second(X), sc.masked(first, plan)(X)) < 1e-12
    assert second.get_submodule("a.conv1").out_channels < first.get_submodule("a.conv1").out_channels
    whole = sc.record(second).plan  # type: ignore[union-attr]
    assert whole.residual == "scatter"
    assert torch.equal(sc.apply(model, whole)(X), second(X))


@pytest.mark.parametrize(
    ("residual", "text"),
    [
        (
            "scatter",
            r"'a\.bn2' was rewired by an earlier cut .*, and cannot be once more\n  do: cut the dense network once",
        ),
        ("coupled", r"needs the captured graph, which has no place for what an earlier cut rewired"),
    ],
)
def test_a_second_cut_of_the_stream_is_refused(residual: Any, text: str) -> None:
    first = sc.apply(network(), plan_of())
    before = {name: t.clone() for name, t in first.state_dict().items()}
    want, record = first(X), sc.record(first)
    with pytest.raises(sc.CannotPrune, match=text):
        sc.apply(first, sc.plan(first, X, ratios=0.4, residual=residual))
    assert sc.record(first) is record
    assert all(torch.equal(before[name], t) for name, t in first.state_dict().items())
    assert torch.equal(first(X), want)


# Costs ---------------------------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("keep", [0.3, 0.5, 0.8])
@pytest.mark.parametrize("allocation", ["global", "uniform"])
def test_budgets_are_reached_and_counts_are_true(constants: Any, keep: float, allocation: Any) -> None:
    budget = sc.Budget(keep=keep)
    plan = sc.plan(graph(), budget=budget, residual="scatter", constants=constants, allocation=allocation)
    model = graph().model
    small = sc.apply(model, plan)
    share = sc.count(small, X[:1]).macs / sc.count(model, X[:1]).macs
    assert 0.9 * keep < share <= keep  # a network of a few channels comes in large steps


def test_macs_by_hand() -> None:
    """By hand: kept outputs, kept inputs (all of a stream's behind a sum), kernel, positions."""
    plan, small = shared()
    n = {name: len(kept) for name, kept in plan.keep.items()}
    maps, half = 81, 25
    want = n["stem"] * 3 * 9 * maps + n["stem"] * n["a.conv1"] * 9 * maps + n["a.conv1"] * n["a.conv2"] * 9 * maps
    want += 8 * n["b.conv1"] * 9 * half + n["b.conv1"] * n["b.conv2"] * 9 * half + 8 * n["b.down.0"] * half + 12 * 5
    assert sc.count(small, X[:1]).macs == want
    assert sc.count(shared("fold")[1], X[:1]).macs == want


# Elsewhere -----------------------------------------------------------------------------------------------------------


@BOTH
def test_onnx(constants: str, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    small = sc.apply(network(), plan_of(constants)).float()
    report = sc.export_onnx(small, tmp_path / "small.onnx", X[:1].float())
    session = onnxruntime.InferenceSession(str(report.path), providers=["CPUExecutionProvider"])
    for batch in (1, 3):
        x = tensor(batch, 3, 9, 9, seed=batch)
        (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        assert relative_error(torch.from_numpy(found), small(x)) < 1e-5


@BOTH
def test_torch_compile_needs_no_break(constants: str) -> None:
    small = shared(constants)[1]
    torch.compiler.reset()
    compiled = torch.compile(small, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(X), small(X))
