"""TensorRT, on an Nvidia GPU, in float32.

Written by the interface that TensorRT 10 documents, where there was no such GPU: it has not been run by its authors.
Like in every engine, what it computes is compared with torch before it is timed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from secateur.engines.files import Arrays, Bound, Session, check_slots


def open_tensorrt(path: Path, threads: int, arrays: Arrays) -> Session:
    """An execution context for arrays of these shapes. A run starts with its inputs on the GPU and brings the outputs
    back; ``threads`` means nothing to it."""
    import tensorrt as trt

    logger = trt.Logger(trt.Logger.ERROR)
    runtime = trt.Runtime(logger)
    engine = runtime.deserialize_cuda_engine(_built(trt, logger, path, arrays))
    context, stream = engine.create_execution_context(), torch.cuda.Stream()
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    inputs = [name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
    for name, array in zip(inputs, arrays, strict=True):
        context.set_input_shape(name, array.shape)
    results = {}
    for name in (name for name in names if name not in inputs):
        host = np.empty(tuple(context.get_tensor_shape(name)), trt.nptype(engine.get_tensor_dtype(name)))
        results[name] = torch.from_numpy(host).cuda()

    def bind(given: Arrays) -> Bound:
        bound = {name: torch.from_numpy(array).cuda() for name, array in zip(inputs, given, strict=True)} | results

        def run() -> Arrays:
            for name, tensor in bound.items():
                context.set_tensor_address(name, tensor.data_ptr())
            if not context.execute_async_v3(stream.cuda_stream):
                raise RuntimeError("execute_async_v3 says that it failed")
            stream.synchronize()
            return [tensor.cpu().numpy() for tensor in results.values()]

        run.keeps = (runtime, engine)  # type: ignore[attr-defined]  # a context points into both
        return run

    return bind


def _built(trt: Any, logger: Any, path: Path, arrays: Arrays) -> Any:
    """The file compiled for these shapes, without TensorFloat-32."""
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(path)):
        raise RuntimeError("; ".join(parser.get_error(index).desc() for index in range(parser.num_errors)))
    slots = [network.get_input(index) for index in range(network.num_inputs)]
    check_slots([slot.name for slot in slots], arrays)
    profile = builder.create_optimization_profile()
    for slot, array in zip(slots, arrays, strict=True):
        profile.set_shape(slot.name, array.shape, array.shape, array.shape)
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)
    config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise RuntimeError("the network could not be built; TensorRT's log says why")
    return plan


def no_gpu() -> str:
    """What TensorRT lacks on this machine besides its package."""
    if torch.cuda.is_available():
        return ""
    return (
        "engine 'tensorrt' needs an Nvidia GPU that torch can use\n  do: install torch for CUDA on a machine with one"
    )


def tensorrt_version() -> str:
    """Its version."""
    import tensorrt

    return str(tensorrt.__version__)
