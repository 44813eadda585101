"""Training: what it gives, what it leaves alone, its settings one by one, and what it refuses."""

import copy
import itertools
import math
import random
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, TensorDataset

import secateur as sc
from secateur.errors import BadRequest, MissingExtra
from secateur.measurement import accuracy
from secateur.recover import Hooks, Run, Training, cross_entropy, fit_, loop
from secateur.recover.objectives import mix
from secateur.recover.rates import rate
from secateur.recover.tensorboard import tensorboard_log
from secateur.recover.training import parameter_groups
from training_cases import Numbered, blobs, images, net


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def bare(model: nn.Module, data: Any, epochs: int, lr: float, **options: Any) -> nn.Module:
    """The loop that anybody would write."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, nesterov=True, **options)
    model.train()
    for _ in range(epochs):
        for inputs, targets in data:
            nn.functional.cross_entropy(model(inputs), targets).backward()
            optimizer.step()
            optimizer.zero_grad()
    return model.eval()


def test_it_is_the_loop_that_anybody_would_write() -> None:
    model = net()
    fit_(model, blobs(), Training(epochs=3, lr=0.05, schedule="constant", weight_decay=0.0))
    assert same(model, bare(net(), blobs(), 3, 0.05))
    assert not model.training


def test_it_learns_keeps_the_best_and_tells() -> None:
    model, data = net(), blobs()
    scores = iter([float("nan"), 0.9, 0.1, 0.9])
    states: list[dict[str, Tensor]] = []
    steps: list[int] = []
    records: list[Mapping[str, Any]] = []

    def evaluate(m: nn.Module) -> float:
        assert not any(module.training for module in m.modules())
        states.append(copy.deepcopy(m.state_dict()))
        return next(scores)

    def progress(done: int, total: int, facts: Mapping[str, float]) -> None:
        assert total == 12
        assert facts["loss"] > 0
        assert 0 <= facts["accuracy"] <= 1
        assert facts["images_per_s"] > 0
        assert ("score" in facts) == (done > 3)
        steps.append(done)

    history = fit_(
        model,
        data,
        Training(epochs=4, keep="best", label_smoothing=0.1),
        evaluate=evaluate,
        run=Run(progress=progress, log=records.append),
    )
    assert [epoch.score for epoch in history] == pytest.approx([math.nan, 0.9, 0.1, 0.9], nan_ok=True)
    assert steps == list(range(1, 13))
    assert all(torch.equal(states[1][k], v) for k, v in model.state_dict().items())
    assert not model.training
    assert all(p.grad is None for p in model.parameters())
    assert [(r["kind"], r["step"], r["epoch"]) for r in records] == [("epoch", 3 * n, n) for n in (1, 2, 3, 4)]
    assert records[1]["loss"] == history[1].loss


def test_it_reaches_full_accuracy_repeats_itself_and_leaves_chance_alone() -> None:
    first, second, other = net(dropout=0.2), net(dropout=0.2), net(dropout=0.2)
    torch.manual_seed(99)
    random.seed(99)
    np.random.seed(99)
    states = torch.random.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    for model, seed in ((first, 0), (second, 0), (other, 1)):
        fit_(model, blobs(), Training(epochs=12, lr=0.2, schedule="one-cycle", seed=seed))
        torch.randn(2)
        torch.random.set_rng_state(states[0])
    assert accuracy(first, blobs()) == 1.0
    assert same(first, second)
    assert not same(first, other)
    assert torch.equal(torch.random.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.random.get_state()[1].tolist() == states[2]


def test_evaluation_and_progress_do_not_move_training() -> None:
    watched, alone = net(dropout=0.2), net(dropout=0.2)

    def evaluate(model: nn.Module) -> float:
        return float(torch.rand(1)) + random.random() + float(np.random.rand())

    data = DataLoader(TensorDataset(*images()), 16, shuffle=True)
    fit_(watched, data, Training(epochs=2), evaluate=evaluate, run=Run(progress=lambda *a: None, log=lambda r: None))
    fit_(alone, data, Training(epochs=2))
    assert same(watched, alone)


def test_any_precision_after_any_other_in_one_process() -> None:
    trained = {}
    for precision in ("fp32", "bf16", "fp32"):
        model = net()
        seen = []

        def objective(m: nn.Module, x: Any, y: Tensor, seen: list[torch.dtype] = seen) -> tuple[Tensor, Tensor]:
            seen.append(m(x).dtype)
            return cross_entropy()(m, x, y)

        fit_(model, blobs(), Training(epochs=2, precision=precision), objective=objective)  # type: ignore[arg-type]
        assert set(seen) == {torch.bfloat16 if precision == "bf16" else torch.float32}
        assert all(p.dtype == torch.float32 for p in model.parameters())
        assert "forward" not in vars(model)
        if precision in trained:
            assert same(trained[precision], model)
        trained[precision] = model
    assert not same(trained["fp32"], trained["bf16"])


def test_the_users_accelerator_stays_as_it_was() -> None:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState, PartialState

    try:
        theirs = Accelerator(mixed_precision="bf16", cpu=True)
        fit_(net(), blobs(), Training(epochs=1))
        assert theirs.mixed_precision == "bf16"
        assert theirs.state.device.type == "cpu"
        assert Accelerator(mixed_precision="bf16", cpu=True).mixed_precision == "bf16"
    finally:
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()


@pytest.mark.parametrize(("norm", "n"), [("group", 46), ("none", 42)])
def test_accumulated_batches_are_one_batch(norm: str, n: int) -> None:
    """Also where the last batch of a step has fewer examples (4, 4, 2) or a step has fewer batches (4, 2)."""
    how: dict[str, Any] = {"epochs": 2, "lr": 0.05}
    small, large = net(norm), net(norm)
    one = fit_(small, blobs(n, batch=4), Training(accumulate=3, **how))
    other = fit_(large, blobs(n, batch=12), Training(**how))
    for a, b in zip(small.parameters(), large.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert one[1].loss == pytest.approx(other[1].loss, rel=1e-5)
    assert one[1].train_accuracy == other[1].train_accuracy


def test_clipping_and_weight_decay() -> None:
    model, gradients = net(), []
    clip = Hooks(after_step=lambda m: gradients.append(torch.cat([p.detach().flatten() for p in m.parameters()])))
    fit_(model, blobs(), Training(epochs=1, lr=1.0, schedule="constant", momentum=0, clip=1e-3), hooks=clip)
    moved = [float((b - a).norm()) for a, b in itertools.pairwise(gradients)]
    assert max(moved) < 1.2e-3 + 5e-4 * float(gradients[0].norm())
    spared, norms = parameter_groups(net(), 0.1), parameter_groups(net(), 0.1, decay_norms=True)
    assert [(len(g["params"]), g["weight_decay"]) for g in spared] == [(2, 0.1), (3, 0.0)]
    assert [g["weight_decay"] for g in norms] == [0.1, 0.1]


def test_the_average_is_what_is_evaluated_and_kept() -> None:
    model, seen, steps = net(), [], []

    def remember(m: nn.Module) -> None:
        steps.append({k: v.clone() for k, v in m.state_dict().items()})

    fit_(
        model,
        blobs(),
        Training(epochs=2, lr=0.05, ema=0.75),
        hooks=Hooks(after_step=remember),
        evaluate=lambda m: seen.append({k: v.clone() for k, v in m.state_dict().items()}) or 0.0,
    )
    mean = steps[0]
    for state in steps[1:]:
        mean = {k: 0.75 * mean[k] + 0.25 * v if v.is_floating_point() else v for k, v in state.items()}
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, seen[-1][name])
        torch.testing.assert_close(tensor, mean[name], rtol=1e-5, atol=1e-6)


class Indexed(nn.Module):
    """With tensors of which there is no mean, and a complex one, of which there is."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = net()
        self.register_buffer("index", torch.arange(300))
        self.register_buffer("chosen", torch.tensor([True, False]))
        self.register_buffer("phase", torch.zeros(2, dtype=torch.complex64))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


