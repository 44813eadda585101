"""Capture: a model and example inputs become a flat graph of ATen calls, with the user's names and source lines.

``torch.export`` runs the model once on fake tensors; nothing is computed and nothing of the user's is changed. Two
examples are enough to decide with; what has to run on any number of them is captured again with a symbolic batch.
Networks with parameters that only train mode uses (auxiliary heads) are captured in train mode as well, so that those
are pruned along with the rest.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import gc
import inspect
import io
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, cast

import torch
from torch import fx, nn
from torch._decomp import decomposition_table

from secateur.errors import CannotCapture
from secateur.nests import InputOrder, flatten, unflatten

Inputs = torch.Tensor | Sequence[Any] | Mapping[str, Any]


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


@dataclass(frozen=True, eq=False)
class Graph:
    """A captured model. ``model`` is the user's own module, unwrapped; ``args`` and ``kwargs`` the example inputs.

    ``captures``: the eval pass first, then the train pass if some parameters occur only there. ``train_note`` says why
    a needed train pass could not be captured (its parameters are then locked).
    """

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    captures: tuple[Capture, ...]
    train_note: str = ""
    inputs: InputOrder = field(default_factory=lambda: InputOrder((), ()))
    memo: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """Canonical ``state_dict`` name -> parameter or buffer; a tied tensor stands under its first name only."""
        names = canonical_names(self.model)
        return {name: t for name, t in all_tensors(self.model) if names[name] == name}

    @cached_property
    def used(self) -> frozenset[str]:
        """Names of the tensors that some captured pass really uses."""
        return frozenset(
            c.names[str(n.target)] for c in self.captures for n in c.graph.nodes if is_tensor_node(n, c) and n.users
        )


def trace(model: nn.Module | Graph, example_inputs: Inputs | None = None) -> Graph:
    """Capture ``model`` on ``example_inputs``: a tensor, a tuple of positional arguments or a dict of keyword ones.

    A ``Graph`` is returned as it is, so that every verb may be given one and the cost of capture is paid once. Wrapped
    models (``DistributedDataParallel``, ``torch.compile``) are unwrapped; models on a GPU or in half precision are
    captured from a float32 copy on the CPU. Training flags are put back as they were.

    Raises ``CannotCapture`` if the inputs do not fit the model or its forward cannot be traced.
    """
    if isinstance(model, Graph):
        return model
    dense = unwrap(model)
    _check_weights_exist(dense)
    args, kwargs = as_arguments(example_inputs)
    graph = Graph(dense, args, kwargs, (), inputs=InputOrder(*_names_and_skeleton(dense, args, kwargs)))
    graph = dataclasses.replace(graph, captures=(_capture(*_plain_call(graph), "eval"),))
    everything = all(name in graph.used for name, _ in dense.named_parameters())
    return graph if everything else with_train_pass(graph)


def with_train_pass(graph: Graph) -> Graph:
    """The graph with its train pass captured too; where that fails, ``train_note`` says why. Done once."""
    if len(graph.captures) > 1 or graph.train_note:
        return graph
    if "with train pass" not in graph.memo:
        try:
            captures = (*graph.captures, _capture(*_plain_call(graph), "train", graph.captures[0].free))
            graph.memo["with train pass"] = dataclasses.replace(graph, captures=captures, memo={})
        except CannotCapture as error:
            note = str(error).splitlines()[0]
            graph.memo["with train pass"] = dataclasses.replace(graph, train_note=note, memo={})
    return cast(Graph, graph.memo["with train pass"])


def with_free_batch(graph: Graph) -> Graph:
    """The graph captured so that it runs on any number of examples, where the model allows it (see ``Capture.free``):
    what ``masked`` and the graph networks need, and deciding does not. Done once."""
    if graph.captures[0].free:
        return graph
    if "free" not in graph.memo:
        captures = tuple(_capture(*_plain_call(graph), c.mode, free=True) for c in graph.captures)
        graph.memo["free"] = dataclasses.replace(graph, captures=captures, memo={})
    return cast(Graph, graph.memo["free"])


def _plain_call(graph: Graph) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    args, kwargs = tuple(plain(a) for a in graph.args), {k: plain(v) for k, v in graph.kwargs.items()}
    return to_plain_cpu(graph.model), args, kwargs


def _names_and_skeleton(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[tuple[str, ...], Any]:
    parameters = list(inspect.signature(model.forward).parameters.values())
    plain_ones = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    names = [plain_ones[i] if i < len(plain_ones) else f"*{i}" for i in range(len(args))]
    return (*names, *kwargs), flatten([*args, *kwargs.values()])[1]


def unwrap(model: nn.Module) -> nn.Module:
    """The user's own module inside ``torch.compile``, ``DistributedDataParallel`` and ``DataParallel``."""
    while True:
        if isinstance(model, torch.jit.ScriptModule):
            raise CannotCapture(
                "the model is TorchScript, whose source is gone and cannot be captured\n"
                "  do: pass the nn.Module that it was scripted or traced from"
            )
        if not isinstance(model, nn.Module):
            raise CannotCapture(f"expected a torch.nn.Module, got {type(model).__name__}\n  do: pass the model itself")
        if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            model = model.module
        elif hasattr(model, "_orig_mod"):
            model = cast(nn.Module, model._orig_mod)
        else:
            return model


