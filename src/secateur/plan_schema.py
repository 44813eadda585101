"""The plan's JSON: a layout people can read, and a reader that believes nothing.

Version 1. One line per tensor shape and per slice; channel indices and positions as ranges (``"0-12,14,20-31"``), or as
``{"start", "count": [C, k], "step": [per channel, within]}`` where they are regular, which they nearly always are.

The reader takes hostile text: it bounds every count by the tensor shapes before anything of that size is allocated,
refuses duplicate and unknown keys, and answers everything it does not like with ``BadPlan`` and the path of the field.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from secateur.core import Edit, Group, Slice
from secateur.errors import BadPlan

if TYPE_CHECKING:
    from secateur.plans import Plan

VERSION = 1
VERSIONS = (1,)
"""The versions of the format that this release reads."""
LONGEST_TEXT = 64 * 2**20
MOST_POSITIONS = 2**24
"""The most positions a whole plan may spell out, far more than any network has channels."""

Count = Annotated[int, Field(ge=0, lt=2**63)]
Some = Annotated[int, Field(ge=1, lt=2**63)]
Name = Annotated[str, Field(max_length=1000)]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class _Positions(_Strict):
    """Either ``start`` and ``step``, or ``ranges``."""

    count: Annotated[list[Some], Field(min_length=2, max_length=2)]
    start: Count | None = None
    step: Annotated[list[int], Field(min_length=2, max_length=2)] | None = None
    ranges: str | None = None


class _Slice(_Strict):
    tensor: Name
    axis: Count
    role: Literal["writes", "reads", "scales", "follows"]
    positions: _Positions


class _Group(_Strict):
    name: Name
    channels: Some
    keep: str
    partitions: Some
    slices: Annotated[list[_Slice], Field(min_length=1)]


class _Edit(_Strict):
    kind: Literal["attribute", "graph", "bias", "scatter", "gather", "constant"]
    target: Name
    name: Name
    value: int | list[int] | None
    axis: Count | None = None


class _Plan(_Strict):
    secateur_plan: int
    made_by: dict[str, Any]
    inputs: dict[str, Any]
    residual: Literal["coupled", "inner", "scatter"]
    groups: list[_Group]
    constants: dict[Name, Literal["drop", "fold"]]
    stripes: dict[Name, list[str]]
    edits: list[_Edit]
    model: dict[Name, list[Count]]


def encode(plan: Plan) -> str:
    """``plan`` as JSON text of version 1, ASCII, ending in a newline."""
    line = json.dumps
    groups = [_group_text(group, plan.keep[group.name]) for group in plan.groups]
    edits = [line({key: v for key, v in vars(e).items() if key != "axis" or v is not None}) for e in plan.edits]
    stripes = {name: [_bits(rows) for rows in mask] for name, mask in plan.stripes.items()}
    entries = {
        "secateur_plan": str(VERSION),
        "made_by": json.dumps(dict(plan.made_by), indent=2).replace("\n", "\n  "),
        "inputs": line(dict(plan.inputs)),
        "residual": line(plan.residual),
        "groups": _block("[]", groups),
        "constants": line(dict(plan.constants)),
        "stripes": _block("{}", [f"{line(name)}: {line(rows)}" for name, rows in stripes.items()]),
        "edits": _block("[]", edits),
        "model": _block("{}", [f"{line(name)}: {line(shape)}" for name, shape in plan.model.items()]),
    }
    return "{\n" + ",\n".join(f'  "{key}": {text}' for key, text in entries.items()) + "\n}\n"


def decode(text: str) -> dict[str, Any]:
    """The fields of ``Plan`` that ``text`` states, not yet checked against each other. ``BadPlan`` for bad text."""
    data = _parse(text)
    try:
        read = _Plan.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
        raise BadPlan(f"plan: {_path(first['loc'])}: {first['msg'].lower()}{more}") from None
    _check_size(read)
    return {
        "groups": tuple(_group(f"plan: groups[{index}]", group) for index, group in enumerate(read.groups)),
        "keep": _keep(read.groups),
        "model": {name: tuple(shape) for name, shape in read.model.items()},
        "inputs": read.inputs,
        "made_by": read.made_by,
        "constants": read.constants,
        "stripes": {name: _mask(name, rows, read.model) for name, rows in read.stripes.items()},
        "residual": read.residual,
        "edits": tuple(
            Edit(e.kind, e.target, e.name, tuple(e.value) if isinstance(e.value, list) else e.value, e.axis)
            for e in read.edits
        ),
    }


def ranges(numbers: Iterable[int]) -> str:
    """``[0, 1, 2, 5]`` as ``"0-2,5"``. Order is kept; a run is written as a range where it rises by one."""
    values = np.asarray(tuple(numbers), dtype=np.int64)
    if not values.size:
        return ""
    breaks = np.flatnonzero(np.diff(values) != 1) + 1
    runs = zip([0, *breaks], [*breaks, len(values)], strict=True)
    return ",".join(f"{values[i]}-{values[j - 1]}" if j - i > 1 else f"{values[i]}" for i, j in runs)


def parse_ranges(where: str, text: str, most: int) -> list[int]:
    """The numbers of ``"0-2,5"``, at most ``most`` of them: a range is measured before it is spelled out."""
    found: list[int] = []
    for item in text.split(",") if text else ():
        match = _ITEM.fullmatch(item)
        if match is None:
            raise BadPlan(f"{where}: {item[:40]!r} is neither a number nor a range such as 4-7")
        start = int(match[1])
        end = start if match[2] is None else int(match[2])
        if end < start:
            raise BadPlan(f"{where}: the range {item!r} runs backwards")
        if len(found) + end - start + 1 > most:
            raise BadPlan(f"{where}: at {item!r} there are more than the {most} numbers there can be")
        found.extend(range(start, end + 1))
    return found


_ITEM = re.compile(r"([0-9]{1,12})(?:-([0-9]{1,12}))?")


def _parse(text: str) -> Any:
    if not isinstance(text, str):
        raise BadPlan(f"plan: JSON text is needed, not {type(text).__name__}")
    if len(text) > LONGEST_TEXT:
        raise BadPlan(f"plan: the text is longer than {LONGEST_TEXT // 2**20} MiB")
    try:
        data = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    except RecursionError:
        raise BadPlan("plan: the JSON nests too deeply") from None
    except json.JSONDecodeError as error:
        raise BadPlan(f"plan: not JSON, or cut off: {error}") from None
    except BadPlan:
        raise
    except ValueError as error:  # a number of thousands of digits
        raise BadPlan(f"plan: {error}") from None
    if not isinstance(data, dict) or "secateur_plan" not in data:
        raise BadPlan("plan: this JSON is not a plan of secateur: it has no field 'secateur_plan'")
    version = data["secateur_plan"]
    if type(version) is not int or version not in VERSIONS:
        shown = (
            version if type(version) is int and abs(version) < 10**9 else f"no small integer ({type(version).__name__})"
        )
        known = ", ".join(map(str, VERSIONS))
        raise BadPlan(f"plan: its version is {shown}; this release of secateur reads version {known}")
    return data


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise BadPlan(f"plan: the key {key[:80]!r} is there twice in one object")
            seen.add(key)
    return result


def _no_constant(name: str) -> Any:
    raise BadPlan(f"plan: {name} is not a number of JSON")


def _path(location: tuple[int | str, ...]) -> str:
    """``("groups", 3, "keep")`` as ``groups[3].keep``, without pydantic's names for the arms of a union."""
    arms = ("int", "list[int]")
    parts = [f"[{p}]" if isinstance(p, int) else f".{p}" for p in location if p not in arms]
    return "".join(parts).lstrip(".") or "the whole"


