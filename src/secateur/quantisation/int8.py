"""ONNX files in int8, for ONNX Runtime, OpenVINO and whatever else reads quantise-dequantise pairs (QDQ).

Weights become int8, symmetric, with a scale for each output channel; activations uint8, with a scale and a zero point
each, whose range is taken from calibration images. The graph is folded and fused first (batch norm is in its
convolution then), biases take back what rounded weights do to the means, and the file is written aside, run, and only
then renamed into place.

**Seven bits.** x86 processors without VNNI multiply bytes in pairs and add the two products in 16 bits, where
``2 * 255 * 127`` does not fit: sums saturate. For them weights get seven bits, ``|w| <= 64``, and nothing is lost.
Those of depthwise convolutions keep eight: with one input channel there is nothing to pair. For another machine than
this one, ``reduce_range`` says which of both is meant.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import platform
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from secateur.errors import BadArtifact, BadRequest, MissingExtra, SecateurError, nearest
from secateur.files import written_aside
from secateur.graph import Inputs
from secateur.machines import instructions
from secateur.onnx_file import export_onnx
from secateur.quantisation.batches import Calibration, read_calibration
from secateur.quantisation.correction import corrected, with_biases
from secateur.quantisation.observation import ranges_of
from secateur.quantisation.thresholds import METHODS, Method

WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")
SCOPES = "pkg.torch.onnx.name_scopes"
"""Where the exporter notes the modules that a node comes from."""


@dataclass(frozen=True)
class QuantiseReport:
    """What was written. ``bytes`` of the file and ``float_bytes`` of the same network in float32; the ``opset``;
    ``images`` it was calibrated on; ``layers``: names of those that compute in int8, and ``float_layers`` of those that
    do not; ``method``, and whether weights but depthwise ones have seven bits (``reduce_range``).

    On the calibration images: ``difference``, ``|int8 - float| / |float|`` over all values of an output (Euclidean
    norms), the worst of the outputs; ``agreement``: the fraction of images whose highest score is that of the same
    class, ``None`` unless the only output is scores ``[B, K]``.
    """

    path: Path
    bytes: int
    float_bytes: int
    opset: int
    images: int
    layers: tuple[str, ...]
    float_layers: tuple[str, ...]
    method: Method
    reduce_range: bool
    difference: float
    agreement: float | None


def quantise_onnx(
    small: nn.Module,
    path: str | os.PathLike[str],
    example_inputs: Inputs,
    data: Iterable[Any],
    *,
    batches: int = 8,
    method: Method = "minmax",
    per_channel: bool = True,
    exclude: Sequence[str] = (),
    reduce_range: bool | None = None,
) -> QuantiseReport:
    """Write ``small`` to ``path`` as ONNX in int8, calibrated on the first ``batches`` batches of ``data``.

    ``data``: batches of inputs or ``(inputs, targets)`` of any size, prepared as for training but not augmented; they
    are read once and kept in memory. ``method``: how wide a range an activation gets: ``"minmax"`` all that was seen,
    ``"percentile"`` without the outermost 0.001 %, ``"entropy"`` up to where clipping changes its distribution least.
    ``exclude``: names or globs of modules that stay in float. ``per_channel=False``: one scale for a whole weight.
    ``reduce_range``: weights in seven bits; ``None``: where this machine's processor needs it. The model is untouched.

    Raises ``MissingExtra`` without onnx, onnxscript or onnxruntime; ``BadRequest`` for data that are missing, empty or
    do not fit and for an ``exclude`` that matches nothing; what ``export_onnx`` raises; ``BadArtifact`` where ONNX
    Runtime cannot quantise or run the network or the file cannot be written. None is left behind then.

    >>> sc.quantise_onnx(small, "small.int8.onnx", torch.randn(1, 3, 224, 224), loader)    # doctest: +SKIP
    """
    check_target(method, path)
    calibration = read_calibration(data, example_inputs, batches)
    with tempfile.TemporaryDirectory(prefix="secateur-") as folder:
        source = Path(folder) / "float.onnx"
        export_onnx(small, source, example_inputs)
        settings = Settings(method, per_channel, tuple(exclude), reduce_range)
        return quantise_file(source, Path(path), calibration, settings)


@dataclass(frozen=True)
class Settings:
    """How a file is quantised; see ``quantise_onnx``."""

    method: Method = "minmax"
    per_channel: bool = True
    exclude: tuple[str, ...] = ()
    reduce_range: bool | None = None


def quantise_file(
    source: Path, path: str | os.PathLike[str], calibration: Calibration, settings: Settings
) -> QuantiseReport:
    """The same of the float ONNX file ``source``, as ``export_onnx`` wrote it."""
    target = check_target(settings.method, path)
    reduced = saturates() if settings.reduce_range is None else settings.reduce_range
    threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory(prefix="secateur-") as name, _told(target), quiet():
        folder = Path(name)
        model = _prepared(source, folder)
        names = layer_names(model)
        kept = _excluded(settings.exclude, names)
        ranges = ranges_of(model, calibration, settings.method, folder, threads)
        with written_aside(target) as aside:
            biased = with_biases(model, kept)
            rounded = _quantised(biased, ranges, kept, settings, reduced)
            repaired = corrected(biased, rounded, calibration, folder, threads)
            opset, done = _write(_quantised(repaired, ranges, kept, settings, reduced), aside)
            difference, agreement = _compare(source, aside, calibration, threads)
    sizes = target.stat().st_size, source.stat().st_size
    weighted = {node: shown for node, (shown, _) in names.items() if shown}
    inside = tuple(shown for node, shown in weighted.items() if node in done)
    outside = tuple(shown for node, shown in weighted.items() if node not in done)
    return QuantiseReport(
        target, *sizes, opset, calibration.images, inside, outside, settings.method, reduced, difference, agreement
    )


@contextlib.contextmanager
def _told(target: Path) -> Iterator[None]:
    """What ONNX Runtime's tools raise, in our words."""
    try:
        yield
    except (SecateurError, MemoryError):
        raise
    except OSError as error:
        raise BadArtifact(
            f"{target} cannot be written: {error.strerror or error}\n  do: free some space or choose another path"
        ) from error
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise BadArtifact(
            f"ONNX Runtime cannot quantise the network: {type(error).__name__}: {(lines or [''])[0][:300]}\n"
            "  do: leave the modules that it cannot do in float with exclude. No file was written"
        ) from error


