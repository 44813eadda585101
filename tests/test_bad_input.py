"""Bad input to ``trace``, ``plan``, ``masked`` and ``apply``: an error of the library's own that says what and what to
do, and a model that is exactly what it was."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import secateur as sc
from law import relative_error
from networks.common import tensor
from secateur.core import GroupView

X = tensor(2, 3, 6, 6)


class Net(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width)
        self.second, self.head = nn.Conv2d(width, 6, 3), nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.sigmoid(self.second(torch.sigmoid(self.norm(self.first(x))))))


def net(width: int = 8, seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net(width).eval()


@functools.cache
def graph() -> sc.Graph:
    """One capture for all tests that only ask for something wrong."""
    return sc.trace(net(), X)


@functools.cache
def plan_text() -> str:
    return sc.plan(graph(), ratios=0.5).to_json()


def plan() -> sc.Plan:
    return sc.Plan.from_json(plan_text())


@contextlib.contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Whatever happens inside, ``model``'s tensors, flags, hooks and attributes are what they were."""

    def look() -> tuple[Any, ...]:
        modules = dict(model.named_modules())
        return (
            {n: (id(t), t.requires_grad, t.dtype, t.device) for n, t in model.named_parameters()},
            {n: (id(t), t.dtype) for n, t in model.named_buffers()},
            {n: (type(m), m.training, set(vars(m)), len(m._forward_hooks)) for n, m in modules.items()},
        )

    def values() -> dict[str, Tensor]:
        return {n: t.clone() for n, t in model.state_dict().items() if t.device.type != "meta"}

    before, state = look(), values() if not _lazy(model) else {}
    yield
    assert look() == before
    for name, t in state.items():
        assert torch.equal(model.state_dict()[name].nan_to_num(7), t.nan_to_num(7)), name


def _lazy(model: nn.Module) -> bool:
    return any(nn.parameter.is_lazy(p) for p in model.parameters())


# ------------------------------------------------------------------------------------------------ what is no model


