"""What whole networks are known by where their times are kept: all that a time depends on, and nothing else.

Two networks whose tensors have the same shapes may differ in strides, in activations or in how they are wired, and are
then not equally fast.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from secateur.capture import Capture
from secateur.groups import Coupling
from secateur.latencies.records import digest
from secateur.nodes import as_int
from secateur.plans import input_specs, named_tensors


def network_digest(coupling: Coupling) -> str:
    """A short name of a network and of how its groups are coupled, the same in every process: of what is computed, of
    the shapes, dtypes and devices of its tensors, and of its inputs, not of any weight."""
    graph = coupling.graph
    tensors = [(name, [*t.shape], str(t.dtype), t.device.type) for name, t in named_tensors(graph.model).items()]
    groups = [(group.name, group.channels, group.partitions) for group in coupling.groups]
    inputs = input_specs(graph.args, graph.kwargs)
    return digest(tensors, inputs, groups, coupling.scatter, _operations(graph.captures[0]))


def _operations(capture: Capture) -> list[Any]:
    """Every node of a pass as what it calls and on what: other nodes by their places, tensors by their names."""
    place: dict[fx.Node, int] = {}
    found: list[Any] = []

    def told(value: Any) -> str:
        if isinstance(value, fx.Node):
            return f"%{place[value]}"
        return str(as_int(value) if isinstance(value, torch.SymInt) else value)

    for node in capture.graph.nodes:
        target = str(node.target)
        if node.op != "call_function":  # placeholders are told by their order, constants of the forward by their names
            target = capture.names.get(target, "" if node.op == "placeholder" else target)
        arguments = fx.node.map_aggregate((node.args, dict(node.kwargs)), told)
        found.append((node.op, target, arguments))
        place[node] = len(place)
    return found
