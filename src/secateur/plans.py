"""The plan: which channels of which groups stay, as frozen, validated data.

A plan is what deciding hands to doing. ``masked`` and ``apply`` interpret it, ``save`` writes it, ``load`` replays it,
and none of them need to know why it was made. It speaks of the dense network only: channel indices and tensor positions
are those of the network it was made on, whose tensors' shapes (``model``) are its fingerprint.

A plan that was constructed is a good one: every index is in range, sorted and unique, every group keeps a channel, no
position of a tensor's axis belongs to two channels. ``BadPlan`` says which field is not.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from secateur import plan_checks as checks
from secateur.capture import all_tensors, canonical_names
from secateur.core import Edit, Group
from secateur.errors import BadPlan, BadRequest, WrongModel, nearest
from secateur.graph import Graph, unwrap
from secateur.plan_checks import Shape

Constant = Literal["drop", "fold"]
Residual = Literal["coupled", "inner", "scatter"]

CONSTANTS = ("drop", "fold")
CONSTANT_KERNEL = "constant_kernel"
"""The buffer of a convolution that a ``constant`` edit rewires."""
RESIDUALS = ("coupled", "inner", "scatter")


@dataclass(frozen=True, eq=False, repr=False)
class Plan:
    """Which channels stay, for one dense network.

    ``groups``: all free groups of the network, in graph order. ``keep``: for each of them the sorted indices of the
    channels that stay, at least one. ``model``: the fingerprint, shape of every tensor of the dense network
    (``fingerprint``). ``inputs``: what the network was traced with (``input_specs``). ``made_by``: criterion, budget,
    ratios, version: JSON values, for people to read. ``constants``: what becomes of the constant that a removed channel
    leaves behind a batch norm, by group. ``stripes``: by convolution a bool mask ``[O, K, L]`` of the dense network's
    filters, True = kept. ``residual``: how residual branches are treated. ``edits``: what ``apply`` changes besides
    slicing, in order. ``graph``: the capture that plan, masks and surgery share in memory; never written, compared,
    copied or pickled.

    Raises ``BadPlan`` where a field contradicts itself or another.
    """

    groups: tuple[Group, ...]
    keep: Mapping[str, tuple[int, ...]]
    model: Mapping[str, Shape]
    inputs: Mapping[str, Any] = field(default_factory=dict)
    made_by: Mapping[str, Any] = field(default_factory=dict)
    constants: Mapping[str, Constant] = field(default_factory=dict)
    stripes: Mapping[str, np.ndarray] = field(default_factory=dict)
    residual: Residual = "coupled"
    edits: tuple[Edit, ...] = ()
    graph: Graph | None = None

    def __post_init__(self) -> None:
        groups = tuple(self.groups)
        model = {
            name: checks.shape_of(f"model[{name!r}]", shape)
            for name, shape in checks.mapping("model", self.model).items()
        }
        keep = {name: checks.indices(name, kept) for name, kept in checks.mapping("keep", self.keep).items()}
        found = getattr(self.graph, "memo", {}).values()
        if not any(getattr(coupling, "groups", None) is groups for coupling in found):  # ours are right by making
            checks.check_groups(groups, model)
        checks.check_keep(groups, keep)
        names = [group.name for group in groups]
        constants = dict(checks.mapping("constants", self.constants))
        for name, constant in constants.items():
            if name not in keep:
                raise BadPlan(f"constants: the plan has no group {name!r}{nearest(name, names)}")
            checks.one_of(f"constants[{name!r}]", constant, CONSTANTS)
        stripes = {
            name: checks.stripe(name, mask, model) for name, mask in checks.mapping("stripes", self.stripes).items()
        }
        checks.one_of("residual", self.residual, RESIDUALS)
        edits = tuple(checks.edit_of(index, edit) for index, edit in enumerate(self.edits))
        checks.check_biases(edits, model)
        values: dict[str, Any] = {
            "groups": groups,
            "keep": {name: keep[name] for name in names},
            "model": model,
            "inputs": checks.inputs_of(self.inputs),
            "made_by": checks.plain("made_by", self.made_by),
            "constants": constants,
            "stripes": stripes,
            "edits": edits,
        }
        for name, value in values.items():
            object.__setattr__(self, name, MappingProxyType(value) if isinstance(value, dict) else value)

    def kept(self) -> dict[str, dict[int, np.ndarray]]:
        """``{tensor: {axis: positions}}`` for every axis that shrinks: int64, sorted, counted on the dense axis."""
        gone: dict[tuple[str, int], np.ndarray] = {}
        for group in self.groups:
            removed = np.ones(group.channels, dtype=bool)
            removed[list(self.keep[group.name])] = False
            if not removed.any():
                continue
            for part in group.slices:
                place = (part.tensor, part.axis)
                if place not in gone:
                    gone[place] = np.zeros(self.model[part.tensor][part.axis], dtype=bool)
                gone[place][part.positions[removed]] = True
        result: dict[str, dict[int, np.ndarray]] = {}
        for (tensor, axis), mask in gone.items():
            result.setdefault(tensor, {})[axis] = np.flatnonzero(~mask)
        return result

    def to_json(self) -> str:
        """The plan as readable, versioned JSON. ``Plan.from_json`` gives an equal plan back."""
        from secateur.plan_schema import encode

        return encode(self)

    @staticmethod
    def from_json(text: str) -> Plan:
        """The plan in ``text``; ``BadPlan`` for anything but what ``to_json`` could have written."""
        from secateur.plan_schema import decode

        return Plan(**decode(text))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Plan):
            return NotImplemented
        fields = ("groups", "keep", "model", "inputs", "made_by", "constants", "residual", "edits")
        if any(getattr(self, name) != getattr(other, name) for name in fields):
            return False
        if self.stripes.keys() != other.stripes.keys():
            return False
        return all(np.array_equal(mask, other.stripes[name]) for name, mask in self.stripes.items())

    def __hash__(self) -> int:
        return hash((self.groups, tuple(self.keep.items())))

    def __reduce__(self) -> tuple[Any, ...]:
        # Mapping proxies do not pickle, and the graph holds the user's whole model: neither travels.
        mappings = (dict(self.keep), dict(self.model), dict(self.inputs), dict(self.made_by), dict(self.constants))
        return Plan, (self.groups, *mappings, dict(self.stripes), self.residual, self.edits)

    def __repr__(self) -> str:
        channels = sum(group.channels for group in self.groups)
        kept = sum(len(indices) for indices in self.keep.values())
        criterion = self.made_by.get("criterion")
        by = f", by {criterion}" if isinstance(criterion, str) else ""
        return f"Plan({len(self.groups)} groups, {kept:,} of {channels:,} channels kept{by})"


def pruned_shapes(plan: Plan) -> dict[str, Shape]:
    """``{tensor: shape}`` of the network that ``apply`` makes of ``plan``'s dense one."""
    shapes = dict(plan.model)
    for tensor, axes in plan.kept().items():
        shape = list(shapes[tensor])
        for axis, positions in axes.items():
            shape[axis] = len(positions)
        shapes[tensor] = tuple(shape)
    return shapes | added_tensors(plan)


