"""What ``apply`` keeps: everything of the user's but the channels that went, on each of its three ways."""

from __future__ import annotations

import copy
import dataclasses
import functools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import secateur as sc
from law import relative_error, to_double
from networks.common import randomise, tensor

X = tensor(2, 3, 6, 6)


class Base(nn.Module):
    """Two convs, norms, buffers of both kinds, a frozen parameter, an attribute of the user's own."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.n = nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12)
        self.b, self.m = nn.Conv2d(12, 10, 3), nn.BatchNorm2d(10)
        self.head = nn.Conv2d(10, 4, 1)
        self.note = {"user": [1, 2]}
        self.register_buffer("gain", torch.rand(12, 1, 1) + 0.5)
        self.register_buffer("shift", torch.rand(12, 1, 1), persistent=False)

    def moved(self, x: Tensor) -> Tensor:
        return x

    def forward(self, x: Tensor) -> Tensor:
        h = F.softplus(self.n(self.a(x))) * self.gain + self.shift
        return self.head(F.softplus(self.m(self.b(self.moved(h)))))


class Divided(Base):
    """Its forward computes with an integer attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.width = 12

    def moved(self, x: Tensor) -> Tensor:
        return x.reshape(x.shape[0], self.width, -1).reshape(x.shape[0], self.width, *x.shape[2:])


class Rolled(Base):
    """No attribute says by how much its channels are rolled."""

    def moved(self, x: Tensor) -> Tensor:
        return x.roll(5, 1)


TIERS: dict[str, type[Base]] = {"module": Base, "attributes": Divided, "graph": Rolled}
EVERY = pytest.mark.parametrize("tier", TIERS)
MODULES = pytest.mark.parametrize("tier", ["module", "attributes"])


def network(tier: str, seed: int = 0) -> Base:
    torch.manual_seed(seed)
    model = TIERS[tier]()
    randomise(model, seed)
    return model.eval()


@functools.cache
def text(tier: str) -> str:
    """A plan as JSON, so that each test gets one that remembers no capture."""
    model = network(tier)
    return sc.plan(model, X, ratios={"a": 7, "b": 4}).to_json()


def plan_of(tier: str) -> sc.Plan:
    return sc.Plan.from_json(text(tier))


def pruned(tier: str, change: Callable[[Base], Any] = lambda m: None, **options: Any) -> tuple[Base, Any]:
    model = network(tier)
    change(model)
    small = sc.apply(model, plan_of(tier), **options)
    applied = sc.record(small)
    assert applied is not None
    assert applied.tier == tier
    return model, small


@functools.cache
def unchanged(tier: str) -> tuple[Base, Any]:
    """Dense and pruned network, to be looked at only."""
    return pruned(tier)


def tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


@EVERY
def test_values_are_the_kept_ones_under_the_same_names(tier: str) -> None:
    model, small = unchanged(tier)
    kept = plan_of(tier).kept()
    assert set(model.state_dict()) <= set(small.state_dict())
    assert [n for n, _ in small.named_parameters()] == [n for n, _ in model.named_parameters()]
    mine = tensors(small)
    for name, tensor_ in tensors(model).items():
        for axis, positions in kept.get(name, {}).items():
            tensor_ = tensor_.index_select(axis, torch.from_numpy(positions))
        assert torch.equal(mine[name], tensor_), name
    assert small.a.weight.shape == (7, 3, 3, 3)
    assert small.b.weight.shape == (4, 7, 3, 3)


@EVERY
def test_record_says_how(tier: str) -> None:
    model, small = unchanged(tier)
    applied = sc.record(small)
    assert applied is not None
    assert applied.difference is not None
    assert applied.difference <= 1e-9
    assert not applied.casts
    kinds = {edit.kind for edit in applied.plan.edits}
    assert kinds == {"module": set(), "attributes": {"attribute"}, "graph": {"graph"}}[tier]
    assert applied.plan.keep == plan_of(tier).keep
    assert applied.plan.graph is None
    assert sc.record(model) is None


