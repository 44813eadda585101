"""Int8 beside float32: ``secateur quantise``, and recipes that quantise."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner

import secateur as sc
from example_plans import names
from secateur import cli_quantising
from secateur.cli import app
from secateur.errors import BadRequest
from secateur.quantisation import file_accuracy
from secateur.recipes import Outcome, make_recipe, run_recipe
from secateur.zoo.data import DataSettings, open_data
from tiny_runs import recipe, small

pytest.importorskip("onnxruntime")
DATA = ("--data", "digits", "--set", "data.size=8", "--set", "data.batch=64")
X = torch.zeros(1, 1, 8, 8)


@pytest.fixture(autouse=True, scope="module")
def _wide_terminal() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "200")
        patch.setenv("TERM", "dumb")
        yield


def command(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["quantise", *(str(argument) for argument in arguments)])
    assert result.exit_code == code, result.output + repr(result.exception)
    return result.output


def rows_of(told: str) -> list[str]:
    """The lines of tables that begin with the networks' names."""
    lines = [line.strip(" │") for line in told.splitlines()]
    return [line for line in lines if line.startswith(("dense", "pruned"))]


def go(values: dict[str, Any], folder: Path) -> Outcome:
    return run_recipe(make_recipe(values), folder, allow_import=True, cpu=True)


@pytest.fixture(scope="module")
def dense() -> nn.Module:
    torch.manual_seed(0)
    images = open_data(DataSettings("digits", size=8, batch=64))
    model = small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for epoch in range(3):
        for inputs, targets in images.train.epoch(epoch):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs), targets).backward()
            optimizer.step()
    return model.eval()


@pytest.fixture(scope="module")
def saved(dense: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the pruned network, and the dense one's weights beside it."""
    folder = tmp_path_factory.mktemp("saved")
    save_file(dense.state_dict(), folder / "dense.safetensors")
    plan = sc.plan(dense, X, criterion="l1", budget=sc.Budget(keep=0.6))
    sc.save(folder / "small", sc.apply(dense, plan), plan)
    return folder


def test_dense_and_pruned_in_float_and_int8(saved: Path, tmp_path: Path) -> None:
    path = tmp_path / "small.int8.onnx"
    told = command(
        saved / "small", "--model", "tiny_runs:small", "--dense", saved / "dense.safetensors", *DATA, "--batches", 4,
        "--engine", "onnxruntime", "-o", path,
    )  # fmt: skip
    assert [row.split()[0] for row in rows_of(told)[:4]] == ["dense", "pruned", "dense,", "pruned,"]
    assert names(tmp_path) == ["small.int8.onnx"]
    assert f"{path}: " in told
    assert "3 layers in int8" in told
    assert "calibrated on 256 training images: " in told
    images = open_data(DataSettings("digits", size=8, batch=64))
    right = file_accuracy(path, X, images.test)
    assert f"{100 * right:.2f} %" in told
    assert right > 0.5


@pytest.mark.slow
def test_what_is_not_known_of_a_folder(saved: Path, tmp_path: Path) -> None:
    told = command(
        saved / "small", "--model", "tiny_runs:small", *DATA, "--batches", 1, "--test-batches", 1, "--no-latency",
        "--exclude", "8", "--seven-bits", "-o", tmp_path / "small.onnx",
    )  # fmt: skip
    assert [("–" in row) for row in rows_of(told)] == [True, False, True, False]  # the dense weights are not there
    assert "in float32: 8" in told
    assert "weights have seven bits" in told


@pytest.mark.slow
def test_one_network(saved: Path, tmp_path: Path) -> None:
    told = command(
        "tiny_runs:small", "--weights", saved / "dense.safetensors", *DATA, "--batches", 1, "--test-batches", 0,
        "--no-latency", "--eight-bits", "-o", tmp_path / "dense.onnx",
    )  # fmt: skip
    assert "accuracy" not in told
    assert "tiny_runs:small, int8" in told
    assert "seven bits" not in told


@pytest.mark.parametrize(
    ("line", "text"),
    [
        (("--dense", "x.pth"), "--dense is for a saved folder, and 'tiny_runs:small' is none"),
        (("--method", "max"), "unknown method 'max'; did you mean 'minmax'?"),
        (("--engine", "onxruntime"), "unknown engine 'onxruntime'; did you mean 'onnxruntime'?"),
        (("--batches", "0"), "batches must be a whole number of at least 1, not 0"),
    ],
)
def test_refusals(line: tuple[str, ...], text: str, tmp_path: Path) -> None:
    assert text in command("tiny_runs:small", *DATA, *line, "-o", tmp_path / "x.onnx", code=2)
    assert names(tmp_path) == []


def test_engines_are_asked_for_in_any_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli_quantising, "installed", lambda: ["torch", "onnxruntime"])
    assert cli_quantising._engines(()) == ["onnxruntime"]
    assert cli_quantising._engines(("torch,onnxruntime", "torch")) == ["torch", "onnxruntime"]


