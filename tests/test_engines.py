"""Engines: each gives what torch gives, or says so before anything is timed, and leaves the network alone."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from secateur import engines
from secateur.engines import ENGINES, Exports, find_engine, installed, prepare_all, prepare_file
from secateur.engines import protocol as engine_protocol
from secateur.errors import BadArtifact, BadRequest, CannotCapture, MissingExtra, WrongOutput

X = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))
WORDS = torch.tensor([1, 5])
QUICK = ("torch", "channels_last", "onnxruntime", "openvino")


class Many(nn.Module):
    """Two inputs, one of them integer, and a nest of outputs, one of them integer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm, self.embed = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Embedding(7, 4)
        self.drop = nn.Dropout(0.5)

    def forward(self, image: torch.Tensor, word: torch.Tensor) -> dict[str, Any]:
        features = self.norm(self.conv(image)) + self.embed(word)[:, :, None, None]
        return {"scores": self.drop(features.mean((2, 3))), "maps": [features, features[:, :2].argmax(1)]}


def need(engine: str) -> None:
    if engine not in installed():
        pytest.skip(ENGINES[engine].missing().partition("\n")[0])


def wanted(model: nn.Module, image: torch.Tensor, word: torch.Tensor) -> list[torch.Tensor]:
    with torch.no_grad():
        out = copy.deepcopy(model).eval()(image, word)
    return [out["scores"], *out["maps"]]


@pytest.fixture(scope="module")
def model() -> nn.Module:
    model = Many().train()
    with torch.no_grad():
        model.norm.running_mean.normal_(generator=torch.Generator().manual_seed(1))
    model.norm.eval()
    return model


@pytest.fixture(scope="module")
def exported(model: nn.Module) -> Any:
    """Exporting costs seconds: most tests share one file."""
    with Exports() as exports:
        yield exports


SLOW = [(name, kind) for name in ("inductor", "executorch") for kind in ("keyword", "positional")]
SLOW += [(name, "positional") for name in ("onnxruntime", "openvino")]
EVERY = [(name, "keyword") for name in QUICK] + [(name, "positional") for name in ("torch", "channels_last")]


@pytest.mark.parametrize(("engine", "kind"), [*EVERY, *(pytest.param(*one, marks=pytest.mark.slow) for one in SLOW)])
def test_an_engine_gives_what_torch_gives(engine: str, kind: str, model: nn.Module, exported: Exports) -> None:
    need(engine)
    keyword = kind == "keyword"
    inputs = {"image": X, "word": WORDS} if keyword else (X, WORDS)
    before, threads = copy.deepcopy(model.state_dict()), torch.get_num_threads()
    modes = [module.training for module in model.modules()]
    with prepare_all({"net": model}, inputs, engine=engine, threads=2, exports=exported) as runs:
        run = runs["net"]
        run()
        assert torch.get_num_threads() == 2
        found = run.outputs()
        other = torch.randn(3, 3, 6, 6), torch.tensor([6, 0, 2])
        of_others = run.outputs({"image": other[0], "word": other[1]} if keyword else other)
        again = run.outputs()
    for ours, theirs in ((found, wanted(model, X, WORDS)), (of_others, wanted(model, *other)), (again, found)):
        for a, b in zip(ours, theirs, strict=True):
            assert a.dtype == b.dtype
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.get_num_threads() == threads


def test_a_network_is_exported_once_for_all_engines(
    model: nn.Module, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("onnxruntime", "openvino"):
        need(name)
    written: list[Path] = []

    def counted(model: nn.Module, path: Path, *inputs: Any, **options: Any) -> None:
        written.append(path)
        path.write_bytes(file.read_bytes())

    monkeypatch.setattr(engine_protocol, "export_onnx", counted)
    with Exports() as exports:
        for name in ("onnxruntime", "openvino"):
            with prepare_all({"": model}, {"image": X, "word": WORDS}, engine=name, exports=exports):
                pass
        assert len(written) == 1
        assert written[0].is_file()
        exports.path(model, {"image": X[:1], "word": WORDS[:1]})  # another batch is no other network
        assert len(written) == 1
    assert not written[0].parent.exists()


def test_nothing_is_left_when_it_is_interrupted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model: nn.Module
) -> None:
    need("onnxruntime")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def interrupted(model: nn.Module, path: Path, *inputs: Any, **options: Any) -> None:
        path.write_text("half")
        raise KeyboardInterrupt

    monkeypatch.setattr(engine_protocol, "export_onnx", interrupted)
    with (
        pytest.raises(KeyboardInterrupt),
        prepare_all({"": model}, (X, WORDS), engine="onnxruntime"),
    ):
        pass
    assert list(tmp_path.iterdir()) == []


