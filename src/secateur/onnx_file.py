"""A network as one ONNX file, proved against torch before anyone gets to see it.

Written by torch's dynamo exporter with a dynamic batch (axis 0 of every input), run in ONNX Runtime at batch 1 and 3
and on the example inputs, compared with torch, and only then renamed into place.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import os
import secrets
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from secateur.capture import all_tensors, in_mode
from secateur.errors import BadArtifact, BadRequest, CannotCapture, MissingExtra
from secateur.graph import Inputs, as_arguments, plain, to_plain_cpu, unwrap
from secateur.nests import flatten, unflatten

BATCHES = (1, 3)
LARGEST = 2**31 - 2**24
"""Bytes of tensors that one ONNX file can hold, with some room for the graph."""
SMALL = 1e-6
"""Outputs below this are compared absolutely."""


@dataclass(frozen=True)
class ExportReport:
    """What was written: ``bytes`` of the file, the ``opset``, and ``max_difference`` to torch: the largest
    ``max|onnx - torch| / max|torch|`` of any output of any run, or ``None`` if it was not checked."""

    path: Path
    bytes: int
    max_difference: float | None
    opset: int


def export_onnx(
    small: nn.Module,
    path: str | os.PathLike[str],
    example_inputs: Inputs,
    *,
    opset: int | None = None,
    free_batch: bool = True,
    check: bool = True,
    tolerance: float = 1e-4,
) -> ExportReport:
    """Write ``small`` to ``path`` as ONNX, in eval mode, with axis 0 of every input free.

    ``free_batch=False`` fixes it to that of the example inputs, and takes a third of the time.

    Any nest of outputs becomes a flat list of them. ``opset``: the exporter's own choice if ``None``. ``tolerance``:
    the largest relative difference to torch that is accepted. The model is untouched; a network on a GPU or in half
    precision is exported from a float32 copy on the CPU.

    Raises ``MissingExtra`` without onnx, onnxscript or onnxruntime, ``CannotCapture`` if the exporter fails,
    ``BadRequest`` for an opset that cannot express the network, and ``BadArtifact`` if the file differs from torch,
    fixes the batch, or cannot be written; none is left behind then.
    """
    _need(("onnx", "onnxscript", "onnxruntime") if check else ("onnx", "onnxscript"))
    _check_known(opset)
    target = Path(path).expanduser().resolve()
    if target.is_dir():
        raise BadArtifact(f"{target} is a folder\n  do: name a file, such as {target.name}/model.onnx")
    if not target.parent.is_dir():
        raise BadArtifact(f"{target} cannot be written: its folder does not exist\n  do: create {target.parent}")
    args, kwargs = as_arguments(example_inputs)
    tensors, skeleton = flatten((args, kwargs))
    examples = [plain(tensor) for tensor in tensors]
    model = _Flat(to_plain_cpu(unwrap(small)), skeleton)
    _check_size(model)
    aside = target.with_name(f".{target.name}.{secrets.token_hex(4)}.partial")
    with in_mode(model, False), torch.no_grad():
        program = _program(model, examples, opset, free_batch)
        _check_written(program, opset)
        try:
            with _quiet():
                program.save(str(aside), external_data=False)
            difference = _compare(model, aside, examples, tolerance, BATCHES if free_batch else ()) if check else None
            size = aside.stat().st_size
            aside.replace(target)
        except OSError as error:
            raise BadArtifact(
                f"{target} cannot be written: {error.strerror or error}\n  do: free some space or choose another path"
            ) from error
        finally:
            with contextlib.suppress(OSError):
                aside.unlink(missing_ok=True)
    return ExportReport(target, size, difference, program.model.opset_imports[""])


class _Flat(nn.Module):
    """Calls the model with tensors only, in and out; ``names`` are those of its last outputs."""

    skeleton: Callable[[], Any]
    names: Callable[[], list[str]]

    def __init__(self, model: nn.Module, skeleton: Any) -> None:
        super().__init__()
        self.model = model
        self.training = model.training
        names: list[str] = []
        # closures: the exporter puts plain attributes back as they were, and may trace into containers
        self.skeleton, self.names = lambda: skeleton, lambda: names

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        args, kwargs = unflatten(self.skeleton(), tensors)
        outputs = self.model(*args, **kwargs)
        flat, _ = flatten(outputs)
        self.names()[:] = _output_names(outputs, len(flat))
        return tuple(flat)


def _output_names(outputs: Any, count: int) -> list[str]:
    if isinstance(outputs, Mapping) and len(outputs) == count and all(_is_name(key) for key in outputs):
        return list(outputs)
    return ["output"] if count == 1 else [f"output_{index}" for index in range(count)]


def _input_names(model: nn.Module, skeleton: Any, count: int) -> list[str]:
    """The names of the forward's arguments where each of them is one tensor."""
    args, kwargs = skeleton
    names = [*list(inspect.signature(model.forward).parameters)[: len(args)], *kwargs]
    if len(args) + len(kwargs) == count == len(set(names)) and "args" not in names:
        return names
    return ["input"] if count == 1 else [f"input_{index}" for index in range(count)]