def test_the_average_of_what_is_not_floating_is_what_it_is_now() -> None:
    model = Indexed()

    def turn(m: nn.Module) -> None:
        m.phase += 1 + 2j  # type: ignore[operator]
        m.chosen.logical_not_()  # type: ignore[operator, union-attr]

    fit_(model, blobs(), Training(epochs=1, ema=0.9), hooks=Hooks(after_step=turn))
    assert torch.equal(model.index, torch.arange(300))
    assert model.chosen.tolist() == [False, True]
    assert int(model.inner[1].num_batches_tracked) == 3  # type: ignore[arg-type]
    torch.testing.assert_close(model.phase, torch.full((2,), 1.29 * (1 + 2j), dtype=torch.complex64))


def test_frozen_norms_keep_their_statistics_and_learn_their_weights() -> None:
    model = net()
    before = copy.deepcopy(model[1].state_dict())
    fit_(model, blobs(), Training(epochs=1, freeze_norms=True))
    after = model[1].state_dict()
    assert torch.equal(before["running_mean"], after["running_mean"])
    assert int(after["num_batches_tracked"]) == 0
    assert not torch.equal(before["weight"], after["weight"])


class Uneven(nn.Module):
    """After the cut its chunks are uneven, which only the rewritten graph can do."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.n, self.drop, self.b = nn.Conv2d(1, 12, 1), nn.BatchNorm2d(12), nn.Dropout(), nn.Conv2d(12, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        first, second, third = self.n(self.a(x)).chunk(3, 1)
        return self.b(self.drop(torch.cat([third, first, second], 1).relu())).mean((2, 3))


def test_frozen_norms_of_a_rewritten_graph_keep_their_statistics() -> None:
    torch.manual_seed(0)
    model = Uneven()
    inputs = blobs()[0][0]
    small = sc.apply(model, sc.plan(model, inputs, ratios={"a": 0.5}))
    assert sc.record(small).tier == "graph"  # type: ignore[union-attr]
    before = copy.deepcopy(small.state_dict())
    fit_(small, blobs(), Training(epochs=1, freeze_norms=True))
    for name, tensor in small.state_dict().items():
        still = name.startswith("n.") and name not in ("n.weight", "n.bias")
        assert torch.equal(tensor, before[name]) is still, name
    fit_(small, blobs(), Training(epochs=1))
    assert not torch.equal(small.get_buffer("n.running_mean"), before["n.running_mean"])


def test_freezing_a_norm_does_not_freeze_what_lies_inside_of_it() -> None:
    model = nn.Sequential(net(dropout=0.2))
    model.register_buffer("running_mean", torch.zeros(1))
    modes: list[tuple[bool, ...]] = []

    def note(m: nn.Module) -> None:
        modes.append((m.training, m[0].training, m[0][1].training, m[0][3].training))  # type: ignore[index, operator, union-attr]

    fit_(model, blobs(), Training(epochs=1, freeze_norms=True), hooks=Hooks(after_step=note))
    assert set(modes) == {(False, True, False, True)}


def test_hooks_are_called_where_their_names_say() -> None:
    called: list[str] = []

    def note(name: str) -> Any:
        def act(m: nn.Module) -> Tensor:
            assert isinstance(m, nn.Sequential)
            reached = all(p.grad is not None for p in m.parameters())
            assert reached == (name == "backward")
            called.append(name)
            return m[0].weight.square().sum() * 0.1

        return act

    hooks = Hooks(note("penalty"), note("backward"), note("step"), note("epoch"))
    model, plain = net(), net()
    fit_(model, blobs(), Training(epochs=2), hooks=[hooks], evaluate=lambda m: float(called.append("evaluate") or 0))
    assert called == [*(["penalty", "backward", "step"] * 3), "epoch", "evaluate"] * 2
    fit_(plain, blobs(), Training(epochs=2))
    assert model[0].weight.norm() < plain[0].weight.norm()


@pytest.mark.parametrize("classes", [2, 3, 7])
def test_mixup(classes: int) -> None:
    inputs, targets = images(40, classes)
    mixed, chances = mix(inputs, targets, classes, alpha=0.4, seed=(0, 1, 0, 0))
    again, _ = mix(inputs, targets, classes, alpha=0.4, seed=(0, 1, 0, 0))
    other, _ = mix(inputs, targets, classes, alpha=0.4, seed=(0, 2, 0, 0))
    assert torch.equal(mixed, again)
    assert not torch.equal(mixed, other)
    assert chances.shape == (40, classes)
    torch.testing.assert_close(chances.sum(1), torch.ones(40))
    weight = float(chances[chances < 0.999].max())
    draw = np.random.default_rng((0, 1, 0, 0))
    drawn = float(draw.beta(0.4, 0.4))
    assert max(drawn, 1 - drawn) == pytest.approx(weight, rel=1e-5)
    order = torch.from_numpy(draw.permutation(40))
    torch.testing.assert_close(mixed, drawn * inputs + (1 - drawn) * inputs[order])
    nested, _ = mix({"x": inputs, "n": torch.arange(40)}, targets, classes, alpha=0.4, seed=(0, 1, 0, 0))
    assert torch.equal(nested["x"], mixed)
    assert torch.equal(nested["n"], torch.arange(40))
    model = net(classes=classes)
    history = fit_(model, [(inputs, targets)], Training(epochs=3, mixup=0.4))
    assert 0 < history[-1].train_accuracy <= 1


def test_rates() -> None:
    cosine, cycle = Training(epochs=10, lr=0.4), Training(epochs=10, lr=0.4, schedule="one-cycle")
    assert [rate(cosine, s, 10) for s in (0, 50, 100)] == pytest.approx([0.4, 0.2, 0])
    assert [rate(cycle, s, 10) for s in (0, 30, 100)] == pytest.approx([0.016, 0.4, 0])
    assert rate(Training(lr=0.4, schedule="constant"), 90, 10) == 0.4
    steps = Training(epochs=10, lr=1.0, schedule="step", milestones=(0.07, 0.29, 0.57), gamma=0.5)
    assert [rate(steps, s, 10) for s in (6, 7, 28, 29, 56, 57)] == [1, 0.5, 0.5, 0.25, 0.25, 0.125]


def test_warm_up_rises_in_a_line_and_rewinding_takes_the_end_of_the_schedule() -> None:
    plain = Training(epochs=6, lr=0.4)
    warm = Training(epochs=6, lr=0.4, warmup=2)
    ratios = [rate(warm, s, 5) / rate(plain, s, 5) for s in range(12)]
    assert ratios == pytest.approx([(s + 1) / 10 for s in range(10)] + [1, 1])
    late = Training(epochs=6, lr=0.4, warmup=2, rewind=3)
    assert [rate(late, s, 5) for s in range(15)] == [rate(warm, s + 15, 5) for s in range(15)]
    assert len(fit_(net(), blobs(), late)) == 3


def test_adamw() -> None:
    model, theirs = net(), net()
    fit_(model, blobs(), Training(epochs=2, lr=0.01, optimizer="adamw", schedule="constant", decay_norms=True))
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=0.01, betas=(0.9, 0.999), weight_decay=5e-4)
    for _ in range(2):
        for inputs, targets in blobs():
            optimizer.zero_grad()
            nn.functional.cross_entropy(theirs(inputs), targets).backward()
            optimizer.step()
    assert same(model, theirs)


def test_inputs_may_be_nests() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = net()

        def forward(self, x: Tensor, *, add: Tensor) -> Tensor:
            return self.inner(x + add)

    data = [({"x": x, "add": torch.zeros_like(x)}, y) for x, y in blobs()]
    model, plain = Two(), net()
    fit_(model, data, Training(epochs=2, mixup=0.2))
    fit_(plain, blobs(), Training(epochs=2, mixup=0.2))
    assert same(model.inner, plain)


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = net()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.inner(x), x


class Lying(list[Any]):
    def __len__(self) -> int:
        return 4


SETTINGS = {
    "epochs": (0, "epochs=0\n  do: epochs is a whole number, at least 1"),
    "lr": (-1.0, "lr=-1.0"),
    "momentum": (1.0, "momentum=1.0"),
    "weight_decay": (-0.1, "weight_decay=-0.1"),
    "milestones": (
        (0.7, 0.5),
        r"milestones=\(0.7, 0.5\)\n  do: milestones is fractions of all steps in \(0, 1\), rising",
    ),
    "gamma": (0.0, "gamma=0.0"),
    "warmup": (11, "warmup=11"),
    "rewind": (11, "rewind=11"),
    "label_smoothing": (1.0, "label_smoothing=1.0"),
    "mixup": (-0.2, "mixup=-0.2"),
    "clip": (0.0, "clip=0.0"),
    "accumulate": (0, "accumulate=0"),
    "ema": (1.0, "ema=1.0"),
    "seed": (-1, "seed=-1"),
    "schedule": ("cosin", "unknown schedule 'cosin'; did you mean 'cosine'"),
    "optimizer": ("adam", "unknown optimizer 'adam'; did you mean 'adamw'"),
    "precision": ("fp16", "precision='fp16' needs a GPU: a CPU has no loss scaling\n  do: use 'bf16', or 'fp32'"),
    "keep": ("best", "nothing to choose by\n  do: pass evaluate="),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_out_of_range(name: str) -> None:
    value, match = SETTINGS[name]
    model = net()
    with pytest.raises(BadRequest, match=match):
        fit_(model, blobs(), Training(**{name: value}), run=Run(cpu=True))
    assert same(model, net())


def shared_out() -> DataLoader[Any]:
    data = TensorDataset(*images())
    return DataLoader(data, 8, sampler=DistributedSampler(data, num_replicas=2, rank=0))


BAD_DATA: dict[str, tuple[Any, str]] = {
    "iterator": (iter(blobs()), "read only once"),
    "generator": ((b for b in blobs()), "read only once"),
    "empty": ([], "nothing to train on: data has no batches"),
    "number": (3, "data is int: nothing to iterate over"),
    "no pairs": ([torch.zeros(2, 1, 6, 6)], r"needs batches \(inputs, targets\) .* but data yields Tensor"),
    "no tensor": ([(torch.zeros(2, 1, 6, 6), [0, 1])], r"data yields \['Tensor', 'list'\]"),
    "no examples": ([(torch.zeros(0, 1, 6, 6), torch.zeros(0).long())], "a batch without examples"),
    "shared out": (shared_out(), "DistributedSampler.*\n  do: pass a DataLoader with shuffle=True"),
    "ends early": (Lying(blobs()), "data says it has 4 batches, but epoch 1 ended after 3"),
    "target above": ([(torch.zeros(2, 1, 6, 6), torch.tensor([0, 3]))], "target 3 is out of range: .* 3 classes, numb"),
    "target below": ([(torch.zeros(2, 1, 6, 6), torch.tensor([0, -1]))], "target -1 is out of range"),
    "float targets": ([(torch.zeros(2, 1, 6, 6), torch.zeros(2))], r"targets are torch.float32 \[2\]"),
}


@pytest.mark.parametrize("name", BAD_DATA)
def test_bad_data(name: str) -> None:
    data, match = BAD_DATA[name]
    with pytest.raises(BadRequest, match=match):
        fit_(net(), data, Training(epochs=1))


@pytest.mark.parametrize("objective", [None, cross_entropy(0.1)])
@pytest.mark.parametrize(("target", "match"), [(3, "target 3 is out of range: .* 3 cl"), (-1, "target -1 is out of")])
def test_bad_targets_under_mixup(objective: Any, target: int, match: str) -> None:
    good, bad = torch.tensor([0, 1]), torch.tensor([0, target])
    inputs = torch.zeros(2, 1, 6, 6)
    for data in ([(inputs, bad)], [(inputs, good), (inputs, bad)]):
        with pytest.raises(BadRequest, match=match):
            fit_(net(), data, Training(epochs=1, mixup=0.4), objective=objective)


class Streamed(IterableDataset[Any]):
    """Examples without a length."""

    def __iter__(self) -> Any:
        return iter(zip(*images(50), strict=True))


def test_a_loader_without_a_length_is_counted() -> None:
    model, plain = net(), net()
    fit_(model, DataLoader(Streamed(), 8), Training(epochs=2, lr=0.05))
    fit_(plain, blobs(50, batch=8), Training(epochs=2, lr=0.05))
    assert same(model, plain)


@pytest.mark.parametrize("where", ["evaluate", "objective", "hook", "data"])
def test_an_error_of_the_users_leaves_modes_and_gradients(where: str) -> None:
    """The weights are those of the moment; without an error what there was of gradients is no part of training."""
    model, plain, steps = net(), net(), []
    model.train()
    model[1].eval()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    gradients = [p.grad for p in model.parameters()]
    modes = [module.training for module in model.modules()]

    def fail(here: str, value: Any) -> Any:
        if where == here and len(steps) >= 2:
            raise ZeroDivisionError(here)
        return value

    class Failing(list[Any]):
        def __iter__(self) -> Any:
            return (fail("data", pair) for pair in super().__iter__())

    def train() -> None:
        fit_(
            model,
            Failing(blobs()),
            Training(epochs=1, lr=0.05),
            evaluate=lambda m: fail("evaluate", 0.0),
            objective=lambda m, x, y: fail("objective", cross_entropy()(m, x, y)),
            hooks=Hooks(after_step=lambda m: steps.append(1), after_backward=lambda m: fail("hook", None)),
        )

    with pytest.raises(ZeroDivisionError, match=where):
        train()
    assert [module.training for module in model.modules()] == modes
    for p, gradient in zip(model.parameters(), gradients, strict=True):
        assert p.grad is gradient
        assert torch.equal(gradient, torch.ones_like(p))
    assert not torch.equal(model[0].weight, plain[0].weight)
    model.load_state_dict(plain.state_dict())
    where = "nowhere"
    train()
    fit_(plain, blobs(), Training(epochs=1, lr=0.05))
    assert same(model, plain)
    assert not any(module.training for module in model.modules())
    assert all(p.grad is None for p in model.parameters())


def test_bad_models_and_runs() -> None:
    with pytest.raises(BadRequest, match="the model returns tuple\n  do: pass objective="):
        fit_(Pair(), blobs())
    with pytest.raises(BadRequest, match=r"16 targets, but the model returns \[16, 8, 6, 6\]"):
        fit_(net()[:1], blobs())
    with pytest.raises(BadRequest, match="no parameter of the model learns"):
        fit_(net().requires_grad_(False), blobs())
    with pytest.raises(BadRequest, match="every 0 steps"):
        fit_(net(), blobs(), run=Run(every=0))


def test_a_loss_that_is_not_finite_stops_and_gives_back_the_last_good_weights(tmp_path: Path) -> None:
    kept: list[dict[str, Tensor]] = []
    data = Numbered()
    model = net()

    def spoil(m: nn.Module) -> None:
        if len(kept) == 2:
            m[0].weight.data[0, 0, 0, 0] = math.inf  # type: ignore[index, operator, union-attr]

    with pytest.raises(BadRequest) as caught:
        fit_(
            model,
            data,
            Training(epochs=4, lr=0.05),
            hooks=Hooks(after_step=spoil),
            evaluate=lambda m: float(kept.append(copy.deepcopy(m.state_dict())) or 0),
            run=Run(folder=tmp_path, every=1000),
        )
    text = str(caught.value)
    assert text.startswith("the loss is nan at step 16 of 28 (epoch 3, lr 0.0")
    assert "training stopped, and the model has its weights of step 14 again\n  do: lower lr, set clip=1.0" in text
    assert str(tmp_path) in text
    assert all(torch.equal(kept[-1][k], v) for k, v in model.state_dict().items())
    assert [path.name for path in tmp_path.iterdir()] == ["step-000014-epoch"]


def test_a_weight_that_is_not_finite_is_never_kept(tmp_path: Path) -> None:
    model = net()

    def spoil(m: nn.Module) -> None:
        m[0].weight.data[0, 0, 0, 0] = math.inf  # type: ignore[index, operator, union-attr]

    with pytest.raises(BadRequest, match=r"a weight is no longer finite after step 3 of 3.*of the start again"):
        fit_(model, blobs(), Training(epochs=1), hooks=Hooks(after_epoch=spoil), run=Run(folder=tmp_path))
    assert not list(tmp_path.iterdir())
    with pytest.raises(BadRequest, match=r"the loss is .* at step 2 of 9(.|\n)*lower lr"):
        fit_(model, blobs(), Training(lr=1e30, epochs=3))
    assert same(model, net())


def test_where_looking_is_dear_it_is_done_seldom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: what is told is the same in the end, only later."""
    often, seldom = net(), net()
    how = Training(epochs=2, lr=0.05)
    told: list[float] = []
    wanted = fit_(often, Numbered(), how)
    monkeypatch.setattr(loop, "looks_every", lambda device: 4)
    run = Run(progress=lambda done, total, facts: told.append(facts.get("loss", 0.0)))
    found = fit_(seldom, Numbered(), how, run=run)
    assert same(often, seldom)
    for a, b in zip(wanted, found, strict=True):
        assert (a.loss, a.train_accuracy) == pytest.approx((b.loss, b.train_accuracy), rel=1e-9)
    assert len(set(told)) == 1 + 5  # nothing yet, then at steps 4, 7 (an epoch ends), 8, 12 and 14
    poisoned = [(x * (math.nan if i == 1 else 1), y) for i, (x, y) in enumerate(blobs(80))]
    with pytest.raises(BadRequest, match="the loss is nan in steps 1 to 4 of 5 "):
        fit_(seldom, poisoned, Training(epochs=1))


