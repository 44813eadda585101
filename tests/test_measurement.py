"""Accuracy and latency: what they give, what they leave alone, and what they refuse."""

import copy
import time

import pytest
import torch
from torch import nn

from secateur.errors import BadRequest
from secateur.graph import trace
from secateur.measurement import accuracy, inference_runs, interleaved_latency_ms, measure


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


def test_latency_is_the_median_taken_in_turns() -> None:
    order: list[str] = []

    def run(name: str, seconds: list[float]) -> None:
        order.append(name)
        time.sleep(seconds.pop(0))

    slow, fast = [0.3, 0.03, 0.03, 0.3], [0.0, 0.0, 0.0, 0.0]
    rounds: list[tuple[int, int]] = []
    found = interleaved_latency_ms(
        {"slow": lambda: run("slow", slow), "fast": lambda: run("fast", fast)},
        repeats=3,
        warmup=1,
        progress=lambda done, total: rounds.append((done, total)),
    )
    assert order == ["slow", "fast"] * 4
    assert 25 < found["slow"] < 150
    assert found["fast"] < 20
    assert rounds == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_onnxruntime_runs_the_same_network() -> None:
    model, inputs = net().eval(), torch.randn(2, 1, 6, 6)
    with inference_runs({"net": model}, inputs, engine="onnxruntime") as runs:
        out = runs["net"]()
    assert isinstance(out, list)
    torch.testing.assert_close(torch.from_numpy(out[0]), model(inputs).detach(), rtol=1e-5, atol=1e-5)