def _check_size(read: _Plan) -> None:
    """Bounds all that will be allocated by what the tensors' shapes allow, and that by ``MOST_POSITIONS``."""
    axes: dict[tuple[str, int], int] = {}
    total = 0
    for number, group in enumerate(read.groups):
        for index, part in enumerate(group.slices):
            where = f"plan: groups[{number}].slices[{index}]"
            shape = read.model.get(part.tensor)
            if shape is None:
                raise BadPlan(f"{where}: the model has no tensor {part.tensor!r}")
            if part.axis >= len(shape):
                raise BadPlan(f"{where}: there is no axis {part.axis} in a tensor of shape {shape}")
            channels, k = part.positions.count
            if channels != group.channels:
                raise BadPlan(f"{where}: positions of {channels} channels in a group of {group.channels}")
            if channels * k > shape[part.axis]:
                raise BadPlan(f"{where}: {channels} x {k} positions on an axis of {shape[part.axis]}")
            total += channels * k
            axes[part.tensor, part.axis] = shape[part.axis]
    if max(total, sum(axes.values())) > MOST_POSITIONS:
        raise BadPlan(f"plan: it spans more than {MOST_POSITIONS} positions, beyond any network that can be pruned")


def _keep(groups: list[_Group]) -> dict[str, tuple[int, ...]]:
    keep: dict[str, tuple[int, ...]] = {}
    for number, group in enumerate(groups):
        if group.name in keep:
            raise BadPlan(f"plan: groups[{number}].name: {group.name!r} is there twice")
        keep[group.name] = tuple(parse_ranges(f"plan: groups[{number}].keep", group.keep, group.channels))
    return keep


