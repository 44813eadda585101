"""Biases that take back what the rounding of weights does to the mean of every channel.

Rounded weights ``w + e`` add ``e x`` to what a layer computes, and inputs that are all positive (after a ReLU) give it
a mean of its own in every channel: a constant, which a bias can take back. It matters most where weights of both signs
nearly cancel, as in a depthwise convolution that looks for edges: their sum is a small difference of large numbers, and
what rounding adds to it is not small.

M. Nagel, M. van Baalen, T. Blankevoort, M. Welling, "Data-Free Quantization Through Weight Equalization and Bias
Correction", ICCV 2019; the means are those of calibration images here, and of the float network.

Letters: ``K`` output channels of a layer.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from secateur.quantisation.batches import Calibration
from secateur.quantisation.observation import session_of

BIASED = ("Conv", "ConvTranspose", "Gemm")
"""Those with a bias of their own, channels on axis 1 of what they compute."""


def with_biases(model: Any, kept: Container[str]) -> Any:
    """A copy of ``model`` (an ONNX ``ModelProto``) in which every layer with a constant weight adds a vector ``[K]``
    that no other layer shares, zeros where it had none. As they are stay the nodes ``kept``, and biases that are no
    constants or not one number for each channel.

    ONNX Runtime's tools fail on biases that are one number, or a row ``[1, K]``.
    """
    import onnx
    from onnx import numpy_helper

    own = onnx.ModelProto()
    own.CopyFrom(model)
    constants = {tensor.name: tensor for tensor in own.graph.initializer}
    for node in own.graph.node:
        if node.op_type not in BIASED or node.name in kept or node.input[1] not in constants:
            continue
        value = _bias(node, constants)
        if value is None:
            continue
        name = _named(node)
        own.graph.initializer.append(numpy_helper.from_array(value.astype(np.float32), name))
        node.input[:] = [*node.input[:2], name]
        for attribute in node.attribute:
            if attribute.name == "beta":
                attribute.f = 1.0
    used = {name for node in own.graph.node for name in node.input} | {value.name for value in own.graph.output}
    left = [tensor for tensor in own.graph.initializer if tensor.name in used]
    del own.graph.initializer[:]
    own.graph.initializer.extend(left)
    return own


def corrected(model: Any, rounded: Any, calibration: Calibration, folder: Path, threads: int) -> Any:
    """A copy of ``model``, which is ``with_biases``, whose biases take back what the weights in ``rounded``, the same
    graph with its weights quantised, do to the means. ``folder``: for a file that is there meanwhile."""
    import onnx
    from onnx import numpy_helper

    repaired = onnx.ModelProto()
    repaired.CopyFrom(model)
    constants = {tensor.name: tensor for tensor in repaired.graph.initializer}
    errors = {}
    weights = dequantised(rounded)
    for node in repaired.graph.node:
        if node.name in weights and _named(node) in constants:
            errors[node.name] = weights[node.name] - numpy_helper.to_array(constants[node.input[1]])
    means = _means(repaired, errors, calibration, folder / "errors.onnx", threads)
    for node in repaired.graph.node:
        if node.name in means:
            bias = constants[_named(node)]
            value = numpy_helper.to_array(bias) - means[node.name]
            bias.CopyFrom(numpy_helper.from_array(value.astype(np.float32), bias.name))
    return repaired


def _named(node: Any) -> str:
    return f"{node.name}_bias_of_its_own"


def dequantised(model: Any) -> dict[str, np.ndarray]:
    """Node -> its weight as the quantised ``model`` computes with it, of the nodes whose weight is quantised."""
    from onnx import numpy_helper

    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    made = {node.output[0]: node for node in model.graph.node if node.op_type == "DequantizeLinear"}
    found = {}
    for node in model.graph.node:
        maker = made.get(node.input[1]) if node.op_type in BIASED else None
        if maker is None or maker.input[0] not in constants:
            continue
        whole, scale, zero = (numpy_helper.to_array(constants[name]) for name in maker.input)
        axis = next((entry.i for entry in maker.attribute if entry.name == "axis"), 1)
        shape = [-1 if place == axis % whole.ndim else 1 for place in range(whole.ndim)] if scale.ndim else []
        steps = whole.astype(np.float64) - zero.reshape(shape).astype(np.float64)
        found[node.name] = (steps * scale.reshape(shape)).astype(np.float32)
    return found


def _bias(node: Any, constants: Mapping[str, Any]) -> np.ndarray | None:
    """What ``node`` adds ``[K]``; ``None`` if that is no constant or not one number for each channel."""
    from onnx import numpy_helper

    given = {entry.name: entry for entry in node.attribute}
    shape = constants[node.input[1]].dims
    axis = (
        1
        if node.op_type == "ConvTranspose" or (node.op_type == "Gemm" and not ("transB" in given and given["transB"].i))
        else 0
    )
    channels = shape[axis] * (given["group"].i if node.op_type == "ConvTranspose" and "group" in given else 1)
    if len(node.input) < 3 or not node.input[2]:
        return np.zeros(channels)
    if node.input[2] not in constants:
        return None
    value = numpy_helper.to_array(constants[node.input[2]]).astype(np.float64)
    if value.size not in (1, value.shape[-1] if value.ndim else 1):
        return None
    return np.broadcast_to(value.reshape(-1) * (given["beta"].f if "beta" in given else 1), (channels,))


def _means(
    model: Any, errors: Mapping[str, np.ndarray], calibration: Calibration, path: Path, threads: int
) -> dict[str, np.ndarray]:
    """Node -> the mean ``[K]`` of what it would compute with its weight's error for a weight, on the inputs that it has
    in the float network."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    if not errors:
        return {}
    watching = onnx.ModelProto()
    watching.CopyFrom(model)
    graph, watched = watching.graph, []
    for number, node in enumerate([node for node in graph.node if node.name in errors]):
        error, added, mean, axes = (f"secateur_{what}_{number}" for what in ("error", "added", "mean", "axes"))
        twin = onnx.NodeProto()
        twin.CopyFrom(node)
        twin.name, twin.input[:], twin.output[:] = added, [node.input[0], error], [added]
        others = np.array([axis for axis in range(errors[node.name].ndim) if axis != 1])
        graph.initializer.append(numpy_helper.from_array(errors[node.name], error))
        graph.initializer.append(numpy_helper.from_array(others, axes))
        graph.node.extend([twin, helper.make_node("ReduceMean", [added, axes], [mean], keepdims=0)])
        watched.append(helper.make_tensor_value_info(mean, TensorProto.FLOAT, None))
    del graph.output[:]
    graph.output.extend(watched)
    session = session_of(watching, path, threads)
    fed = [slot.name for slot in session.get_inputs()]
    totals: list[np.ndarray] = []
    for batch in calibration.batches:
        share = calibration.count(batch) / calibration.images
        found = [share * mean for mean in session.run(None, dict(zip(fed, batch, strict=True)))]
        totals = [a + b for a, b in zip(totals, found, strict=True)] if totals else found
    order = [node.name for node in model.graph.node if node.name in errors]
    return dict(zip(order, totals, strict=True))