def added_tensors(plan: Plan) -> dict[str, Shape]:
    """``{tensor: shape}`` of what the pruned network has and the dense one has not: biases, and constants where
    modules were rewired."""
    found: dict[str, Shape] = {}
    for edit in plan.edits:
        if edit.kind == "bias" and isinstance(edit.value, int):
            found[checks.bias_of(edit.target)] = (edit.value,)
        elif edit.kind == "constant" and isinstance(edit.value, tuple):
            found[f"{edit.target}.{CONSTANT_KERNEL}"] = edit.value
        elif edit.kind == "scatter" and edit.name and isinstance(edit.value, tuple):
            found[f"{edit.target}.{edit.name}"] = (sum(place < 0 for place in edit.value),)
    return found


def fingerprint(model: nn.Module) -> dict[str, Shape]:
    """``{name: shape}`` of every parameter and buffer of ``model``, also those behind parametrisations and those that
    ``state_dict`` leaves out; a tied tensor stands under the first of its names. Wrappers (``DistributedDataParallel``,
    ``torch.compile``) are seen through. Raises ``BadRequest`` for a lazy module that has not been run yet."""
    return {name: tuple(tensor.shape) for name, tensor in named_tensors(model).items()}


def named_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors themselves, named and ordered as in ``fingerprint``."""
    model = unwrap(model)
    first = canonical_names(model)
    tensors = {name: tensor for name, tensor in all_tensors(model) if first[name] == name}
    for name, tensor in tensors.items():
        if nn.parameter.is_lazy(tensor):
            raise BadRequest(f"{name!r} has no shape yet, its module is lazy: run the model once on an example first")
    return tensors


def check_model(plan: Plan, model: nn.Module) -> None:
    """Raises ``WrongModel``, naming the first tensor that differs, unless ``plan`` was made for a network like this.

    Buffers that ``state_dict`` leaves out are compared only where the plan prunes them: many are caches.
    """
    cut = {part.tensor for group in plan.groups for part in group.slices}
    caches = transient(model) - cut
    wanted = {name: shape for name, shape in plan.model.items() if name not in caches}
    offered = {name: shape for name, shape in fingerprint(model).items() if name not in caches}
    compare_shapes(wanted, offered, ("the plan's network", "this model"))


def transient(model: nn.Module) -> set[str]:
    """The names of the buffers that ``state_dict`` leaves out."""
    owners = dict(unwrap(model).named_modules(remove_duplicate=False))
    return {
        f"{prefix}.{name}" if prefix else name
        for prefix, owner in owners.items()
        for name in owner._non_persistent_buffers_set
    }


def compare_shapes(wanted: Mapping[str, Shape], offered: Mapping[str, Shape], who: tuple[str, str]) -> None:
    """Raises ``WrongModel`` with the first tensor, in the order of ``wanted``, that ``offered`` has not or has
    otherwise. ``who`` names the two sides in the text."""
    left, right = who
    for name, shape in wanted.items():
        if name not in offered:
            raise WrongModel(f"tensor {name!r} {list(shape)} of {left} is missing in {right}")
        if offered[name] != shape:
            raise WrongModel(f"tensor {name!r} is {list(shape)} in {left} but {list(offered[name])} in {right}")
    for name, shape in offered.items():
        if name not in wanted:
            raise WrongModel(f"tensor {name!r} {list(shape)} of {right} is unknown to {left}")


def check_pruned(
    plan: Plan, offered: Mapping[str, Shape], *, who: tuple[str, str], also: Set[str] = frozenset()
) -> None:
    """Raises ``WrongModel`` unless ``offered`` could be the fingerprint of what ``apply`` makes of ``plan``'s network.

    Tensors that only one of the two has are passed over, unless the plan cuts them or they are in ``also``: a network
    that was returned as a graph has tables of its own, and lacks the buffers that its forward does not read.
    """
    shapes = pruned_shapes(plan)
    cut = {part.tensor for group in plan.groups for part in group.slices} | also
    wanted = {name: shape for name, shape in shapes.items() if name in cut or name in offered}
    found = {name: shape for name, shape in offered.items() if name in cut or name in shapes}
    compare_shapes(wanted, found, who)


def compose(first: Plan, second: Plan) -> Plan:
    """One plan for the original network that does what ``first`` and then ``second`` do.

    ``second`` was made on the network that ``apply`` made by ``first``; its positions count that network's. A channel
    of ``first`` stays if all its positions do. Raises ``WrongModel`` if ``second`` belongs to another network, and
    ``BadPlan`` where it splits a channel of ``first``, or removes what ``first`` cannot name.
    """
    cut = {part.tensor for group in second.groups for part in group.slices}
    check_pruned(first, second.model, also=cut, who=("the once pruned network", "the second plan's network"))
    before = first.kept()
    final = {tensor: dict(axes) for tensor, axes in before.items()}
    added, later = added_tensors(first), second.kept()
    for tensor, axes in later.items():
        for axis, positions in axes.items() if tensor not in added else ():
            earlier = before.get(tensor, {}).get(axis)
            final.setdefault(tensor, {})[axis] = positions if earlier is None else earlier[positions]
    keep = {group.name: _surviving(group, final, first.model) for group in first.groups}
    shrunk = tuple(_shrunk(edit, later) for edit in first.edits)
    edits = {(edit.kind, edit.target, edit.name): edit for edit in (*shrunk, *second.edits)}
    result = replace(
        first,
        keep=keep,
        made_by={**second.made_by, "after": dict(first.made_by)},
        constants=_compose_constants(first, second),
        stripes=_compose_stripes(first, second, before),
        residual=_compose_residual(first.residual, second.residual),
        edits=tuple(edits.values()),
    )
    _same_cuts(result.kept(), final)
    return result


def _shrunk(edit: Edit, later: Mapping[str, Mapping[int, np.ndarray]]) -> Edit:
    """An added bias, or kernel of constants, after another round of pruning."""
    if edit.kind == "bias":
        axes = later.get(checks.bias_of(edit.target), {})
        return replace(edit, value=len(axes[0])) if axes else edit
    if edit.kind == "constant" and isinstance(edit.value, tuple):
        axes = later.get(f"{edit.target}.{CONSTANT_KERNEL}", {})
        return replace(edit, value=tuple(len(axes.get(axis, range(size))) for axis, size in enumerate(edit.value)))
    return edit


def input_specs(args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """``Plan.inputs`` for example inputs: every tensor becomes ``{"shape": [...], "dtype": "float32"}``, lists, tuples
    and dicts of them keep their form, and anything else that JSON can hold is written as ``{"value": ...}``."""

    def spec(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return {"shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
        if isinstance(value, (list, tuple)):
            return [spec(item) for item in value]
        if isinstance(value, Mapping):
            return {str(key): spec(item) for key, item in value.items()}
        return {"value": value if value is None or isinstance(value, (bool, int, float, str)) else repr(value)}

    return {"args": [spec(arg) for arg in args], "kwargs": {key: spec(arg) for key, arg in (kwargs or {}).items()}}


def _surviving(group: Group, final: Mapping[str, Mapping[int, np.ndarray]], model: Mapping[str, Shape]) -> Shape:
    """The channels of ``group`` all of whose positions are in ``final``."""
    some, every = np.zeros(group.channels, dtype=bool), np.ones(group.channels, dtype=bool)
    for part in group.slices:
        stays = np.ones(model[part.tensor][part.axis], dtype=bool)
        positions = final.get(part.tensor, {}).get(part.axis)
        if positions is not None:
            stays[:] = False
            stays[positions] = True
        some |= stays[part.positions].any(1)
        every &= stays[part.positions].all(1)
    if (some != every).any():
        channel = int(np.flatnonzero(some != every)[0])
        raise BadPlan(
            f"the plans do not compose: of channel {channel} of {group.name!r} the second removes a part only"
        )
    return tuple(np.flatnonzero(every).tolist())


def _same_cuts(got: Mapping[str, Mapping[int, np.ndarray]], wanted: Mapping[str, Mapping[int, np.ndarray]]) -> None:
    """No position may be cut that no group of the first plan stands for."""
    for tensor, axes in wanted.items():
        for axis, positions in axes.items():
            if not np.array_equal(got.get(tensor, {}).get(axis, ()), positions):
                raise BadPlan(
                    f"the plans do not compose: the second cuts axis {axis} of {tensor!r}, where the first plan has no "
                    "channel. Plan the original network in one step instead"
                )


def _compose_residual(first: Residual, second: Residual) -> Residual:
    """The groups are the first plan's, and so is what their channels meet."""
    if first == "scatter":
        return "scatter"
    return "inner" if first == "inner" and second != "coupled" else "coupled"


