"""ONNX files in int8: as near to float as eight bits allow, whole or not there."""

from __future__ import annotations

import importlib.util
import itertools
import logging
import math
import platform
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from example_plans import names, no_file_beyond
from secateur.errors import BadArtifact, BadRequest, MissingExtra
from secateur.onnx_file import export_onnx
from secateur.quantisation import Settings, int8, observation, quantise_file, quantise_onnx, read_calibration
from secateur.quantisation.batches import Calibration
from secateur.quantisation.networks import file_accuracy
from secateur.quantisation.thresholds import Histogram, entropy_range, percentile_range

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
from onnx import numpy_helper  # noqa: E402

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def images(*sizes: int, seed: int = 1) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, 3, 8, 8, generator=generator) for size in sizes]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.norm(self.conv(x)) + x)


class Net(nn.Module):
    """A stem, a residual block and a classifier of five classes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block, self.head = nn.Conv2d(3, 8, 3, padding=1), Block(), nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.block(torch.relu(self.stem(x))).mean((2, 3)))


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(0)
    model = Net()
    model.train()(torch.cat(images(32)))
    return model.eval()


@pytest.fixture(scope="module")
def source(net: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Exporting costs seconds whatever the network: all tests of what comes after share one file."""
    path = tmp_path_factory.mktemp("float") / "float.onnx"
    export_onnx(net, path, X, check=False)
    return path


@pytest.fixture
def at_hand(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int8, "export_onnx", lambda model, path, inputs: path.write_bytes(source.read_bytes()))


def run(path: Path, *inputs: torch.Tensor) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    feed = {slot.name: tensor.numpy() for slot, tensor in zip(session.get_inputs(), inputs, strict=True)}
    return list(session.run(None, feed))


# --- ranges ------------------------------------------------------------------------------------------------------


def histogram(values: np.ndarray) -> Histogram:
    extremes = float(values.min()), float(values.max())
    counts = torch.zeros(4096, dtype=torch.int64)
    zeros = observation.add_(counts, values, extremes)
    return Histogram(*extremes, zeros, counts.numpy())


def drawn(kind: str) -> np.ndarray:
    rng = np.random.default_rng(0)
    normal = rng.normal(size=200_000)
    return {
        "normal": normal,
        "relu": np.maximum(normal, 0),
        "tail": np.abs(normal) ** 3,
        "uniform": rng.uniform(0, 1, 200_000),
        "below": -np.abs(normal),
    }[kind].astype(np.float32)


def test_a_histogram_counts_every_value() -> None:
    values = np.array([-2, -1, 0, 0, 0.5, 1, 2], dtype=np.float32)
    found = histogram(values)
    assert (found.low, found.high, found.zeros, found.reach) == (-2, 2, 2, 2)
    assert found.counts.sum() == 5
    assert [int(place) for place in np.nonzero(found.counts)[0]] == [0, 1024, 2560, 3072, 4095]
    assert int(histogram(np.zeros(3, dtype=np.float32)).counts.sum()) == 0


@pytest.mark.parametrize("kind", ["normal", "relu", "tail", "below"])
def test_percentiles(kind: str) -> None:
    values = drawn(kind)
    low, high = percentile_range(histogram(values))
    width = 2 * np.abs(values).max() / 4096
    ordered = np.sort(values)
    assert abs(low - ordered[1]) <= width + 1e-6  # of 200,000 values one goes at each end
    assert abs(high - ordered[-2]) <= width + 1e-6
    assert ordered[0] <= low <= high <= ordered[-1]


