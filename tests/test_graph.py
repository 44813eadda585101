"""Capture: whatever inputs and outputs a model has, and nothing of the model's is changed by looking at it."""

from __future__ import annotations

import dataclasses
import gc
import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import secateur as sc
from law import call, leaves, relative_error, to_double
from networks.common import tensor
from secateur.nests import flatten, unflatten
from secateur.nodes import shape_of

X = tensor(2, 3, 6, 6)


class Pair(NamedTuple):
    logits: Tensor
    features: Tensor


@dataclasses.dataclass
class Output:
    logits: Tensor
    hidden: tuple[Tensor, ...] | None = None
    name: str = "out"


class Net(nn.Module):
    """``moved`` is what the three ways of ``apply`` differ by; ``give`` shapes the output."""

    def __init__(self, give: Callable[[Tensor, Tensor], Any] = lambda y, h: y, rolled: bool = False) -> None:
        super().__init__()
        self.a, self.n, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1)
        self.extra = nn.Conv2d(8, 2, 1)
        self.give, self.rolled = give, rolled

    def forward(self, x: Tensor) -> Any:
        h = torch.sigmoid(self.n(self.a(x)))
        h = h.roll(3, 1) if self.rolled else h
        return self.give(self.b(h), self.extra(h))


class Weighted(nn.Module):
    """An image, a vector for each example, and a table that has no batch."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.f, self.b = nn.Conv2d(3, 8, 3), nn.Linear(5, 8), nn.Conv2d(8, 4, 1)

    def forward(self, image: Tensor, vector: Tensor, table: Tensor, *, scale: float = 1.0) -> Tensor:
        h = torch.sigmoid(self.a(image)) * self.f(vector)[:, :, None, None]
        return self.b(h.roll(3, 1)) * table * scale


def net(**options: Any) -> Net:
    torch.manual_seed(0)
    return Net(**options).double().eval()


def test_flags_tensors_and_hooks_are_left_alone() -> None:
    model = Net(lambda y, h: y).train()
    model.n.eval()
    state = {n: t.clone() for n, t in model.state_dict().items()}
    graph = sc.trace(model, X)
    assert graph.model is model
    assert [m.training for m in model.modules()] == [True, True, False, True, True]
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert [c.mode for c in graph.captures] == ["eval"]


def test_flags_are_put_back_when_capture_fails() -> None:
    model = Net().train()
    model.n.eval()
    with pytest.raises(sc.CannotCapture):
        sc.trace(model, tensor(2, 5, 6, 6))
    assert [m.training for m in model.modules()] == [True, True, False, True, True]


class Auxiliary(Net):
    def forward(self, x: Tensor) -> Any:
        h = torch.sigmoid(self.n(self.a(x)))
        return (self.b(h), self.extra(h)) if self.training else self.b(h)


def test_a_train_mode_branch_is_captured_too_and_statistics_stay() -> None:
    model = Auxiliary().eval()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    graph = sc.trace(model, X[:1])
    assert [c.mode for c in graph.captures] == ["eval", "train"]
    assert graph.used == {n for n, _ in model.named_parameters()} | {"n.running_mean", "n.running_var"} | (
        graph.used & {"n.num_batches_tracked"}
    )
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert not any(m.training for m in model.modules())


def test_a_graph_is_taken_as_it_is() -> None:
    graph = sc.trace(Net(), X)
    assert sc.trace(graph) is graph
    assert sc.find_groups(graph) == sc.find_groups(graph.model, X)


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_any_batch_of_examples_gives_the_same_groups_and_network(batch: int) -> None:
    model = net(rolled=True)
    x = to_double(tensor(batch, 3, 6, 6))
    graph = sc.trace(model, x)
    plan = sc.plan(graph, ratios=0.5)
    assert plan.groups[0].name == "a"
    assert len(plan.keep["a"]) == 4
    small, dense = sc.apply(graph, plan), sc.masked(graph, plan)
    for other in (1, 2, 5):
        fresh = to_double(tensor(other, 3, 6, 6, seed=other))
        assert relative_error(small(fresh), dense(fresh)) < 1e-9
        assert small(fresh).shape[0] == other


def weighted_inputs(batch: int, seed: int = 0) -> dict[str, Tensor]:
    one = {"image": tensor(batch, 3, 6, 6, seed=seed), "vector": tensor(batch, 5, seed=seed + 1), "table": tensor(4, 4)}
    return to_double(one)  # type: ignore[return-value]


@pytest.mark.parametrize(("batch", "keywords"), [(1, True), (2, False), (4, True)])
def test_inputs_with_and_without_a_batch(batch: int, keywords: bool) -> None:
    """``table`` has four rows whatever the batch is; a batch of four examples must not take it for one more."""
    torch.manual_seed(0)
    model = Weighted().double().eval()
    given = weighted_inputs(batch)
    inputs: Any = given if keywords else tuple(given.values())
    plan = sc.plan(model, inputs, ratios=0.4)
    small, dense = sc.apply(model, plan), sc.masked(model, plan)
    assert relative_error(call(small, inputs), call(dense, inputs)) < 1e-9
    if batch != 4:
        other = weighted_inputs(3, seed=5)
        assert relative_error(call(small, other), call(dense, other)) < 1e-9


class Symmetric(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.p, self.q, self.h = nn.Conv2d(3, 6, 3), nn.Conv2d(3, 6, 3), nn.Conv2d(6, 3, 1)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return self.h((torch.sigmoid(self.p(left)) - self.q(right)).roll(2, 1))


@pytest.mark.parametrize("positional", [True, False])
def test_keywords_in_any_order_mean_the_same(positional: bool) -> None:
    torch.manual_seed(0)
    model = Symmetric().double().eval()
    left, right = to_double((X, tensor(2, 3, 6, 6, seed=4)))
    plan = sc.plan(model, (left, right) if positional else {"left": left, "right": right}, ratios=0.5)
    for module in (sc.apply(model, plan), sc.masked(model, plan)):
        want = module(left, right) if positional else module(left=left, right=right)
        for args, kwargs in (
            ((), {"right": right, "left": left}),
            ((left,), {"right": right}),
            ((left, right), {}),
        ):
            try:
                got = module(*args, **kwargs)
            except TypeError:  # to refuse is as good as to understand
                continue
            assert torch.equal(got, want), (args and "positional", list(kwargs))


def test_arguments_that_are_no_tensors_are_not_ignored() -> None:
    torch.manual_seed(0)
    model = Weighted().double().eval()
    inputs = weighted_inputs(2)
    plan = sc.plan(model, inputs, ratios=0.5)
    small, dense = sc.apply(model, plan), sc.masked(model, plan)
    for module in (small, dense):
        try:
            assert relative_error(module(**inputs, scale=2.0), 2 * module(**inputs)) < 1e-9
        except TypeError:
            continue


OUTPUTS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "tensor": lambda y, h: y,
    "tuple": lambda y, h: (y, h),
    "tuple of one": lambda y, h: (y,),
    "list": lambda y, h: [y, [h]],
    "dict": lambda y, h: {"b": y, "a": h},
    "ordered dict": lambda y, h: OrderedDict(z=y, a=h),
    "named tuple": Pair,
    "dataclass": lambda y, h: Output(y, (h,)),
    "dataclass with None": lambda y, h: Output(y, None, "other"),
    "nest": lambda y, h: {"x": [Pair(y, h), None, 3, "text"]},
    "twice the same": lambda y, h: (y, y),
}


def form(value: Any) -> Any:
    """The containers of an output, their types, their order and all that is no tensor."""
    if isinstance(value, Tensor):
        return Tensor
    if dataclasses.is_dataclass(value):
        return type(value), [(f.name, form(getattr(value, f.name))) for f in dataclasses.fields(value)]
    if isinstance(value, dict):
        return type(value), [(k, form(v)) for k, v in value.items()]
    if isinstance(value, (list, tuple)):
        return type(value), [form(v) for v in value]
    return value


@pytest.mark.parametrize("rolled", [False, True], ids=["module", "graph"])
@pytest.mark.parametrize("name", OUTPUTS)
def test_outputs_keep_their_type_and_values(name: str, rolled: bool) -> None:
    model, x = net(give=OUTPUTS[name], rolled=rolled), to_double(X)
    graph = sc.trace(model, x)
    everything = sc.plan(graph, ratios=0.0)
    some = sc.plan(graph, ratios=0.5)
    want = model(x)
    assert form(sc.masked(graph, everything)(x)) == form(want)
    assert relative_error(sc.masked(graph, everything)(x), want) < 1e-12
    small = sc.apply(graph, some)
    assert sc.record(small).tier == ("graph" if rolled else "module")  # type: ignore[union-attr]
    assert form(small(x)) == form(want)
    assert relative_error(small(x), sc.masked(graph, some)(x)) < 1e-9
    for module in (small, sc.masked(graph, some)):
        if name == "twice the same":
            assert all(torch.equal(t, module(x)[0]) for t in leaves(module(x)))


def test_flatten_and_unflatten_are_inverse() -> None:
    a, b = torch.zeros(1), torch.ones(1)
    value = {"x": [Pair(a, b), None, 3], "y": Output(b, (a,), "n"), "z": (a,)}
    tensors, skeleton = flatten(value)
    assert [t is s for t, s in zip(tensors, [a, b, b, a, a], strict=True)] == [True] * 5
    again = unflatten(skeleton, [t + 1 for t in tensors])
    assert form(again) == form(value)
    assert [float(t) for t in leaves(again)] == [1, 2, 2, 1, 1]
    assert value["y"].logits is b  # type: ignore[attr-defined]


def test_the_graph_knows_names_lines_and_shapes() -> None:
    model = Net()
    graph = sc.trace(model, X)
    assert set(graph.tensors) == set(model.state_dict())
    assert all(t is dict(model.named_parameters()).get(n, dict(model.named_buffers()).get(n)) for n, t in
               graph.tensors.items())  # fmt: skip
    convs = [n for n in graph.captures[0].graph.nodes if "conv2d" in str(n.target)]
    assert [shape_of(n) for n in convs] == [(2, 8, 6, 6), (2, 4, 6, 6), (2, 2, 6, 6)]
    reason = next(g for g in sc.find_groups(graph) if g.name == "b").locked
    assert reason == "it is an output of the network"


def test_reasons_name_the_users_line() -> None:
    class Mixed(Net):
        def forward(self, x: Tensor) -> Any:
            h = self.a(x)
            h = h.softmax(1)
            return self.b(h)

    line = Mixed.forward.__code__.co_firstlineno + 2
    group = next(g for g in sc.find_groups(Mixed(), X) if g.name == "a")
    assert group.locked == f"a softmax is taken over it, at softmax in test_graph.py:{line}: h = h.softmax(1)"


def test_parameters_that_nothing_uses_are_locked() -> None:
    model = Net(lambda y, h: y)
    model.spare = nn.Linear(4, 4)  # type: ignore[assignment]
    spare = [g for g in sc.find_groups(model, X) if g.name.startswith("spare")]
    assert spare
    assert all("no captured pass uses this parameter" in g.locked for g in spare)


class OtherInTraining(Net):
    """Probabilities in eval mode, logits in train mode; no parameter is used in one mode alone."""

    def forward(self, x: Tensor) -> Any:
        y = super().forward(x)
        return y if self.training else y.softmax(1)


def test_what_train_mode_computes_otherwise_is_kept_by_the_graph_too() -> None:
    torch.manual_seed(0)
    model = OtherInTraining(rolled=True).double().eval()
    small = sc.apply(model, sc.plan(model, to_double(X), ratios=0.5))
    assert sc.record(small).tier == "graph"  # type: ignore[union-attr]
    assert torch.allclose(small(to_double(X)).sum(1), torch.ones(()).double())
    assert float((small.train()(to_double(X)).detach().sum(1) - 1).abs().max()) > 1e-2


class PooledInTraining(Net):
    def __init__(self) -> None:
        super().__init__()
        self.pooled = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 6, 1), nn.BatchNorm2d(6), nn.Conv2d(6, 2, 1))

    def forward(self, x: Tensor) -> Any:
        h = torch.sigmoid(self.n(self.a(x)))
        return (self.b(h), self.pooled(h)) if self.training else self.b(h)


@pytest.mark.parametrize("keywords", [False, True])
def test_one_example_is_enough_for_a_norm_in_train_mode(keywords: bool) -> None:
    model = PooledInTraining().eval()
    small: Any = sc.apply(model, sc.plan(model, {"x": X[:1]} if keywords else X[:1], ratios=0.5))
    assert sc.record(small).tier == "module"  # type: ignore[union-attr]
    assert small.pooled[1].weight.shape == (3, 4, 1, 1)
    assert small.train()(X)[1].shape == (2, 2, 1, 1)


def test_nests_hold_no_tensor_longer_than_their_caller() -> None:
    gc.collect()
    gc.disable()
    try:
        tensor = torch.zeros(3)
        gone = weakref.ref(tensor)
        tensors, skeleton = flatten({"a": [tensor, 1], "b": (tensor,)})
        again = unflatten(skeleton, tensors)
        assert again["a"][0] is tensor
        del tensor, tensors, again
        assert gone() is None
    finally:
        gc.enable()
