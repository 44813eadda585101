"""Consumers: the calls that read a group's channels and are affine in them, each with where the channels lie in what it
reads.

Convolutions, transposed convolutions and linear operations are, if their weight depends neither on the input nor on
which channels are there (under weight norm, what is kept changes when others go). Channels are found by their labels,
so that concatenations, residual streams, partitions and flattened maps need no code of their own: a depthwise
convolution is passed on the way, and what reads behind it is the consumer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from secateur.core import Group
from secateur.groups import Coupling
from secateur.interpreter import Env, Masks, zeroed
from secateur.layer_weights import MOVES
from secateur.nodes import module_stack, named_args, op_name, shape_of
from secateur.patches import Layout, layout_of
from secateur.taps import ACTIVATIONS, places

_CONVOLUTIONS = frozenset("conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d".split())
_OPERANDS = {"linear": ("input", "weight"), "addmm": ("mat1", "mat2"), "mm": ("self", "mat2")} | {
    "matmul": ("self", "other"),
    **dict.fromkeys(_CONVOLUTIONS, ("input", "weight")),
}
_BY_PLACE = MOVES | ACTIVATIONS | frozenset("add sub mul div neg abs exp".split())
"""Operations on weights of which each result belongs to one place."""


@dataclass(frozen=True, eq=False)
class Affine:
    """A call that is affine in ``source``: ``y = W p`` over patches of it, ``W`` as ``layout`` lays out the value of
    the node ``weight``, and perhaps a bias."""

    node: fx.Node
    source: fx.Node
    weight: fx.Node
    layout: Layout


@dataclass(frozen=True, eq=False)
class Consumer:
    """A group's channels in what an affine call reads.

    ``columns [n]``: the positions along the axis of ``source`` that is summed over, all partitions one after another,
    that hold channels of the group, and ``channels [n]``: which they hold, int64 both. ``whole``: there are no others.
    ``name``: of the module that the call was made in.
    """

    name: str
    call: Affine
    columns: torch.Tensor
    channels: torch.Tensor
    whole: bool


def consumers_of(coupling: Coupling, group: Group) -> tuple[list[Consumer], dict[str, str]]:
    """The affine calls of the eval pass that read ``group``, in graph order; and, by name, why other calls that read it
    are none."""
    found: list[Consumer] = []
    others: dict[str, str] = {}
    propagation = coupling.passes[0]
    for node in coupling.graph.captures[0].graph.nodes:
        if node not in propagation.readers:
            continue
        call = affine(node, coupling)
        sources = [call.source] if isinstance(call, Affine) else node.all_input_nodes
        for source in sources:
            place = places(coupling, group, source) if source not in propagation.weights_only else None
            if place is None:
                continue
            axis, positions = place
            if isinstance(call, str):
                others[caller(node)] = call
                continue
            shape = shape_of(source) or ()
            if axis != call.layout.channels_axis % len(shape):
                continue  # it runs along the channels, and sums over something else
            channels = torch.arange(group.channels).repeat_interleave(positions.shape[1])
            columns = positions.reshape(-1)
            found.append(Consumer(caller(node), call, columns, channels, len(columns) == int(shape[axis])))
    return found, others


def affine(node: fx.Node, coupling: Coupling) -> Affine | str:
    """How a call is affine in what it reads, or why it is not."""
    name, args = op_name(node), named_args(node)
    if name not in _OPERANDS:
        return f"{name} is not affine in what it reads"
    source, weight = (args[key] for key in _OPERANDS[name])
    if name == "addmm" and (args["beta"], args["alpha"]) != (1, 1):
        return "it scales its product"
    if source in coupling.passes[0].weights_only:
        return "what it reads is computed from parameters"
    if weight not in coupling.passes[0].weights_only:
        return f"{name} multiplies activations with each other"
    rank = len(shape_of(weight) or ())
    if rank < 2:
        return "its weight is a vector"
    if name not in _CONVOLUTIONS and rank != 2:
        return "its weight is a stack of matrices"
    if not _by_itself(weight):
        return "its weight is computed from all channels together, and changes when some go"
    return Affine(node, source, weight, layout_of(node, turned=False))


def _by_itself(weight: fx.Node) -> bool:
    """Whether every element of a weight depends on elements of parameters at its own place only, so that it stays what
    it is when others are removed: a weight that is normalised by its norm does not."""
    todo, seen = [weight], {weight}
    while todo:
        node = todo.pop()
        if node.op == "call_function" and op_name(node) not in _BY_PLACE:
            return False
        new = [source for source in node.all_input_nodes if source not in seen]
        seen.update(new)
        todo += new
    return True


def value_read(call: Affine, env: Env, masks: Masks | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """What a call reads and the value of its weight, of the live values ``env`` in front of it. With ``masks``, what
    they remove is zero in what it reads, as it is to the call itself."""
    x = env[call.source]
    if masks is not None:
        x = zeroed(x, masks.read(call.node).get(call.source, ()))
    return x, env[call.weight]


def caller(node: fx.Node) -> str:
    """The module that a call was made in; of a call outside of all modules, the node itself."""
    stack = module_stack(node)
    return stack[-1][0] if stack and stack[-1][0] else str(node)
