"""Bias: the constant that a reader loses with its channels, and where the pruned network can hold it.

A removed channel gives its reader, on average over samples and output positions, the constant ``W_removed E[p]``. It is
added to the reader's own bias; where there is none, and nothing but a batch norm in eval mode reads the output, it is
taken from that batch norm's running mean (``(y + d - m) = (y - (m - d))``); else a layer of torch's own kinds gets a
bias. What comes behind, or stands alone, cannot hold a constant, and is left without.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import fx, nn

from secateur.attributes import takes_bias
from secateur.capture import Capture
from secateur.groups import Coupling
from secateur.nodes import module_stack, named_args, op_name, shape_of
from secateur.plan_checks import bias_of


@dataclass(frozen=True)
class Home:
    """Where a reader's constant is kept: in the tensor ``name``, ``kind="bias"`` or a batch norm's running ``"mean"``;
    ``"added"``: in a new bias, of the module ``module``; ``"none"``: nowhere, ``why`` says."""

    kind: Literal["bias", "mean", "added", "none"]
    name: str = ""
    module: str = ""
    why: str = ""


def home_of(nodes: Sequence[fx.Node], weight: str, coupling: Coupling, *, may_add: bool) -> Home:
    """The home of the constant of the reader that ``nodes`` are the calls of, all by the same ``weight``."""
    capture = coupling.graph.captures[0]
    own = {_own_bias(node, capture) for node in nodes}
    if own != {None}:
        name = own.pop()
        if own or not name or _users(name, capture) - set(nodes):
            return Home("none", why="its bias is shared, or computed from other tensors")
        return Home("bias", name)
    for node in nodes if len(nodes) == 1 else ():
        found = _behind(node, capture)
        if found is not None:
            return found
    module = weight.rpartition(".")[0]
    stacks = {(module_stack(node) or [("", "")])[-1][0] for node in nodes}
    layer = _submodule(coupling.graph.model, module)
    if stacks != {module} or layer is None or not takes_bias(layer):
        return Home("none", why="it has no bias, and is no layer that one could be added to")
    if not may_add:
        return Home("none", why="it has no bias, and the captured graph has no place for one")
    return Home("added", bias_of(module), module)


def _own_bias(node: fx.Node, capture: Capture) -> str | None:
    """The name of the bias that a call adds; empty if that is not a parameter by itself."""
    bias = named_args(node).get("self" if op_name(node) == "addmm" else "bias")
    if bias is None:
        return None
    shape = shape_of(bias)
    return _parameter(bias, capture) if shape is not None and len(shape) == 1 else ""


def _parameter(node: object, capture: Capture) -> str:
    """The canonical name of a parameter or buffer that a node fetches, else empty."""
    return capture.names.get(str(node.target), "") if isinstance(node, fx.Node) and node.op == "get_attr" else ""


def _users(name: str, capture: Capture) -> set[fx.Node]:
    fetched = [n for n in capture.graph.nodes if _parameter(n, capture) == name]
    return {user for node in fetched for user in node.users}


def _behind(node: fx.Node, capture: Capture) -> Home | None:
    """What adds to the output of ``node`` before anything else happens to it: a batch norm, or a vector."""
    if len(node.users) != 1:
        return None
    (user,) = node.users
    if op_name(user) == "batch_norm":
        args = named_args(user)
        mean = _parameter(args["running_mean"], capture)
        if args["input"] is node and not args["training"] and mean and _users(mean, capture) == {user}:
            return Home("mean", mean)
    if op_name(user) == "add" and op_name(node) in ("linear", "matmul", "mm") and not user.kwargs:
        other = next((a for a in user.args if a is not node), None)
        vector, shape = _parameter(other, capture), shape_of(other) if isinstance(other, fx.Node) else None
        outputs = shape_of(node)
        if vector and shape is not None and outputs is not None and _users(vector, capture) == {user}:
            return Home("bias", vector) if shape == outputs[-1:] else None
    return None


def _submodule(model: nn.Module, path: str) -> nn.Module | None:
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


def give_constant_(
    home: Home,
    constant: torch.Tensor,
    state: Mapping[str, torch.Tensor],
    added: dict[fx.Node, torch.Tensor],
    nodes: Mapping[fx.Node, int],
) -> None:
    """Put ``constant [outputs]`` of the dense width where it belongs. ``nodes``: the reader's calls, and how many axes
    lie behind that of their outputs."""
    if home.kind == "bias":
        state[home.name].add_(constant.to(state[home.name]))
    elif home.kind == "mean":
        state[home.name].sub_(constant.to(state[home.name]))
    elif home.kind == "added":
        for node, behind in nodes.items():
            before = added.get(node)
            shaped = constant.reshape(-1, *[1] * behind)
            added[node] = shaped if before is None else before + shaped
