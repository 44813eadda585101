"""``secateur measure``, ``engines`` and ``export``: what they print, and how they refuse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from secateur import cli_reporting
from secateur.cli_measuring import with_batch
from secateur.engines import ENGINES, installed
from secateur.engines import protocol as engine_protocol
from secateur.errors import BadArtifact, BadRequest
from secateur.timing import time_in_engines
from test_cli import TINY, run


@pytest.fixture(autouse=True)
def _wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TERM", "dumb")


@pytest.fixture
def small(tmp_path: Path) -> Path:
    run("plan", TINY, "--ratio", 0.5, "-o", tmp_path / "plan.json")
    run("apply", TINY, tmp_path / "plan.json", "-o", tmp_path / "small")
    return tmp_path / "small"


def test_measure_in_several_engines(small: Path) -> None:
    text = run(
        "measure",
        small,
        "--model",
        TINY,
        "--engine",
        "torch,channels_last",
        "--batch",
        3,
        "--train-step",
        "--threads",
        2,
    )
    lines = {line.split()[0]: line for line in text.splitlines() if " ms (" in line}
    assert list(lines) == ["torch", "channels_last", "training"]
    for line in lines.values():
        assert line.count(" ms (") == 2
        assert line.split(" ms (")[0].split()[-2] == "dense"
    assert "Median (quartiles) of 30 runs of 3 examples on 2 threads, all in turns" in text
    # 12 channels of 8 x 8 before and behind their ReLU; half of them
    assert f"{3 * 2 * 12 * 64 * 4 / 1000:.1f} kB" in text
    assert f"{3 * 2 * 6 * 64 * 4 / 1000:.2f} kB" in text
    assert "Activations at their peak, each freed after its last use; torch, run eagerly, held dense " in text


def test_measure_without_latency_and_memory() -> None:
    text = run("measure", TINY, "--no-latency", "--no-memory")
    assert " ms" not in text
    assert "ctivations" not in text


def test_an_engine_that_fails_is_told_and_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(models: Any, inputs: Any, *, engines: Any, failures: Any, **options: Any) -> Any:
        failures["channels_last"] = BadArtifact("it does not run")
        return time_in_engines(models, inputs, engines=["torch"], failures=failures, **options)

    monkeypatch.setattr(cli_reporting, "time_in_engines", failing)
    text = run("measure", TINY, "--engine", "channels_last", "--engine", "torch")
    assert "note: channels_last is left out: it does not run" in text
    assert "torch 2." in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--engine", "openvin"), "unknown engine 'openvin'; did you mean 'openvino'?"),
        (("--batch", "0"), "--batch must be at least 1, not 0"),
        (("--threads", "0"), "threads must be a whole number of at least 1, not 0"),
    ],
)
def test_measure_refuses(options: tuple[str, ...], message: str) -> None:
    assert message in run("measure", TINY, *options, code=2)


def test_an_engine_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    real = engine_protocol.find_spec
    monkeypatch.setattr(engine_protocol, "find_spec", lambda name: None if name == "openvino" else real(name))
    text = run("measure", TINY, "--engine", "openvino", code=2)
    assert "engine 'openvino' needs openvino\n  do: pip install 'secateur[engines]'" in text
    (line,) = [line for line in run("engines").splitlines() if "openvino" in line]
    assert "no" in line
    assert "pip install 'secateur[engines]'" in line


def test_engines_lists_all_of_them() -> None:
    text = run("engines")
    for name, engine in ENGINES.items():
        (line,) = [line for line in text.splitlines() if f"│ {name} " in line]
        assert (engine.version() in line and engine.about in line) if name in installed() else " no " in line


def test_inputs_of_another_batch() -> None:
    x, scale = torch.arange(6.0).view(2, 3), torch.tensor(2.0)
    made: Any = with_batch({"x": x, "scale": scale}, 5)
    assert list(made) == ["x", "scale"]
    assert torch.equal(made["x"], x[[0, 1, 0, 1, 0]])
    assert torch.equal(made["scale"], scale)
    (one,) = with_batch(x, 1)
    assert torch.equal(one, x[:1])
    with pytest.raises(BadRequest, match="--batch must be at least 1"):
        with_batch(x, 0)


@pytest.mark.slow
def test_export_with_an_opset(tmp_path: Path) -> None:
    assert "opset 20" in run("export", TINY, "-o", tmp_path / "net.onnx", "--opset", 20)
    assert "opset 13 cannot express this network" in run(
        "export", TINY, "-o", tmp_path / "old.onnx", "--opset", 13, code=2
    )