def naive_divergence(magnitudes: list[int], bins: int, levels: int) -> float:
    p = [float(count) for count in magnitudes[:bins]]
    p[-1] += sum(magnitudes[bins:])
    q = [0.0] * bins
    edges = [level * bins // levels for level in range(levels)] + [bins]
    for start, stop in itertools.pairwise(edges):
        full = [place for place in range(start, stop) if magnitudes[place]]
        for place in full:
            q[place] = sum(magnitudes[start:stop]) / len(full)
    if not any(q) or (p[-1] and not q[-1]):
        return math.inf
    return sum(a / sum(p) * math.log((a / sum(p)) / (b / sum(q))) for a, b in zip(p, q, strict=True) if a)


def test_the_threshold_is_the_one_of_least_divergence() -> None:
    found = histogram(drawn("tail"))
    magnitudes = [int(count) for count in found.counts[2048:] + found.counts[:2048][::-1]]
    losses = {bins: naive_divergence(magnitudes, bins, 256) for bins in range(256, 2049, 8)}
    best = min(losses, key=lambda bins: losses[bins])
    low, high = entropy_range(found)
    assert low == found.low
    assert high == pytest.approx(found.reach * best / 2048)
    assert high < 0.5 * found.high


def test_the_entropy_rule_clips_tails_only() -> None:
    for kind in ("normal", "uniform"):
        values = drawn(kind)
        low, high = entropy_range(histogram(values))
        assert ((values < low) | (values > high)).mean() < 0.01
    assert entropy_range(histogram(np.zeros(4, dtype=np.float32))) == (0, 0)
    low, high = entropy_range(histogram(drawn("below")))
    assert low < high <= 0


# --- what is observed --------------------------------------------------------------------------------------------


def test_extremes_and_histograms_of_every_activation(
    net: nn.Module, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = images(5, 1, 7)
    calibration = read_calibration(data, X, 3)
    model = int8._prepared(source, tmp_path)
    seen: dict[str, torch.Tensor] = {}
    x = torch.cat(data)
    with torch.no_grad():
        stem = net.stem(x)
        seen = {"x": x, "stem": torch.relu(stem), "block": net.block(torch.relu(stem)), "out": net(x)}
    found = observation.ranges_of(model, calibration, "minmax", tmp_path, 1)
    ranges = {(round(low, 4), round(high, 4)) for low, high in found.values()}
    for tensor in seen.values():
        assert any(
            abs(low - float(tensor.min())) < 1e-3 and abs(high - float(tensor.max())) < 1e-3 for low, high in ranges
        )
    every = observation._histograms(model, list(found), found, calibration, tmp_path / "a.onnx", 1)
    assert every["x"].zeros + every["x"].counts.sum() == x.numel()
    # a ration of one image counts the same as all at once
    monkeypatch.setattr(observation, "MOST", 1)
    rationed = observation._histograms(model, list(found), found, calibration, tmp_path / "a.onnx", 1)
    for name, one in every.items():
        np.testing.assert_array_equal(one.counts, rationed[name].counts)
        assert one.zeros == rationed[name].zeros


def test_activations_that_are_not_finite(source: Path, tmp_path: Path) -> None:
    calibration = Calibration(((np.full((1, 3, 8, 8), 1e38, dtype=np.float32),),), (True,), 1)
    with pytest.raises(BadRequest, match=r"activations are not finite \(NaN or infinite\) on the\s+calibration data"):
        quantise_file(source, tmp_path / "int8.onnx", calibration, Settings())
    assert names(tmp_path) == []


# --- the file ----------------------------------------------------------------------------------------------------


def test_a_network_in_int8_at_any_batch(net: nn.Module, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    pairs = [(batch, torch.zeros(len(batch))) for batch in images(16, 9)]
    report = quantise_onnx(net.train(), tmp_path / "int8.onnx", X[:1], pairs, batches=4)
    assert capfd.readouterr().out == ""
    assert all(module.training for module in net.modules())
    net.eval()
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert names(tmp_path) == ["int8.onnx"]
    assert (report.path, report.bytes) == (tmp_path / "int8.onnx", (tmp_path / "int8.onnx").stat().st_size)
    assert (report.layers, report.float_layers) == (("stem", "block.conv", "head"), ())
    assert (report.images, report.method, report.reduce_range) == (25, "minmax", int8.saturates())
    assert report.opset >= 18
    assert report.agreement is not None
    assert report.agreement >= 0.9
    assert 0 < report.difference < 0.05
    exact, rounded = (torch.cat([f(batch) for batch in images(16, 9)]) for f in (
        lambda x: net(x).detach(), lambda x: torch.from_numpy(run(report.path, x)[0]),
    ))  # fmt: skip
    assert report.difference == pytest.approx(float((rounded - exact).norm() / exact.norm()), rel=1e-3)
    assert report.agreement == float((rounded.argmax(1) == exact.argmax(1)).float().mean())
    assert run(report.path, images(3)[0])[0].shape == (3, 5)


def test_what_the_tools_say_is_not_heard(capfd: pytest.CaptureFixture[str]) -> None:
    root = logging.getLogger()
    handlers, root.handlers = root.handlers, []
    try:
        with int8.quiet():
            logging.warning("their advice")  # gives the root logger a handler where it has none
            warnings.warn("their future", FutureWarning, stacklevel=1)
            print("their progress")
        assert root.handlers == []
    finally:
        root.handlers = handlers
    assert not logging.root.manager.disable
    told = capfd.readouterr()
    assert told.out + told.err == ""


@pytest.mark.parametrize(("reduced", "largest"), [(True, 64), (False, 127)])
def test_weights_are_rounded_to_bits(net: nn.Module, source: Path, tmp_path: Path, reduced: bool, largest: int) -> None:
    calibration = read_calibration(images(8), X, 1)
    settings = Settings(reduce_range=reduced)
    report = quantise_file(source, tmp_path / "int8.onnx", calibration, settings)
    assert report.reduce_range is reduced
    tensors = {t.name: numpy_helper.to_array(t) for t in onnx.load(report.path).graph.initializer}
    whole, scale = tensors["stem.weight_quantized"], tensors["stem.weight_scale"]
    assert whole.dtype == np.int8
    assert np.abs(whole).max() == largest
    assert scale.shape == (8,)
    wanted = net.stem.weight.detach().numpy()
    assert np.abs(whole * scale[:, None, None, None] - wanted).max() <= 0.5001 * scale.max()


def layer(kind: str, weight: tuple[int, ...], groups: int) -> Any:
    """A network of one layer whose sums are the largest there are: weights and images of ones."""
    outputs = weight[0] if kind == "Conv" else weight[1] * groups
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node(kind, ["x", "w", "b"], ["y"], name="layer", group=groups)],
        "one",
        [value("x", onnx.TensorProto.FLOAT, ["n", weight[1] * groups if kind == "Conv" else weight[0], 9, 9])],
        [value("y", onnx.TensorProto.FLOAT, None)],
        [
            numpy_helper.from_array(np.ones(weight, dtype=np.float32), "w"),
            numpy_helper.from_array(np.zeros(outputs, dtype=np.float32), "b"),
        ],
    )
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=9)


