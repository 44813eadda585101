"""One pass of ``torch.export`` over a model, on fake tensors: a flat graph of ATen calls with the user's names."""

from __future__ import annotations

import contextlib
import copy
import gc
import io
import logging
import operator
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import fx, nn
from torch._decomp import decomposition_table

from secateur.errors import CannotCapture
from secateur.nests import flatten, leaves, unflatten


@dataclass(frozen=True, eq=False)
class Capture:
    """One pass through the model: ``get_attr``, ``placeholder``, ``call_function`` and ``output`` nodes in ``graph``.

    ``names``: ``get_attr`` target -> canonical ``state_dict`` name; targets that are not there are ``constants``.
    ``skeleton``: what the user's forward returns, with the places of its tensors marked (see ``unflatten``).
    ``batched``: for every input tensor whether its axis 0 counts examples (two in the capture); ``free``: whether their
    number is symbolic, so that the graph runs on any.
    """

    mode: str
    graph: fx.Graph
    names: Mapping[str, str]
    constants: Mapping[str, torch.Tensor]
    skeleton: Any
    batched: tuple[bool, ...]
    free: bool


def canonical_names(model: nn.Module) -> dict[str, str]:
    """Every name of a parameter or buffer -> the first name of the same tensor (tied weights share one)."""
    first: dict[int, str] = {}
    return {name: first.setdefault(id(t), name) for name, t in all_tensors(model)}


def all_tensors(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """All parameters, then all buffers, under every name they have (buffers outside the state_dict too)."""
    return [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]


@contextlib.contextmanager
def in_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """``model`` in train or eval mode for the block's length; every submodule's own flag, and every
    counter, is put back."""
    flags = {m: m.training for m in model.modules()}
    counters = {b: b.clone() for b in model.buffers() if not b.is_floating_point() and b.numel() == 1}
    try:
        for m in flags:
            m.training = training
        yield
    finally:
        for m, flag in flags.items():
            m.training = flag
        for counter, value in counters.items():  # capture really counts up num_batches_tracked
            counter.copy_(value)


_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size, torch.SymInt)


class _Flat(nn.Module):
    """Calls the model with tensors only, in and out, so that any container of outputs can be captured."""

    def __init__(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        super().__init__()
        self.model = model
        self.skeleton_in = flatten((args, dict(kwargs)))[1]
        found: list[Any] = []
        self.found = lambda: found  # a closure: the exporter puts plain attributes back as they were

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        args, kwargs = unflatten(self.skeleton_in, tensors)
        out, skeleton = flatten(self.model(*args, **kwargs))
        strange = [type(v).__name__ for v in leaves(skeleton) if not isinstance(v, _PLAIN)]
        if strange or not out:
            raise CannotCapture(
                f"the model returns {f'a {strange[0]}, which may hide tensors' if strange else 'no tensor'}\n"
                "  do: return tensors in tuples, lists, dicts or dataclasses"
            )
        if any(isinstance(v, torch.SymInt) for v in leaves(skeleton)):
            raise CannotCapture(
                "the model returns a number that depends on the batch, which a captured graph cannot compute\n"
                "  do: leave the number to the caller, or return it as a tensor"
            )
        self.found().append(skeleton)
        return tuple(out)


def capture(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], mode: str, free: bool = False
) -> Capture:
    tensors, _ = flatten((args, dict(kwargs)))
    if not tensors:
        raise CannotCapture("the example inputs hold no tensor\n  do: pass at least one tensor")
    if any(t.numel() == 0 for t in tensors):
        shapes = ", ".join(str(tuple(t.shape)) for t in tensors)
        raise CannotCapture(
            f"the example inputs ({shapes}) are empty, so nothing can be checked on them\n"
            "  do: pass tensors of at least one example"
        )
    flat = _Flat(model, args, kwargs)
    program, batched, symbolic = _export(flat, tensors, mode, free)
    graph, attributes = _with_attributes(program)
    canonical = canonical_names(model)
    names: dict[str, str] = {}
    constants: dict[str, torch.Tensor] = {}
    for target in attributes:
        own = target.removeprefix("model.")
        if own in canonical:
            names[target] = canonical[own]
        elif isinstance(program.constants.get(target), torch.Tensor):
            constants[target] = program.constants[target].detach()
    return Capture(mode, graph, names, constants, flat.found()[-1], batched, symbolic)


def _with_attributes(program: torch.export.ExportedProgram) -> tuple[fx.Graph, list[str]]:
    """The exported graph with parameters, buffers and constants fetched by name instead of passed in; those names."""
    signature = program.graph_signature
    passed_in = {
        **signature.inputs_to_parameters,
        **signature.inputs_to_buffers,
        **signature.inputs_to_lifted_tensor_constants,
    }
    graph = fx.Graph()
    twin: dict[fx.Node, Any] = {}
    for node in program.graph.nodes:
        if node.op == "placeholder" and node.name in passed_in:
            twin[node] = graph.create_node("get_attr", passed_in[node.name])
            twin[node].meta = dict(node.meta)
        elif node.op == "output":
            own = set(signature.user_outputs)
            graph.output(tuple(twin[n] if isinstance(n, fx.Node) else n for n in node.args[0] if str(n) in own))
        else:
            _copy(node, graph, twin, program.graph_module)
    return graph, list(dict.fromkeys(passed_in.values()))