@pytest.mark.parametrize(
    ("model", "kind"), [(None, "NoneType"), (3, "int"), (nn.Conv2d, "type"), (torch.relu, "builtin_function_or_method")]
)
def test_no_module(model: Any, kind: str) -> None:
    with pytest.raises(sc.CannotCapture, match=f"expected a torch.nn.Module, got {kind}"):
        sc.plan(model, X, ratios=0.5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript() -> None:
    with pytest.raises(sc.CannotCapture, match=r"TorchScript[\s\S]*pass the nn.Module that it was scripted"):
        sc.plan(torch.jit.trace(net(), X), X, ratios=0.5)


def test_a_lazy_module_that_was_never_run() -> None:
    model = nn.Sequential(nn.LazyConv2d(8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1))
    with untouched(model), pytest.raises(sc.SecateurError, match=r"lazy[\s\S]*run (it|the model) once"):
        sc.plan(model, X, ratios=0.5)


def test_a_model_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = Net()
    with untouched(model), pytest.raises(sc.SecateurError, match="meta"):
        sc.plan(model, X, ratios=0.5)


def test_inputs_on_the_meta_device() -> None:
    with pytest.raises(sc.SecateurError, match="meta"):
        sc.plan(net(), X.to("meta"), ratios=0.5)


class Branching(Net):
    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        if h.mean() > 0:  # the line that the error must name
            h = 2 * h
        return self.head(self.second(h))


class Leaving(Net):
    def forward(self, x: Tensor) -> Tensor:
        h = torch.from_numpy(self.first(x).detach().numpy())  # and this one
        return self.head(self.second(h))


@pytest.mark.parametrize("kind", [Branching, Leaving])
def test_a_forward_that_cannot_be_captured(kind: type[Net], capfd: pytest.CaptureFixture[str]) -> None:
    model = kind().train()
    number = kind.forward.__code__.co_firstlineno + {Branching: 2, Leaving: 1}[kind]
    with untouched(model), pytest.raises(sc.CannotCapture, match=r"the model runs, but torch.export cannot") as caught:
        sc.plan(model, X, ratios=0.5)
    assert f"at: test_bad_input.py:{number}" in str(caught.value)
    assert "do: avoid Python control flow that depends on tensor values" in str(caught.value)
    printed = capfd.readouterr()
    assert printed.out + printed.err == "", "the exporter's own noise reaches the user"


# ------------------------------------------------------------------------------------------- what is wrapped or half


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiled_model_is_unwrapped() -> None:
    model = net()
    compiled: Any = torch.compile(model)
    with untouched(model):
        small = sc.apply(compiled, sc.plan(compiled, X, ratios=0.5))
    assert type(small) is Net
    assert set(small.state_dict()) == set(model.state_dict())


def test_data_parallel_is_unwrapped() -> None:
    model = net()
    with untouched(model):
        small = sc.apply(nn.DataParallel(model), sc.plan(nn.DataParallel(model), X, ratios=0.5))
    assert type(small) is Net
    assert set(small.state_dict()) == set(model.state_dict())


@pytest.mark.filterwarnings("ignore")
def test_distributed_data_parallel_is_unwrapped(tmp_path: Path) -> None:
    import torch.distributed as dist

    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = net()
        wrapped = nn.parallel.DistributedDataParallel(model)
        with untouched(model):
            small = sc.apply(wrapped, sc.plan(wrapped, X, ratios=0.5))
            dense = sc.masked(wrapped, sc.plan(wrapped, X, ratios=0.5))
        assert type(small) is Net
        assert set(small.state_dict()) == set(model.state_dict())
        assert relative_error(small(X), dense(X)) < 1e-5
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("half_inputs", [True, False])
def test_half_precision_stays(dtype: torch.dtype, half_inputs: bool) -> None:
    model = net().to(dtype)
    with untouched(model):
        mine = sc.plan(model, X.to(dtype) if half_inputs else X, ratios=0.5)
        small = sc.apply(model, mine)
    assert {p.dtype for p in small.parameters()} == {dtype}
    assert small(X.to(dtype)).dtype == dtype
    assert sc.record(small).difference <= 1e-9  # type: ignore[union-attr, operator]


# ------------------------------------------------------------------------------------------------------ example inputs


@pytest.mark.parametrize(
    ("inputs", "text"),
    [
        (None, "example inputs are needed, got NoneType"),
        ((), "example inputs are needed, got tuple"),
        ([], "example inputs are needed, got list"),
        ({}, "the example inputs hold no tensor"),
        (3, "example inputs are needed, got int"),
        ("x", "example inputs are needed, got str"),
        (X.numpy(), "example inputs are needed, got ndarray"),
        ((3,), "the example inputs hold no tensor"),
        ((None,), "the example inputs hold no tensor"),
        (tensor(2, 4, 6, 6), r"does not run on the example inputs of shape \(2, 4, 6, 6\): RuntimeError: .*channels"),
        (tensor(2, 3, 1, 1), r"does not run on the example inputs of shape \(2, 3, 1, 1\)"),
        (torch.tensor(1.0), r"does not run on the example inputs of shape \(\)"),
        ((X, X), r"does not run on .* \(2, 3, 6, 6\), \(2, 3, 6, 6\): TypeError: .*positional arguments"),
        ({"y": X}, "does not run on .* TypeError: .*unexpected keyword argument 'y'"),
        (X.long(), "does not run on .* RuntimeError"),
        (torch.zeros(0, 3, 6, 6), "(?i)empty|batch of 0|no examples"),
    ],
    ids=lambda value: str(getattr(value, "shape", value))[:40],
)
def test_wrong_example_inputs(inputs: Any, text: str) -> None:
    model = net().train()
    with untouched(model), pytest.raises(sc.CannotCapture, match=text) as caught:
        sc.plan(model, inputs, ratios=0.5)
    assert "do: " in str(caught.value)


# -------------------------------------------------------------------------------------------------------------- weights


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite(value: float) -> None:
    model = net()
    model.first.weight.data[1, 0, 0, 0] = value
    with untouched(model), pytest.raises(sc.CannotPrune, match=r"'first.weight' holds 1 of 216 values .* not finite"):
        sc.plan(model, X, ratios=0.5)


def test_weights_that_are_not_finite_where_nothing_is_scored() -> None:
    model = net()
    model.head.weight.data[0, 0] = float("nan")
    with untouched(model), pytest.raises(sc.CannotPrune, match=r"NaN[\s\S]*check its weights"):
        sc.apply(model, plan())


# ------------------------------------------------------------------------------------------------------------- requests


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({}, "say how much to prune"),
        ({"ratios": 0.5, "criterion": "l11"}, "there is no criterion 'l11'; did you mean 'l1'"),
        ({"ratios": 0.5, "criterion": "taylorish"}, "there is no criterion 'taylorish'"),
        ({"ratios": 0.5, "criterion": 7}, "a criterion is a name or a function .* not 7"),
        ({"ratios": {"frist": 0.5}}, "ratios: no group is called, or matches, 'frist'; did you mean 'first'"),
        ({"ratios": {"layer*": 0.5}}, r"ratios: no group is called, or matches, 'layer\*'"),
        ({"ratios": {3: 0.5}}, "3 is not a group's name"),
        (
            {"ratios": 0.5, "exclude": "secnd"},
            "exclude: no group is called, or matches, 'secnd'; did you mean 'second'",
        ),
        ({"ratios": 0.5, "exclude": ["first", "hed"]}, "exclude: .*'hed'; did you mean 'head'"),
        ({"ratios": 1.0}, r"1.0 is not a ratio in \[0, 1\)"),
        ({"ratios": -0.1}, r"-0.1 is not a ratio in \[0, 1\)"),
        ({"ratios": 50}, r"50 is not a ratio in \[0, 1\)"),
        ({"ratios": float("nan")}, r"nan is not a ratio in \[0, 1\)"),
        ({"ratios": True}, r"True is not a ratio"),
        ({"ratios": "half"}, "'half' is not a ratio"),
        ({"ratios": {"first": 1.5}}, r"ratios\['first'\]: 1.5 is not a ratio in \[0, 1\) or a width"),
        ({"ratios": {"first": 9}}, "'first' has 8 channels: it cannot keep 9"),
        ({"ratios": 0.5, "allocation": "globl"}, "there is no allocation 'globl'; did you mean 'global'"),
        ({"ratios": 0.5, "residual": "scattered"}, "no residual rule 'scattered'; did you mean 'scatter'"),
        ({"ratios": 0.5, "constants": "foldd"}, "constants: there is no 'foldd'; did you mean 'fold'"),
        ({"ratios": 0.5, "constants": {"frst": "fold"}}, "constants: no group .*'frst'; did you mean 'first'"),
        ({"budget": sc.Budget()}, "exactly one of keep .* and at_most"),
        ({"budget": sc.Budget(keep=1.5)}, r"Budget.keep=1.5 is not a fraction in \(0, 1\]"),
        ({"budget": sc.Budget(keep=0.5, of="flops")}, "a budget of 'flops' is not known"),  # type: ignore[arg-type]
        ({"budget": sc.Budget(keep=0.5), "ratios": 0.5}, "fixes every group"),
        ({"budget": 0.5}, "a budget is a Budget"),
    ],
    ids=str,
)
def test_wrong_requests(options: dict[str, Any], text: str) -> None:
    with untouched(graph().model), pytest.raises(sc.BadRequest, match=text):
        sc.plan(graph(), **options)


