"""ONNX files: equal to torch at any batch, whole or not there."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from example_plans import X, names, no_file_beyond, pruned, random_plan, trained
from secateur import onnx_file
from secateur.errors import BadArtifact, BadRequest, CannotCapture, MissingExtra
from secateur.onnx_file import export_onnx
from secateur.surgery import apply, record

onnxruntime = pytest.importorskip("onnxruntime")


def run(path: Path, **inputs: torch.Tensor) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return list(session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()}))


@pytest.fixture(scope="module")
def small() -> nn.Module:
    return pruned()[0].eval()


@pytest.fixture(scope="module")
def program(small: nn.Module) -> Any:
    """Exporting costs seconds whatever the network: the tests of what comes after share one."""
    with torch.no_grad():
        return onnx_file._program(onnx_file._Flat(small, (((onnx_file.flatten(X)[1]),), {})), [X], 18, True)


@pytest.fixture
def at_hand(program: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_file, "_program", lambda *_: program)


def test_a_pruned_network_at_any_batch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import onnx

    small = pruned()[0].train()
    small[2].eval()
    report = export_onnx(small, tmp_path / "small.onnx", X[:1])
    assert capsys.readouterr().out == ""
    assert names(tmp_path) == ["small.onnx"]
    assert (report.path, report.bytes) == (tmp_path / "small.onnx", (tmp_path / "small.onnx").stat().st_size)
    assert report.max_difference is not None
    assert report.max_difference < 1e-5
    assert report.opset >= 18
    assert [module.training for module in small] == [True, True, False, True, True, True]
    small.eval()
    for batch in (1, 2, 5):
        x = torch.randn(batch, 3, 2, 2)
        (found,) = run(report.path, input=x)
        np.testing.assert_allclose(found, small(x).detach().numpy(), rtol=1e-5, atol=1e-5)
    graph = onnx.load(report.path).graph
    assert {"3.weight", "5.weight", "5.bias"} <= {tensor.name for tensor in graph.initializer}
    assert graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    assert graph.output[0].type.tensor_type.shape.dim[0].dim_param == "batch"


def test_without_check(tmp_path: Path, small: nn.Module, at_hand: None) -> None:
    report = export_onnx(small, tmp_path / "small.onnx", X, check=False)
    assert (report.max_difference, report.opset) == (None, 18)


@dataclasses.dataclass
class Out:
    logits: torch.Tensor
    features: list[torch.Tensor]


class Many(nn.Module):
    """Two inputs, one of them integer, and outputs in a nest of the caller's choice."""

    def __init__(self, nest: Any) -> None:
        super().__init__()
        self.conv, self.embed, self.nest = nn.Conv2d(3, 4, 1), nn.Embedding(7, 4), nest

    def forward(self, image: torch.Tensor, word: torch.Tensor) -> Any:
        features = self.conv(image) + self.embed(word)[:, :, None, None]
        return self.nest(features.mean((2, 3)), features)


NESTS: dict[str, Any] = {
    "dict": lambda y, f: {"logits": y, "image": f},
    "tuple": lambda y, f: (y, (f,)),
    "dataclass": lambda y, f: Out(y, [f]),
}


@pytest.mark.parametrize("nest", ["dict", *(pytest.param(n, marks=pytest.mark.slow) for n in ("tuple", "dataclass"))])
def test_nests_of_inputs_and_outputs(tmp_path: Path, nest: str) -> None:
    model = Many(NESTS[nest]).eval()
    word = torch.tensor([3, 6])
    report = export_onnx(model, tmp_path / "many.onnx", {"image": X, "word": word})
    assert report.max_difference is not None
    assert report.max_difference < 1e-5
    x, words = torch.randn(4, 3, 5, 5)[:, :, :2, :2].contiguous(), torch.tensor([0, 1, 2, 6])
    logits, features = run(report.path, image=x, word=words)
    wanted = Many(lambda y, f: (y, f))
    wanted.load_state_dict(model.state_dict())
    for found, tensor in zip((logits, features), wanted(x, words), strict=True):
        np.testing.assert_allclose(found, tensor.detach().numpy(), rtol=1e-4, atol=1e-6)
    session = onnxruntime.InferenceSession(str(report.path))
    expected = ["logits", "image_out"] if nest == "dict" else ["output_0", "output_1"]
    assert [slot.name for slot in session.get_outputs()] == expected


