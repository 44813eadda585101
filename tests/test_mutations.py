"""Rules broken on purpose: whatever is wrong in the engine, ``apply``'s own check must notice, and hand nothing out.

Each mutation stands for a mistake that one could really make: a lock forgotten, an offset wrong, a join left out. Every
network passes with the engine as it is, at the same ratios, so that it is the mutation that is noticed.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import secateur as sc
from law import call as run
from law import prepared, random_ratios, relative_error, to_double, zero_readers
from networks.common import Apply, Sandwich, randomise, tensor
from secateur import interpreter, masks, rewrites, surgery
from secateur.labels import on_axis
from secateur.propagation import Call
from secateur.rules import RULES, contraction, elementwise, movement, norms

Patch = pytest.MonkeyPatch


class Residual(nn.Module):
    """``x + gamma * inner(x)``; gamma is a plain number or a vector that may start at zero."""

    def __init__(self, inner: nn.Module, gamma: float | None = None) -> None:
        super().__init__()
        self.inner = inner
        self.gamma = None if gamma is None else nn.Parameter(torch.full((1, 12, 1, 1), gamma))

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        return x + (y if self.gamma is None else self.gamma * y)


class Beside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.more = nn.Conv2d(12, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.more(x), x], 1)


class Attention(nn.Module):
    """Two heads of eight features over the positions of a map."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(12, 16) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        b, _, h, w = x.shape
        t = x.flatten(2).transpose(1, 2)
        q, k, v = (f(t).unflatten(2, (2, 8)).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q * 3, k, v)
        return y.transpose(1, 2).reshape(b, h * w, 16).transpose(1, 2).reshape(b, 16, h, w)


def _halves(x: Tensor) -> Tensor:
    a, b = x.split(6, 1)
    return torch.cat([a.sin(), 2 * b], 1)


def _inner() -> nn.Module:
    return nn.Sequential(nn.Conv2d(12, 10, 1), nn.Softplus(), Apply(lambda x: x.flip(1)), nn.Conv2d(10, 12, 1))


def _flat() -> nn.Module:
    return Sandwich(nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten()), out=48, flat=True)


def _on(function: Callable[[Tensor], Tensor], out: int = 12) -> Callable[[], nn.Module]:
    return lambda: Sandwich(Apply(function), out=out)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "plain": _on(torch.sin),
    "max": _on(lambda x: x * x.amax(1, keepdim=True)),
    "mean": _on(lambda x: x * x.mean(1, keepdim=True)),
    "sum": _on(lambda x: x * x.sum(1, keepdim=True)),
    "softmax": _on(lambda x: x.softmax(1)),
    "flip": _on(lambda x: x.flip(1)),
    "roll": _on(lambda x: x.roll(5, 1)),
    "slice": _on(lambda x: x[:, 2:10], out=8),
    "split": _on(_halves),
    "pad": _on(lambda x: F.pad(x, (0, 0, 0, 0, 0, 4)) + 0.5, out=16),
    "cat": lambda: Sandwich(Beside(), out=20),
    "add": lambda: Sandwich(Residual(nn.Conv2d(12, 12, 1))),
    "scale": lambda: Sandwich(Residual(nn.Conv2d(12, 12, 1), 0.1)),
    "scale of 1e-6": lambda: Sandwich(Residual(_inner(), 1e-6)),
    "scale of zero": lambda: Sandwich(Residual(_inner(), 0.0)),
    "group norm": lambda: Sandwich(nn.GroupNorm(4, 12)),
    "layer norm": lambda: Sandwich(nn.GroupNorm(1, 12)),
    "batch norm": lambda: Sandwich(nn.BatchNorm2d(12)),
    "grouped": lambda: Sandwich(nn.Sequential(nn.Conv2d(12, 24, 1, groups=3), nn.Softplus()), out=24),
    "depthwise": lambda: Sandwich(nn.Sequential(nn.Conv2d(12, 12, 3, padding=1, groups=12), nn.Softplus())),
    "flatten": _flat,
    "attention": lambda: Sandwich(Attention(), out=16),
}


@functools.cache
def captured(name: str) -> sc.Graph:
    torch.manual_seed(1)
    model = NETWORKS[name]()
    if not name.startswith("scale of"):
        randomise(model, 1)
    return prepared(model, tensor(2, 3, 6, 6))


def fresh_graph(name: str) -> sc.Graph:
    """The capture without its coupling, which is found again by the rules of the day."""
    return dataclasses.replace(captured(name), memo={})