def _is_name(key: object) -> bool:
    return isinstance(key, str) and key.isidentifier()


def _need(packages: Sequence[str]) -> None:
    for package in packages:
        if find_spec(package) is None:
            raise MissingExtra(f"exporting to ONNX needs {package}\n  do: pip install 'secateur[export]'")


def _check_size(model: nn.Module) -> None:
    size = sum(t.numel() * t.element_size() for t in {id(t): t for _, t in all_tensors(model)}.values())
    if size >= LARGEST:
        raise BadRequest(f"the network has {size / 2**30:.1f} GiB of tensors; one ONNX file holds less than 2 GiB")


def _program(model: _Flat, examples: Sequence[torch.Tensor], opset: int | None, free_batch: bool) -> Any:
    """The exporter's program. For a free batch, one of 1 is doubled first: the exporter takes a 1 for a constant."""
    batch = examples[0].shape[0] if examples[0].dim() else 0
    marks = [free_batch and t.dim() > 0 and t.shape[0] == batch > 0 for t in examples]
    inputs = tuple(torch.cat([t, t]) if mark and batch == 1 else t for t, mark in zip(examples, marks, strict=True))
    free = (tuple({0: torch.export.Dim.DYNAMIC} if mark else None for mark in marks),)
    try:
        with _quiet():
            exported = torch.export.export(model, inputs, strict=False, dynamic_shapes=free if any(marks) else None)
            names = _input_names(model.model, model.skeleton(), len(examples))
            program = torch.onnx.export(
                exported,
                dynamo=True,
                verbose=False,
                opset_version=opset,
                input_names=names,
                output_names=[name + "_out" if name in names else name for name in model.names()],
                dynamic_shapes=tuple({0: "batch"} if mark else None for mark in marks) if any(marks) else None,
            )
    except Exception as error:  # the exporter raises dozens of types
        raise CannotCapture(
            f"the network cannot be exported to ONNX{' with a free batch' * any(marks)}: {_first_line(error)}\n"
            "  do: see that it runs on the example inputs at any batch, without Python control flow on tensor values"
        ) from error
    _plain_names(program)
    return program


def _check_known(opset: int | None) -> None:
    import onnx

    newest = onnx.defs.onnx_opset_version()
    if opset is not None and not 1 <= opset <= newest:
        raise BadRequest(
            f"opset {opset} does not exist: onnx {onnx.__version__} knows 1 to {newest}\n"
            "  do: leave opset out, and the exporter chooses one"
        )


