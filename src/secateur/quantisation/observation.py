"""What every activation of an ONNX graph does on calibration images: extremes, then histograms between them.

The graph is run in ONNX Runtime, unoptimised, so that every tensor is there under its name. Extremes are reduced inside
the graph; where a histogram is asked for, the images are looked at a second time, so few at once that all activations
together stay below ``MOST`` bytes.

ONNX Runtime has calibrators of its own. They hold the activations of all images at once, need batches of one size, and
search for the entropy threshold among the bins beyond those of the first batch only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch

from secateur.errors import BadRequest
from secateur.quantisation.batches import Calibration
from secateur.quantisation.thresholds import BINS, RANGES, Histogram

MOST = 2**28
"""Bytes of activations that are held at once."""

Ranges = dict[str, tuple[float, float]]


def ranges_of(model: Any, calibration: Calibration, method: str, folder: Path, threads: int) -> Ranges:
    """The range of every float activation of ``model`` (an ONNX ``ModelProto``, its tensors' types inferred) by
    ``method`` of ``RANGES``. ``folder``: for files that are there meanwhile.

    Raises ``BadRequest`` where an activation is not finite.
    """
    names = activations(model)
    extremes = _extremes(model, names, calibration, folder / "extremes.onnx", threads)
    if method == "minmax":
        return extremes
    histograms = _histograms(model, names, extremes, calibration, folder / "activations.onnx", threads)
    return {name: RANGES[method](histogram) for name, histogram in histograms.items()}


def activations(model: Any) -> list[str]:
    """The float tensors that nodes read or write and that are no constants, in the order of the graph."""
    import onnx

    graph = model.graph
    known = {value.name: value for value in chain(graph.value_info, graph.input, graph.output)}
    constants = {tensor.name for tensor in graph.initializer}
    seen = dict.fromkeys(name for node in graph.node for name in chain(node.input, node.output))
    return [
        name
        for name in seen
        if name in known and name not in constants and known[name].type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    ]


def _extremes(model: Any, names: Sequence[str], calibration: Calibration, path: Path, threads: int) -> Ranges:
    """The least and the largest value of every tensor."""
    import onnx

    watching = onnx.ModelProto()
    watching.CopyFrom(model)
    graph, watched = watching.graph, []
    for number, name in enumerate(names):
        for kind in ("ReduceMin", "ReduceMax"):
            # no axes: over all of them
            graph.node.append(onnx.helper.make_node(kind, [name], [f"secateur_{kind}_{number}"], keepdims=0))
            watched.append(onnx.helper.make_tensor_value_info(f"secateur_{kind}_{number}", onnx.TensorProto.FLOAT, []))
    del graph.output[:]
    graph.output.extend(watched)
    session = session_of(watching, path, threads)
    fed = [slot.name for slot in session.get_inputs()]
    found = np.stack([session.run(None, dict(zip(fed, batch, strict=True))) for batch in calibration.batches])
    wrong = [
        name for name, finite in zip(names, np.isfinite(found).all(0).reshape(-1, 2).all(1), strict=True) if not finite
    ]
    if wrong:
        raise BadRequest(
            f"{len(wrong)} of the network's {len(names)} activations are not finite (NaN or infinite) on the "
            f"calibration data, first {wrong[0]!r}\n  do: check the data and the network's weights"
        )
    lows, highs = found[:, 0::2].min(0), found[:, 1::2].max(0)
    return {name: (float(low), float(high)) for name, low, high in zip(names, lows, highs, strict=True)}


def _histograms(
    model: Any, names: Sequence[str], extremes: Ranges, calibration: Calibration, path: Path, threads: int
) -> dict[str, Histogram]:
    """The histogram of every tensor between its extremes."""
    import onnx

    graph = model.graph
    known = {value.name: value for value in chain(graph.value_info, graph.input, graph.output)}
    fed = {value.name for value in graph.input}
    inner = [name for name in names if name not in fed]
    watching = onnx.ModelProto()
    watching.CopyFrom(model)
    del watching.graph.output[:]
    watching.graph.output.extend(known[name] for name in inner)
    order = [value.name for value in graph.input if value.name not in {t.name for t in graph.initializer}]
    counts = {name: torch.zeros(BINS, dtype=torch.int64) for name in names}
    zeros = dict.fromkeys(names, 0)
    for inputs, outputs in _rationed(watching, calibration, path, threads):
        given = dict(zip(order, inputs, strict=True))
        for name, values in [(n, given[n]) for n in names if n in fed] + list(zip(inner, outputs, strict=True)):
            zeros[name] += add_(counts[name], values, extremes[name])
    return {name: Histogram(*extremes[name], zeros[name], counts[name].numpy()) for name in names}


def add_(counts: torch.Tensor, values: np.ndarray, extremes: tuple[float, float]) -> int:
    """Count ``values`` into the bins ``[B]`` over ``[-reach, reach]``; returns how many are 0, which are in none."""
    flat = torch.from_numpy(values).flatten()
    nonzero = flat[flat != 0].double()
    reach, bins = max(map(abs, extremes)), len(counts)
    if len(nonzero):
        places = ((nonzero / reach + 1) * (bins / 2)).long().clamp_(0, bins - 1)
        counts += torch.bincount(places, minlength=bins)
    return len(flat) - len(nonzero)


def _rationed(
    model: Any, calibration: Calibration, path: Path, threads: int
) -> Iterator[tuple[list[np.ndarray], list[np.ndarray]]]:
    """Inputs and outputs of as many images at once as take at most ``MOST`` bytes, which one image tells."""
    session = session_of(model, path, threads)
    names = [slot.name for slot in session.get_inputs()]
    one = session.run(None, dict(zip(names, calibration.rows(calibration.batches[0], 1)[0], strict=True)))
    most = max(1, MOST // max(1, sum(array.nbytes for array in one)))
    for inputs in chain.from_iterable(calibration.rows(batch, most) for batch in calibration.batches):
        yield inputs, session.run(None, dict(zip(names, inputs, strict=True)))


def session_of(model: Any, path: Path, threads: int) -> Any:
    """A session of ONNX Runtime that computes the graph as it stands, by way of the file ``path``."""
    import onnx
    import onnxruntime as ort

    onnx.save(model, path)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
