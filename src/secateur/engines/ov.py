"""OpenVINO, on the CPU."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from secateur.engines.files import Arrays, Bound, Session, check_slots


@cache
def _core() -> Any:
    import openvino

    return openvino.Core()


def open_openvino(path: Path, threads: int, arrays: Arrays) -> Session:
    """A request for arrays of these shapes: one stream, for latency, in float32 wherever the file is."""
    import openvino

    model = _core().read_model(str(path))
    check_slots([slot.get_any_name() for slot in model.inputs], arrays)
    model.reshape({slot: list(array.shape) for slot, array in zip(model.inputs, arrays, strict=True)})
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": "1",
        "INFERENCE_NUM_THREADS": str(threads),
        # a processor with bfloat16 would use it without being asked
        "INFERENCE_PRECISION_HINT": "f32",
        # pinned to a core that something else is busy on, a run says nothing about the network
        "ENABLE_CPU_PINNING": "NO",
    }
    request = _core().compile_model(model, "CPU", settings).create_infer_request()

    def bind(inputs: Arrays) -> Bound:
        shared = [openvino.Tensor(array, shared_memory=True) for array in inputs]

        def run() -> Arrays:
            for index, tensor in enumerate(shared):  # another run of this request may have set its own
                request.set_input_tensor(index, tensor)
            request.infer(share_outputs=True)
            return [output.data for output in request.output_tensors]

        return run

    return bind


def openvino_version() -> str:
    """Its version, without the build."""
    import openvino

    return str(openvino.__version__).partition("-")[0]
