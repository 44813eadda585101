"""``masked``: the dense network in which removed channels are never read.

It runs the captured graph with the parameters untouched. Where an operation sums over channels, the removed ones among
its inputs are zero; where a normalisation takes statistics over channels, it takes them over the kept ones, group norm
over the *dense* partition. Channels whose constants the plan folds are not masked: their filters are zero instead, and
what they leave is read. This is the meaning of a plan, against which every smaller network is checked.
"""

from __future__ import annotations

import copy
from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from secateur.errors import BadPlan, CannotPrune, WrongModel
from secateur.graph import Graph, trace
from secateur.graph import unwrap as unwrap_model
from secateur.groups import Coupling, couple, freed, same_groups
from secateur.interpreter import run_masked
from secateur.nests import unflatten
from secateur.plans import Plan, check_model


def masked(model: nn.Module | Graph, plan: Plan) -> nn.Module:
    """A module that computes ``model``'s eval pass with the channels that ``plan`` removes masked at their readers.

    Same inputs and outputs as ``model``; its parameters are copies, nothing of the user's is shared or changed.
    Raises ``WrongModel`` if the plan belongs to another network, ``BadPlan`` if it asks for what this release reserves.
    """
    return Masked(freed(coupling_for(model, plan)), plan)


def coupling_for(model: nn.Module | Graph, plan: Plan) -> Coupling:
    """The groups of ``model``, sure to be the ones that ``plan`` speaks of. Reuses the plan's own capture."""
    dense = model.model if isinstance(model, Graph) else unwrap_model(model)
    check_model(plan, dense)
    _refuse_reserved(plan)
    if isinstance(model, Graph):
        graph = model
    elif plan.graph is not None and plan.graph.model is dense:
        graph = plan.graph
    else:
        floats = [p.dtype for p in dense.parameters() if p.is_floating_point()]
        graph = trace(dense, example_from(plan, floats[0] if floats else torch.float32))
    scatter = plan.residual == "scatter"
    coupling = same_groups(graph, plan.groups, scatter=scatter)
    if coupling is None:
        coupling = couple(graph, scatter=scatter)
        mine, theirs = {g.name: g for g in coupling.groups}, {g.name: g for g in plan.groups}
        odd = next(n for n in [*theirs, *mine] if mine.get(n) != theirs.get(n))
        raise WrongModel(
            f"the plan's group {odd!r} is wired differently in this model, although all tensors have the same shapes\n"
            "  do: use the model that the plan was made for, or plan again"
        )
    return coupling


def _refuse_reserved(plan: Plan) -> None:
    if plan.stripes:
        raise BadPlan(
            "the plan asks for stripes, which its schema reserves and this release cannot carry out\n"
            "  do: use a release that can, or plan again without"
        )


@dataclass(frozen=True, eq=False)
class Meaning:
    """What a plan makes of the dense network. ``keep``: the classes that are not masked where they are read;
    ``zeros``: the positions of the filters that are zero instead, by tensor and axis; ``folded``: classes, all but
    those whose filters are zero."""

    keep: torch.Tensor
    zeros: Mapping[tuple[str, int], torch.Tensor]
    folded: torch.Tensor


def meaning_of(coupling: Coupling, plan: Plan) -> Meaning:
    """Which removed channels are masked, and which have their filters set to zero (``constants="fold"``).

    Raises ``CannotPrune`` for a folded group that no filters write, or filters that the forward computes.
    """
    folded = {name: kept for name, kept in plan.keep.items() if plan.constants.get(name) == "fold"}
    zeros: dict[tuple[str, int], list[torch.Tensor]] = {}
    tensors = coupling.graph.tensors if folded else {}
    for group in coupling.groups:
        if len(folded.get(group.name, ())) in (0, group.channels):
            continue
        removed = sorted(set(range(group.channels)) - set(folded[group.name]))
        filters = [s for s in group.slices if s.role == "writes" and len(plan.model[s.tensor]) >= 2]
        filters = [s for s in filters if isinstance(tensors[s.tensor], nn.Parameter)]
        if not filters or any(s.tensor in coupling.transformed for s in filters):
            what = "the forward computes its filters" if filters else "no filters write it"
            raise CannotPrune(
                f"constants='fold' cannot be carried out for {group.name}: {what}\n"
                f"  do: drop its constants, with constants={{{group.name!r}: 'drop', '*': 'fold'}}, or exclude it"
            )
        for part in filters:
            at = torch.from_numpy(part.positions[removed].ravel())
            zeros.setdefault((part.tensor, part.axis), []).append(at)
    masked_ones = {name: kept for name, kept in plan.keep.items() if name not in folded}
    return Meaning(
        coupling.class_keep(masked_ones),
        {place: torch.cat(found).unique() for place, found in zeros.items()},
        coupling.class_keep(folded),
    )