def rule(*names: str) -> Callable[[Callable[[Call], Any]], Callable[[Patch], None]]:
    def mutation(function: Callable[[Call], Any]) -> Callable[[Patch], None]:
        def patch(mp: Patch) -> None:
            for name in names:
                assert name in RULES
                mp.setitem(RULES, name, function)

        return patch

    return mutation


def _with(call: Call, **changes: Any) -> Call:
    call.args = {**call.args, **changes}
    return call


def _shifted(base: Callable[[Call], Any], axis: int) -> Callable[[Call], Any]:
    return lambda call: [f.roll(1, axis) if f.shape[axis] > 1 else f for f in base(call)]


def _unlocked(call: Call) -> Any:
    with pytest.MonkeyPatch.context() as mp:
        mp.setattr(call.labels, "lock", lambda *_: None)
        return norms.reduced(call)


def _group_norm_without_joins(call: Call) -> Any:
    with pytest.MonkeyPatch.context() as mp:
        mp.setattr(call.labels, "join", lambda a, b, *_: None if b.shape[0] == 1 < a.shape[0] else call.labels)
        mp.setattr(call, "merge", lambda items: items[0][0])
        return norms.group_norm(call)


def _depthwise_apart(call: Call) -> Any:
    if call.args["groups"] == call.shape(call.args["input"])[1]:
        return [on_axis(call.axis(call.args["weight"], 0)[0].reshape(-1), 1, len(call.out_shape))]  # type: ignore[union-attr]
    return contraction.convolution(call)


def _pad_in_front(call: Call) -> Any:
    pad = call.args["pad"]
    return movement.padded(_with(call, pad=[*pad[:-2], pad[-1], pad[-2]]))


def _no_statistics(base: Callable[[Call], Any]) -> Callable[[Call], Any]:
    def mutated(call: Call) -> Any:
        call.mark_norm = lambda: None  # type: ignore[method-assign]
        return base(call)

    return mutated


def _unread(call: Call) -> Any:
    call.mark_reader = lambda: None  # type: ignore[method-assign]
    return norms.reduced(call)


def _attribute(target: object, name: str, value: Any) -> Callable[[Patch], None]:
    return lambda mp: mp.setattr(target, name, value)


def _untied_bias(call: Call, labels: Tensor | None) -> Any:
    return [] if labels is None else [on_axis(labels, 1, len(call.out_shape))]


def _next_number(site: Any, axis: int, numbers: Tensor, old_size: int) -> None:
    real_pick_again(site, axis, (numbers + 1) % (int(numbers.max()) + 1), old_size)


real_pick_again = rewrites._pick_again


def _scale_forgotten(mp: Patch) -> None:
    mp.setattr(surgery, "keep_attention_scale_", lambda *_: None)
    mp.setitem(rewrites.REWRITES, "scaled_dot_product_attention", lambda site: None)