def test_the_attribute_is_the_edit() -> None:
    model, small = unchanged("attributes")
    assert (model.width, small.width) == (12, 7)  # type: ignore[attr-defined]
    edit = sc.record(small).plan.edits[0]  # type: ignore[union-attr]
    assert (edit.target, edit.name, edit.value) == ("", "width", 7)


@EVERY
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_dtype(tier: str, dtype: torch.dtype) -> None:
    model, small = pruned(tier, lambda m: m.to(dtype))
    assert {t.dtype for n, t in tensors(small).items() if t.is_floating_point()} == {dtype}
    assert {p.dtype for p in model.parameters()} == {dtype}
    y = small(X.to(dtype))
    assert y.dtype == dtype
    dense = sc.masked(model, plan_of(tier))(X.to(dtype))
    assert relative_error(y, dense) < {torch.float64: 1e-12, torch.bfloat16: 0.1}[dtype]


@EVERY
def test_memory_format(tier: str) -> None:
    model, small = pruned(tier, lambda m: m.to(memory_format=torch.channels_last))
    for name in ("a.weight", "b.weight"):
        assert model.get_parameter(name).is_contiguous(memory_format=torch.channels_last)
        assert small.get_parameter(name).is_contiguous(memory_format=torch.channels_last), name
        assert not small.get_parameter(name).is_contiguous()
    assert unchanged(tier)[1].a.weight.is_contiguous()


def test_memory_format_of_volumes() -> None:
    model = nn.Sequential(nn.Conv3d(3, 8, 3), nn.Sigmoid(), nn.Conv3d(8, 4, 2))
    model = model.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    x = tensor(2, 3, 5, 5, 5)
    small: Any = sc.apply(model, sc.plan(model, x, ratios=0.5))
    assert small[0].weight.is_contiguous(memory_format=torch.channels_last_3d)


@EVERY
def test_modes_of_each_submodule(tier: str) -> None:
    def change(m: Base) -> None:
        m.train()
        m.n.eval()

    model, small = pruned(tier, change)
    flags = {name: module.training for name, module in model.named_modules()}
    assert flags["m"]
    assert not flags["n"]
    for name, module in small.named_modules():
        assert module.training == flags[name], name
    before = {name: t.clone() for name, t in small.named_buffers()}
    small(X)
    moved = {name for name, t in small.named_buffers() if not torch.equal(t, before[name])}
    assert moved == {"m.running_mean", "m.running_var", "m.num_batches_tracked"}
    for training in (True, False):
        assert small.train(training).training is training
        assert all(module.training is training for module in small.modules())


@EVERY
def test_training_is_that_of_the_dense_network(tier: str) -> None:
    """One step in train mode: outputs and batch statistics are those of the dense network with zeroed readers."""
    model, small = pruned(tier, lambda m: m.double().train())
    plan, x = plan_of(tier), to_double(X)
    with torch.no_grad():
        for group in plan.groups:
            gone = torch.tensor([c for c in range(group.channels) if c not in plan.keep[group.name]])
            for s in group.slices:
                if s.role == "reads":
                    t = model.state_dict()[s.tensor]
                    t.index_fill_(s.axis, torch.tensor(s.positions)[gone].flatten(), 0)
        assert relative_error(small(x), model(x)) < 1e-9
    dense = dict(model.named_buffers())
    for name, buffer in small.named_buffers():
        if "running" in name or "num_batches" in name:
            want = dense[name]
            for axis, positions in plan.kept().get(name, {}).items():
                want = want.index_select(axis, torch.from_numpy(positions))
            assert torch.allclose(buffer.double(), want.double(), rtol=1e-9), name


@EVERY
def test_requires_grad_of_each(tier: str) -> None:
    def change(m: Base) -> None:
        m.a.weight.requires_grad_(False)
        m.m.requires_grad_(False)

    model, small = pruned(tier, change)
    wanted = {name: p.requires_grad for name, p in model.named_parameters()}
    assert {name: p.requires_grad for name, p in small.named_parameters()} == wanted
    small(X).sum().backward()
    assert {name for name, p in small.named_parameters() if p.grad is not None} == {n for n, r in wanted.items() if r}
    assert all(p.grad is None for p in model.parameters())


