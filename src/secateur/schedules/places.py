"""Where channels lie in the parameters, and what may be done to them there: set to zero, or weighted.

A *mask* is a bool array ``[C]`` over the channels of a group, True = meant; masks go by group name. A *place* is an
axis of a tensor, ``(state_dict name, axis)``. Letters: ``C`` channels of a group, ``N`` length of an axis.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.func import functional_call

from secateur.capture import in_mode
from secateur.core import Group, Slice
from secateur.errors import BadRequest, CannotPrune
from secateur.graph import Graph, unwrap
from secateur.masks import coupling_for, meaning_of
from secateur.nests import flatten, unflatten
from secateur.plans import Plan, named_tensors

Place = tuple[str, int]
Masks = Mapping[str, np.ndarray]
Tensors = Mapping[str, torch.Tensor]

MAKERS = ("writes", "scales", "follows")
"""The roles of all that makes a channel: filters, norms and layer scales, and the biases of them."""


def parameters_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """The parameters that have channels worth the name: real numbers, under their canonical names."""
    return {
        name: tensor
        for name, tensor in named_tensors(model).items()
        if isinstance(tensor, nn.Parameter) and tensor.is_floating_point()
    }


def makers(group: Group, parameters: Tensors, roles: Sequence[str] = MAKERS) -> list[Slice]:
    """The slices of ``group`` in ``parameters`` that have one of the ``roles``; for a group that has none (its channels
    come from elsewhere), those that read it."""
    own = [s for s in group.slices if s.tensor in parameters]
    return [s for s in own if s.role in roles] or [s for s in own if s.role == "reads"]


def filters(group: Group, parameters: Tensors) -> list[Slice]:
    """The slices that write channels through two axes or more; where there are none, ``makers``."""
    found = makers(group, parameters, ("writes",))
    return [s for s in found if parameters[s.tensor].dim() >= 2] or makers(group, parameters)


def zeroed(plan: Plan, parameters: Tensors, *, soft: bool = False) -> dict[str, list[Slice]]:
    """The slices of every group that are set to zero for the channels that ``plan`` removes: all that makes them; the
    filters alone where ``soft``, and nothing but filters where the plan folds the constants that these leave."""

    def chosen(group: Group) -> list[Slice]:
        if plan.constants.get(group.name) == "fold":
            own = [s for s in group.slices if s.tensor in parameters]
            return [s for s in own if s.role == "writes" and parameters[s.tensor].dim() >= 2]
        return filters(group, parameters) if soft else makers(group, parameters)

    return {group.name: chosen(group) for group in plan.groups}


def removed(plan: Plan) -> dict[str, np.ndarray]:
    """The masks of the channels that ``plan`` removes."""
    masks = {group.name: np.ones(group.channels, dtype=bool) for group in plan.groups}
    for name, kept in plan.keep.items():
        masks[name][list(kept)] = False
    return masks


def kept_by(masks: Masks) -> dict[str, tuple[int, ...]]:
    """``Plan.keep`` from the masks of what is removed."""
    return {name: tuple(np.flatnonzero(~mask).tolist()) for name, mask in masks.items()}


def positions(slices: Mapping[str, Iterable[Slice]], masks: Masks) -> dict[Place, torch.Tensor]:
    """The sorted positions ``[n]``, int64, of the channels in ``masks`` at every place that has any."""
    found: dict[Place, list[np.ndarray]] = {}
    for name, own in slices.items():
        for part in own:
            at = part.positions[masks[name]].ravel()
            if at.size:
                found.setdefault((part.tensor, part.axis), []).append(at)
    return {place: torch.from_numpy(np.unique(np.concatenate(parts))) for place, parts in found.items()}


def coefficients(
    slices: Mapping[str, Iterable[Slice]], weights: Mapping[str, torch.Tensor], parameters: Tensors
) -> dict[Place, torch.Tensor]:
    """``[N]`` for every place: the weight ``weights[group][c]`` of the channel at each position, 0 where there is none,
    in the dtype and on the device of the tensor."""
    found: dict[Place, torch.Tensor] = {}
    for name, own in slices.items():
        if not bool(weights[name].any()):
            continue
        for part in own:
            tensor = parameters[part.tensor]
            total = found.setdefault(
                (part.tensor, part.axis), torch.zeros(tensor.shape[part.axis], dtype=torch.float64)
            )
            at = torch.from_numpy(part.positions)
            total.index_add_(0, at.reshape(-1), weights[name].double().repeat_interleave(at.shape[1]))
    return {(name, axis): w.to(parameters[name]) for (name, axis), w in found.items()}


def along(vector: torch.Tensor, axis: int, rank: int) -> torch.Tensor:
    """``vector [N]`` so that it broadcasts along ``axis`` of a tensor of ``rank`` axes."""
    shape = [1] * rank
    shape[axis] = -1
    return vector.view(shape)


class Index:
    """Positions, kept on every device on which they are used."""

    def __init__(self, places: Mapping[Place, torch.Tensor]) -> None:
        self.places = places
        self._moved: dict[torch.device, dict[Place, torch.Tensor]] = {}

    def at(self, place: Place, device: torch.device) -> torch.Tensor:
        """The positions of ``place`` on ``device``."""
        moved = self._moved.setdefault(device, {})
        if place not in moved:
            moved[place] = self.places[place].to(device)
        return moved[place]

    @torch.no_grad()
    def zero_(self, tensors: Mapping[str, torch.Tensor | None]) -> None:
        """Set the positions to zero in every tensor; those that are ``None`` are passed over."""
        for name, axis in self.places:
            tensor = tensors.get(name)
            if tensor is not None:
                tensor.index_fill_(axis, self.at((name, axis), tensor.device), 0.0)

    def is_zero(self, tensors: Tensors) -> bool:
        """Whether nothing but zeros stands at the positions."""
        return not any(
            bool(tensors[name].detach().index_select(axis, self.at((name, axis), tensors[name].device)).any())
            for name, axis in self.places
        )


def zero_(model: nn.Module, plan: Plan) -> None:
    """Set everything in ``model`` that makes a channel which ``plan`` removes to zero: filters, norm weights, layer
    scales, biases; of groups whose constants the plan folds, the filters alone. Running statistics stay.

    Where constants are folded, and where an activation is 0 at 0 and no norm takes statistics over channels, the
    network then computes just what ``apply(model, plan)`` does: see ``zeroing``.

    Raises ``CannotPrune`` where that would make the outputs NaN and no part of it would not, and for constants that
    cannot be folded.
    """
    if plan.graph is None or plan.graph.model is not unwrap(model):
        raise BadRequest("the plan was not made on this very network\n  do: plan again on it, with sc.plan(model, ...)")
    meaning_of(coupling_for(plan.graph, plan), plan)
    spared, everything = harmful(plan.graph, plan), parameters_of(model)
    found = {name: tensor for name, tensor in everything.items() if name not in spared}
    Index(positions(zeroed(plan, found), removed(plan))).zero_(found)


def harmful(graph: Graph, plan: Plan) -> frozenset[str]:
    """The parameters that must not be zeroed, since the network divides by them: the direction of a weight norm (whose
    length is zeroed), or a divisor. Found by trying on the example inputs, what ``plan`` removes set to zero.

    Raises ``CannotPrune`` if the outputs are NaN even so.
    """
    found = parameters_of(graph.model)
    slices = zeroed(plan, found)
    everything = positions(slices, removed(plan))
    before = _undefined(graph, found, {})
    if _undefined(graph, found, everything) <= before:
        return frozenset()
    one_by_one = {
        name
        for name in {name for name, _ in everything}
        if _undefined(graph, found, {p: at for p, at in everything.items() if p[0] == name}) > before
    }
    rest = {p: at for p, at in everything.items() if p[0] not in one_by_one}
    needed = {part.tensor for name in plan.constants for part in slices[name]}  # the filters of folded constants
    if not rest or needed & one_by_one or _undefined(graph, found, rest) > before:
        raise CannotPrune(
            "the network's outputs are NaN as soon as whole channels are zero, so that it cannot be pruned by zeroing\n"
            "  do: prune in one cut or in several (iterative), or exclude the groups that it divides by"
        )
    return frozenset(one_by_one)


def _undefined(graph: Graph, parameters: Tensors, places: Mapping[Place, torch.Tensor]) -> int:
    """How many numbers in the outputs on the example inputs are NaN with zeros at ``places``."""
    changed = {name: parameters[name].detach().clone() for name, _ in places}
    Index(places).zero_(changed)
    device = next((t.device for t in parameters.values()), torch.device("cpu"))

    def here(value: Any) -> Any:
        return value.to(device) if isinstance(value, torch.Tensor) else value

    tensors, skeleton = flatten((graph.args, dict(graph.kwargs)))
    args, kwargs = unflatten(skeleton, [here(t) for t in tensors])
    with in_mode(graph.model, False), torch.no_grad():
        outputs, _ = flatten(functional_call(graph.model, changed, args, kwargs))
    return sum(int(t.isnan().sum()) for t in outputs if t.is_floating_point())
