"""Engines: the ways in which a network is run, behind one small protocol.

    with prepare_all({"dense": dense, "pruned": small}, inputs, engine="openvino", threads=1) as runs:
        runs["pruned"]()             # one inference, waited for
        runs["pruned"].outputs()     # flat outputs on the CPU

A network is made ready once and then run any number of times. Before anybody times it, its outputs on the example
inputs are compared with those of torch, run eagerly in eval mode: a fast network that computes something else is worth
nothing. The difference is relative, ``max|engine - torch| / max|torch|``, the worst of all outputs. It may be 1e-3:
float32 arithmetic in another order stays far below, TensorFloat-32 and bfloat16 do not. Networks in half precision may
differ by eight units in the last place of their dtype.

Engines that read ONNX (ONNX Runtime, OpenVINO, TensorRT) and ExecuTorch run a float32 copy, on the CPU but for
TensorRT; the others run the network on its own device and in its own dtype. All run on fixed shapes, batch included:
those of the example inputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

from secateur.capture import all_tensors
from secateur.engines.eager import prepare_channels_last, prepare_eager, torch_threads, torch_version
from secateur.engines.et import executorch_version, prepare_executorch
from secateur.engines.files import ArrayRun, OpenFile, as_arrays, prepare_from_file
from secateur.engines.inductor import no_compiler, prepare_inductor
from secateur.engines.ort import onnxruntime_version, open_onnxruntime
from secateur.engines.ov import open_openvino, openvino_version
from secateur.engines.protocol import Engine, Exports, Prepared, check_threads
from secateur.engines.trt import no_gpu, open_tensorrt, tensorrt_version
from secateur.errors import BadArtifact, BadRequest, MissingExtra, WrongOutput, nearest
from secateur.graph import Inputs, as_arguments, plain, to_plain_cpu, unwrap
from secateur.nests import flatten, unflatten
from secateur.onnx_file import difference

__all__ = [
    "ENGINES",
    "FILE_ENGINES",
    "TOLERANCE",
    "Engine",
    "Exports",
    "Prepared",
    "checked_parity",
    "find_engine",
    "installed",
    "parity",
    "prepare_all",
    "prepare_file",
]

TOLERANCE = 1e-3
"""The largest relative difference to torch of a network in float32."""

_ONNX = ("onnx", "onnxscript")
_OPEN: dict[str, OpenFile] = {"onnxruntime": open_onnxruntime, "openvino": open_openvino}
FILE_ENGINES = tuple(_OPEN)
"""Those that run ONNX files of any kind, quantised ones too."""

ENGINES: dict[str, Engine] = {
    engine.name: engine
    for engine in (
        Engine(
            "torch", (), "", torch_version, prepare_eager, "PyTorch, one operator after the other", own_weights=True
        ),
        Engine(
            "channels_last",
            (),
            "",
            torch_version,
            prepare_channels_last,
            "PyTorch with channels innermost in memory",
            own_weights=True,
        ),
        Engine(
            "inductor",
            (),
            "",
            torch_version,
            prepare_inductor,
            "torch.compile with frozen weights",
            obstacle=no_compiler,
            own_weights=True,
        ),
        Engine(
            "onnxruntime",
            (*_ONNX, "onnxruntime"),
            "export",
            onnxruntime_version,
            prepare_from_file("onnxruntime", open_onnxruntime),
            "ONNX Runtime on the CPU",
        ),
        Engine(
            "openvino",
            (*_ONNX, "openvino"),
            "engines",
            openvino_version,
            prepare_from_file("openvino", open_openvino),
            "OpenVINO on the CPU",
        ),
        Engine(
            "executorch",
            ("executorch",),
            "",
            executorch_version,
            prepare_executorch,
            "ExecuTorch with XNNPACK on the CPU",
        ),
        Engine(
            "tensorrt",
            (*_ONNX, "tensorrt"),
            "",
            tensorrt_version,
            prepare_from_file("tensorrt", open_tensorrt),
            "TensorRT in float32 on an Nvidia GPU",
            obstacle=no_gpu,
        ),
    )
}


def find_engine(name: str) -> Engine:
    """The engine of that name. Raises ``BadRequest`` if there is none, ``MissingExtra`` if it is not installed."""
    if name not in ENGINES:
        raise BadRequest(f"unknown engine {name!r}{nearest(name, ENGINES)}\n  do: choose of {', '.join(ENGINES)}")
    missing = ENGINES[name].missing()
    if missing:
        raise MissingExtra(missing)
    return ENGINES[name]


def installed() -> list[str]:
    """The names of the engines that can be used here."""
    return [name for name, engine in ENGINES.items() if not engine.missing()]


@contextmanager
def prepare_all(
    models: Mapping[str, nn.Module],
    example_inputs: Inputs,
    *,
    engine: str,
    threads: int = 1,
    check: bool = True,
    exports: Exports | None = None,
) -> Iterator[dict[str, Prepared]]:
    """Every network of ``models`` made ready in ``engine`` on the same batch, while the context is open.

    Eval mode; torch's thread count is ``threads`` meanwhile, and is put back like the modules' modes. ``check``:
    compare the outputs with torch's first. ``exports``: where ONNX files are kept for the next engine that reads them.

    Raises ``BadRequest`` and ``MissingExtra`` as ``find_engine`` does, ``CannotCapture`` where a network cannot be
    exported, ``BadArtifact`` where the engine cannot run it, and ``WrongOutput`` where it computes something else.
    """
    check_threads(threads)
    chosen = find_engine(engine)
    with ExitStack() as stack:
        stack.enter_context(torch_threads(threads))
        files = stack.enter_context(Exports()) if exports is None else exports
        ready: dict[str, Prepared] = {}
        for name, model in models.items():
            ready[name] = stack.enter_context(chosen.prepare(model, example_inputs, threads=threads, exports=files))
            if check:
                checked_parity(ready[name], model, example_inputs, engine=chosen, name=name)
        yield ready


def prepare_file(
    path: str | Path, example_inputs: Inputs, *, engine: str = "onnxruntime", threads: int = 1
) -> Prepared:
    """An ONNX file, quantised ones included, made ready in ``"onnxruntime"`` or ``"openvino"``.

    Raises ``BadRequest`` for an engine that reads no ONNX and for inputs that are not as many as the file's,
    ``MissingExtra``, and ``BadArtifact`` for a file that is not there or that the engine cannot run.
    """
    check_threads(threads)
    if engine not in _OPEN:
        known = nearest(engine, _OPEN) if engine not in ENGINES else ""
        raise BadRequest(f"engine {engine!r} runs no ONNX files{known}\n  do: choose of {', '.join(_OPEN)}")
    find_engine(engine)
    file = Path(path).expanduser()
    if not file.is_file():
        raise BadArtifact(f"{file} is no file\n  do: name an ONNX file, as export_onnx writes it")
    return ArrayRun(engine, file.name, partial(_OPEN[engine], file, threads), as_arrays(example_inputs))


def parity(prepared: Prepared, model: nn.Module, example_inputs: Inputs, *, own_weights: bool = False) -> float:
    """How far the outputs of ``prepared`` are from torch's, relative to the largest of them; infinite where the number
    of outputs, a shape or a NaN differs. ``own_weights``: as ``Engine`` has it."""
    if not own_weights:
        tensors, skeleton = flatten(as_arguments(example_inputs))
        args, kwargs = unflatten(skeleton, [plain(tensor) for tensor in tensors])
        model, example_inputs = to_plain_cpu(unwrap(model)), (args or kwargs)
    with prepare_eager(model, example_inputs, threads=torch.get_num_threads()) as eager:
        wanted = eager.outputs()
    return difference([_array(t) for t in prepared.outputs()], [_array(t) for t in wanted], floor=1e-30)


def tolerance_of(model: nn.Module, engine: Engine) -> float:
    """The largest difference that arithmetic in the network's dtype explains."""
    floats = [t.dtype for _, t in all_tensors(model) if t.is_floating_point()] if engine.own_weights else []
    return max([TOLERANCE, *(8 * torch.finfo(dtype).eps for dtype in floats)])


def checked_parity(
    prepared: Prepared, model: nn.Module, example_inputs: Inputs, *, engine: Engine, name: str = ""
) -> float:
    """``parity``, or ``WrongOutput`` where it is more than arithmetic explains; ``name`` is the network's."""
    found = parity(prepared, model, example_inputs, own_weights=engine.own_weights)
    allowed = tolerance_of(model, engine)
    if not found <= allowed:
        raise WrongOutput(
            f"{engine.name} {engine.version()} and torch differ by {found:.1e} (relative) on "
            f"{f'network {name!r}' if name else 'the network'}, more than {allowed:.1e}: its time would say nothing\n"
            "  do: see whether the forward draws random numbers or keeps a state; else measure it in another engine"
        )
    return found


def _array(tensor: torch.Tensor) -> np.ndarray:
    return (tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor).numpy()