def saturates() -> bool:
    """Whether this processor may lose sums of int8 products: x86 without VNNI, or where that cannot be told."""
    if platform.machine().lower() not in ("x86_64", "amd64", "i386", "i686"):
        return False
    known = set(instructions())
    if not known:  # from torch 2.11 on, also where the system does not tell
        told: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
        known = {name for name, there in told.items() if there}
    return not {"avx512_vnni", "avx_vnni"} & known


def layer_names(model: Any) -> dict[str, tuple[str, tuple[str, ...]]]:
    """Node -> what its layer is called (empty for one without weights), and all modules that it lies in."""
    constants = {tensor.name for tensor in model.graph.initializer}
    found = {}
    for node in model.graph.node:
        scopes = next((entry.value for entry in node.metadata_props if entry.key == SCOPES), "[]")
        modules = [part.strip(" '\"") for part in scopes.strip("[]").split(",")][:-1]
        inner = [name.removeprefix("model.") for name in modules if name.startswith("model.")]
        weighted = node.op_type in WEIGHTED and len(node.input) > 1 and node.input[1] in constants
        layer = ""
        if weighted:
            layer = node.input[1].rpartition(".")[0] or (inner[-1] if inner else node.name)
        # a network that is a captured graph has no scopes, and tensors of the old names
        above = [layer[:place] for place, letter in enumerate(layer) if letter == "."]
        found[node.name] = layer, tuple(dict.fromkeys([*inner, *above, *([layer] if layer else []), node.name]))
    return found


def _excluded(patterns: Sequence[str], names: Mapping[str, tuple[str, tuple[str, ...]]]) -> dict[str, None]:
    """The nodes whose module, or one that it lies in, matches a pattern."""
    kept: dict[str, None] = {}
    for pattern in patterns:
        matched = [node for node, (_, own) in names.items() if any(fnmatchcase(name, pattern) for name in own)]
        if not matched:
            known = [layer for layer, _ in names.values() if layer]
            raise BadRequest(
                f"exclude: no module of the exported network is called {pattern!r}{nearest(pattern, known)}"
            )
        kept |= dict.fromkeys(matched)
    return kept


