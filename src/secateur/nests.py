"""Nests: tensors inside tuples, lists, dicts and dataclasses, as the arguments and outputs of a forward come."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch


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


@dataclass(frozen=True)
class _Leaf:
    index: int


def flatten(value: Any) -> tuple[list[torch.Tensor], Any]:
    """The tensors in a nest of tuples, lists, dicts and dataclasses, and the nest with their places marked."""
    tensors: list[torch.Tensor] = []
    return tensors, _marked(value, tensors)


def _marked(value: Any, tensors: list[torch.Tensor]) -> Any:
    # no function that knows itself: the cycle would hold the tensors until garbage is collected
    if isinstance(value, torch.Tensor):
        tensors.append(value)
        return _Leaf(len(tensors) - 1)
    return _map_container(lambda inner: _marked(inner, tensors), value)


def leaves(skeleton: Any) -> list[Any]:
    """Everything in a nest that is neither a container nor a tensor's place."""
    found: list[Any] = []

    def look(v: Any) -> Any:
        inside = _map_container(look, v)
        if inside is v and not isinstance(v, _Leaf):
            found.append(v)
        return v

    look(skeleton)
    return found


def unflatten(skeleton: Any, tensors: Sequence[torch.Tensor]) -> Any:
    """The inverse of ``flatten``."""
    if isinstance(skeleton, _Leaf):
        return tensors[skeleton.index]
    return _map_container(lambda inner: unflatten(inner, tensors), skeleton)


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
