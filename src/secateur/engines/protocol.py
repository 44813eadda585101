"""What an engine is: a way to run a network, made ready once and then run again and again."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Protocol

import torch
from torch import nn

from secateur.errors import BadRequest
from secateur.graph import Inputs, as_arguments
from secateur.nests import flatten
from secateur.onnx_file import export_onnx


class Prepared(Protocol):
    """A network made ready in an engine for one batch of example inputs."""

    def __call__(self) -> object:
        """One inference of the example inputs, waited for. This is what is timed: nothing else happens in it."""

    def outputs(self, inputs: Inputs | None = None) -> list[torch.Tensor]:
        """The outputs as a flat list on the CPU, of the example inputs or of ``inputs``, which have their shapes but
        for the batch."""


@dataclass
class Exports:
    """ONNX files of networks, each written once however many engines read it; gone when the context ends.

    A file is that of one module on inputs of one shape, as it was when it was asked for first: whoever changes the
    module meanwhile asks another ``Exports``. ``free_batch=False``: the files are of the batch that they are asked for
    with, and are written three times as fast.
    """

    free_batch: bool = True
    _folder: tempfile.TemporaryDirectory[str] | None = None
    _written: list[tuple[nn.Module, tuple[object, ...], Path]] = field(default_factory=list)

    def __enter__(self) -> Exports:
        self._folder = tempfile.TemporaryDirectory(prefix="secateur-")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._folder is not None:
            self._folder.cleanup()
        self._folder, self._written = None, []

    def path(self, model: nn.Module, example_inputs: Inputs) -> Path:
        """The file of ``model``; what ``export_onnx`` raises, this raises."""
        if self._folder is None:
            raise RuntimeError("Exports is a context manager: enter it first")
        tensors, skeleton = flatten(as_arguments(example_inputs))
        call = (*((t.dtype, t.shape[self.free_batch :]) for t in tensors), repr(skeleton))
        for known, shapes, path in self._written:
            if known is model and shapes == call:
                return path
        path = Path(self._folder.name) / f"{len(self._written)}.onnx"
        # every engine compares its own outputs with torch's, so that the file need not be run for that alone
        export_onnx(model, path, example_inputs, free_batch=self.free_batch, check=False)
        self._written.append((model, call, path))
        return path


class Prepare(Protocol):
    """Makes ``model`` ready on ``example_inputs``: its context's length. The model is run in eval mode, and is as it
    was afterwards."""

    def __call__(
        self, model: nn.Module, example_inputs: Inputs, *, threads: int = 1, exports: Exports | None = None
    ) -> AbstractContextManager[Prepared]: ...


def nothing() -> str:
    """No obstacle."""
    return ""


@dataclass(frozen=True)
class Engine:
    """An engine: its ``name``; the ``packages`` that must be there to import, and the ``extra`` of ours that brings
    them (empty: none does); its ``version``; how a network is made ready in it; ``about`` it, in a line.

    ``obstacle`` says what besides a package keeps it from working here (no C++ compiler), with what to do; empty where
    nothing does. ``own_weights``: the network runs on its own device and in its own dtype, not from a float32 copy.
    """

    name: str
    packages: tuple[str, ...]
    extra: str
    version: Callable[[], str]
    prepare: Prepare
    about: str
    obstacle: Callable[[], str] = nothing
    own_weights: bool = False

    def missing(self) -> str:
        """What has to be installed before this engine works here, with what to do; empty if nothing has."""
        for package in self.packages:
            if find_spec(package) is None:
                how = f"pip install 'secateur[{self.extra}]'" if self.extra else f"pip install {package}"
                return f"engine {self.name!r} needs {package}\n  do: {how}"
        return self.obstacle()


def check_threads(threads: int) -> None:
    """Raises ``BadRequest`` for anything but a number of threads."""
    if isinstance(threads, bool) or not isinstance(threads, int) or threads < 1:
        raise BadRequest(f"threads must be a whole number of at least 1, not {threads!r}")