def test_the_model_itself_runs_in_torch_and_its_hooks_too() -> None:
    model, calls = nn.Conv2d(3, 4, 1).double(), []
    model.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    with prepare_all({"": model}, X.double(), engine="torch", check=False) as runs:
        runs[""]()
        assert runs[""].outputs()[0].dtype == torch.float64
    assert calls == [False, False]


def test_half_precision_may_differ_as_its_dtype_does() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()).bfloat16()
    for name in ("torch", "channels_last"):
        with prepare_all({"": model}, X.bfloat16(), engine=name) as runs:
            assert runs[""].outputs()[0].dtype == torch.bfloat16
    assert engines.tolerance_of(model, ENGINES["torch"]) == 8 / 128
    assert engines.tolerance_of(model, ENGINES["openvino"]) == engines.tolerance_of(model.float(), ENGINES["torch"])


def test_half_precision_is_run_in_float32_from_a_file() -> None:
    model = nn.Conv2d(3, 4, 1).bfloat16()
    wanted = copy.deepcopy(model).float()(X.bfloat16().float()).detach()
    with Exports() as exports:
        for engine in set(engines.FILE_ENGINES) & set(installed()):
            with prepare_all({"": model}, X.bfloat16(), engine=engine, exports=exports) as runs:
                torch.testing.assert_close(runs[""].outputs()[0], wanted, rtol=1e-5, atol=1e-6)
    assert model.weight.dtype == torch.bfloat16


class Noisy(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.rand_like(x)


def test_another_output_than_torchs_is_an_error() -> None:
    with (
        pytest.raises(
            WrongOutput,
            match=r"torch .* and torch differ by .*e[-+]\d\d \(relative\) on network 'noise', more than 1\.0e-03: its "
            r"time would say nothing\n  do: see whether the forward draws random numbers",
        ),
        prepare_all({"noise": Noisy()}, X, engine="torch"),
    ):
        pass
    with prepare_all({"noise": Noisy()}, X, engine="torch", check=False) as runs:
        runs["noise"]()


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda out: out * 1.5, 0.5),
        (lambda out: out[:, :2], float("inf")),
        (lambda out: out.where(out != out.max(), torch.nan), float("inf")),
    ],
    ids=["scaled", "another shape", "not a number"],
)
def test_parity_by_hand(change: Callable[[torch.Tensor], torch.Tensor], found: float) -> None:
    class Run:
        def __call__(self) -> None: ...

        def outputs(self, inputs: Any = None) -> list[torch.Tensor]:
            return [change(X)]

    assert engines.parity(Run(), nn.Identity(), X) == pytest.approx(found, rel=1e-5)
    with pytest.raises(WrongOutput, match="on the network, more than 1"):
        engines.checked_parity(Run(), nn.Identity(), X, engine=ENGINES["torch"])


def test_tiny_outputs_are_compared_relatively() -> None:
    class Run:
        def __call__(self) -> None: ...

        def outputs(self, inputs: Any = None) -> list[torch.Tensor]:
            return [X * 2e-12]

    assert engines.parity(Run(), nn.Identity(), X * 1e-12) == pytest.approx(1, rel=1e-5)


# --- what is asked for ---------------------------------------------------------------------------------------------


def test_unknown_engines() -> None:
    with pytest.raises(
        BadRequest, match=r"unknown engine 'onnx'; did you mean 'onnxruntime'\?\n  do: choose of torch, "
    ):
        find_engine("onnx")
    with pytest.raises(BadRequest, match="unknown engine 'onnx'"), prepare_all({}, X, engine="onnx"):
        pass


