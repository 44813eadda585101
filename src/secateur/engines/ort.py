"""ONNX Runtime, on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from secateur.engines.files import Arrays, Bound, Session, check_slots


def open_onnxruntime(path: Path, threads: int, arrays: Arrays) -> Session:
    """A session for arrays of these shapes: every free axis of the file gets the length that it has in them."""
    import onnxruntime as ort

    def opened(options: Any) -> Any:
        options.log_severity_level = 4  # what goes wrong is raised as well
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    unread = ort.SessionOptions()
    unread.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    slots = opened(unread).get_inputs()
    names = [slot.name for slot in slots]
    check_slots(names, arrays)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # threads that wait for work would slow down whatever is timed in turns with this
    options.add_session_config_entry("session.force_spinning_stop", "1")
    for slot, array in zip(slots, arrays, strict=True):
        for axis, length in zip(slot.shape, array.shape, strict=False):
            if isinstance(axis, str):
                options.add_free_dimension_override_by_name(axis, length)
    session = opened(options)

    def bind(inputs: Arrays) -> Bound:
        feed = dict(zip(names, inputs, strict=True))
        return lambda: session.run(None, feed)

    return bind


def onnxruntime_version() -> str:
    """Its version."""
    import onnxruntime as ort

    return str(ort.__version__)