def test_asking_for_a_locked_group() -> None:
    with pytest.raises(sc.CannotPrune, match=r"'head'[\s\S]*locked[\s\S]*output of the network"):
        sc.plan(graph(), ratios={"head": 0.5})


@pytest.mark.parametrize(
    ("criterion", "error", "text"),
    [
        (lambda v: v.filters, sc.BadRequest, r"on group 'first' returned the shape \[8, 27\], not \[8\]"),
        (lambda v: v.filters.sum(), sc.BadRequest, r"returned the shape \[\], not \[8\]"),
        (lambda v: v.filters.sum(1)[1:], sc.BadRequest, r"returned the shape \[7\], not \[8\]"),
        (lambda v: v.filters.sum(1).tolist(), sc.BadRequest, "returned list, not a tensor of 8 scores"),
        (lambda v: None, sc.BadRequest, "returned NoneType"),
        (lambda v: v.filters.sum(1) > 0, sc.BadRequest, "returned torch.bool, not real numbers"),
        (lambda v: v.filters.sum(1) / 0, sc.CannotPrune, "returned 8 of 8 scores that are not finite"),
    ],
)
def test_a_users_criterion_that_is_wrong(criterion: Callable[[GroupView], Any], error: type, text: str) -> None:
    with untouched(graph().model), pytest.raises(error, match=text):
        sc.plan(graph(), criterion=criterion, ratios=0.5)