def zeroed_filters(
    state: Mapping[str, torch.Tensor], zeros: Mapping[tuple[str, int], torch.Tensor]
) -> dict[str, torch.Tensor]:
    """``state`` with zeros at the positions in ``zeros``; what has none is the same tensor."""
    found = dict(state)
    for (name, axis), positions in zeros.items():
        found[name] = found[name].index_fill(axis, positions.to(found[name].device), 0.0)
    return found


def example_from(plan: Plan, dtype: torch.dtype = torch.float32) -> Any:
    """Random inputs of the shapes that the plan was made with; floats of the model's ``dtype``."""
    generator = torch.Generator().manual_seed(0)

    def make(spec: Any) -> Any:
        if isinstance(spec, list):
            return tuple(make(s) for s in spec)
        if isinstance(spec, Mapping) and set(spec) == {"shape", "dtype"}:
            kind = getattr(torch, spec["dtype"])
            if kind.is_floating_point:
                return torch.randn(spec["shape"], generator=generator).to(dtype)
            return torch.zeros(spec["shape"], dtype=kind)
        if isinstance(spec, Mapping) and set(spec) == {"value"}:
            return spec["value"]
        return {key: make(s) for key, s in spec.items()}

    if not plan.inputs:
        raise BadPlan("the plan does not say what inputs it was made with\n  do: pass a Graph from sc.trace instead")
    args, kwargs = make(plan.inputs["args"]), make(plan.inputs["kwargs"])
    return kwargs if kwargs and not args else args


class Masked(nn.Module):
    """The dense graph of a coupling, interpreted with a plan's masks. Always the eval pass."""

    def __init__(self, coupling: Coupling, plan: Plan) -> None:
        super().__init__()
        # not plain attributes: the user's modules may bear any name
        self.__dict__["_secateur"] = (coupling, plan, meaning_of(coupling, plan))
        register(self, {name: _own(t) for name, t in coupling.graph.tensors.items()})

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        coupling, _, meaning = self.__dict__["_secateur"]
        state = zeroed_filters({**dict(self.named_parameters()), **dict(self.named_buffers())}, meaning.zeros)
        out = run_masked(coupling, meaning.keep, state, coupling.graph.inputs.flat(args, kwargs))
        return unflatten(coupling.graph.captures[0].skeleton, out)

    def __deepcopy__(self, memo: dict[int, Any]) -> Masked:
        coupling, plan, _ = self.__dict__["_secateur"]
        twin = Masked(coupling, plan)
        for name, tensor in [*self.named_parameters(), *self.named_buffers()]:
            *path, leaf = name.split(".")
            holder = twin.get_submodule(".".join(path))
            own: dict[str, Any] = holder._parameters if leaf in holder._parameters else holder._buffers
            own[leaf] = copy.deepcopy(tensor, memo)
        return twin.train(self.training)


def _own(tensor: torch.Tensor) -> torch.Tensor:
    value = tensor.detach().clone()
    return nn.Parameter(value, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else value


def register(root: nn.Module, tensors: Mapping[str, torch.Tensor], transient: Container[str] = ()) -> None:
    """Give ``root`` parameters and buffers under dotted names, on plain modules in between; ``transient`` names are
    buffers that the state_dict leaves out."""
    for name, tensor in tensors.items():
        *path, leaf = name.split(".")
        holder = root
        for part in path:
            if part not in holder._modules:
                holder.add_module(part, nn.Module())
            holder = holder.get_submodule(part)
        if isinstance(tensor, nn.Parameter):
            holder.register_parameter(leaf, tensor)
        else:
            holder.register_buffer(leaf, tensor, persistent=name not in transient)
