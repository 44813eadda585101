"""ExecuTorch, the runtime of phones and boards, with its XNNPACK kernels on the CPU.

What XNNPACK does not take runs in ExecuTorch's portable kernels, which are slow; that is how such a network runs there.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version

import torch
from torch import nn

from secateur.engines.eager import OnTensors, copied
from secateur.engines.files import ArrayRun, Arrays, Bound, Session, as_arrays
from secateur.engines.protocol import Exports, Prepared
from secateur.graph import Inputs, as_arguments, to_plain_cpu, unwrap
from secateur.nests import flatten


@contextmanager
def prepare_executorch(
    model: nn.Module, example_inputs: Inputs, *, threads: int = 1, exports: Exports | None = None
) -> Iterator[Prepared]:
    """A float32 copy, exported and lowered to XNNPACK for the shapes of the example inputs."""
    skeleton = flatten(as_arguments(example_inputs))[1]
    twin = OnTensors(copied(to_plain_cpu(unwrap(model))), skeleton)
    yield ArrayRun("executorch", "the network", partial(_open, twin, threads), as_arrays(example_inputs))


def _open(model: nn.Module, threads: int, arrays: Arrays) -> Session:
    with _quiet():
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import to_edge_transform_and_lower
        from executorch.extension.pybindings import portable_lib
        from executorch.runtime import Runtime

        exported = torch.export.export(model, tuple(torch.from_numpy(array) for array in arrays), strict=False)
        lowered = to_edge_transform_and_lower(exported, partitioner=[XnnpackPartitioner()]).to_executorch()
        # the pool is one for the whole process, and made anew only where its size is another: methods hold on to it
        if portable_lib._threadpool_get_thread_count() != threads:
            portable_lib._unsafe_reset_threadpool(threads)
        program = Runtime.get().load_program(lowered.buffer)
        program.load_method("forward")

    def bind(inputs: Arrays) -> Bound:
        tensors = [torch.from_numpy(array) for array in inputs]
        # the program keeps the method that it has loaded, which points into the program's memory: both live as long
        return lambda: [out.numpy() for out in program.load_method("forward").execute(tensors)]

    return bind


def executorch_version() -> str:
    """Its version, as it was installed."""
    return version("executorch")


@contextmanager
def _quiet() -> Iterator[None]:
    """Importing and lowering print, log and warn at length, from C++ too."""
    logging.disable(logging.CRITICAL)
    kept = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere, warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            os.dup2(nowhere.fileno(), 2)
            warnings.simplefilter("ignore")
            yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        logging.disable(logging.NOTSET)