def check_packages() -> None:
    """Raises ``MissingExtra`` where something is missing that quantising needs."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        if find_spec(package) is None:
            raise MissingExtra(f"quantising needs {package}\n  do: pip install 'secateur[export]'")


def check_target(method: str, path: str | os.PathLike[str]) -> Path:
    """The resolved target. Raises for what can be told before anything is done."""
    check_packages()
    if method not in METHODS:
        raise BadRequest(
            f"unknown method {method!r}{nearest(str(method), METHODS)}\n  do: choose of {', '.join(METHODS)}"
        )
    target = Path(path).expanduser().resolve()
    if target.is_dir():
        raise BadArtifact(f"{target} is a folder\n  do: name a file, such as {target.name}/model.int8.onnx")
    if not target.parent.is_dir():
        raise BadArtifact(f"{target} cannot be written: its folder does not exist\n  do: create {target.parent}")
    return target


def _prepared(source: Path, folder: Path) -> Any:
    """The graph of ``source`` with constants folded, batch norm in its convolution, and the types of all tensors.

    Nothing symbolic is inferred: ONNX's own inference finds the types, and no more of the shapes is read.
    """
    from onnxruntime.quantization import quant_pre_process
    from onnxruntime.quantization.quant_utils import load_model_with_shape_infer

    ready = folder / "ready.onnx"
    quant_pre_process(str(source), str(ready), skip_symbolic_shape=True)
    return load_model_with_shape_infer(ready)


def _quantised(
    model: Any, ranges: Mapping[str, tuple[float, float]], kept: Iterable[str], settings: Settings, reduced: bool
) -> Any:
    """A copy of ``model`` with pairs of quantise and dequantise around everything but the ``kept`` nodes."""
    import onnx
    from onnxruntime.quantization import CalibrationMethod, QDQQuantizer, QuantType, TensorsData
    from onnxruntime.quantization.registry import QDQRegistry, QLinearOpsRegistry

    own = onnx.ModelProto()
    own.CopyFrom(model)
    found = {name: (np.float32(low), np.float32(high)) for name, (low, high) in ranges.items()}
    quantizer = QDQQuantizer(
        own,
        settings.per_channel,
        reduced,
        QuantType.QInt8,
        QuantType.QUInt8,
        TensorsData(CalibrationMethod.MinMax, found),
        [],
        [*kept],
        sorted({*QLinearOpsRegistry, *QDQRegistry}),
        {"TensorQuantOverrides": _exceptions(own, settings, reduced)},
    )
    quantizer.quantize_model()
    quantizer.model.topological_sort()
    return quantizer.model.model


def _exceptions(model: Any, settings: Settings, reduced: bool) -> dict[str, list[dict[str, Any]]]:
    """Weights that are not quantised as all others are, for ONNX Runtime's tools.

    Transposed convolutions in groups get one scale: axis 1 has the channels of one group only. Depthwise convolutions
    keep eight bits: what there is one input channel of, is not added in pairs.
    """
    shapes = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    found: dict[str, list[dict[str, Any]]] = {}
    for node in model.graph.node:
        groups = next((entry.i for entry in node.attribute if entry.name == "group"), 1)
        shape = shapes.get(node.input[1], ()) if node.op_type in ("Conv", "ConvTranspose") else ()
        if shape and node.op_type == "ConvTranspose" and groups > 1:
            found[node.input[1]] = [{"symmetric": True}]
        elif shape and node.op_type == "Conv" and groups == shape[0] and shape[1] == 1 and reduced:
            found[node.input[1]] = [{"reduce_range": False, **({"axis": 0} if settings.per_channel else {})}]
    return found


def _write(written: Any, path: Path) -> tuple[int, set[str]]:
    """The opset and the nodes whose weights are int8."""
    import onnx

    dequantised = {node.output[0] for node in written.graph.node if node.op_type == "DequantizeLinear"}
    done = {
        node.name
        for node in written.graph.node
        if node.op_type in WEIGHTED and all(name in dequantised for name in node.input[:2])
    }
    if not done:
        raise BadRequest(
            "no layer of the network can be quantised: none of its convolutions and linear layers is in float32 and "
            "outside exclude\n  do: pass a float32 network, and leave fewer modules out"
        )
    onnx.save(written, path)
    return next(entry.version for entry in written.opset_import if entry.domain in ("", "ai.onnx")), done


def _compare(source: Path, path: Path, calibration: Calibration, threads: int) -> tuple[float, float | None]:
    """How far int8 is from float on the calibration images, and how often both prefer the same class."""
    sessions = [opened(file, threads) for file in (source, path)]
    names = [slot.name for slot in sessions[0].get_inputs()]
    lost: list[float] = []
    whole: list[float] = []
    same: int | None = 0
    for batch in calibration.batches:
        feed = dict(zip(names, batch, strict=True))
        exact, rounded = (session.run(None, feed) for session in sessions)
        lost = lost or [0.0] * len(exact)
        whole = whole or [0.0] * len(exact)
        for place, (a, b) in enumerate(zip(exact, rounded, strict=True)):
            lost[place] += float(np.square(b.astype(np.float64) - a).sum())
            whole[place] += float(np.square(a.astype(np.float64)).sum())
        scores = len(exact) == 1 and exact[0].ndim == 2 and exact[0].shape[1] > 1
        same = same + int((exact[0].argmax(1) == rounded[0].argmax(1)).sum()) if scores and same is not None else None
    difference = max((a / b) ** 0.5 if b else float(a > 0) for a, b in zip(lost, whole, strict=True))
    return difference, None if same is None else same / calibration.images


def opened(path: Path, threads: int) -> Any:
    """A session of ONNX Runtime at any batch."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """ONNX Runtime's tools print, warn, and log through the root logger, which they give a handler if it has none."""
    root = logging.getLogger()
    handlers, disabled = list(root.handlers), logging.root.manager.disable
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        logging.disable(logging.CRITICAL)
        try:
            yield
        finally:
            logging.disable(disabled)
            root.handlers[:] = handlers