def _check_written(program: Any, opset: int | None) -> None:
    """The exporter builds a newer opset and converts it; where it cannot, it keeps the newer one and goes on."""
    import onnx

    written = program.model.opset_imports[""]
    if opset is None or written == opset:
        return
    versions: dict[str, list[int]] = {}
    for schema in onnx.defs.get_all_schemas_with_history():
        if schema.domain == "":
            versions.setdefault(schema.name, []).append(schema.since_version)
    absent, changed = set(), set()
    for node in program.model.graph.all_nodes():
        since = versions.get(node.op_type, [1]) if node.domain == "" else [1]
        if min(since) > opset:
            absent.add(f"{node.op_type} is there since opset {min(since)}")
        elif any(opset < version <= written for version in since):
            changed.add(node.op_type)
    why = ", ".join(sorted(absent)) or (
        f"newer ones changed {', '.join(sorted(changed))}" if changed else "torch's exporter cannot convert to it"
    )
    raise BadRequest(
        f"opset {opset} cannot express this network: {why}; what the exporter made is of opset {written}\n"
        "  do: leave opset out, or ask for a higher one. No file was written"
    )


def _plain_names(program: Any) -> None:
    """Initialisers under the network's own names: ours has one module around it."""
    initializers = program.model.graph.initializers
    for name, value in list(initializers.items()):
        own = name.removeprefix("model.")
        if own != name and own not in initializers:
            value.name = own


def _first_line(error: BaseException) -> str:
    """The cause at the bottom, without the exporter's own page of advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


def _compare(
    model: _Flat, path: Path, examples: Sequence[torch.Tensor], tolerance: float, batches: Sequence[int]
) -> float:
    """The largest difference of the file to torch: the examples, then random inputs of every batch in ``batches``."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 4
    worst, doing = 0.0, "open the exported network"
    try:
        session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        for what, inputs in [("the example inputs", list(examples)), *_random(examples, batches)]:
            doing = f"run the exported network on {what}"
            wanted = [tensor.numpy() for tensor in model(*inputs)]
            feed = {slot.name: x.numpy() for slot, x in zip(session.get_inputs(), inputs, strict=True)}
            worst = max(worst, difference(session.run(None, feed), wanted))
    except Exception as error:
        if type(error).__module__.split(".")[0] != "onnxruntime":
            raise
        raise BadArtifact(
            f"ONNX Runtime cannot {doing}: {_first_line(error)}\n"
            "  do: export a float32 network; see that its forward does not fix the batch. No file was written"
        ) from error
    if not worst <= tolerance:
        raise BadArtifact(
            f"the exported network differs from torch by {worst:.1e} (relative), more than {tolerance:.1e}\n"
            "  do: try another opset, or a higher tolerance if you know why. No file was written"
        )
    return worst


def _random(examples: Sequence[torch.Tensor], batches: Sequence[int]) -> Iterator[tuple[str, list[torch.Tensor]]]:
    """Normal inputs at every batch of ``batches``; rows of the examples where they are integers."""
    generator = torch.Generator().manual_seed(0)
    batch = examples[0].shape[0] if examples[0].dim() else 0
    for size in batches:
        rows = torch.arange(size) % max(batch, 1)
        inputs = []
        for tensor in examples:
            if tensor.dim() == 0 or tensor.shape[0] != batch:
                inputs.append(tensor)
            elif tensor.is_floating_point():
                inputs.append(torch.randn((size, *tensor.shape[1:]), generator=generator, dtype=tensor.dtype))
            else:
                inputs.append(tensor[rows])
        yield f"a batch of {size}", inputs


def difference(found: Sequence[Any], wanted: Sequence[Any], *, floor: float = SMALL) -> float:
    """``max|found - wanted| / max(|wanted|, floor)``, the worst of all outputs; infinite where shapes or NaNs
    disagree."""
    worst = 0.0 if len(found) == len(wanted) else np.inf
    for a, b in zip(found, wanted, strict=False):
        if a.shape != b.shape:
            return np.inf
        a, b = a.astype(np.float64), b.astype(np.float64)
        same = (a == b) | (np.isnan(a) & np.isnan(b))
        if not same.all():
            finite = np.abs(b[np.isfinite(b)])
            gap = np.abs(a - b)[~same].max() / max(finite.max(initial=0.0), floor)
            worst = max(worst, float(gap) if np.isfinite(gap) else np.inf)
    return worst


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter prints, logs and warns at length about what is checked here anyway."""
    loggers = [logging.getLogger(name) for name in ("torch", "torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
