"""Carrying an optimiser over to a pruned network: its state is sliced as the weights were.

Momentum belongs to a weight as its gradient does: where channels go, theirs go. Nothing else about the optimiser
changes, so that training goes on after pruning as if the network had always been that small.

A learning-rate scheduler holds its optimiser and goes on by being handed the new one:
``scheduler.optimizer = rebind(optimizer, small, plan)``.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Mapping
from types import MethodType
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

from secateur.errors import BadRequest, WrongModel
from secateur.graph import unwrap
from secateur.plans import Plan, check_model, named_tensors, pruned_shapes

Cuts = Mapping[int, np.ndarray]
"""``{axis: kept positions}`` of one tensor."""


def rebind(optimizer: Optimizer, small: nn.Module, plan: Plan, *, model: nn.Module | None = None) -> Optimizer:
    """A new optimiser of the same class over the parameters of ``small``, with the state of ``optimizer`` sliced.

    ``small`` is what ``apply`` made of the dense network by ``plan``. Parameter groups, their order, hyper-parameters
    and frozen parameters stay; state of a parameter's shape (momentum, second moments) keeps what ``plan.kept()``
    keeps; state that is one number (a step count) is copied. ``optimizer``, which holds the dense network's parameters,
    is untouched. ``model``: that dense network; not needed while ``plan.graph`` still holds it.

    Raises ``BadRequest`` if the dense network is not known, the optimiser holds parameters that are not its own, or
    state has a shape that cannot be sliced; ``WrongModel`` if ``plan`` or ``small`` do not belong to it.
    """
    dense = _dense(plan, model)
    check_model(plan, dense)
    found, shapes = named_tensors(small), pruned_shapes(plan)
    names = {id(tensor): name for name, tensor in named_tensors(dense).items()}
    kept = plan.kept()
    successors: dict[torch.Tensor, nn.Parameter] = {}
    state: defaultdict[torch.Tensor, Any] = defaultdict(dict)
    groups = []
    for index, group in enumerate(optimizer.param_groups):
        for old in group["params"]:
            name = _name(old, names, f"param_groups[{index}]")
            new = successors[old] = _successor(name, found.get(name), shapes[name])
            if old in optimizer.state:
                state[new] = _sliced(name, old, optimizer.state[old], kept.get(name, {}))
        rest = {key: copy.deepcopy(value) for key, value in group.items() if key != "params"}
        groups.append({"params": [successors[old] for old in group["params"]], **rest})
    # The way torch unpickles one: the class's own __setstate__, and no constructor whose signature nobody knows.
    fresh: Optimizer = type(optimizer).__new__(type(optimizer))
    own = _own_attributes(optimizer)
    fresh.__setstate__({**own, "defaults": copy.deepcopy(optimizer.defaults), "state": state, "param_groups": groups})
    return fresh


def _dense(plan: Plan, model: nn.Module | None) -> nn.Module:
    if model is not None:
        return unwrap(model)
    if plan.graph is not None:
        return plan.graph.model
    raise BadRequest(
        "the plan does not hold its network any more (it was loaded, copied or pickled), so the optimiser's parameters "
        "have no names\n  do: rebind(optimizer, small, plan, model=the dense network)"
    )


def _name(old: torch.Tensor, names: Mapping[int, str], where: str) -> str:
    if id(old) not in names:
        raise BadRequest(
            f"{where} of the optimiser holds a parameter {list(old.shape)} that is none of the dense network's\n"
            "  do: pass model=the network whose parameters the optimiser was made with"
        )
    return names[id(old)]


def _successor(name: str, found: torch.Tensor | None, shape: tuple[int, ...]) -> nn.Parameter:
    """The parameter of the pruned network that ``name`` became: ``found``, if it is what the plan says."""
    if not isinstance(found, nn.Parameter):
        raise BadRequest(
            f"parameter {name!r} of the optimiser is not in the pruned network any more\n"
            "  do: make a new optimiser over small.parameters()"
        )
    if tuple(found.shape) != shape:
        raise WrongModel(
            f"tensor {name!r} is {list(found.shape)} in the pruned network but the plan leaves {list(shape)}"
        )
    return found


def _sliced(name: str, old: torch.Tensor, state: Mapping[str, Any], cuts: Cuts) -> dict[str, Any]:
    """What an optimiser remembers of one parameter, for the part of it that stays."""
    result: dict[str, Any] = {}
    for key, value in state.items():
        if isinstance(value, torch.Tensor):
            result[key] = _slice(f"state {key!r} of parameter {name!r}", old, value, cuts)
        elif _holds_tensors(value):
            raise BadRequest(
                f"state {key!r} of parameter {name!r} is a {type(value).__name__} of tensors, which cannot be sliced\n"
                "  do: make a new optimiser over small.parameters()"
            )
        else:
            result[key] = copy.deepcopy(value)
    return result


def _slice(what: str, old: torch.Tensor, value: torch.Tensor, cuts: Cuts) -> torch.Tensor:
    # Factored second moments (Adafactor) have length 1 on the axes they were averaged over.
    if value.dim() == old.dim() and all(v in (1, o) for v, o in zip(value.shape, old.shape, strict=True)):
        result = value.detach()
        for axis, positions in cuts.items():
            if value.shape[axis] == old.shape[axis]:
                result = result.index_select(axis, torch.from_numpy(positions).to(value.device))
        return result.clone()
    if value.numel() <= 1:
        return value.detach().clone()
    raise BadRequest(
        f"{what} is {list(value.shape)} and the parameter {list(old.shape)}: it cannot be sliced\n"
        "  do: make a new optimiser over small.parameters()"
    )


def _holds_tensors(value: object) -> bool:
    if isinstance(value, Mapping):
        return any(_holds_tensors(item) for item in value.values())
    if isinstance(value, (list, tuple, set)):
        return any(_holds_tensors(item) for item in value)
    return isinstance(value, (torch.Tensor, Optimizer))


def _own_attributes(optimizer: Optimizer) -> dict[str, Any]:
    """Hooks and whatever else the optimiser keeps beside its state, without ``step``, which a scheduler has wrapped: it
    would step the old one."""
    own: dict[str, Any] = {}
    for key, value in vars(optimizer).items():
        if key in ("defaults", "state", "param_groups", "step") or isinstance(value, MethodType):
            continue
        if _holds_tensors(value):
            raise BadRequest(
                f"{type(optimizer).__name__} keeps tensors of its own in {key!r}, which cannot be carried over\n"
                "  do: make a new optimiser over small.parameters()"
            )
        own[key] = copy.copy(value)
    return own
