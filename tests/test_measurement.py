"""Accuracy and latency: what they give, what they leave alone, and what they refuse."""

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from secateur.artifact import read_measurement, save
from secateur.core import Measurement
from secateur.errors import BadRequest
from secateur.graph import trace
from secateur.measurement import accuracy, measure
from secateur.pipeline import plan
from secateur.surgery import apply


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 3),
    )


def blobs(n: int = 48) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Three kinds of images that differ in brightness: easy to learn, impossible to get right by chance."""
    generator = torch.Generator().manual_seed(1)
    targets = torch.arange(n) % 3
    images = torch.randn(n, 1, 6, 6, generator=generator) * 0.1 + targets[:, None, None, None] - 1
    return [(images[i : i + 16], targets[i : i + 16]) for i in range(0, n, 16)]


class Constant(nn.Module):
    def __init__(self, scores: torch.Tensor) -> None:
        super().__init__()
        self.scores = nn.Parameter(scores)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.scores.expand(len(x), -1)


def test_measure_counts_by_hand() -> None:
    found = measure(net(), torch.randn(2, 1, 6, 6))
    assert found.params == 4 * 9 + 4 + 8 + 12 + 3
    assert found.macs == 4 * 9 * 36 + 12  # of one example
    assert (found.accuracy, found.latency_ms, found.engine, found.device) == (None, None, "", "cpu")


def test_measure_takes_a_graph() -> None:
    inputs = torch.randn(2, 1, 6, 6)
    found = measure(trace(net(), inputs), latency=True, repeats=2)
    assert found.macs == measure(net(), inputs).macs
    assert found.latency_ms is not None
    assert 0 < found.latency_ms < 1000
    assert found.engine == "torch"


class Caching(nn.Module):
    """Makes a table in its first forward, which every other one multiplies with."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = net()
        self.table: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.table is None:
            self.table = torch.linspace(1, 2, 3)
        return self.inner(x) * self.table


def test_what_was_evaluated_can_be_trained() -> None:
    model = Caching()
    accuracy(model, blobs())
    model(blobs()[0][0]).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_accuracy_is_the_fraction_of_right_ones() -> None:
    x = torch.zeros(5, 1)
    data = [(x, torch.tensor([1, 1, 0, 1, 2])), (x[:3], torch.tensor([1, 0, 0]))]
    assert accuracy(Constant(torch.tensor([0.0, 1.0, 0.5])), data) == 4 / 8


def test_measuring_changes_nothing() -> None:
    model = net().train()
    model[1].eval()
    before = copy.deepcopy(model.state_dict())
    threads = torch.get_num_threads()
    measure(model, torch.randn(4, 1, 6, 6), blobs(), latency=True, threads=threads + 1, repeats=2)
    assert [m.training for m in model] == [True, False, True, True, True, True]
    assert model.training
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert torch.get_num_threads() == threads


def test_accuracy_runs_in_eval_mode() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.9999), nn.Identity()).train()
    one_hot = torch.eye(3).repeat(20, 1)
    assert accuracy(model, [(one_hot, torch.arange(60) % 3)]) == 1.0


@pytest.mark.parametrize(
    ("model", "data", "match"),
    [
        (net(), [], "no batches"),
        (net(), [torch.randn(2, 1, 6, 6)], r"batches \(inputs, targets\), but data yields Tensor"),
        (nn.Flatten(0), [(torch.zeros(2, 3), torch.zeros(2))], r"class scores \[B, K\] for 2 targets.*returns \[6\]"),
    ],
)
def test_accuracy_refuses(model: nn.Module, data: list[object], match: str) -> None:
    with pytest.raises(BadRequest, match=match):
        accuracy(model, data)


def test_unknown_engine() -> None:
    with pytest.raises(BadRequest, match="unknown engine 'onnx'; did you mean 'onnxruntime'"):
        measure(net(), torch.randn(1, 1, 6, 6), latency=True, engine="onnx")


def test_measure_says_what_was_timed() -> None:
    found = measure(net(), torch.randn(5, 1, 6, 6), latency=True, engine="channels_last", threads=2, repeats=3)
    assert found.engine == "channels_last"
    assert found.latency_ms is not None
    details = dict(found.details)
    low, high = details.pop("quartiles_ms")  # type: ignore[misc]
    assert low <= found.latency_ms <= high
    assert details.pop("parity") < 1e-5  # type: ignore[operator]
    # convolution and batch norm, or batch norm and relu: two maps at once
    assert found.memory == 2 * 5 * 4 * 36 * 4
    assert details == {
        "threads": 2,
        "repeats": 3,
        "batch": 5,
        "engine_version": torch.__version__,
        "memory_held": 2 * 5 * 4 * 36 * 4,
    }
    assert found.training_ms is None


def test_measuring_a_training_step_leaves_the_network_alone() -> None:
    model = nn.Sequential(net(), nn.Dropout(0.5)).eval()
    model[0][0].weight.grad = torch.ones_like(model[0][0].weight)
    inputs = torch.randn(4, 1, 6, 6)
    before, generator = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    found = measure(model, inputs, training=True, repeats=2)
    assert torch.equal(torch.get_rng_state(), generator)
    assert found.training_ms is not None
    assert found.training_ms > 0
    assert (found.latency_ms, found.memory, found.engine) == (None, None, "")
    assert found.details["batch"] == 4
    assert not model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.equal(model[0][0].weight.grad, torch.ones_like(model[0][0].weight))
    assert model[0][5].weight.grad is None


def test_what_was_measured_is_kept_with_the_network(tmp_path: Path) -> None:
    model, x = net(), torch.randn(2, 1, 6, 6)
    made = plan(model, x, ratios=0.5)
    small = apply(model, made)
    found = measure(small, x, latency=True, repeats=2, training=True)
    folder = save(tmp_path / "small", small, made, measurement=found)
    assert read_measurement(folder) == found
    old = {"params": 1, "macs": 2, "accuracy": None, "latency_ms": 3.5, "engine": "torch", "device": "cpu"}
    (folder / "measure.json").write_text(json.dumps({**old, "details": {"threads": 1}}))
    assert read_measurement(folder) == Measurement(1, 2, latency_ms=3.5, engine="torch", details={"threads": 1})
