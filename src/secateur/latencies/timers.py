"""How long single layers take inside an engine, one of each, timed as a network would run them: one after another.

What is timed is a network of layers side by side, each on an input of its own. It runs as a whole, round after round,
so that caches are as full of other layers' weights as in a real network; the engine itself tells how long each layer
took (ONNX Runtime and OpenVINO profile their nodes; eager torch runs layers one by one anyway). What engines put around
a lone layer, and in a network only at its ends, is left out: conversions of the memory layout.

A layer is a ``Sized`` geometry: ``(geometry, inputs, outputs)``.
"""

from __future__ import annotations

import json
import re
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from secateur.errors import BadRequest, nearest
from secateur.latencies.geometries import Geometry

Sized = tuple[Geometry, int, int]
WARMUP = 2
NAME = re.compile(r"layer(\d+)")
CONVERSIONS = ("Reorder", "ReorderInput", "ReorderOutput", "Convert")
CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def time_layers(
    layers: Sequence[Sized], *, engine: str, batch: int = 1, threads: int = 1, rounds: int = 8
) -> list[float]:
    """Milliseconds of every layer on a batch of that many examples: the least of ``rounds``, since what disturbs a time
    makes it longer. Raises ``BadRequest`` for an engine whose layers
    cannot be timed.
    """
    check_timed(engine)
    taken = TIMERS[engine](layers, batch, threads, rounds)
    return [min(own) for own in taken]


def check_timed(engine: str) -> None:
    """Raises ``BadRequest`` for an engine whose layers cannot be timed."""
    if engine not in TIMERS:
        raise BadRequest(
            f"the layers of a network cannot be timed one by one in engine {engine!r}{nearest(engine, TIMERS)}\n"
            f"  do: plan for the latency in one of {', '.join(TIMERS)}, and measure the result in the engine you want"
        )


