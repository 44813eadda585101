"""Times are medians of runs that are taken in turns; nothing else of what runs meanwhile is changed."""

from __future__ import annotations

import gc
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from secateur.core import Timing
from secateur.errors import BadRequest, CannotCapture, SecateurError
from secateur.timing import summary, take_turns, time_in_engines, training_steps

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def net(width: int = 4) -> nn.Sequential:
    torch.manual_seed(width)
    return nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.Flatten())


def test_the_median_of_runs_in_turns() -> None:
    order: list[str] = []

    def run(name: str, seconds: list[float]) -> None:
        order.append(name)
        time.sleep(seconds.pop(0))

    slow, fast = [0.3, 0.03, 0.03, 0.3], [0.0, 0.0, 0.0, 0.0]
    rounds: list[tuple[int, int]] = []
    found = take_turns(
        {"slow": lambda: run("slow", slow), "fast": lambda: run("fast", fast)},
        repeats=3,
        warmup=1,
        progress=lambda done, total: rounds.append((done, total)),
    )
    assert order == ["slow", "fast"] * 4
    assert rounds == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert found["slow"].runs == found["fast"].runs == 3
    assert found["slow"].high > 150  # between 30 and 300
    assert found["slow"].least <= found["slow"].low <= found["slow"].ms < found["slow"].high


def test_quartiles_by_hand() -> None:
    assert summary([5.0]) == Timing(ms=5, low=5, high=5, least=5, runs=1)
    assert summary([4.0, 1.0, 3.0, 2.0, 9.0]) == Timing(ms=3, low=2, high=4, least=1, runs=5)
    assert summary([1.0, 2.0, 3.0, 4.0]) == Timing(ms=2.5, low=1.75, high=3.25, least=1, runs=4)


def test_threads_and_the_garbage_collector_are_put_back() -> None:
    seen: list[tuple[int, bool]] = []
    before = torch.get_num_threads()

    def fail() -> None:
        seen.append((torch.get_num_threads(), gc.isenabled()))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        take_turns({"": fail}, threads=before + 2)
    assert seen == [(before + 2, False)]
    assert (torch.get_num_threads(), gc.isenabled()) == (before, True)


@pytest.mark.parametrize(
    ("numbers", "match"),
    [
        ({"repeats": 0}, "repeats must be at least 1 and warmup at least 0, not 0 and 5"),
        ({"warmup": -1}, "repeats must be at least 1 and warmup at least 0, not 30 and -1"),
        ({"threads": 0}, "threads must be a whole number of at least 1, not 0"),
        ({"threads": 1.5}, "threads must be a whole number of at least 1, not 1.5"),
    ],
)
def test_numbers_out_of_range(numbers: dict[str, int], match: str) -> None:
    with pytest.raises(BadRequest, match=match):
        take_turns({}, **numbers)  # type: ignore[misc]


class Printed(nn.Module):
    """Runs in torch, and cannot be exported."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * float(x.sum())


def test_engines_and_networks_in_turns() -> None:
    names = ("torch", "channels_last")
    found = time_in_engines({"a": net(), "b": net(8)}, X, engines=names, repeats=2, warmup=0)
    assert {engine: list(own) for engine, own in found.items()} == {name: ["a", "b"] for name in names}
    assert all(timing.runs == 2 and timing.ms > 0 for own in found.values() for timing in own.values())


def test_an_engine_that_cannot_run_a_network(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    failures: dict[str, SecateurError] = {}
    options = {"engines": ("onnxruntime", "torch"), "repeats": 1, "warmup": 0}
    found = time_in_engines({"": Printed()}, X, **options, failures=failures)  # type: ignore[arg-type]
    assert list(found) == ["torch"]
    assert list(failures) == ["onnxruntime"]
    assert isinstance(failures["onnxruntime"], CannotCapture)
    with pytest.raises(CannotCapture, match="cannot be exported to ONNX"):
        time_in_engines({"": Printed()}, X, **options)  # type: ignore[arg-type]
    with pytest.raises(BadRequest, match="unknown engine 'onnx'"):
        time_in_engines({"": Printed()}, X, engines=("torch", "onnx"), failures=failures)


def test_a_training_step_goes_forward_and_backward() -> None:
    model = net().eval()
    calls: list[str] = []
    modes: list[bool] = []
    model[1].register_forward_hook(lambda *_: calls.append("forward"))
    model[1].register_forward_hook(lambda module, *_: modes.append(module.training))
    model[1].register_full_backward_hook(lambda *_: calls.append("backward"))
    with training_steps({"": model}, X) as steps:
        calls.clear()
        steps[""]()
        steps[""]()
    assert calls == ["forward", "backward"] * 2
    assert all(modes)
    assert not model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert float(model[1].running_mean.abs().sum()) == 0


@pytest.mark.parametrize(
    ("model", "inputs", "match"),
    [
        (nn.ReLU(), X, r"the network has nothing to train: .*\n  do: call requires_grad_\(True\)"),
        (
            nn.Sequential(nn.Flatten(), nn.BatchNorm1d(192)),
            X[:1],
            r"cannot take a training step on inputs of shape \[1, 3, 8, 8\]: Expected more than 1 value per channel",
        ),
    ],
    ids=["nothing to train", "one example"],
)
def test_steps_that_cannot_be_taken(model: nn.Module, inputs: torch.Tensor, match: str) -> None:
    with pytest.raises(BadRequest, match=match), training_steps({"": model}, inputs):
        pass