def test_without_accelerate() -> None:
    code = """
import sys
sys.modules["accelerate"] = None
from training_cases import blobs, net
from secateur.recover import fit_
fit_(net(), blobs())
"""
    here = Path(__file__).parent
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, cwd=here)
    assert "MissingExtra: training needs Hugging Face Accelerate\n  do: pip install 'secateur[train]'" in done.stderr
    assert issubclass(MissingExtra, ImportError)


def test_tensorboard_gets_every_number(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = Run(folder=tmp_path / "run", log=tensorboard_log(tmp_path / "curves", prefix="finetune/"))
    history = fit_(net(), blobs(), Training(epochs=2), evaluate=lambda m: 0.5, run=run)
    read = EventAccumulator(str(tmp_path / "curves")).Reload()
    assert [(e.step, e.value) for e in read.Scalars("finetune/epoch/score")] == [(3, 0.5), (6, 0.5)]
    losses = [event.value for event in read.Scalars("finetune/epoch/loss")]
    assert losses == pytest.approx([epoch.loss for epoch in history], rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8])
@pytest.mark.parametrize("mixup", [0.0, 0.5])
def test_whole_numbers_of_any_type_are_classes(dtype: torch.dtype, mixup: float) -> None:
    same = [fitted([(x, y.to(kind)) for x, y in blobs()], mixup) for kind in (torch.int64, dtype)]
    assert torch.equal(*same)


def fitted(batches: list[tuple[Tensor, Tensor]], mixup: float) -> Tensor:
    torch.manual_seed(0)
    model = net()
    fit_(model, batches, Training(epochs=1, lr=0.1, mixup=mixup))
    return torch.cat([p.detach().flatten() for p in model.parameters()])