# --- recipes -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    values = recipe(
        compensate=None, quantise={"batches": 2, "exclude": ["8"]}, measure={"latency": True, "engine": "onnxruntime"}
    )
    return go(values, tmp_path_factory.mktemp("run") / "run")


def test_rows_in_int8_stand_beside_those_in_float(done: Outcome) -> None:
    assert [row.name for row in done.rows] == ["dense", "pruned", "fine-tuned", "dense, int8", "fine-tuned, int8"]
    rows = {row.name: row for row in done.rows}
    for name in ("dense", "fine-tuned"):
        exact, rounded = rows[name], rows[f"{name}, int8"]
        assert (exact.macs, exact.params) == (rounded.macs, rounded.params)
        assert exact.accuracy == pytest.approx(rounded.accuracy, abs=0.05)
        assert set(rounded.latencies_ms) == {"onnxruntime"}
        assert rounded.memory is None
    path = done.folder / "model.int8.onnx"
    assert rows["fine-tuned, int8"].size == path.stat().st_size
    images = open_data(DataSettings("digits", size=8, batch=64, limit=512))
    assert rows["fine-tuned, int8"].accuracy == file_accuracy(path, X, images.test)


def test_what_a_run_keeps_of_it(done: Outcome) -> None:
    phases = {entry["phase"]: entry["facts"] for entry in json.loads((done.folder / "run.json").read_text())["done"]}
    assert [*phases][-3:] == ["quantise", "measure", "save"]
    facts = phases["quantise"]["networks"]
    assert list(facts) == ["dense", "fine-tuned"]
    assert facts["dense"]["file"] == "phases/dense.int8.onnx"
    assert (done.folder / "phases" / "dense.int8.onnx").is_file()
    assert facts["fine-tuned"]["float_layers"] == ["8"]
    assert facts["fine-tuned"]["images"] == 128
    log = (done.folder / "log.txt").read_text()
    assert "quantising: dense: " in log
    assert "of 128 images as in float32" in log


def test_a_module_that_is_not_there_is_told_at_once(tmp_path: Path) -> None:
    values = recipe(quantise={"exclude": ["9"]})
    with pytest.raises(BadRequest, match=r"quantise\.exclude: no module of the network is called '9'"):
        go(values, tmp_path / "run")
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("section", "text"),
    [
        ({"batchez": 2}, "quantise: unknown key 'batchez'; did you mean 'batches'?"),
        ({"batches": 0}, "quantise.batches: should be greater than or equal to 1, not 0"),
        ({"method": "max"}, "quantise.method: 'max' is none of minmax, percentile, entropy; did you mean 'minmax'?"),
    ],
)
def test_mistakes_in_the_section(section: dict[str, Any], text: str) -> None:
    with pytest.raises(BadRequest) as caught:
        make_recipe(recipe(quantise=section))
    assert text in str(caught.value)