@pytest.mark.parametrize(
    ("kind", "weight", "groups", "largest", "scales"),
    [
        ("Conv", (6, 1, 3, 3), 6, 127, (6,)),
        ("Conv", (3, 1, 5, 5), 3, 127, (3,)),
        ("Conv", (6, 3, 3, 3), 1, 64, (6,)),
        ("Conv", (6, 1, 3, 3), 3, 64, (6,)),
        ("ConvTranspose", (6, 2, 3, 3), 3, 64, ()),
        ("ConvTranspose", (6, 2, 3, 3), 1, 64, (2,)),
    ],
)
def test_seven_bits_only_where_sums_saturate(
    kind: str, weight: tuple[int, ...], groups: int, largest: int, scales: tuple[int, ...], tmp_path: Path
) -> None:
    """On every processor, which is why the sums are the largest there are."""
    model = layer(kind, weight, groups)
    onnx.save(model, tmp_path / "float.onnx")
    x = torch.ones(2, *(slot.dim_value for slot in model.graph.input[0].type.tensor_type.shape.dim[1:]))
    for per_channel in (True, False):
        settings = Settings(reduce_range=True, per_channel=per_channel)
        report = quantise_file(tmp_path / "float.onnx", tmp_path / "int8.onnx", read_calibration([x], x, 1), settings)
        tensors = {t.name: numpy_helper.to_array(t) for t in onnx.load(report.path).graph.initializer}
        assert int(np.abs(tensors["w_quantized"]).max()) == largest
        assert tensors["w_scale"].shape == (scales if per_channel else ())
        assert report.difference < 0.005


