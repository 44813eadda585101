"""Slicing: the user's own modules, copied with smaller tensors inside."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from secateur.attributes import correct_modules
from secateur.capture import all_tensors, canonical_names
from secateur.groups import Coupling
from secateur.nodes import op_name

RECORD = "_secateur_record"
Kept = Mapping[str, Mapping[int, np.ndarray]]
State = Mapping[str, torch.Tensor]


def named(model: nn.Module) -> dict[str, torch.Tensor]:
    """Canonical name -> tensor of ``model``."""
    names = canonical_names(model)
    return {name: t for name, t in all_tensors(model) if names[name] == name}


def sliced(dense: nn.Module, kept: Kept, state: State) -> nn.Module:
    """A deep copy of ``dense`` with the values in ``state`` cut to what is kept; nothing dense is ever copied."""
    names = canonical_names(dense)
    memo: dict[int, Any] = {}
    for name, tensor in all_tensors(dense):
        if id(tensor) not in memo and names[name] in state:
            memo[id(tensor)] = like(tensor, small_tensor(names[name], state[names[name]], kept))
    for module in dense.modules():  # plain attributes that hold computed tensors (old weight norm) cannot be copied
        for value in vars(module).values():
            if isinstance(value, torch.Tensor) and value.grad_fn is not None:
                memo[id(value)] = value.detach().clone()
    small = copy.deepcopy(dense, memo)
    small.__dict__.pop(RECORD, None)
    correct_modules(dense, small)
    return small


def small_tensor(name: str, tensor: torch.Tensor, kept: Kept) -> torch.Tensor:
    """The kept positions of one tensor, a copy in the same memory format."""
    value = tensor.detach()
    for axis, positions in kept.get(name, {}).items():
        value = value.index_select(axis, torch.from_numpy(positions).to(value.device))
    value = value.clone() if name not in kept else value
    for rank, layout in ((4, torch.channels_last), (5, torch.channels_last_3d)):
        if tensor.dim() == rank and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=layout):
            value = value.contiguous(memory_format=layout)
    return value


def like(original: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """``value`` as a parameter or buffer, whichever ``original`` is."""
    if isinstance(original, nn.Parameter):
        return nn.Parameter(value, requires_grad=original.requires_grad)
    return value


def keep_attention_scale_(small: nn.Module, coupling: Coupling, class_keep: torch.Tensor) -> None:
    """Attention without an explicit scale divides by the root of the *pruned* width: its queries make up for it."""
    parameters = dict(small.named_parameters())
    with torch.no_grad():
        for name, rows in attention_factors(coupling, class_keep).items():
            if name in parameters:
                tensor = parameters[name]
                tensor.mul_(rows.to(tensor).reshape(-1, *[1] * (tensor.dim() - 1)))


def attention_factors(coupling: Coupling, class_keep: torch.Tensor) -> dict[str, torch.Tensor]:
    """What the kept rows of the parameters that write queries are multiplied by, ``name -> [kept rows]``."""
    propagation = coupling.passes[0]
    roles = propagation.shared.roles()
    found: dict[str, torch.Tensor] = {}
    for node in propagation.capture.graph.nodes:
        if node.op != "call_function" or op_name(node) != "scaled_dot_product_attention":
            continue
        query = node.args[0]
        mask = coupling.node_masks(0, query, class_keep)[-1]
        if len(node.args) > 6 or node.kwargs.get("scale") is not None or mask is None:
            continue
        factors = propagation.factors[query]
        assert isinstance(factors, list)
        labels = torch.cat([f.reshape(-1) for f in factors])
        factor = (float(mask.sum()) / len(mask)) ** 0.5
        for name, own in coupling.parameters.items():
            written = next((f.reshape(-1) for f in own if f.shape[0] > 1), None)
            if written is None or roles.get((name, 0)) != "writes":
                continue
            rows = torch.isin(written, labels)[class_keep[coupling.classes.free[written]]]
            if bool(rows.any()):
                rescaled = torch.ones(len(rows), dtype=torch.float64)
                rescaled[rows] = factor
                for each in (name, name.removesuffix("weight") + "bias"):
                    found[each] = found.get(each, 1.0) * rescaled
    return found
