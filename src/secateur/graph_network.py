"""A network made of a rewritten graph: what ``apply`` returns where the user's own forward cannot be made to fit.

It is plain data, the generated source of its forward and its tensors under their old names, so that it pickles, copies,
moves between devices and dtypes, and switches between train and eval mode like any other module.
"""

from __future__ import annotations

import inspect
import math
import operator
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from secateur.capture import canonical_names
from secateur.interpreter import CASTS
from secateur.masks import register
from secateur.nests import InputOrder, unflatten
from secateur.nodes import module_stack, op_name
from secateur.rewrites import Rewritten

_MODE_FLAGS = {
    "batch_norm": "training",
    "dropout": "train",
    "feature_dropout": "train",
    "instance_norm": "use_input_stats",
}


class GraphNetwork(nn.Module):
    """Runs a pass, the source of a Python function of ``(self, *tensors)``: one for eval mode, one for train mode.

    ``sources(network)`` shows them. Batch norm and dropout follow the train or eval mode of the submodule they came
    from, so that a part of the network can be frozen as before.
    """

    def __init__(self, program: Program, tensors: Mapping[str, torch.Tensor], transient: Container[str]) -> None:
        super().__init__()
        self.__dict__["_secateur_program"] = program  # no plain attribute: the user's modules may bear any name
        for path in program.modules:
            above, _, name = path.rpartition(".")
            self.get_submodule(above).add_module(name, nn.Module())
        register(self, tensors, transient)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        program: Program = self.__dict__["_secateur_program"]
        mode = "train" if self.training else "eval"
        out = _compiled(program.sources[mode])(self, *program.inputs.flat(args, kwargs))
        return unflatten(program.skeletons[mode], out)


@dataclass(frozen=True)
class Program:
    """What a ``GraphNetwork`` runs: a source and the form of its outputs for each mode, the order of its inputs, and
    the paths of its submodules, parents first, in the dense network's order: they hold tensors, and the mode of batch
    norm and dropout."""

    sources: Mapping[str, str]
    skeletons: Mapping[str, Any]
    inputs: InputOrder
    modules: tuple[str, ...]


def sources(network: GraphNetwork) -> Mapping[str, str]:
    """The generated Python source of each mode."""
    program: Program = network.__dict__["_secateur_program"]
    return program.sources


_cache: dict[str, Callable[..., Any]] = {}


def _compiled(source: str) -> Callable[..., Any]:
    function = _cache.get(source)
    if function is None:
        space: dict[str, Any] = {
            "torch": torch,
            "operator": operator,
            "inf": math.inf,
            "nan": math.nan,
            "device": torch.device,
            "getattr": getattr,
            "NoneType": type(None),
        }
        exec(compile(source, "<secateur graph>", "exec"), space)
        function = _cache[source] = space["forward"]
    return function


@dataclass(frozen=True)
class Pass:
    """One rewritten pass and what its names stand for."""

    rewritten: Rewritten
    names: Mapping[str, str]
    constants: Mapping[str, torch.Tensor]
    skeleton: Any


def build(
    passes: Mapping[str, Pass],
    inputs: InputOrder,
    dense: nn.Module,
    tensors: Mapping[str, torch.Tensor],
) -> GraphNetwork:
    """A network from rewritten passes (``"eval"``, and ``"train"`` where it was captured) and pruned ``tensors``.

    Without a train pass, the eval pass with batch norm and dropout switched to training stands for it.
    """
    texts: dict[str, str] = {}
    tables: dict[str, torch.Tensor] = {}
    switches: set[str] = set()
    for mode in ("eval", "train"):
        origin = mode if mode in passes else "eval"
        texts[mode], found, paths = _finished(passes[origin], dense, prefix=f"_secateur_{origin}")
        tables |= found
        switches |= paths
    skeletons = {mode: passes.get(mode, passes["eval"]).skeleton for mode in ("eval", "train")}
    needed = switches | {name.rpartition(".")[0] for name in tensors}
    modules = [
        path for path, _ in dense.named_modules() if path and any(f"{n}.".startswith(f"{path}.") for n in needed)
    ]
    program = Program(texts, skeletons, inputs, tuple(modules))
    device = next((t.device for t in tensors.values()), torch.device("cpu"))
    own = {name: table.to(device) for name, table in tables.items()}
    every_name = {name: tensors[first] for name, first in canonical_names(dense).items() if first in tensors}
    lasting = dense.state_dict().keys()
    network = GraphNetwork(program, {**every_name, **own}, {*own, *(n for n in every_name if n not in lasting)})
    for path, module in network.named_modules():
        module.training = dense.get_submodule(path).training
    return network