def as_arguments(example_inputs: Inputs | None) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Example inputs as ``(args, kwargs)``."""
    if isinstance(example_inputs, torch.Tensor):
        return (example_inputs,), {}
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, (tuple, list)) and example_inputs:
        return tuple(example_inputs), {}
    raise CannotCapture(
        f"example inputs are needed, got {type(example_inputs).__name__}\n"
        "  do: pass a tensor, a tuple of positional arguments, or a dict of keyword arguments"
    )


def _check_weights_exist(model: nn.Module) -> None:
    for name, tensor in all_tensors(model):
        if torch.nn.parameter.is_lazy(tensor):
            raise CannotCapture(
                f"{name!r} has no shape yet: its module is lazy\n  do: run the model once on an example first"
            )
        if tensor.is_meta:
            raise CannotCapture(
                f"{name!r} is on the meta device and has no values\n  do: load the weights onto a real device first"
            )


def canonical_names(model: nn.Module) -> dict[str, str]:
    """Every name of a parameter or buffer -> the first name of the same tensor (tied weights share one)."""
    first: dict[int, str] = {}
    return {name: first.setdefault(id(t), name) for name, t in all_tensors(model)}


def all_tensors(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """All parameters, then all buffers, under every name they have (buffers outside the state_dict too)."""
    return [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]


def to_plain_cpu(model: nn.Module) -> nn.Module:
    """``model`` itself if it lives on the CPU in float32 or float64, else such a float32 copy."""
    odd = [t for _, t in all_tensors(model) if t.device.type != "cpu" or t.dtype in (torch.float16, torch.bfloat16)]
    if not odd:
        return model
    return copy.deepcopy(model).to(device="cpu", dtype=torch.float32)


def plain(value: Any) -> Any:
    """``value`` as float32, float64 or integers on the CPU, if it is a tensor."""
    if not isinstance(value, torch.Tensor):
        return value
    if value.is_meta:
        raise CannotCapture(
            f"an example input {tuple(value.shape)} is on the meta device and has no values\n  do: pass a real tensor"
        )
    value = value.detach().cpu()
    return value.float() if value.dtype in (torch.float16, torch.bfloat16) else value


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
        self.found().append(skeleton)
        return tuple(out)


def _capture(
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
    graph, twin = fx.Graph(), {}
    for node in program.graph.nodes:
        if node.op == "placeholder" and node.name in passed_in:
            twin[node] = graph.create_node("get_attr", passed_in[node.name])
            twin[node].meta = dict(node.meta)
        elif node.op == "output":
            own = set(signature.user_outputs)
            graph.output(tuple(twin[n] if isinstance(n, fx.Node) else n for n in node.args[0] if str(n) in own))
        elif node.op != "call_function" or "_assert_tensor_metadata" not in str(node.target):
            twin[node] = graph.node_copy(node, lambda n: twin[n])  # asserts pin float32, and we check in float64
    return graph, list(dict.fromkeys(passed_in.values()))


def _export(flat: _Flat, tensors: list[torch.Tensor], mode: str, free: bool) -> tuple[Any, tuple[bool, ...], bool]:
    """Try with axis 0 of every input as the batch, then only of those as long as the first one's (or all but one of
    them), then of none.

    Batched inputs are captured with two examples. ``free`` leaves the number of examples symbolic, which takes about
    twice as long, and falls back to the inputs as they are.
    """
    first = tensors[0].shape[0] if tensors[0].dim() else 0
    likely = [t.dim() > 0 and t.shape[0] == first for t in tensors]
    but_one = [[m and i != j for i, m in enumerate(likely)] for j in range(1, len(tensors)) if likely[j]]
    attempts = [[t.dim() > 0 for t in tensors], likely, *but_one, [False] * len(tensors)]
    errors: list[Exception] = []
    with in_mode(flat.model, mode == "train"), _quiet(), _quick_export(), torch.no_grad():
        for marks in attempts:
            two = [torch.cat([t[:1], t[:1]]) if m else t.clone() for t, m in zip(tensors, marks, strict=True)]
            symbolic = free and any(marks)
            shapes = (tuple({0: torch.export.Dim.DYNAMIC} if m else None for m in marks),) if symbolic else None
            try:
                program = torch.export.export(flat, tuple(two), strict=False, dynamic_shapes=shapes)
                return program, tuple(marks), symbolic
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