def test_engines_that_are_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    absent = {"openvino", "onnxruntime", "executorch"}
    monkeypatch.setattr(engine_protocol, "find_spec", lambda name: None if name in absent else real(name))
    assert not absent & set(installed())
    assert {"torch", "channels_last"} <= set(installed())
    with pytest.raises(MissingExtra, match=r"'openvino' needs openvino\n  do: pip install 'secateur\[engines\]'"):
        find_engine("openvino")
    with pytest.raises(MissingExtra, match=r"'onnxruntime' needs onnxruntime\n  do: pip install 'secateur\[export\]'"):
        find_engine("onnxruntime")
    with pytest.raises(MissingExtra, match=r"'executorch' needs executorch\n  do: pip install executorch"):
        find_engine("executorch")


def test_an_engine_may_need_more_than_a_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "inductor" not in installed()
    with pytest.raises(MissingExtra, match=r"'inductor' needs a C\+\+ compiler \(no-such-compiler\)\n  do: install g"):
        find_engine("inductor")


def test_every_engine_says_what_it_is() -> None:
    for name, engine in ENGINES.items():
        assert engine.name == name
        assert engine.about
        if not engine.missing():
            assert engine.version()[0].isdigit()


@pytest.mark.parametrize("threads", [0, -1, True, 1.5])
def test_threads_are_a_number(threads: Any) -> None:
    with (
        pytest.raises(BadRequest, match="threads must be a whole number of at least 1"),
        prepare_all({}, X, engine="torch", threads=threads),
    ):
        pass


@pytest.mark.slow
def test_what_torchs_compiler_does_not_take() -> None:
    need("inductor")

    class Printed(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * float(x.sum())

    with (
        pytest.raises(
            CannotCapture, match=r"torch's compiler does not take this network: .*\n  do: measure it in another"
        ),
        prepare_all({"": Printed()}, X, engine="inductor"),
    ):
        pass


# --- files ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def file(model: nn.Module, exported: Exports) -> Path:
    return exported.path(model, {"image": X, "word": WORDS})


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_a_file_by_itself(engine: str, file: Path, model: nn.Module, tmp_path: Path) -> None:
    need(engine)
    run = prepare_file(file, (X, WORDS), engine=engine, threads=2)
    run()
    others = [(torch.randn(batch, 3, 6, 6), torch.arange(batch)) for batch in (2, 3, 1, 2)]
    found = [run.outputs(), *(run.outputs(other) for other in others), run.outputs()]
    for outputs, inputs in zip(found, [(X, WORDS), *others, (X, WORDS)], strict=True):
        for a, b in zip(outputs, wanted(model, *inputs), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    with pytest.raises(
        BadArtifact,
        match=rf"{engine} cannot open {file.name} on inputs of shape \[2, 3, 6, 6\]: it takes 2 \(image, word\)",
    ):
        prepare_file(file, X, engine=engine)
    with pytest.raises(BadArtifact, match=rf"{engine} cannot (open|run) {file.name} on inputs of shape \[2, 5, 6, 6\]"):
        run.outputs((torch.zeros(2, 5, 6, 6), WORDS))
    run.outputs()  # it is none the worse for that
    damaged = tmp_path / "damaged.onnx"
    damaged.write_bytes(file.read_bytes()[:200])
    with pytest.raises(BadArtifact, match=rf"{engine} cannot open damaged\.onnx on inputs of shape .*\n  do: see that"):
        prepare_file(damaged, (X, WORDS), engine=engine)


def test_files_that_cannot_be_run(file: Path, tmp_path: Path) -> None:
    need("onnxruntime")
    with pytest.raises(BadArtifact, match=r"none\.onnx is no file\n  do: name an ONNX file"):
        prepare_file(tmp_path / "none.onnx", X)
    with pytest.raises(BadRequest, match=r"engine 'torch' runs no ONNX files\n  do: choose of onnxruntime, openvino"):
        prepare_file(file, X, engine="torch")
    with pytest.raises(BadRequest, match=r"engine 'onnxrt' runs no ONNX files; did you mean 'onnxruntime'\?"):
        prepare_file(file, X, engine="onnxrt")


def test_an_exports_has_to_be_entered(model: nn.Module) -> None:
    with pytest.raises(RuntimeError, match="enter it first"):
        Exports().path(model, X)


def test_engines_are_data() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        ENGINES["torch"].name = "other"  # type: ignore[misc]