class Shuffled(nn.Module):
    """A channel shuffle by written sizes: pruned, it comes back as a graph."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.a(x)
        return self.b(x.reshape(x.shape[0], 2, 4, x.shape[2], x.shape[3]).transpose(1, 2).flatten(1, 2))


def test_a_network_that_is_a_graph(tmp_path: Path) -> None:
    model = Shuffled().eval()
    small = apply(model, random_plan(model, X))
    assert record(small).tier == "graph"  # type: ignore[union-attr]
    report = export_onnx(small, tmp_path / "graph.onnx", X)
    assert report.max_difference is not None
    assert report.max_difference < 1e-5


@pytest.mark.slow
def test_half_precision_is_exported_in_float32(tmp_path: Path) -> None:
    model = trained().bfloat16()
    report = export_onnx(model, tmp_path / "half.onnx", X.bfloat16())
    assert model[0].weight.dtype == torch.bfloat16
    assert run(report.path, input=X)[0].dtype == np.float32


# --- failures ----------------------------------------------------------------------------------------------------


def test_a_difference_to_torch_is_an_error_and_an_old_file_stays(
    tmp_path: Path, small: nn.Module, at_hand: None
) -> None:
    (tmp_path / "small.onnx").write_text("old")
    other = copy.deepcopy(small)
    with torch.no_grad():
        other[5].bias.add_(0.01 * other(X).abs().max())
    with pytest.raises(BadArtifact, match=r"differs from torch by .* \(relative\), more than 1\.0e-04"):
        export_onnx(other, tmp_path / "small.onnx", X)
    assert names(tmp_path) == ["small.onnx"]
    assert (tmp_path / "small.onnx").read_text() == "old"


def test_nan_and_shape_are_differences() -> None:
    one, nan = np.ones((2, 2)), np.full((2, 2), np.nan)
    assert onnx_file.difference([one, nan], [one, nan]) == 0
    assert onnx_file.difference([nan], [one]) == np.inf
    assert onnx_file.difference([one], [nan]) == np.inf
    assert onnx_file.difference([one], [one[:1]]) == np.inf
    assert onnx_file.difference([one], [one, one]) == np.inf
    assert onnx_file.difference([one * 3], [one * 2]) == 0.5


class FixedBatch(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.reshape(2, 12) if x.shape[0] == 2 else x.flatten(1)


def test_a_network_of_one_batch_size_only(tmp_path: Path) -> None:
    with pytest.raises(
        CannotCapture, match=r"cannot be exported to ONNX with a free batch: .*\n  do: see that it runs"
    ):
        export_onnx(FixedBatch(), tmp_path / "fixed.onnx", X)
    assert names(tmp_path) == []


def test_what_onnx_runtime_cannot_run(tmp_path: Path, at_hand: None) -> None:
    wide = nn.Sequential(nn.Conv2d(4, 5, 1))
    with pytest.raises(BadArtifact, match=r"ONNX Runtime cannot run the exported network on the example inputs: "):
        export_onnx(wide, tmp_path / "wide.onnx", torch.randn(2, 4, 2, 2))
    assert names(tmp_path) == []


def test_missing_packages(tmp_path: Path, small: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(onnx_file, "find_spec", lambda name: None if name == "onnxruntime" else real(name))
    with pytest.raises(MissingExtra, match=r"needs onnxruntime\n  do: pip install 'secateur\[export\]'"):
        export_onnx(small, tmp_path / "small.onnx", X)


def test_where_it_cannot_be_written(
    tmp_path: Path, small: nn.Module, at_hand: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(BadArtifact, match=r"is a folder\n  do: name a file"):
        export_onnx(small, tmp_path, X)
    with pytest.raises(BadArtifact, match=r"none/small\.onnx cannot be written: its folder does not exist"):
        export_onnx(small, tmp_path / "none" / "small.onnx", X)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(BadArtifact, match=r"small\.onnx cannot be written: No space left on device"):
        export_onnx(small, tmp_path / "small.onnx", X, check=False)
    monkeypatch.undo()
    assert names(tmp_path) == []
    with no_file_beyond(500), pytest.raises(BadArtifact, match=r"small\.onnx cannot be written: File too large"):
        export_onnx(small, tmp_path / "small.onnx", X)
    assert names(tmp_path) == []


def test_more_than_a_file_holds(tmp_path: Path) -> None:
    with torch.device("meta"):
        huge = nn.Linear(2**15, 2**15)
    huge.weight = nn.Parameter(torch.zeros(1).expand(2**15, 2**15))
    huge.bias = nn.Parameter(torch.zeros(2**15))
    with pytest.raises(BadRequest, match=r"the network has 4\.0 GiB of tensors; one ONNX file holds less than 2 GiB"):
        export_onnx(huge, tmp_path / "huge.onnx", torch.zeros(1, 2**15))


def test_an_opset_that_cannot_express_the_network(tmp_path: Path) -> None:
    """The exporter would keep a newer one, and only warn."""
    (tmp_path / "net.onnx").write_text("old")
    hard = nn.Sequential(nn.Conv2d(3, 2, 1), nn.Hardswish())
    with pytest.raises(
        BadRequest,
        match=r"opset 13 cannot express this network: HardSwish is there since opset 14; what the exporter made is of "
        r"opset 18\n  do: leave opset out, or ask for a higher one\. No file was written",
    ):
        export_onnx(hard, tmp_path / "net.onnx", X, opset=13)
    assert names(tmp_path) == ["net.onnx"]
    assert (tmp_path / "net.onnx").read_text() == "old"


@pytest.mark.slow
def test_opsets_that_the_exporter_converts_to_and_cannot(tmp_path: Path) -> None:
    hard = nn.Sequential(nn.Conv2d(3, 2, 1), nn.Hardswish())
    assert export_onnx(hard, tmp_path / "net.onnx", X, opset=16).opset == 16
    with pytest.raises(BadRequest, match=r"opset 17 cannot express this network: newer ones changed Pad; what"):
        export_onnx(nn.ReflectionPad2d(1), tmp_path / "net.onnx", X, opset=17)


@pytest.mark.parametrize("opset", [0, -1, 1000])
def test_an_opset_that_does_not_exist(tmp_path: Path, small: nn.Module, opset: int) -> None:
    with pytest.raises(
        BadRequest, match=rf"opset {opset} does not exist: onnx [\d.]+ knows 1 to \d+\n  do: leave opset"
    ):
        export_onnx(small, tmp_path / "small.onnx", X, opset=opset)
    assert names(tmp_path) == []


def test_a_fixed_batch(tmp_path: Path, small: nn.Module) -> None:
    written = export_onnx(small, tmp_path / "fixed.onnx", X, free_batch=False)
    assert written.max_difference is not None
    session = onnxruntime.InferenceSession(str(written.path), providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].shape == list(X.shape)