def test_a_users_criterion_that_raises_is_named() -> None:
    def mine(view: GroupView) -> Tensor:
        raise KeyError("own")

    with pytest.raises(KeyError) as caught:
        sc.plan(graph(), criterion=mine, ratios=0.5)
    assert caught.value.__notes__ == ["while the criterion 'mine' scored the group 'first'"]


def test_a_users_criterion_cannot_change_the_weights() -> None:
    def greedy(view: GroupView) -> Tensor:
        return view.filters.zero_().sum(1) + torch.arange(len(view.filters))

    model = net()
    with untouched(model):
        sc.plan(model, X, criterion=greedy, ratios=0.5)


# --------------------------------------------------------------------------------------------------- plans for others


@pytest.mark.parametrize("verb", [sc.apply, sc.masked])
def test_a_plan_for_another_width(verb: Callable[..., Any]) -> None:
    model = net(width=10)
    text = r"'first.weight' is \[8, 3, 3, 3\] in the plan's network but \[10, 3, 3, 3\] in this model"
    with untouched(model), pytest.raises(sc.WrongModel, match=text):
        verb(model, plan())


@pytest.mark.parametrize("verb", [sc.apply, sc.masked])
def test_a_plan_for_another_structure(verb: Callable[..., Any]) -> None:
    more, less = net(), net()
    more.extra = nn.Linear(2, 2)  # type: ignore[assignment]
    less.norm = nn.Identity()  # type: ignore[assignment]
    with untouched(more), pytest.raises(sc.WrongModel, match=r"'extra.weight' .* of this model is unknown to the plan"):
        verb(more, plan())
    with untouched(less), pytest.raises(sc.WrongModel, match=r"'norm.weight' .* is missing in this model"):
        verb(less, plan())


class Rewired(Net):
    """The same tensors, wired otherwise."""

    def forward(self, x: Tensor) -> Tensor:
        h = torch.sigmoid(self.norm(self.first(x)))
        return self.head(torch.sigmoid(self.second(h.flip(1))))


class Added(Net):
    def forward(self, x: Tensor) -> Tensor:
        h = torch.sigmoid(self.norm(self.first(x)))
        return self.head(torch.sigmoid(self.second(h.softmax(1))))


@pytest.mark.parametrize("kind", [Rewired, Added])
def test_a_model_with_the_same_shapes_but_wired_otherwise(kind: type[Net]) -> None:
    model = kind().eval()
    with untouched(model), pytest.raises(sc.WrongModel, match="group 'first' is wired differently") as caught:
        sc.apply(model, plan())
    assert "plan again" in str(caught.value)


def test_a_model_rewired_after_it_was_planned() -> None:
    """The capture that the plan remembers is stale: the check must notice."""
    model = net()
    mine = sc.plan(model, X, ratios=0.5)
    model.forward = types.MethodType(Rewired.forward, model)  # type: ignore[method-assign]
    with untouched(model), pytest.raises(sc.SecateurError):
        sc.apply(model, mine)


def test_a_plan_without_inputs_needs_a_graph() -> None:
    bare = dataclasses.replace(plan(), inputs={})
    with pytest.raises(sc.BadPlan, match="does not say what inputs"):
        sc.apply(net(), bare)
    assert type(sc.apply(graph(), bare)) is Net


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"stripes": {"first": torch.ones(8, 3, 3, dtype=torch.bool).numpy()}}, "stripes"),
    ],
    ids=str,
)
def test_what_the_schema_reserves_is_refused(change: dict[str, Any], text: str) -> None:
    with pytest.raises(sc.BadPlan, match=f"asks for {text}.*reserves"):
        sc.apply(graph(), dataclasses.replace(plan(), **change))
