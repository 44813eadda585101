"""Batch-norm recalibration against the definition, written as loops, and what it leaves alone."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import secateur as sc
from law import relative_error
from networks.common import randomise
from secateur.recover import recalibrate_
from secateur.zoo.torchvision_shim import import_torchvision

D = torch.float64


class Net(nn.Module):
    """Two batch norms, one of them called as a function of bare buffers, dropout, and a layer between."""

    def __init__(self, norm: Any = nn.BatchNorm2d) -> None:
        super().__init__()
        self.a, self.n, self.b = nn.Conv2d(3, 6, 3), norm(6), nn.Conv2d(6, 5, 3)
        self.register_buffer("mean", torch.zeros(5))
        self.register_buffer("var", torch.ones(5))
        self.drop, self.c = nn.Dropout(0.5), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(F.relu(self.n(self.a(x))))
        x = F.relu(F.batch_norm(self.b(x), self.mean, self.var, None, None, False))  # type: ignore[arg-type]
        return self.c(x.mean((2, 3)))


def net(norm: Any = nn.BatchNorm2d) -> Net:
    torch.manual_seed(0)
    model = Net(norm)
    randomise(model, 1)
    return model.double()


def data() -> list[Tensor]:
    g = torch.Generator().manual_seed(2)
    return [torch.randn(n, 3, 8, 8, dtype=D, generator=g) for n in (4, 7, 1, 5)]


def naive(model: Net, batches: list[Tensor]) -> dict[str, Tensor]:
    """The definition: normalise by the batch, remember what was normalised, take mean and unbiased variance of all."""
    first, second = [], []
    for x in batches:
        h = model.a(x)
        first.append(h)
        m, v = h.mean((0, 2, 3), keepdim=True), h.var((0, 2, 3), unbiased=False, keepdim=True)
        w, b = model.n.weight.view(1, -1, 1, 1), model.n.bias.view(1, -1, 1, 1)
        second.append(model.b(F.relu((h - m) / (v + model.n.eps).sqrt() * w + b)))
    rows = [torch.cat([t.movedim(1, -1).flatten(0, -2) for t in found]).detach() for found in (first, second)]
    return {
        "n.running_mean": rows[0].mean(0),
        "n.running_var": rows[0].var(0),
        "mean": rows[1].mean(0),
        "var": rows[1].var(0),
    }


@pytest.mark.parametrize("training", [False, True])
def test_statistics_are_those_of_the_definition(training: bool) -> None:
    model = net().train(training)
    model.n.eval()
    before, modes = copy.deepcopy(model.state_dict()), {n: m.training for n, m in model.named_modules()}
    done: list[int] = []
    step = recalibrate_(model, [(x, torch.zeros(len(x))) for x in data()], progress=done.append)
    want = naive(model, data())
    for name, tensor in model.state_dict().items():
        assert relative_error(tensor, want.get(name, before[name])) < 1e-12 or torch.equal(tensor, before[name])
        assert torch.equal(tensor, before[name]) is (name not in want)
    assert {n: m.training for n, m in model.named_modules()} == modes
    assert (step.name, set(step.changed), dict(step.skipped)) == ("batch norm", {"n", "mean"}, {})
    assert done == [1, 2, 3, 4]


def test_twice_is_once_and_one_batch_is_train_mode() -> None:
    model, x = net(), data()[1]
    recalibrate_(model, [x])
    first = copy.deepcopy(model.state_dict())
    recalibrate_(model, [x])
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, first[name], rtol=1e-12, atol=1e-14)
    torched = net()
    torched.n.momentum = 1.0
    torched.n.train()
    torched(x)
    assert relative_error(model.n.running_var, torched.n.running_var) < 1e-12


@pytest.mark.filterwarnings("ignore::secateur.zoo.torchvision_shim.TorchvisionMismatch")
def test_the_captured_graph_and_classes_of_others() -> None:
    import_torchvision()
    import timm

    torch.manual_seed(0)
    model = timm.create_model("resnet10t", num_classes=3).eval()
    randomise(model, 0)
    batches = [torch.randn(4, 3, 64, 64), torch.randn(3, 3, 64, 64)]
    step = recalibrate_(model, batches)
    norms = {n for n, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
    assert set(step.changed) == norms
    assert len(norms) > 10

    class Shuffled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.n, self.b = nn.Conv2d(3, 12, 1), nn.BatchNorm2d(12), nn.Conv2d(12, 12, 1)
            self.m, self.c = nn.BatchNorm2d(12), nn.Conv2d(12, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.n(self.a(x))
            first, second, third = x.chunk(3, 1)  # uneven after the cut, which only the rewritten graph can do
            x = F.softplus(torch.cat([third, first, second], 1))
            return self.c(F.softplus(self.m(self.b(x))))

    torch.manual_seed(0)
    shuffled = Shuffled().double().eval()
    randomise(shuffled, 0)
    x = data()
    plan = sc.plan(shuffled, x[0], ratios={"a": 0.5, "b": 0.4})
    small = sc.apply(shuffled, plan)
    assert sc.record(small).tier == "graph"  # type: ignore[union-attr]
    assert set(recalibrate_(small, x).changed) == {"n", "m"}
    h = small.get_submodule("n")
    kept = plan.kept()["a.weight"][0]
    rows = torch.cat(
        [F.conv2d(b, shuffled.a.weight[kept], shuffled.a.bias[kept]).movedim(1, 0).flatten(1) for b in x], 1
    )  # type: ignore[index]
    assert relative_error(h.running_mean, rows.mean(1)) < 1e-12
    assert relative_error(h.running_var, rows.var(1)) < 1e-12


def test_a_shared_batch_norm_takes_all_it_sees() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.n = nn.BatchNorm1d(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.n(self.n(x) * 2 + 1)

    model, x = Twice().double(), torch.randn(50, 3, dtype=D) * 3 + 2
    recalibrate_(model, [x])
    m, v = x.mean(0), x.var(0, unbiased=False)
    both = torch.cat([x, (x - m) / (v + 1e-5).sqrt() * 2 + 1])
    assert relative_error(model.n.running_mean, both.mean(0)) < 1e-12
    assert relative_error(model.n.running_var, both.var(0)) < 1e-12


def test_one_value_for_each_channel() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).double()
    x = torch.randn(6, 3, dtype=D)
    recalibrate_(model, list(x.split(1)))
    h = model[0](x)
    norm: Any = model[1]
    assert relative_error(norm.running_mean, h.mean(0)) < 1e-12
    assert relative_error(norm.running_var, h.var(0)) < 1e-12
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(sc.BadRequest, match="batch norm '1' saw a single value for each channel"):
        recalibrate_(model, [x[:1]])
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_what_keeps_no_statistics_is_said() -> None:
    model = net(lambda n: nn.BatchNorm2d(n, track_running_stats=False))
    step = recalibrate_(model, data())
    assert step.changed == ("mean",)
    assert step.skipped == {"n": "it keeps no running statistics"}
    assert recalibrate_(nn.Conv2d(3, 2, 1).double(), data()).changed == ()


def test_half_precision_sums_in_double() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3)).to(torch.bfloat16)
    x = (torch.randn(64, 3, 16, 16) + 300).to(torch.bfloat16)
    recalibrate_(model, [x])
    norm: Any = model[0]
    want = x.double().movedim(1, 0).flatten(1)
    assert torch.equal(norm.running_mean, want.mean(1).to(torch.bfloat16))
    assert torch.equal(norm.running_var, want.var(1).to(torch.bfloat16))


class Breaks:
    def __init__(self, error: BaseException) -> None:
        self.error = error

    def __iter__(self) -> Iterator[Tensor]:
        yield data()[0]
        raise self.error


@pytest.mark.parametrize(
    ("bad", "error", "text"),
    [
        ([], sc.BadRequest, "data has no batches"),
        (iter(data()), sc.BadRequest, "read only once"),
        (5, sc.BadRequest, "not int"),
        ([torch.full((4, 3, 8, 8), float("nan"), dtype=D)], sc.BadRequest, "batch norm 'n' are not finite"),
        (Breaks(KeyboardInterrupt()), KeyboardInterrupt, None),
        (Breaks(OSError("disk")), OSError, "disk"),
    ],
)
def test_nothing_changes_when_it_fails(bad: Any, error: type[BaseException], text: str | None) -> None:
    model = net().train()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=text):
        recalibrate_(model, bad)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert all(m.training for m in model.modules())