def test_one_scale_for_a_weight(source: Path, tmp_path: Path) -> None:
    calibration = read_calibration(images(8), X, 1)
    report = quantise_file(source, tmp_path / "int8.onnx", calibration, Settings(per_channel=False))
    tensors = {t.name: numpy_helper.to_array(t) for t in onnx.load(report.path).graph.initializer}
    assert tensors["stem.weight_scale"].shape == ()


@pytest.mark.parametrize("method", ["percentile", "entropy"])
def test_other_methods(source: Path, tmp_path: Path, method: Any) -> None:
    calibration = read_calibration(images(16, 16), X, 2)
    report = quantise_file(source, tmp_path / "int8.onnx", calibration, Settings(method))
    assert report.method == method
    assert 0 < report.difference < 0.2


def test_modules_that_stay_in_float(net: nn.Module, source: Path, tmp_path: Path) -> None:
    calibration = read_calibration(images(8), X, 1)
    report = quantise_file(source, tmp_path / "int8.onnx", calibration, Settings(exclude=("block", "he*")))
    assert (report.layers, report.float_layers) == (("stem",), ("block.conv", "head"))
    graph = onnx.load(report.path).graph
    kinds = {tensor.name: tensor.data_type for tensor in graph.initializer}
    assert kinds["head.weight"] == onnx.TensorProto.FLOAT
    adds = [node for node in graph.node if node.op_type == "Add"]
    dequantised = {node.output[0] for node in graph.node if node.op_type == "DequantizeLinear"}
    assert not set(adds[0].input) <= dequantised
    with pytest.raises(BadRequest, match=r"exclude: no module of the exported network is called 'stam'; did you mean"):
        quantise_file(source, tmp_path / "other.onnx", calibration, Settings(exclude=("stam",)))
    with pytest.raises(BadRequest, match=r"no layer of the network can be quantised: .*\n  do: pass a float32 network"):
        quantise_file(source, tmp_path / "other.onnx", calibration, Settings(exclude=("*",)))
    assert names(tmp_path) == ["int8.onnx"]


def test_the_accuracy_of_a_file(net: nn.Module, source: Path) -> None:
    (batch,) = images(12)
    with torch.no_grad():
        targets = net(batch).argmax(1)
    targets[:3] = (targets[:3] + 1) % 5
    assert file_accuracy(source, X, [(batch[:5], targets[:5]), (batch[5:], targets[5:])]) == 0.75


