"""Capture: a model and example inputs become a flat graph of ATen calls, with the user's names and source lines.

``torch.export`` runs the model once on fake tensors; nothing is computed and nothing of the user's is changed. Two
examples are enough to decide with; what has to run on any number of them is captured again with a symbolic batch.
Networks with parameters that only train mode uses (auxiliary heads) are captured in train mode as well, so that those
are pruned along with the rest.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, cast

import torch
from torch import nn

from secateur.capture import Capture, all_tensors, canonical_names, capture, is_tensor_node
from secateur.errors import CannotCapture
from secateur.nests import InputOrder, flatten

Inputs = torch.Tensor | Sequence[Any] | Mapping[str, Any]


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
    graph = dataclasses.replace(graph, captures=(capture(*_plain_call(graph), "eval"),))
    everything = all(name in graph.used for name, _ in dense.named_parameters())
    return graph if everything else with_train_pass(graph)


def with_train_pass(graph: Graph) -> Graph:
    """The graph with its train pass captured too; where that fails, ``train_note`` says why. Done once."""
    if len(graph.captures) > 1 or graph.train_note:
        return graph
    if "with train pass" not in graph.memo:
        try:
            captures = (*graph.captures, capture(*_plain_call(graph), "train", graph.captures[0].free))
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
        captures = tuple(capture(*_plain_call(graph), c.mode, free=True) for c in graph.captures)
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