def shapes_of(layer: Sized, batch: int) -> tuple[list[int], list[int]]:
    """The shapes of the input and of the weight of a layer."""
    geometry, into, out = layer
    if geometry.kind == "linear":
        return [batch, *geometry.size, into], [out, into]
    groups = into if geometry.depthwise else geometry.groups
    return [batch, into, *geometry.size], [out, into // groups, *geometry.kernel]


def groups_of(layer: Sized) -> int:
    """How many groups a convolution of these widths has."""
    geometry, into, _ = layer
    return into if geometry.depthwise else geometry.groups


# Eager torch -------------------------------------------------------------------------------------------------------


def _torch(layers: Sequence[Sized], batch: int, threads: int, rounds: int) -> list[list[float]]:
    return _eager(layers, batch, threads, rounds, torch.contiguous_format)


def _channels_last(layers: Sequence[Sized], batch: int, threads: int, rounds: int) -> list[list[float]]:
    return _eager(layers, batch, threads, rounds, torch.channels_last)


def _eager(
    layers: Sequence[Sized], batch: int, threads: int, rounds: int, layout: torch.memory_format
) -> list[list[float]]:
    modules = [_module(layer).eval() for layer in layers]
    inputs = [torch.rand(shapes_of(layer, batch)[0]) for layer in layers]
    for module in modules:
        for parameter in module.parameters():
            if parameter.dim() == 4:
                parameter.data = parameter.data.contiguous(memory_format=layout)
    inputs = [x.contiguous(memory_format=layout) if x.dim() == 4 else x for x in inputs]
    taken: list[list[float]] = [[] for _ in layers]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.no_grad():
            for turn in range(WARMUP + rounds):
                for own, module, x in zip(taken, modules, inputs, strict=True):
                    start = time.perf_counter()
                    module(x)
                    if turn >= WARMUP:
                        own.append((time.perf_counter() - start) * 1e3)
    finally:
        torch.set_num_threads(before)
    return taken


def _module(layer: Sized) -> nn.Module:
    geometry, into, out = layer
    if geometry.kind == "linear":
        return nn.Linear(into, out)
    kind: Any = CONVOLUTIONS[len(geometry.kernel)]
    module: nn.Module = kind(
        into,
        out,
        geometry.kernel,
        stride=geometry.stride,
        padding=geometry.padding,
        dilation=geometry.dilation,
        groups=groups_of(layer),
    )
    return module


# Engines that read ONNX --------------------------------------------------------------------------------------------


def onnx_of(layers: Sequence[Sized], batch: int) -> bytes:
    """An ONNX network of the layers side by side, each with a ReLU behind it, which engines take into the layer."""
    from onnx import TensorProto, helper, numpy_helper

    nodes, inputs, outputs, tensors = [], [], [], []
    for number, layer in enumerate(layers):
        geometry, name = layer[0], f"layer{number}"
        x, weight = shapes_of(layer, batch)
        inputs.append(helper.make_tensor_value_info(f"{name}_x", TensorProto.FLOAT, x))
        outputs.append(helper.make_tensor_value_info(f"{name}_y", TensorProto.FLOAT, None))
        values = np.full(weight, 0.01, np.float32)
        tensors.append(numpy_helper.from_array(np.zeros(weight[0], np.float32), f"{name}_b"))
        arguments = [f"{name}_x", f"{name}_w", f"{name}_b"]
        if geometry.kind == "conv":
            node = helper.make_node(
                "Conv",
                arguments,
                [f"{name}_z"],
                name=f"{name}_conv",
                kernel_shape=geometry.kernel,
                strides=geometry.stride,
                pads=[*geometry.padding, *geometry.padding],
                dilations=geometry.dilation,
                group=groups_of(layer),
            )
            nodes.append(node)
        elif geometry.size:  # as exporters write it: rows are multiplied, and the bias is added to each
            values = np.ascontiguousarray(values.T)
            nodes.append(helper.make_node("MatMul", arguments[:2], [f"{name}_p"], name=f"{name}_product"))
            nodes.append(helper.make_node("Add", [f"{name}_p", f"{name}_b"], [f"{name}_z"], name=f"{name}_sum"))
        else:
            nodes.append(helper.make_node("Gemm", arguments, [f"{name}_z"], name=f"{name}_gemm", transB=1))
        tensors.append(numpy_helper.from_array(values, f"{name}_w"))
        nodes.append(helper.make_node("Relu", [f"{name}_z"], [f"{name}_y"], name=f"{name}_relu"))
    graph = helper.make_graph(nodes, "layers", inputs, outputs, tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    return bytes(model.SerializeToString())


def _onnxruntime(layers: Sequence[Sized], batch: int, threads: int, rounds: int) -> list[list[float]]:
    import onnxruntime as ort

    with tempfile.TemporaryDirectory(prefix="secateur-") as folder:
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.log_severity_level = 3
        options.enable_profiling, options.profile_file_prefix = True, str(Path(folder) / "layers")
        session = ort.InferenceSession(onnx_of(layers, batch), options, providers=["CPUExecutionProvider"])
        feed = {slot.name: np.random.rand(*slot.shape).astype(np.float32) for slot in session.get_inputs()}
        for _ in range(WARMUP + rounds):
            session.run(None, feed)
        events = json.loads(Path(session.end_profiling()).read_text())
    found: list[dict[str, list[float]]] = [defaultdict(list) for _ in layers]
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("kernel_time"):
            match = NAME.search(event["name"])
            if match and event["args"]["op_name"] not in CONVERSIONS:
                found[int(match[1])][event["name"]].append(event["dur"] / 1e3)
    return [[sum(nodes) for nodes in zip(*own.values(), strict=True)][WARMUP:] for own in found]


def _openvino(layers: Sequence[Sized], batch: int, threads: int, rounds: int) -> list[list[float]]:
    import openvino as ov

    core = ov.Core()
    settings: dict[str, Any] = {
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": "1",
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": "f32",
        "PERF_COUNT": True,
    }
    compiled = core.compile_model(core.read_model(onnx_of(layers, batch)), "CPU", settings)
    request = compiled.create_infer_request()
    feed = [np.random.rand(*slot.shape).astype(np.float32) for slot in compiled.inputs]
    taken: list[list[float]] = [[] for _ in layers]
    for turn in range(WARMUP + rounds):
        request.infer(feed, share_inputs=True)
        spent = [0.0] * len(layers)
        for node in request.profiling_info:
            match = NAME.search(node.node_name)
            if match and node.node_type not in CONVERSIONS:
                spent[int(match[1])] += node.real_time.total_seconds() * 1e3
        if turn >= WARMUP:
            for own, ms in zip(taken, spent, strict=True):
                own.append(ms)
    return taken


Timer = Callable[[Sequence[Sized], int, int, int], list[list[float]]]
TIMERS: dict[str, Timer] = {
    "torch": _torch,
    "channels_last": _channels_last,
    "onnxruntime": _onnxruntime,
    "openvino": _openvino,
}
