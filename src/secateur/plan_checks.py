"""What makes a plan a good one: the checks that ``Plan`` runs on its fields when it is constructed.

Each takes one field, raises ``BadPlan`` naming the place and the value it does not like, and hands back the field in
its plain form (tuples of Python ints, read-only masks, copies of JSON values).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from secateur.core import Edit, Group, Slice
from secateur.errors import BadPlan, nearest

Shape = tuple[int, ...]

ROLES = ("writes", "reads", "scales", "follows")
WIRINGS = ("scatter", "gather", "constant")
EDIT_KINDS = ("attribute", "graph", "bias", *WIRINGS)
SCATTERED_WITH = ("", "scatter_constants")
MOST_AXES = 64
LARGEST_AXIS = 2**24
"""The longest tensor axis that may carry channels: anything beyond it is a damaged or hostile file."""
DEEPEST = 20
"""How deep ``made_by`` and ``inputs`` may nest."""
LARGEST_INPUT = 2**28
"""The most elements of example inputs: they are made again from their specs when a plan is applied elsewhere."""
DTYPES = tuple(
    name for name, value in vars(torch).items() if isinstance(value, torch.dtype) and str(value) == f"torch.{name}"
)


def mapping(what: str, value: object) -> Mapping[str, Any]:
    """``value``, if it is a mapping from strings."""
    if not isinstance(value, Mapping):
        raise BadPlan(f"{what}: a mapping is needed, not {type(value).__name__}")
    for key in value:
        if not isinstance(key, str):
            raise BadPlan(f"{what}: names are strings, not {key!r}")
    return value


def one_of(what: str, value: object, known: Iterable[str]) -> None:
    """``value`` is one of the ``known`` words."""
    if not isinstance(value, str) or value not in tuple(known):
        raise BadPlan(f"{what}: {value!r} is none of {', '.join(known)}")


def shape_of(where: str, shape: object) -> Shape:
    """A shape, as a tuple."""
    if not isinstance(shape, (tuple, list)) or not all(type(size) is int and 0 <= size < 2**63 for size in shape):
        raise BadPlan(f"{where}: a shape is a list of integers >= 0, not {shape!r}")
    return tuple(shape)


def indices(name: str, kept: object) -> Shape:
    """The kept indices of one group, from any list, array or tensor of integers."""
    if isinstance(kept, (np.ndarray, torch.Tensor)):
        kept = kept.tolist()
    if not isinstance(kept, (tuple, list)) or not all(
        isinstance(index, (int, np.integer)) and not isinstance(index, bool) for index in kept
    ):
        raise BadPlan(f"keep[{name!r}]: a list of channel indices is needed, not {type(kept).__name__}")
    return tuple(int(index) for index in kept)


def check_keep(groups: tuple[Group, ...], keep: Mapping[str, Shape]) -> None:
    """Every group is listed, no other; indices are sorted, unique, in range, and at least one."""
    names = {group.name: None for group in groups}
    for name in keep:
        if name not in names:
            raise BadPlan(f"keep: the plan has no group {name!r}{nearest(name, names)}")
    for group in groups:
        where = f"keep[{group.name!r}]"
        if group.name not in keep:
            raise BadPlan(f"{where} is missing: every group is listed, whole ones too")
        kept = keep[group.name]
        if not kept:
            raise BadPlan(f"{where} is empty: at least one of its {group.channels} channels has to stay")
        for index in kept:
            if not 0 <= index < group.channels:
                raise BadPlan(f"{where}: index {index} is outside 0..{group.channels - 1}")
        for left, right in pairwise(kept):
            if left == right:
                raise BadPlan(f"{where}: index {left} is there twice")
            if left > right:
                raise BadPlan(f"{where}: {left} stands before {right}; indices are sorted")


def check_groups(groups: tuple[Group, ...], model: Mapping[str, Shape]) -> None:
    """Groups are free and named once, their slices lie inside the tensors, and no position has two owners."""
    owners: dict[tuple[str, int], np.ndarray] = {}
    seen: set[str] = set()
    first = 0  # channels are numbered through all groups, so that one array per axis tells every owner apart
    for group in groups:
        if not isinstance(group, Group) or not isinstance(group.name, str):
            raise BadPlan(f"groups: a Group is needed, not {type(group).__name__}")
        where = f"group {group.name!r}"
        if group.name in seen:
            raise BadPlan(f"{where} is there twice")
        seen.add(group.name)
        if group.locked:
            raise BadPlan(f"{where} is locked ({group.locked}); a plan lists free groups only")
        for what, number in (("channels", group.channels), ("partitions", group.partitions)):
            if type(number) is not int or number < 1:
                raise BadPlan(f"{where}: {what} is an integer >= 1, not {number!r}")
        if not group.slices:
            raise BadPlan(f"{where} lies in no tensor: at least one slice is needed")
        numbers = np.arange(first, first + group.channels)[:, None]
        for part in group.slices:
            _check_slice(where, group.channels, part, model)
            place = (part.tensor, part.axis)
            if place not in owners:
                owners[place] = np.full(model[part.tensor][part.axis], -1)
            owner = owners[place]
            before = owner[part.positions]
            owner[part.positions] = numbers
            if ((before != -1) & (before != numbers)).any():
                raise BadPlan(f"{where}: a position on axis {part.axis} of {part.tensor!r} belongs to two channels")
        first += group.channels


def _check_slice(where: str, channels: int, part: Slice, model: Mapping[str, Shape]) -> None:
    if part.tensor not in model:
        raise BadPlan(f"{where}: the model has no tensor {part.tensor!r}{nearest(part.tensor, model)}")
    where = f"{where}, {part.tensor!r}"
    shape = model[part.tensor]
    if type(part.axis) is not int or not 0 <= part.axis < len(shape):
        raise BadPlan(f"{where}: there is no axis {part.axis!r} in a tensor of shape {list(shape)}")
    if shape[part.axis] > LARGEST_AXIS:
        raise BadPlan(f"{where}: axis {part.axis} is longer than {LARGEST_AXIS}")
    one_of(f"{where}: role", part.role, ROLES)
    positions = part.positions
    if not isinstance(positions, np.ndarray) or positions.dtype != np.int64 or positions.ndim != 2:
        raise BadPlan(f"{where}: positions are an int64 array [channels, k]")
    if positions.shape[0] != channels or positions.shape[1] < 1:
        raise BadPlan(f"{where}: positions are {list(positions.shape)} but the group has {channels} channels")
    if (np.diff(positions.ravel()) < 1).any() and len(np.unique(positions)) != positions.size:  # most rise: no sorting
        raise BadPlan(f"{where}: a position is there twice on axis {part.axis}")
    if positions.min() < 0 or positions.max() >= shape[part.axis]:
        raise BadPlan(f"{where}: a position is outside 0..{shape[part.axis] - 1} of axis {part.axis}")


def weight_of(conv: str) -> str:
    """The name of the weight of the module ``conv``."""
    return f"{conv}.weight" if conv else "weight"


def bias_of(layer: str) -> str:
    """The name of the bias of the module ``layer``."""
    return f"{layer}.bias" if layer else "bias"


def stripe(name: str, mask: object, model: Mapping[str, Shape]) -> np.ndarray:
    """A read-only copy of a mask ``[O, K, L]`` over the filters of the convolution ``name``."""
    where = f"stripes[{name!r}]"
    shape = model.get(weight_of(name), ())
    if len(shape) != 4:
        raise BadPlan(f"{where}: the model has no 2-d convolution of that name")
    if not isinstance(mask, np.ndarray) or mask.dtype != np.bool_:
        raise BadPlan(f"{where}: a bool array is needed")
    wanted = (shape[0], *shape[2:])
    if mask.shape != wanted:
        raise BadPlan(f"{where}: the mask is {list(mask.shape)} but the filters are {list(wanted)}")
    mask = mask.copy()
    mask.flags.writeable = False
    return mask


def edit_of(index: int, edit: Edit) -> Edit:
    """An edit of a known kind, with a plain value.

    ``attribute`` sets the integer, or tuple of integers, ``name`` of the module ``target``; ``bias`` gives the module
    ``target`` a bias of length ``value``; ``graph``: the pruned network is the captured graph; ``scatter``, ``gather``
    and ``constant`` rewire the module ``target``.
    """
    where = f"edits[{index}]"
    if not isinstance(edit, Edit):
        raise BadPlan(f"{where}: an Edit is needed, not {type(edit).__name__}")
    one_of(f"{where}.kind", edit.kind, EDIT_KINDS)
    if edit.kind == "graph":
        if (edit.target, edit.name, edit.value) != ("", "", None):
            raise BadPlan(f"{where}: a graph edit has neither target nor name nor value")
        return edit
    if not isinstance(edit.target, str):
        raise BadPlan(f"{where}.target: a module's name is needed, not {edit.target!r}")
    if edit.kind == "bias":
        if edit.name != "" or type(edit.value) is not int or not 1 <= edit.value <= LARGEST_AXIS:
            raise BadPlan(f"{where}: a bias edit has no name, and its value is a length from 1 to {LARGEST_AXIS}")
        return edit
    if edit.kind in WIRINGS:
        return _wiring(where, edit)
    if not isinstance(edit.name, str) or not edit.name.isidentifier() or edit.name.startswith("_"):
        raise BadPlan(f"{where}.name: an attribute's name is needed, not {edit.name!r}")
    value = tuple(edit.value) if isinstance(edit.value, (list, tuple)) else edit.value
    for number in value if isinstance(value, tuple) else (value,):
        if type(number) is not int or abs(number) >= 2**63:
            raise BadPlan(f"{where}.value: an integer or a list of integers is needed, not {edit.value!r}")
    return replace(edit, value=value)


def _wiring(where: str, edit: Edit) -> Edit:
    """An edit of a kind that rewires a module, with positions that make sense."""
    value = edit.value if isinstance(edit.value, (list, tuple)) else ()
    numbers = np.asarray(value) if value and all(type(number) is int for number in value) else np.zeros(0, np.int64)
    name, axis, is_kernel = edit.name, edit.axis, edit.kind == "constant"
    there = numbers[numbers >= 0] if edit.kind == "scatter" else numbers
    good = 0 < len(numbers) <= LARGEST_AXIS and bool((numbers < LARGEST_AXIS).all()) and len(there) > 0
    if edit.kind == "scatter":
        good &= bool((numbers >= -1).all()) and there.tolist() == list(range(len(there))) and name in SCATTERED_WITH
    elif edit.kind == "gather":
        good &= bool((np.diff(numbers, prepend=-1) > 0).all()) and name == ""
    else:
        good &= bool((numbers > 0).all()) and math.prod(value) <= LARGEST_INPUT and name == ""
    if not good or (axis is not None if is_kernel else type(axis) is not int or not 0 <= axis < MOST_AXES):
        raise BadPlan(f"{where}: a {edit.kind} edit of {edit.target!r} with a value, a name or an axis that is none")
    return replace(edit, value=tuple(value))


def check_biases(edits: Sequence[Edit], model: Mapping[str, Shape]) -> None:
    """Every bias that is added stands beside a weight, where none was; a captured graph has no place for one."""
    wired = [(edit.kind, edit.target) for edit in edits if edit.kind in WIRINGS]
    if len(set(wired)) < len(wired) or (wired and any(edit.kind == "graph" for edit in edits)):
        raise BadPlan("edits: a module is rewired twice, or rewired in a network that is returned as a captured graph")
    targets = [edit.target for edit in edits if edit.kind == "bias"]
    for target in targets:
        if len(model.get(weight_of(target), ())) < 2:
            raise BadPlan(f"edits: the model has no layer {target!r} with a weight, which a bias could be added to")
        if bias_of(target) in model or targets.count(target) > 1:
            raise BadPlan(f"edits: {target!r} has a bias, and no second one can be added")
    if targets and any(edit.kind == "graph" for edit in edits):
        raise BadPlan(
            f"edits: a bias is added to {targets[0]!r}, but the pruned network is a captured graph, which has no place "
            "for it\n  do: plan with prefer='module', or compensate only after the last cut"
        )


def inputs_of(inputs: object) -> dict[str, Any]:
    """``{"args": [spec, ...], "kwargs": {name: spec}}``, or nothing. A spec is ``{"shape": [...], "dtype": ...}``,
    ``{"value": scalar}``, or a list or mapping of specs."""
    specs = plain("inputs", inputs)
    if specs and specs.keys() != {"args", "kwargs"}:
        raise BadPlan(f"inputs: the keys are args and kwargs, not {', '.join(sorted(specs))}")
    if specs and not (isinstance(specs["args"], list) and isinstance(specs["kwargs"], dict)):
        raise BadPlan("inputs: args is a list and kwargs a mapping")
    if _elements("inputs", specs) > LARGEST_INPUT:
        raise BadPlan(f"inputs: more than {LARGEST_INPUT} elements")
    return specs


def _elements(where: str, spec: Any) -> int:
    """How many elements the tensors of ``spec`` have."""
    if isinstance(spec, list):
        return sum(_elements(f"{where}[{index}]", item) for index, item in enumerate(spec))
    if not isinstance(spec, dict):
        raise BadPlan(f"{where}: {spec!r} describes no input: give shape and dtype, or value")
    if spec.keys() == {"value"} and not isinstance(spec["value"], (list, dict)):
        return 0
    if spec.keys() != {"shape", "dtype"}:
        return sum(_elements(f"{where}.{name}", item) for name, item in spec.items())
    one_of(f"{where}.dtype", spec["dtype"], DTYPES)
    if not isinstance(spec["shape"], list):
        raise BadPlan(f"{where}.shape: a shape is a list of integers >= 0, not {spec['shape']!r}")
    return math.prod(shape_of(f"{where}.shape", spec["shape"]))


def plain(what: str, value: object) -> dict[str, Any]:
    """A deep copy of a mapping made of what JSON can hold; tuples become lists, numpy's numbers Python's."""

    def copied(where: str, value: Any, depth: int) -> Any:
        if depth > DEEPEST:
            raise BadPlan(f"{what}: nested deeper than {DEEPEST}")
        if isinstance(value, (np.integer, np.floating, np.bool_)):
            value = value.item()
        if isinstance(value, Mapping):
            return {key: copied(f"{where}.{key}", item, depth + 1) for key, item in mapping(where, value).items()}
        if isinstance(value, (list, tuple)):
            return [copied(f"{where}[{index}]", item, depth + 1) for index, item in enumerate(value)]
        if isinstance(value, float) and not math.isfinite(value):
            raise BadPlan(f"{where}: {value} is not a number that JSON can hold")
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        raise BadPlan(f"{where}: {type(value).__name__} is nothing that JSON can hold")

    return dict(copied(what, mapping(what, value), 0))