@MODULES
def test_hooks_stay_and_fire(tier: str) -> None:
    seen: list[str] = []

    def change(m: Base) -> None:
        m.b.register_forward_hook(lambda *_: seen.append("hook"))
        m.b.register_forward_pre_hook(lambda *_: seen.append("pre"))

    model, small = pruned(tier, change)
    seen.clear()
    small(X)
    assert seen == ["pre", "hook"]
    assert len(model.b._forward_hooks) == len(small.b._forward_hooks) == 1


def test_hooks_that_a_graph_cannot_keep_are_spoken_of() -> None:
    with pytest.warns(UserWarning, match=r"forward hooks on submodules are gone \(b\)"):
        pruned("graph", lambda m: m.b.register_forward_hook(lambda *_: None))


@pytest.mark.parametrize("tier", ["module"])
def test_hooks_that_change_values_are_pruned_with_the_model(tier: str) -> None:
    model, small = pruned(tier, lambda m: m.a.register_forward_hook(lambda mod, args, out: out.sin()))
    dense = sc.masked(model, plan_of(tier))
    assert relative_error(small(X), dense(X)) < 1e-5
    assert relative_error(small(X), unchanged(tier)[1](X)) > 1e-3


@EVERY
def test_buffers_that_are_not_saved(tier: str) -> None:
    model, small = unchanged(tier)
    assert "shift" not in small.state_dict()
    assert "gain" in small.state_dict()
    assert small.shift.shape == small.gain.shape == (7, 1, 1)
    other = network(tier)
    assert {n for n, _ in model.named_buffers()} == {n for n, _ in other.named_buffers()}


@MODULES
def test_classes_and_attributes_are_the_users_own(tier: str) -> None:
    model, small = unchanged(tier)
    assert [type(m) for m in small.modules()] == [type(m) for m in model.modules()]
    assert small.note == model.note
    assert small.note is not model.note
    assert (small.a.in_channels, small.a.out_channels, small.n.num_features) == (3, 7, 7)
    assert (small.b.in_channels, small.b.out_channels, small.m.num_features) == (7, 4, 4)
    assert (small.head.in_channels, small.head.out_channels) == (4, 4)


@EVERY
def test_tied_weights_stay_tied(tier: str) -> None:
    class Tied(TIERS[tier]):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.twin, self.other = nn.Conv2d(12, 12, 1, bias=False), nn.Conv2d(12, 12, 1, bias=False)
            self.other.weight = self.twin.weight

        def moved(self, x: Tensor) -> Tensor:
            return super().moved(x + self.other(F.softplus(self.twin(x))))

    torch.manual_seed(0)
    model = Tied().eval()
    small: Any = sc.apply(model, sc.plan(model, X, ratios=0.5))
    assert sc.record(small).tier == tier  # type: ignore[union-attr]
    assert small.twin.weight.shape == (6, 6, 1, 1)
    assert small.other.weight is small.twin.weight
    assert set(small.state_dict()) == set(model.state_dict())


@pytest.mark.filterwarnings("ignore:the captured graph stands for the model")
@EVERY
@pytest.mark.parametrize("check", [True, False])
def test_the_original_is_untouched(tier: str, check: bool) -> None:
    model = network(tier).train()
    model.m.eval()
    model.b.register_forward_hook(lambda *_: None)
    state = {name: t.clone() for name, t in tensors(model).items()}
    places = {name: t.data_ptr() for name, t in tensors(model).items()}
    flags = [m.training for m in model.modules()]
    attributes = {name: dict(vars(m)) for name, m in model.named_modules()}
    plan = sc.plan(model, X, ratios=0.4)
    small = sc.apply(model, plan, check=check)
    sc.masked(model, plan)(X)
    with torch.no_grad():
        for p in small.parameters():
            p.zero_()
    assert [m.training for m in model.modules()] == flags
    assert {name: set(vars(m)) for name, m in model.named_modules()} == {n: set(a) for n, a in attributes.items()}
    assert len(model.b._forward_hooks) == 1
    for name, t in tensors(model).items():
        assert torch.equal(t, state[name]), name
        assert t.data_ptr() == places[name], name
        assert t.grad is None