def _compose_constants(first: Plan, second: Plan) -> dict[str, Constant]:
    result: dict[str, Constant] = {}
    for name in {**first.constants, **second.constants}:
        cuts = [any(g.name == name and len(p.keep[name]) < g.channels for g in p.groups) for p in (first, second)]
        asked = [p.constants.get(name, "drop") for p in (first, second)]
        if all(cuts) and asked[0] != asked[1]:
            raise BadPlan(
                f"the plans do not compose: the constants of group {name!r} are {asked[0]!r} in the first plan and "
                f"{asked[1]!r} in the second\n"
                f"  do: plan the second cut with constants={asked[0]!r}, or leave the group out"
            )
        result[name] = asked[1] if cuts[1] or name not in first.constants else asked[0]
    return result


def _compose_stripes(
    first: Plan, second: Plan, before: Mapping[str, Mapping[int, np.ndarray]]
) -> dict[str, np.ndarray]:
    stripes = {name: mask.copy() for name, mask in first.stripes.items()}
    for name, mask in second.stripes.items():
        weight = checks.weight_of(name)
        filters = before.get(weight, {}).get(0, np.arange(first.model[weight][0]))
        whole = stripes.setdefault(name, np.ones((first.model[weight][0], *mask.shape[1:]), dtype=bool))
        whole[filters] &= mask
    return stripes
