"""Runs on arrays, for engines that have a format of their own and know nothing of torch.

A network is opened for fixed shapes, as one that is deployed is: engines plan memory and choose kernels for them.
Another batch is opened anew, and the last one of those is kept. Two of the engines, ONNX Runtime and OpenVINO, read the
files that ``export_onnx`` writes.

Shapes: those of the inputs, in the order in which the network takes them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from secateur.engines.protocol import Exports, Prepare, Prepared
from secateur.errors import BadArtifact, SecateurError
from secateur.graph import Inputs, as_arguments, plain
from secateur.nests import flatten

Arrays = list[np.ndarray]
Bound = Callable[[], Arrays]
"""A run on inputs that are settled; what it returns may be overwritten by the next run."""
Session = Callable[[Arrays], Bound]
"""A network opened for inputs of fixed shapes: inputs to a run on them."""
Open = Callable[[Arrays], Session]
"""A network and a number of threads, opened for arrays of these shapes; raises what the engine raises."""
OpenFile = Callable[[Path, int, Arrays], Session]
"""``(file, threads, example arrays)`` to a session."""


@dataclass
class ArrayRun:
    """The network that ``open`` opens, on ``examples``. ``engine`` and ``what`` is run in it, for messages."""

    engine: str
    what: str
    open: Open
    examples: Arrays
    _session: Session = field(init=False, repr=False)
    _run: Bound = field(init=False, repr=False)
    _other: tuple[list[tuple[int, ...]], Session] | None = field(init=False, default=None, repr=False)

    def __post_init__(self) -> None:
        self._session = self._guarded("open", partial(self.open, self.examples), self.examples)
        self._run = self._guarded("run", partial(self._session, self.examples), self.examples)

    def __call__(self) -> object:
        return self._run()

    def outputs(self, inputs: Inputs | None = None) -> list[torch.Tensor]:
        arrays = self.examples if inputs is None else as_arrays(inputs)
        run = self._run if inputs is None else self._guarded("run", partial(self._of(arrays), arrays), arrays)
        return [torch.from_numpy(np.array(out)) for out in self._guarded("run", run, arrays)]

    def _of(self, arrays: Arrays) -> Session:
        shapes = _shapes(arrays)
        if shapes == _shapes(self.examples):
            return self._session
        if self._other is None or self._other[0] != shapes:
            self._other = (shapes, self._guarded("open", partial(self.open, arrays), arrays))
        return self._other[1]

    def _guarded(self, doing: str, function: Callable[[], Any], arrays: Arrays) -> Any:
        try:
            return function()
        except (SecateurError, MemoryError):
            raise
        except Exception as error:  # RuntimeError, or types of an engine's own
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            raise BadArtifact(
                f"{self.engine} cannot {doing} {self.what} on inputs of shape "
                f"{', '.join(str(list(shape)) for shape in _shapes(arrays))}: "
                f"{(lines or [type(error).__name__])[-1][:300]}\n"
                "  do: see that these are inputs as it was exported with; else take another engine"
            ) from error


def as_arrays(inputs: Inputs) -> Arrays:
    """The tensors of a call in order, as arrays in float32, float64 or integers."""
    return [plain(tensor).contiguous().numpy() for tensor in flatten(as_arguments(inputs))[0]]


def check_slots(slots: Sequence[str], arrays: Arrays) -> None:
    """Raises ``ValueError`` where a file takes another number of inputs than there are."""
    if len(slots) != len(arrays):
        raise ValueError(f"it takes {len(slots)} ({', '.join(slots)}), and {len(arrays)} are given")


def prepare_from_file(engine: str, open_file: OpenFile) -> Prepare:
    """How an engine that reads ONNX makes a network ready: exported, then opened by ``open_file``."""

    @contextmanager
    def prepare(
        model: nn.Module, example_inputs: Inputs, *, threads: int = 1, exports: Exports | None = None
    ) -> Iterator[Prepared]:
        with ExitStack() as stack:
            files = stack.enter_context(Exports()) if exports is None else exports
            path = files.path(model, example_inputs)
            yield ArrayRun(engine, "the exported network", partial(open_file, path, threads), as_arrays(example_inputs))

    return prepare


def _shapes(arrays: Arrays) -> list[tuple[int, ...]]:
    return [tuple(array.shape) for array in arrays]