def _copy(node: fx.Node, graph: fx.Graph, twin: dict[fx.Node, Any], owner: nn.Module) -> None:
    """One node into ``graph``; what stands under ``no_grad`` or ``autocast(enabled=False)`` is written out."""
    name = str(node.target)
    if "_assert_tensor_metadata" in name:
        return  # it pins float32, and we check in float64
    if node.op == "get_attr":
        twin[node] = getattr(owner, name)
    elif name in ("wrap_with_set_grad_enabled", "wrap_with_autocast"):
        start = next(i for i, a in enumerate(node.args) if isinstance(a, fx.Node))
        if name == "wrap_with_autocast" and node.args[2]:
            raise CannotCapture(
                "the model switches autocast on inside its forward, which changes dtypes behind the graph's back\n"
                "  do: put the autocast around the call of the model"
            )
        inner: nn.Module = twin[cast(fx.Node, node.args[start])]
        values = iter(fx.node.map_arg(node.args[start + 1 :], lambda n: twin[n]))
        for part in inner.graph.nodes:  # type: ignore[union-attr]
            if part.op == "placeholder":
                twin[part] = next(values)
            elif part.op == "output":
                twin[node] = fx.node.map_arg(part.args[0], lambda n: twin[n])
            else:
                _copy(part, graph, twin, inner)
    elif node.target is operator.getitem and isinstance(twin[cast(fx.Node, node.args[0])], (tuple, list)):
        twin[node] = twin[cast(fx.Node, node.args[0])][node.args[1]]
    elif isinstance(node.target, torch._ops.HigherOrderOperator):
        raise CannotCapture(
            f"the model's forward has a part of its own kind ({name}) that is not understood\n"
            "  do: take it out of forward, or write it in plain operations"
        )
    else:
        twin[node] = graph.node_copy(node, lambda n: twin[n])


def _export(flat: _Flat, tensors: list[torch.Tensor], mode: str, free: bool) -> tuple[Any, tuple[bool, ...], bool]:
    """Try with axis 0 as the batch of the inputs that are as long as the first one, then of all, then of all but one of
    the likely ones, then of none.

    Batched inputs are captured with two examples. ``free`` leaves the number of examples symbolic, which takes about
    twice as long, and falls back to the inputs as they are.
    """
    first = tensors[0].shape[0] if tensors[0].dim() else 0
    likely = [t.dim() > 0 and t.shape[0] == first for t in tensors]
    but_one = [[m and i != j for i, m in enumerate(likely)] for j in range(1, len(tensors)) if likely[j]]
    attempts = [likely, [t.dim() > 0 for t in tensors], *but_one, [False] * len(tensors)]
    attempts = [marks for i, marks in enumerate(attempts) if marks not in attempts[:i]]
    errors: list[Exception] = []
    with in_mode(flat.model, mode == "train"), _quiet(), _quick_export(), torch.no_grad():
        for marks in attempts:
            two = [torch.cat([t[:1], t[:1]]) if m else t.clone() for t, m in zip(tensors, marks, strict=True)]
            symbolic = free and any(marks)
            shapes = (tuple({0: torch.export.Dim.DYNAMIC} if m else None for m in marks),) if symbolic else None
            try:
                program = torch.export.export(flat, tuple(two), strict=False, dynamic_shapes=shapes)
                return program, tuple(marks), symbolic
            except CannotCapture:
                raise
            except Exception as error:  # the exporter raises dozens of types; the last one is reported below
                errors.append(error)
    raise _explain(flat, tensors, mode, errors[-1])


def _explain(flat: _Flat, tensors: list[torch.Tensor], mode: str, error: Exception) -> CannotCapture:
    shapes = ", ".join(str(tuple(t.shape)) for t in tensors)
    try:
        with in_mode(flat.model, mode == "train"), torch.no_grad():
            copy.deepcopy(flat)(*tensors)
    except Exception as own:
        return CannotCapture(
            f"the model does not run on the example inputs of shape {shapes}: {_first_line(own)}\n"
            "  do: check the inputs' shapes, dtypes and number; the model must run on them as it is"
        )
    return CannotCapture(
        f"the model runs, but torch.export cannot capture it in {mode} mode: {_first_line(error)}\n"
        f"  at: {_user_line(error)}\n"
        "  do: avoid Python control flow that depends on tensor values, .item() and .numpy() in forward, and remove "
        "forward hooks that do so"
    )


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


def _user_line(error: BaseException) -> str:
    """The innermost line of a traceback that is not torch's own nor ours."""
    found, tb = "unknown", error.__traceback__
    while tb is not None:
        file = tb.tb_frame.f_code.co_filename
        if "/torch/" not in file and "/secateur/" not in file:
            found = f"{file.rsplit('/', 1)[-1]}:{tb.tb_lineno}"
        tb = tb.tb_next
    return found


@contextlib.contextmanager
def _quick_export() -> Iterator[None]:
    """The exporter makes millions of short-lived objects, and works out the shape of a batch norm in eval mode by
    running its decomposition on fake tensors: the collector waits, and the shape is that of the input. Half of the time
    on DenseNet-121."""
    table, op = decomposition_table, torch.ops.aten._native_batch_norm_legit_no_training.default
    collecting, old = gc.isenabled(), table.get(op)
    try:
        gc.disable()
        if old is not None:
            table[op] = _batch_norm_shape
        yield
    finally:
        if old is not None:
            table[op] = old
        if collecting:
            gc.enable()


def _batch_norm_shape(x: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.empty_like(x), x.new_empty(0), x.new_empty(0)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter logs and warns at length about what we handle ourselves."""
    logger = logging.getLogger("torch")
    level = logger.level
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logger.setLevel(logging.CRITICAL)
        try:
            with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
                yield
        finally:
            logger.setLevel(level)


def is_tensor_node(node: fx.Node, capture: Capture) -> bool:
    """Whether ``node`` fetches a parameter or buffer of the model."""
    return node.op == "get_attr" and str(node.target) in capture.names