def _group(where: str, group: _Group) -> Group:
    slices = []
    for index, part in enumerate(group.slices):
        positions = _positions(f"{where}.slices[{index}].positions", part.positions)
        slices.append(Slice(part.tensor, part.axis, positions, part.role))
    return Group(group.name, group.channels, tuple(slices), group.partitions)


def _positions(where: str, value: _Positions) -> np.ndarray:
    channels, k = value.count
    if value.ranges is not None and value.start is None and value.step is None:
        numbers = parse_ranges(where, value.ranges, channels * k)
        if len(numbers) != channels * k:
            raise BadPlan(f"{where}: {len(numbers)} positions where count says {channels} x {k}")
        positions = np.array(numbers, dtype=np.int64).reshape(channels, k)
    elif value.ranges is None and value.start is not None and value.step is not None:
        largest = value.start + channels * abs(value.step[0]) + k * abs(value.step[1])
        if largest >= 2**62:
            raise BadPlan(f"{where}: start and step reach beyond any tensor")
        grid = np.arange(channels)[:, None] * value.step[0] + np.arange(k) * value.step[1]
        positions = (value.start + grid).astype(np.int64)
    else:
        raise BadPlan(f"{where}: either start and step are needed, or ranges")
    positions.flags.writeable = False
    return positions


def _group_text(group: Group, keep: Iterable[int]) -> str:
    head = {"name": group.name, "channels": group.channels, "keep": ranges(keep), "partitions": group.partitions}
    slices = [
        json.dumps({"tensor": s.tensor, "axis": s.axis, "role": s.role, "positions": _pattern(s.positions)})
        for s in group.slices
    ]
    return json.dumps(head)[:-1] + ', "slices": ' + _block("[]", slices, indent=6) + "}"


def _pattern(positions: np.ndarray) -> Mapping[str, Any]:
    """The positions as start and steps where they are an arithmetic grid, else as ranges, channel after channel."""
    channels, k = positions.shape
    start = int(positions[0, 0])
    step = [int(positions[1, 0]) - start if channels > 1 else 1, int(positions[0, 1]) - start if k > 1 else 1]
    grid = start + np.arange(channels)[:, None] * step[0] + np.arange(k) * step[1]
    if np.array_equal(grid, positions):
        return {"start": start, "count": [channels, k], "step": step}
    return {"count": [channels, k], "ranges": ranges(positions.ravel().tolist())}


def _bits(rows: np.ndarray) -> str:
    """A filter's stripes ``[K, L]`` as rows of 1 (kept) and 0: ``"111 010 111"``."""
    return " ".join("".join("01"[int(bit)] for bit in row) for row in rows)


def _mask(name: str, filters: list[str], model: Mapping[str, list[int]]) -> np.ndarray:
    where = f"plan: stripes.{name}"
    shape = model.get(f"{name}.weight" if name else "weight", [])
    if len(shape) != 4:
        raise BadPlan(f"{where}: the model has no 2-d convolution of that name")
    if len(filters) != shape[0]:
        raise BadPlan(f"{where}: {len(filters)} filters where the weight has {shape[0]}")
    masks = []
    for index, bits in enumerate(filters):
        rows = bits.split(" ")
        # Lengths first: only then is anything of the stated size made.
        if len(rows) != shape[2] or any(len(row) != shape[3] for row in rows) or set(bits) - set("01 "):
            raise BadPlan(f"{where}[{index}]: {shape[2]} rows of {shape[3]} bits are needed, such as '111 010 111'")
        masks.append([[bit == "1" for bit in row] for row in rows])
    return np.array(masks, dtype=bool).reshape(shape[0], shape[2], shape[3])


def _block(brackets: str, lines: list[str], indent: int = 4) -> str:
    """The lines one below the other between two brackets."""
    if not lines:
        return brackets
    space = " " * indent
    return f"{brackets[0]}\n" + ",\n".join(space + line for line in lines) + "\n" + " " * (indent - 2) + brackets[1]