def _finished(one: Pass, dense: nn.Module, *, prefix: str) -> tuple[str, dict[str, torch.Tensor], set[str]]:
    """Source of one pass: own names for tensors; device, dtype and mode looked up instead of written down."""
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(one.rewritten.graph, mapping))
    tables: dict[str, torch.Tensor] = {}
    like: fx.Node | None = None
    captured: torch.dtype | None = None
    for old, node in mapping.items():
        target = str(node.target)
        if node.op == "get_attr" and target in one.names:
            node.target = one.names[target]
            value = old.meta.get("val")
            if like is None and isinstance(value, torch.Tensor) and value.is_floating_point():
                like, captured = node, value.dtype
        elif node.op == "get_attr":
            fixed = one.rewritten.tables.get(target, one.constants.get(target))
            if fixed is not None:
                node.target = f"{prefix}_{target.replace('.', '_')}"
                tables[node.target] = fixed
    if like is not None:
        first = next(n for n in graph.nodes if n.op == "call_function")
        with graph.inserting_before(first):
            places = {name: graph.call_function(getattr, (like, name)) for name in ("device", "dtype")}
            places["cast"] = graph.call_function(torch.promote_types, (places["dtype"], torch.float32))
        _free(graph, places, captured)
    switches = {path for node in list(graph.nodes) if (path := _switched(graph, node, dense)) is not None}
    graph.eliminate_dead_code()
    source = graph.python_code(root_module="self", verbose=False).src
    return inspect.cleandoc(source), tables, switches


def _switched(graph: fx.Graph, node: fx.Node, dense: nn.Module) -> str | None:
    """Let the mode of the submodule that a batch norm or dropout came from decide; its path, if it was switched."""
    if node.op != "call_function":
        return None
    if op_name(node) == "add" and str(node.args[0]).endswith("num_batches_tracked"):
        flag = "other"  # counted only while that batch norm trains
    else:
        flag = _MODE_FLAGS.get(op_name(node), "")
    if not flag or (op_name(node) in ("batch_norm", "instance_norm") and node.args[3] is None):
        return None
    stack = module_stack(node)
    path = stack[-1][0] if stack else ""
    if not isinstance(dense.get_submodule(path), (nn.modules.batchnorm._NormBase, nn.modules.dropout._DropoutNd)):
        return None  # a function call: each pass has the flag that it was captured with
    with graph.inserting_before(node):
        mode = graph.get_attr(f"{path}.training" if path else "training")
    for i, argument in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
        if argument.name == flag:
            if i < len(node.args):
                node.update_arg(i, mode)
            else:
                node.update_kwarg(flag, mode)
    return path


def _free(graph: fx.Graph, places: Mapping[str, fx.Node], captured: torch.dtype | None) -> None:
    def loose(value: Any, dtype: str) -> Any:
        if isinstance(value, torch.device):
            return places["device"]
        return places[dtype] if isinstance(value, torch.dtype) and value == captured else value

    for node in graph.nodes:
        if node.op == "call_function" and node not in places.values():
            dtype = "cast" if op_name(node) in CASTS else "dtype"
            node.args = tuple(loose(a, dtype) for a in node.args)
            node.kwargs = {k: loose(v, dtype) for k, v in node.kwargs.items()}