@EVERY
def test_copies_pickles_and_moves(tier: str) -> None:
    small = unchanged(tier)[1]
    y = small(X)
    for twin in (copy.deepcopy(small), pickle.loads(pickle.dumps(small))):
        assert torch.equal(twin(X), y)
        assert sc.record(twin).plan == sc.record(small).plan  # type: ignore[union-attr]
        assert {t.data_ptr() for t in twin.parameters()}.isdisjoint(t.data_ptr() for t in small.parameters())
    wide = copy.deepcopy(small).to(torch.float64)
    assert wide(to_double(X)).dtype == torch.float64
    assert relative_error(wide(to_double(X)), y) < 1e-5
    assert copy.deepcopy(small).bfloat16()(X.bfloat16()).dtype == torch.bfloat16
    small.load_state_dict(copy.deepcopy(small).state_dict(), strict=True)


@EVERY
def test_again_and_composition(tier: str) -> None:
    model, once = unchanged(tier)
    first = plan_of(tier)
    second = sc.plan(once, X, ratios={"a": 4, "b": 2})
    twice: Any = sc.apply(once, second)
    assert twice.a.weight.shape == (4, 3, 3, 3)
    assert twice.b.weight.shape == (2, 4, 3, 3)
    whole = sc.record(twice).plan  # type: ignore[union-attr]
    assert whole.keep["a"] == tuple(first.keep["a"][i] for i in second.keep["a"])
    assert whole.model == first.model
    at_once = sc.apply(model, whole)
    assert relative_error(at_once(X), twice(X)) < 1e-5


@EVERY
def test_a_plan_from_json_fits_a_fresh_instance_and_uses_its_weights(tier: str) -> None:
    other = network(tier, seed=7)
    small = sc.apply(other, plan_of(tier))
    kept = torch.tensor(plan_of(tier).keep["a"])
    assert torch.equal(small.get_parameter("a.weight"), other.a.weight[kept])
    assert relative_error(small(X), sc.masked(other, plan_of(tier))(X)) < 1e-5
    assert relative_error(small(X), unchanged(tier)[1](X)) > 1e-3


def test_a_plan_in_memory_fits_another_instance() -> None:
    first, second = network("graph"), network("graph", seed=3)
    plan = sc.plan(first, X, ratios=0.5)
    small = sc.apply(second, plan)
    assert relative_error(small(X), sc.masked(second, plan)(X)) < 1e-5


def test_the_weights_are_those_of_now_and_not_of_the_capture() -> None:
    model = network("graph")
    plan = sc.plan(model, X, ratios=0.5)
    with torch.no_grad():
        model.head.bias.add_(3)
        model.a.weight.mul_(-1)
    assert torch.equal(sc.apply(model, plan).get_parameter("head.bias"), model.head.bias)
    assert relative_error(sc.apply(model, plan)(X), sc.masked(model, plan)(X)) < 1e-5


@pytest.mark.parametrize("name", ["select", "narrow", "roll", "table"])
def test_without_a_check_the_network_is_right_all_the_same(name: str) -> None:
    """``check=False`` skips the proof only where slicing alone is enough, which moved channels are not."""
    table = torch.tensor([9, 1, 2, 3, 4, 5, 6, 7, 8, 0, 10, 11])
    moves: dict[str, Callable[[Tensor], Tensor]] = {
        "select": lambda x: x + x.select(1, 3).unsqueeze(1), "narrow": lambda x: x + x.narrow(1, 4, 1),
        "roll": lambda x: x.roll(2, 1), "table": lambda x: x.index_select(1, table),
    }  # fmt: skip
    model = network("module")
    model.moved = moves[name]  # type: ignore[method-assign]
    plan = sc.plan(model, X, ratios={"b": 4})
    keep = {n: k if n == "b" else tuple(range(1, 1 + max(1, len(k) - 3))) for n, k in plan.keep.items()}
    plan = dataclasses.replace(plan, keep=keep, graph=plan.graph)
    assert relative_error(sc.apply(model, plan, check=False)(X), sc.masked(model, plan)(X)) < 1e-5