class Two(nn.Module):
    """Two inputs, one of them integer; two outputs, one of them a map."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.embed = nn.Conv2d(3, 4, 1), nn.Embedding(7, 4)

    def forward(self, image: torch.Tensor, word: torch.Tensor) -> dict[str, torch.Tensor]:
        features = self.conv(image) + self.embed(word)[:, :, None, None]
        return {"scores": features.mean((2, 3)), "image": features}


def test_several_inputs_and_outputs(tmp_path: Path) -> None:
    example = {"image": X, "word": torch.tensor([3, 6])}
    data = [{"image": batch, "word": torch.arange(len(batch)) % 7} for batch in images(9, 4)]
    report = quantise_onnx(Two().eval(), tmp_path / "two.onnx", example, data)
    assert report.images == 13
    assert report.agreement is None
    assert report.layers == ("conv",)
    assert 0 < report.difference < 0.05


# --- the processor -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("machine", "flags", "wanted"),
    [
        ("x86_64", "avx avx2", True),
        ("x86_64", "avx2 avx512f avx512_vnni", False),
        ("AMD64", "avx2 avx_vnni", False),
        ("aarch64", "asimd", False),
    ],
)
def test_which_processors_saturate(machine: str, flags: str, wanted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(int8, "instructions", lambda: frozenset(flags.split()))
    assert int8.saturates() is wanted


def test_a_system_that_does_not_list_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "AMD64")
    monkeypatch.setattr(int8, "instructions", frozenset)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx_vnni": True}, raising=False)
    assert not int8.saturates()
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx_vnni": False, "avx2": True}, raising=False)
    assert int8.saturates()


# --- failures ----------------------------------------------------------------------------------------------------


def bad_data() -> dict[str, tuple[Any, str]]:
    nan = X.clone()
    nan[0, 0, 0, 0] = float("nan")
    return {
        "none": (None, r"quantising needs calibration data, and none is given: .*\n  do: pass a DataLoader"),
        "tensor": (X, r"quantising needs calibration data, and a Tensor is given"),
        "empty": ([], r"data has no batches"),
        "spent": (iter([]), r"data has no batches"),
        "shape": ([X, X[:, :2]], r"batch 1 of the calibration data .*: its shape is \[2, 2, 8, 8\], and the examples "
                  r"are \[any, 3, 8, 8\]\n  do: pass batches of inputs"),
        "dtype": ([X.int()], r"batch 0 .*: its dtype is torch.int32, and the examples are torch.float32"),
        "kind": ([3], r"batch 0 .*: it is a int"),
        "call": ([{"image": X}], r"batch 0 .*: it is \[2, 3, 8, 8\], and not a call of it"),
        "no rows": ([X[:0]], r"batch 0 .*: it is empty, \[0, 3, 8, 8\]"),
        "nan": ([nan], r"batch 0 .*: it holds values that are not finite"),
    }  # fmt: skip


@pytest.mark.parametrize("what", bad_data())
def test_data_that_do_not_fit(what: str, net: nn.Module, tmp_path: Path, at_hand: None) -> None:
    data, text = bad_data()[what]
    with pytest.raises(BadRequest, match=text):
        quantise_onnx(net, tmp_path / "int8.onnx", X, data)
    assert names(tmp_path) == []


def test_arguments_out_of_range(net: nn.Module, tmp_path: Path, at_hand: None) -> None:
    with pytest.raises(
        BadRequest, match=r"unknown method 'max'; did you mean 'minmax'\?\n  do: choose of minmax, perc"
    ):
        quantise_onnx(net, tmp_path / "int8.onnx", X, [X], method="max")  # type: ignore[arg-type]
    for batches in (0, 1.5, True):
        with pytest.raises(BadRequest, match=r"batches must be a whole number of at least 1, not"):
            quantise_onnx(net, tmp_path / "int8.onnx", X, [X], batches=batches)  # type: ignore[arg-type]


def test_only_the_first_batches_are_read() -> None:
    def endless() -> Iterator[torch.Tensor]:
        yield from images(2, 3)
        raise AssertionError("a third batch was read")

    assert read_calibration(endless(), X, 2).images == 5


def test_missing_packages(net: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(int8, "find_spec", lambda name: None if name == "onnxruntime" else real(name))
    with pytest.raises(MissingExtra, match=r"quantising needs onnxruntime\n  do: pip install 'secateur\[export\]'"):
        quantise_onnx(net, tmp_path / "int8.onnx", X, [X])


def test_where_it_cannot_be_written(
    net: nn.Module, tmp_path: Path, at_hand: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(BadArtifact, match=r"is a folder\n  do: name a file"):
        quantise_onnx(net, tmp_path, X, [X])
    with pytest.raises(BadArtifact, match=r"none/int8\.onnx cannot be written: its folder does not exist"):
        quantise_onnx(net, tmp_path / "none" / "int8.onnx", X, [X])

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(BadArtifact, match=r"int8\.onnx cannot be written: No space left on device"):
        quantise_onnx(net, tmp_path / "int8.onnx", X, [X])
    assert names(tmp_path) == []


def test_a_failure_leaves_the_old_file(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "int8.onnx").write_text("old")
    calibration = read_calibration(images(2), X, 1)

    def fail(*_: Any) -> None:
        raise ValueError("some node\nand more")

    monkeypatch.setattr(int8, "_compare", fail)
    with pytest.raises(
        BadArtifact, match=r"ONNX Runtime cannot quantise the network: ValueError: some node\n  do: leave"
    ):
        quantise_file(source, tmp_path / "int8.onnx", calibration, Settings())
    assert names(tmp_path) == ["int8.onnx"]
    assert (tmp_path / "int8.onnx").read_text() == "old"
    with no_file_beyond(500), pytest.raises(BadArtifact, match=r"cannot be written: File too large"):
        quantise_file(source, tmp_path / "int8.onnx", calibration, Settings())
    assert names(tmp_path) == ["int8.onnx"]
