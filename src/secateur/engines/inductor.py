"""Torch's compiler: the network captured for the example inputs, its weights frozen into generated C++ or Triton."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from secateur.capture import in_mode
from secateur.engines.eager import OnTensors, TorchRun, copied, device_of, torch_threads
from secateur.engines.protocol import Exports, Prepared
from secateur.errors import CannotCapture
from secateur.graph import Inputs, as_arguments
from secateur.nests import flatten


class _Compiled:
    """Compiled runs of one network: that of the examples, and that of the shapes asked for last."""

    def __init__(self, model: nn.Module, example_inputs: Inputs, threads: int) -> None:
        self.model, self.threads = model, threads
        self.device = device_of(model)
        self.run = self._compile(example_inputs)

    def __call__(self) -> object:
        return self.run()

    def outputs(self, inputs: Inputs | None = None) -> list[torch.Tensor]:
        run = self.run
        if inputs is not None:
            tensors = [t.detach().to(self.device) for t in flatten(as_arguments(inputs))[0]]
            same = [t.shape for t in tensors] == [t.shape for t in self.run.args]
            run = TorchRun(run.function, self.device, run.layout, tuple(tensors), {}) if same else self._compile(inputs)
        return run.outputs()

    def _compile(self, inputs: Inputs) -> TorchRun:
        tensors, skeleton = flatten(as_arguments(inputs))
        args = tuple(tensor.detach().to(self.device) for tensor in tensors)
        try:
            function = compiled(OnTensors(self.model, skeleton), args)
        except Exception as error:  # the compiler raises dozens of types
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            raise CannotCapture(
                f"torch's compiler does not take this network: {type(error).__name__}: {(lines or [''])[0][:300]}\n"
                "  do: measure it in another engine; see that torch.export takes it"
            ) from error
        return TorchRun(function, self.device, lambda tensor: tensor, args, {})


def compiled(model: nn.Module, args: tuple[torch.Tensor, ...]) -> Any:
    """``model``, which takes tensors, as compiled code for arguments of these shapes; compiled when this returns.

    What is compiled is the exported graph: code of its own for every network, where the modules' own forward, shared by
    all networks of a class, would be given up after eight of them.
    """
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        graph = torch.export.export(model, args, strict=False).module()
        # one compiling thread: the others would be processes that outlive this
        with torch._inductor.config.patch({"freezing": True, "compile_threads": 1}):
            function = torch.compile(graph, dynamic=False, fullgraph=True)
            function(*args)
    return function


@contextmanager
def prepare_inductor(
    model: nn.Module, example_inputs: Inputs, *, threads: int = 1, exports: Exports | None = None
) -> Iterator[Prepared]:
    """A copy, compiled with its weights as constants for the shapes of the example inputs and for ``threads``."""
    twin = copied(model)
    with torch_threads(threads), in_mode(twin, False):
        yield _Compiled(twin, example_inputs, threads)


def no_compiler() -> str:
    """What torch's compiler lacks on this machine."""
    wanted = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++", "c++", "cl"]
    if any(shutil.which(name) for name in wanted):
        return ""
    return f"engine 'inductor' needs a C++ compiler ({', '.join(wanted)})\n  do: install g++ or clang, or set CXX"