def _split_forgotten(mp: Patch) -> None:
    """Both halves are taken for half of the new width."""

    def even(site: Any) -> None:
        whole = sum(int(part[1].sum()) if part[1] is not None else 6 for part in site.out_masks())
        site.replace(torch.ops.aten.split_with_sizes.default, site.new.args[0], [whole // 2, whole - whole // 2], 1)

    mp.setitem(rewrites.REWRITES, "split", even)


@dataclass(frozen=True)
class Mutation:
    """``network`` is the one whose check must notice; ``oracle``: zeroed readers say what is right as well. ``seeds``:
    of random plans; left out are those at which the mutation happens to be right (a split into equal halves)."""

    network: str
    patch: Callable[[Patch], None]
    oracle: bool = False
    seeds: tuple[int, ...] = (1, 2, 3)


reduces = rule("amax", "mean")(_unlocked)
MUTATIONS: dict[str, Mutation] = {
    "max over channels not locked": Mutation("max", reduces),
    "mean over channels not locked": Mutation("mean", reduces),
    "softmax over channels not locked": Mutation("softmax", rule("softmax")(elementwise.same)),
    "sum does not read": Mutation("sum", rule("sum")(_unread)),
    "flip moves no labels": Mutation("flip", rule("flip")(elementwise.same), oracle=True),
    "roll moves no labels": Mutation("roll", rule("roll")(elementwise.same), oracle=True),
    "roll by one too many": Mutation("roll", rule("roll")(_shifted(movement.picked, 1)), oracle=True),
    "slice off by one": Mutation("slice", rule("slice")(_shifted(movement.picked, 1)), oracle=True),
    "split parts swapped": Mutation(
        "split", rule("split")(lambda call: tuple(reversed(movement.picked(call)))), oracle=True
    ),
    "pad on the wrong side": Mutation("pad", rule("pad")(_pad_in_front), oracle=True),
    "cat in the wrong order": Mutation(
        "cat",
        rule("cat")(lambda call: movement.concatenated(_with(call, tensors=call.args["tensors"][::-1]))),
        oracle=True,
    ),
    "add does not join": Mutation("add", rule("add")(elementwise.same), oracle=True),
    "scale not sliced": Mutation("scale", rule("mul")(elementwise.same), oracle=True),
    "hidden behind a scale of 1e-6": Mutation("scale of 1e-6", rule("flip")(elementwise.same)),
    "hidden behind a scale of zero": Mutation("scale of zero", rule("flip")(elementwise.same)),
    "group norm joins nothing": Mutation("group norm", rule("group_norm")(_group_norm_without_joins)),
    "group norm of dense statistics": Mutation("group norm", rule("group_norm")(_no_statistics(norms.group_norm))),
    "one group of dense statistics": Mutation("layer norm", rule("group_norm")(_no_statistics(norms.group_norm))),
    "batch norm leaves its vectors": Mutation("batch norm", rule("batch_norm")(elementwise.same), oracle=True),
    "bias not tied": Mutation("plain", _attribute(contraction, "_with_bias", _untied_bias), oracle=True),
    "grouped conv ties no partitions": Mutation("grouped", _attribute(contraction, "_joined_across", lambda *_: None)),
    "depthwise conv ties nothing": Mutation("depthwise", rule("conv2d")(_depthwise_apart)),
    "flatten off by one": Mutation("flatten", rule("flatten", "view", "reshape")(_shifted(movement.reshaped, 1)), True),
    "attention scale follows the width": Mutation("attention", _scale_forgotten),
    "rewrite picks the next channel": Mutation("roll", _attribute(rewrites, "_pick_again", _next_number), seeds=(2, 3)),
    "rewrite splits at half of the new width": Mutation("split", _split_forgotten, seeds=(1, 3)),
    "readers read removed channels": Mutation("plain", _attribute(interpreter, "zeroed", lambda value, _: value)),
    "conv is no reader": Mutation("plain", _attribute(Call, "mark_reader", lambda self: None)),
}


def carry_out(graph: sc.Graph, seed: int, ratios: Any = None) -> None:
    free = [g for g in sc.find_groups(graph) if not g.locked]
    assert free, "everything is locked: this mutation tests nothing"
    plan = sc.plan(graph, criterion="random", ratios=ratios or random_ratios(tuple(free), seed, 0.2, 0.8), seed=seed)
    small = sc.apply(graph, plan)
    sure = sc.record(small)
    assert sure is not None
    assert sure.difference is not None


@pytest.mark.parametrize("name", NETWORKS)
def test_without_a_mutation_all_is_well(name: str) -> None:
    graph = fresh_graph(name)
    if not [g for g in sc.find_groups(graph) if not g.locked]:
        assert name in ("max", "mean", "softmax")  # the lock is what the mutation takes away
        return
    for seed in (1, 2):
        carry_out(graph, seed)


@pytest.mark.parametrize("name", MUTATIONS)
def test_the_check_notices(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mutation = MUTATIONS[name]
    mutation.patch(monkeypatch)
    for seed in mutation.seeds:
        with pytest.raises(sc.CannotPrune):
            carry_out(fresh_graph(mutation.network), seed)


@pytest.mark.parametrize(
    "name", ["add does not join", "bias not tied", "group norm joins nothing", "flip moves no labels"]
)
def test_the_check_notices_at_equal_counts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of every group: all shapes fit, only the channels are the wrong ones."""
    mutation = MUTATIONS[name]
    mutation.patch(monkeypatch)
    ratios = 1 / 3 if "group norm" in name else 0.5
    with pytest.raises(sc.CannotPrune):
        carry_out(fresh_graph(mutation.network), 1, ratios=ratios)


@pytest.mark.parametrize("name", [name for name, m in MUTATIONS.items() if m.oracle])
def test_zeroed_readers_notice_too(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second oracle shares no code with the masks: it zeroes parameters and runs the user's own module."""
    mutation = MUTATIONS[name]
    mutation.patch(monkeypatch)
    graph = fresh_graph(mutation.network)
    plan = sc.plan(graph, criterion="random", ratios=0.5, seed=1)
    coupling = masks.coupling_for(graph, plan)
    x = to_double(tensor(2, 3, 6, 6, seed=3))
    for tier in ("module", "graph"):
        try:
            way = surgery.Way(tier, (), coupling)  # type: ignore[arg-type]
            small = surgery.build(way, plan, graph.model, graph.tensors).eval()
            with torch.no_grad():
                error = relative_error(run(small, x), zero_readers(graph.model, plan, x))
        except Exception:  # shapes that do not fit are noticed as well
            continue
        assert error > 1e-4, f"{tier}: the second oracle did not notice"


class Blind(nn.Module):
    """Channels are rolled, so that slicing the modules alone is wrong; ``tell`` is all that one sees of the outcome."""

    def __init__(self, tell: Callable[[Tensor], Tensor], bias: bool = True) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 12, 3, bias=bias), nn.Conv2d(12, 5, 1, bias=bias)
        self.tell = tell

    def forward(self, x: Tensor) -> Tensor:
        return self.tell(self.b(self.a(x).roll(5, 1)))


def assert_right_on_fresh_inputs(model: nn.Module, example: Tensor) -> None:
    """``apply`` refuses, or what it hands out is right on inputs that it has not seen."""
    try:
        plan = sc.plan(model, example, ratios=0.5)
        small = sc.apply(model, plan)
    except sc.SecateurError:
        return
    x = tensor(64, 3, 6, 6, seed=9).to(example.dtype)
    error = relative_error(small(x).double(), sc.masked(model, plan)(x).double())
    assert error < 1e-4, f"apply handed out a wrong network by way of {getattr(sc.record(small), 'tier', '?')!r}"


ATTACKS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "an example of zeros": (lambda: Blind(lambda x: x, bias=False), lambda: torch.zeros(2, 3, 6, 6)),
    "an example of ones": (lambda: Blind(lambda x: x), lambda: torch.ones(2, 3, 6, 6)),
    "an empty batch": (lambda: Blind(lambda x: x), lambda: torch.zeros(0, 3, 6, 6)),
    "class numbers as output": (lambda: Blind(lambda x: x.mean((2, 3)).argmax(1)), lambda: tensor(2, 3, 6, 6)),
    "yes or no as output": (lambda: Blind(lambda x: (x.mean((2, 3)) > 0).float()), lambda: tensor(1, 3, 6, 6)),
    "an activation that is dead": (lambda: Blind(lambda x: F.relu(x - 9)), lambda: 1e-3 * tensor(1, 3, 6, 6)),
    "a saturated output": (lambda: Blind(lambda x: torch.sigmoid(80 * x + 60)), lambda: 1e-3 * tensor(1, 3, 6, 6)),
}


@pytest.mark.parametrize("name", ATTACKS)
@pytest.mark.parametrize("seed", [0, 4])
def test_the_check_is_not_blinded(name: str, seed: int) -> None:
    torch.manual_seed(seed)
    factory, example = ATTACKS[name]
    assert_right_on_fresh_inputs(factory().eval(), example())


class OnlyInTraining(nn.Module):
    """A head of its own in train mode, which reads the channels rolled."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.aux = nn.Conv2d(3, 12, 3), nn.Conv2d(12, 5, 1), nn.Conv2d(12, 4, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        h = torch.sigmoid(self.a(x))
        return (self.b(h), self.aux(h.roll(5, 1))) if self.training else (self.b(h),)


def test_a_branch_of_the_train_mode_is_checked_as_well() -> None:
    torch.manual_seed(0)
    model, x = OnlyInTraining().double().eval(), to_double(tensor(2, 3, 6, 6))
    plan = sc.plan(model, x, ratios=0.5)
    small = sc.apply(model, plan).train()
    kept = plan.keep["a"]
    model.train()
    with torch.no_grad():
        gone = torch.tensor([i for i in range(12) if i not in kept])
        model.b.weight[:, gone] = 0
        model.aux.weight[:, (gone + 5) % 12] = 0
        assert relative_error(small(x), model(x)) < 1e-9


def test_every_network_has_its_mutation() -> None:
    assert {mutation.network for mutation in MUTATIONS.values()} == set(NETWORKS)
