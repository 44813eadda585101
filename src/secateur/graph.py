"""Capture: a model and example inputs become a flat graph of ATen calls, with the user's names and source lines.

``torch.export`` runs the model once on fake tensors; nothing is computed and nothing of the user's is changed. The
batch (axis 0 of every input) stays symbolic wherever the model allows it. Parameters that the network does not use in
eval mode (auxiliary heads) are captured a second time in train mode, so that they are pruned along with the rest.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import inspect
import io
import logging
import operator
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, cast

import torch
from torch import fx, nn

from secateur.errors import CannotCapture

Inputs = torch.Tensor | Sequence[Any] | Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Capture:
    """One pass through the model: ``get_attr``, ``placeholder``, ``call_function`` and ``output`` nodes in ``graph``.

    ``names``: ``get_attr`` target -> canonical ``state_dict`` name; targets that are not there are ``constants``.
    ``skeleton``: what the user's forward returns, with the places of its tensors marked (see ``unflatten``); ``free``:
    for every input tensor whether its axis 0 may have any size.
    """

    mode: str
    graph: fx.Graph
    names: Mapping[str, str]
    constants: Mapping[str, torch.Tensor]
    skeleton: Any
    free: tuple[bool, ...]


@dataclass(frozen=True)
class InputOrder:
    """How the tensors of a call stand in the captured graph: ``names`` of the arguments that were given, in order, and
    the ``skeleton`` of their values."""

    names: tuple[str, ...]
    skeleton: Any

    def flat(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
        """The tensors of a call in captured order; ``TypeError`` for a call that was not captured like this."""
        given = dict(zip(self.names, args, strict=False))
        wrong = [n for n in kwargs if n in given or n not in self.names]
        given |= kwargs
        if wrong or len(args) > len(self.names) or len(given) < len(self.names):
            raise TypeError(
                f"this network was captured with the arguments ({', '.join(self.names)}), and takes just these; "
                f"got {len(args)} positional ones and {sorted(kwargs)}"
            )
        tensors, skeleton = flatten([given[n] for n in self.names])
        if skeleton != self.skeleton:
            raise TypeError(
                "this network was captured with other values or containers in its arguments; trace it again"
            )
        return tensors


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
    here = to_plain_cpu(dense)
    kwargs_cpu = {k: plain(v) for k, v in kwargs.items()}
    args_cpu = tuple(plain(a) for a in args)
    order = InputOrder(*_names_and_skeleton(dense, args, kwargs))
    graph = Graph(dense, args, kwargs, (_capture(here, args_cpu, kwargs_cpu, "eval"),), inputs=order)
    if all(name in graph.used for name, _ in here.named_parameters()):
        return graph
    return with_train_pass(graph)


def with_train_pass(graph: Graph) -> Graph:
    """The graph with its train pass captured too; where that fails, ``train_note`` says why. Done once."""
    if len(graph.captures) > 1 or graph.train_note:
        return graph
    found = graph.memo.get("with train pass")
    if found is None:
        model = to_plain_cpu(graph.model)
        args, kwargs = tuple(plain(a) for a in graph.args), {k: plain(v) for k, v in graph.kwargs.items()}
        try:
            captures = (*graph.captures, _capture(model, args, kwargs, "train"))
            found = dataclasses.replace(graph, captures=captures, memo={})
        except CannotCapture as error:
            found = dataclasses.replace(graph, train_note=str(error).splitlines()[0], memo={})
        graph.memo["with train pass"] = found
    return cast(Graph, found)


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
    if not isinstance(value, torch.Tensor):
        return value
    value = value.detach().cpu()
    return value.float() if value.dtype in (torch.float16, torch.bfloat16) else value


@contextlib.contextmanager
def in_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """``model`` in train or eval mode for the block's length; every submodule's own flag is put back."""
    flags = {m: m.training for m in model.modules()}
    try:
        for m in flags:
            m.training = training
        yield
    finally:
        for m, flag in flags.items():
            m.training = flag


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


def _capture(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], mode: str) -> Capture:
    tensors, _ = flatten((args, dict(kwargs)))
    if not tensors:
        raise CannotCapture("the example inputs hold no tensor\n  do: pass at least one tensor")
    if any(t.is_meta or t.numel() == 0 for t in tensors):
        shapes = ", ".join(str(tuple(t.shape)) for t in tensors)
        raise CannotCapture(
            f"the example inputs ({shapes}) are empty or on the meta device, so nothing can be checked on them\n"
            "  do: pass real tensors of at least one example"
        )
    flat = _Flat(model, args, kwargs)
    program, free = _export(flat, tensors, mode)
    module = program.module(check_guards=False)
    prefix = "model."
    names: dict[str, str] = {}
    constants: dict[str, torch.Tensor] = {}
    canonical = canonical_names(model)
    graph = module.graph
    for node in list(graph.nodes):
        if node.op == "get_attr":
            target = str(node.target)
            value = operator.attrgetter(target)(module)
            own = target.removeprefix(prefix)
            if own in canonical:
                names[target] = canonical[own]
            elif isinstance(value, torch.Tensor):
                constants[target] = value.detach()
        elif node.op == "call_function" and "_assert_tensor_metadata" in str(node.target):
            graph.erase_node(node)  # it pins float32, and we check in float64
    graph.set_codegen(fx.graph.CodeGen())
    return Capture(mode, graph, names, constants, flat.found()[-1], free)


def _export(flat: _Flat, tensors: list[torch.Tensor], mode: str) -> tuple[Any, tuple[bool, ...]]:
    """Try with every input's axis 0 free, then only those as long as the first one's, then nothing free."""
    free = torch.export.Dim.DYNAMIC
    batch = tensors[0].shape[0] if tensors[0].dim() else 0
    attempts = [
        [t.dim() > 0 and t.shape[0] > 0 for t in tensors],
        [t.dim() > 0 and t.shape[0] == batch > 0 for t in tensors],
    ]
    errors: list[Exception] = []
    with in_mode(flat.model, mode == "train"), _quiet(), torch.no_grad():
        for marks in [*attempts, [False] * len(tensors)]:
            doubled = [torch.cat([t, t]) if m and t.shape[0] == 1 else t for t, m in zip(tensors, marks, strict=True)]
            shapes = (tuple({0: free} if m else None for m in marks),) if any(marks) else None
            if mode == "train" and not any(marks):
                doubled = [torch.cat([t, t]) if t.dim() and t.shape[0] == 1 else t for t in tensors]
            try:
                return torch.export.export(flat, tuple(doubled), strict=False, dynamic_shapes=shapes), tuple(marks)
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


@dataclass(frozen=True)
class _Leaf:
    index: int


def flatten(value: Any) -> tuple[list[torch.Tensor], Any]:
    """The tensors in a nest of tuples, lists, dicts and dataclasses, and the nest with their places marked."""
    tensors: list[torch.Tensor] = []

    def mark(v: Any) -> Any:
        if isinstance(v, torch.Tensor):
            tensors.append(v)
            return _Leaf(len(tensors) - 1)
        return _map_container(mark, v)

    skeleton = mark(value)
    return tensors, skeleton


def unflatten(skeleton: Any, tensors: Sequence[torch.Tensor]) -> Any:
    """The inverse of ``flatten``."""

    def fill(v: Any) -> Any:
        return tensors[v.index] if isinstance(v, _Leaf) else _map_container(fill, v)

    return fill(skeleton)


def _map_container(function: Callable[[Any], Any], value: Any) -> Any:
    if isinstance(value, tuple):
        items = [function(v) for v in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    if isinstance(value, list):
        return [function(v) for v in value]
    if isinstance(value, Mapping):
        new = copy.copy(value)
        for k in value:
            new[k] = function(value[k])  # type: ignore[index]
        return new
    if dataclasses.is_dataclass(value) and not isinstance(value, (type, _Leaf)):
        twin = copy.copy(value)
        for f in dataclasses.fields(value):
            object.__setattr__(twin, f.name, function(getattr(value, f.name)))
        return twin
    return value


# ---------------------------------------------------------------------------------------------- reading a node


def is_tensor_node(node: fx.Node, capture: Capture) -> bool:
    """Whether ``node`` fetches a parameter or buffer of the model."""
    return node.op == "get_attr" and str(node.target) in capture.names


def op_name(node: fx.Node) -> str:
    """``conv2d``, ``add``, ``getitem`` ...: the ATen name without namespace, overload and in-place mark."""
    if node.target is operator.getitem:
        return "getitem"
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return getattr(node.target, "__name__", str(node.target))
    name = str(schema.name).split("::")[-1]
    return name[:-1] if name.endswith("_") and not name.startswith("__") else name


def named_args(node: fx.Node) -> dict[str, Any]:
    """Every argument of an ATen call by its name in the schema, defaults filled in."""
    found: dict[str, Any] = {}
    for i, a in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
        if i < len(node.args):
            found[a.name] = node.args[i]
        else:
            found[a.name] = node.kwargs.get(a.name, a.default_value if a.has_default_value() else None)
    return found


def as_int(size: Any) -> int:
    """A size of the captured example, symbolic or not."""
    return size if isinstance(size, int) else int(size.node.hint)


def shape_of(node: fx.Node) -> tuple[int, ...] | None:
    """The shape that a node's tensor had in the capture; ``None`` if it is no single tensor."""
    value = node.meta.get("val")
    return tuple(as_int(k) for k in value.shape) if isinstance(value, torch.Tensor) else None


def source_line(node: fx.Node) -> str:
    """``net.py:84: x = x.softmax(1)``: the innermost line of the user's own code (not torch's) behind a node."""
    lines = str(node.meta.get("stack_trace") or "").splitlines()
    frames = [(lines[i], lines[i + 1].strip()) for i in range(len(lines) - 1) if lines[i].lstrip().startswith("File ")]
    for head, code in reversed(frames):
        file, _, rest = head.strip().removeprefix('File "').partition('", line ')
        if "/torch/" not in file and "/secateur/graph.py" not in file:
            return f"{file.rsplit('/', 1)[-1]}:{rest.split(',')[0]}: {code}"
    return "unknown source"


def module_stack(node: fx.Node) -> list[tuple[str, str]]:
    """The modules a node was called in, outermost first: ``(path, class name)``."""
    stack = node.meta.get("nn_module_stack") or {}
    return [(path.removeprefix("model").removeprefix("."), str(kind)) for path, kind in stack.values()]
