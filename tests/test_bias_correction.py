"""Biases that take back what rounded weights do to the means of channels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from secateur.onnx_file import export_onnx
from secateur.quantisation import Settings, int8, quantise_file, read_calibration
from secateur.quantisation.correction import corrected, dequantised, with_biases

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

SEVEN = Settings(reduce_range=True)


def photographs(*sizes: int) -> list[torch.Tensor]:
    """Bright images: much light, little contrast, each as bright as it likes."""
    generator = torch.Generator().manual_seed(1)
    return [
        torch.rand(size, 1, 1, 1, generator=generator) + 4 + 0.1 * torch.rand(size, 3, 9, 9, generator=generator)
        for size in sizes
    ]


class Edges(nn.Module):
    """Depthwise filters whose weights are large and nearly cancel, as trained networks have them, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.edges = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 16, 3, groups=16, bias=False)
        self.head = nn.Linear(16, 5)
        with torch.no_grad():
            self.stem.weight.abs_()
            self.edges.weight -= self.edges.weight.mean((2, 3), keepdim=True)
            self.edges.weight *= 8

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.edges(torch.relu(self.stem(x)))).mean((2, 3)))


@pytest.fixture(scope="module")
def edges(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("float") / "float.onnx"
    export_onnx(Edges().eval(), path, photographs(2)[0], check=False)
    return path


def test_filters_whose_weights_cancel(edges: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calibration = read_calibration(photographs(40, 7), photographs(2)[0], 2)
    report = quantise_file(edges, tmp_path / "int8.onnx", calibration, SEVEN)
    monkeypatch.setattr(int8, "corrected", lambda model, *_: model)
    plain = quantise_file(edges, tmp_path / "plain.onnx", calibration, SEVEN)
    assert plain.difference > 0.05
    assert report.difference < plain.difference / 3
    assert report.layers == plain.layers == ("stem", "edges", "head")
    biases = {t.name: t for t in onnx.load(report.path).graph.initializer if t.data_type == TensorProto.INT32}
    assert sum(tensor.dims == [16] for tensor in biases.values()) >= 2  # the filters had none


def graph_of(kind: str) -> tuple[Any, dict[str, np.ndarray]]:
    """One layer of two inputs' channels in four groups of what ONNX can say, and its tensors."""
    rng = np.random.default_rng(0)
    shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...] | None, dict[str, Any]]] = {
        "Conv": ((6, 2, 3, 3), (6,), {"group": 2, "strides": [2, 2], "pads": [1, 0, 1, 0]}),
        "Conv without bias": ((6, 4, 1, 1), None, {}),
        "ConvTranspose": ((4, 3, 3, 3), (6,), {"group": 2, "strides": [2, 2]}),
        "Gemm": ((4, 6), (1, 6), {"alpha": 0.5, "beta": 2.0}),
        "Gemm of one number": ((6, 4), (), {"transB": 1}),
    }
    weight, bias, attributes = shapes[kind]
    tensors = {"w": rng.normal(size=weight).astype(np.float32)}
    if bias is not None:
        tensors["b"] = np.array(rng.normal(size=bias), dtype=np.float32)
    shape = ["n", 4] if len(weight) == 2 else ["n", 4, 8, 8]
    graph = helper.make_graph(
        [helper.make_node(kind.split()[0], ["x", *tensors], ["y"], name="layer", **attributes)],
        "one",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value, name) for name, value in tensors.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    return onnx.shape_inference.infer_shapes(model), tensors


def evaluate(model: Any, x: np.ndarray) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(["y"], {"x": x})[0], dtype=np.float64)


@pytest.mark.parametrize("kind", ["Conv", "Conv without bias", "ConvTranspose", "Gemm", "Gemm of one number"])
def test_the_means_are_those_of_float(kind: str, tmp_path: Path) -> None:
    model, tensors = graph_of(kind)
    generator = torch.Generator().manual_seed(0)
    size = (4,) if kind.startswith("Gemm") else (4, 8, 8)
    data = [torch.rand(count, *size, generator=generator) for count in (5, 2)]
    calibration = read_calibration(data, data[0], 2)
    biased = with_biases(model, ())
    np.testing.assert_allclose(
        evaluate(biased, data[0].numpy()), evaluate(model, data[0].numpy()), rtol=1e-6, atol=1e-6
    )
    rounded = int8._quantised(biased, {"x": (0, 1), "y": (-9, 9)}, (), SEVEN, True)
    (weight,) = dequantised(rounded).values()
    assert 0 < np.abs(weight - tensors["w"]).max() < 0.05
    repaired = corrected(biased, rounded, calibration, tmp_path, 1)
    for tensor in repaired.graph.initializer:
        if tensor.name == "w":
            tensor.CopyFrom(numpy_helper.from_array(weight, "w"))
    x = torch.cat(data).numpy()
    wanted, found = evaluate(model, x), evaluate(repaired, x)
    others = tuple(axis for axis in range(wanted.ndim) if axis != 1)
    assert np.abs(found - wanted).max() > 1e-3  # the weights are others
    np.testing.assert_allclose(found.mean(others), wanted.mean(others), atol=2e-6)
    assert [tensor.name for tensor in model.graph.initializer] == [*tensors]


def test_a_layer_that_is_used_twice(tmp_path: Path) -> None:
    model, _ = graph_of("Conv without bias")
    model.graph.node.add().CopyFrom(helper.make_node("Conv", ["z", "w"], ["v"], name="again"))
    model.graph.node.insert(0, helper.make_node("Neg", ["x"], ["z"], name="other"))
    model.graph.output.add().CopyFrom(helper.make_tensor_value_info("v", TensorProto.FLOAT, None))
    data = [torch.rand(5, 4, 8, 8, generator=torch.Generator().manual_seed(0))]
    ranges = {"x": (0.0, 1.0), "z": (-1.0, 0.0), "y": (-9.0, 9.0), "v": (-9.0, 9.0)}
    biased = with_biases(onnx.shape_inference.infer_shapes(model), ())
    rounded = int8._quantised(biased, ranges, (), SEVEN, True)
    repaired = corrected(biased, rounded, read_calibration(data, data[0], 1), tmp_path, 1)
    values = {tensor.name: numpy_helper.to_array(tensor) for tensor in repaired.graph.initializer}
    np.testing.assert_allclose(values["layer_bias_of_its_own"], -values["again_bias_of_its_own"], rtol=1e-5)
    assert np.abs(values["layer_bias_of_its_own"]).min() > 0


@pytest.mark.parametrize("kind", ["computed", "many"])
def test_biases_that_are_no_constant_of_a_channel(kind: str) -> None:
    model, _ = graph_of("Gemm")
    if kind == "many":
        model.graph.initializer[1].CopyFrom(numpy_helper.from_array(np.ones((5, 6), dtype=np.float32), "b"))
    else:
        del model.graph.initializer[1]
        model.graph.input.add().CopyFrom(helper.make_tensor_value_info("b", TensorProto.FLOAT, [6]))
    assert with_biases(model, ()) == model
