"""The JSON of a sensitivity: a layout people can read, and a reader that believes nothing.

Version 1. One line per group and per tensor shape. A cell that has not been evaluated yet is ``null``: the file that a
sweep writes while it is at work is of the same form, and is not handed out as a result before it is whole.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from secateur.allocation import width_at
from secateur.errors import BadArtifact, BadPlan
from secateur.plan_checks import LARGEST_AXIS, plain
from secateur.sensitivities.curves import GroupCurve, Sensitivity

VERSION = 1
VERSIONS = (1,)
"""The versions of the format that this release reads."""
LONGEST_TEXT = 64 * 2**20
FIELDS = ("secateur_sensitivity", "criterion", "ratios", "dense", "made_by", "curves", "model")
CURVE_FIELDS = ("group", "channels", "stage", "keep", "scores", "retrained", "importance")
_ROOM = 1e-6
"""By how much an importance may lie outside 0..1."""


def encode(found: Sensitivity) -> str:
    """``found`` as JSON text of version 1, ASCII, ending in a newline. Scores that are NaN are still missing."""
    curves = [json.dumps(_curve_values(curve)) for curve in found.curves]
    shapes = [f"{json.dumps(name)}: {json.dumps(list(shape))}" for name, shape in found.model.items()]
    made_by = json.dumps(_plain(found.made_by), indent=2).replace("\n", "\n  ")
    entries = {
        "secateur_sensitivity": str(VERSION),
        "criterion": json.dumps(found.criterion),
        "ratios": json.dumps(list(found.ratios)),
        "dense": json.dumps(_or_null(found.dense)),
        "made_by": made_by,
        "curves": _block("[]", curves),
        "model": _block("{}", shapes),
    }
    return "{\n" + ",\n".join(f'  "{key}": {text}' for key, text in entries.items()) + "\n}\n"


def decode(text: str) -> Sensitivity:
    """The sensitivity in ``text``, which may be unfinished: missing scores are NaN. ``BadArtifact`` for bad text."""
    data = _parse(text)
    _keys("sensitivity", data, FIELDS)
    ratios = _ratios(data["ratios"])
    curves = _list("curves", data["curves"])
    found = tuple(_curve(f"curves[{index}]", curve, ratios) for index, curve in enumerate(curves))
    names = [curve.group for curve in found]
    for name in names:
        if names.count(name) > 1:
            raise BadArtifact(f"sensitivity: curves: the group {name!r} is there twice")
    return Sensitivity(
        model={name: _shape(f"model[{name!r}]", s) for name, s in _mapping("model", data["model"]).items()},
        criterion=_text("criterion", data["criterion"]),
        ratios=ratios,
        dense=_score("dense", data["dense"]),
        curves=found,
        made_by=_plain(_mapping("made_by", data["made_by"])),
    )


def cells(found: Sensitivity) -> list[float]:
    """Every number that evaluating gives, NaN where it is missing."""
    return [found.dense, *(score for curve in found.curves for score in (*curve.scores, *curve.retrained))]


def refuse_unfinished(found: Sensitivity) -> None:
    """Raises ``BadArtifact`` if a score is missing."""
    scores = cells(found)
    missing = sum(map(math.isnan, scores))
    if missing:
        raise BadArtifact(
            f"the sensitivity is not finished: {missing} of {len(scores)} evaluations are missing\n"
            "  do: run the same analysis again with the same file; it goes on where it was"
        )


# Writing ---------------------------------------------------------------------------------------------------------


def _curve_values(curve: GroupCurve) -> dict[str, Any]:
    values = {name: getattr(curve, name) for name in CURVE_FIELDS}
    for name in ("scores", "retrained"):
        values[name] = [_or_null(score) for score in values[name]]
    return values


def _or_null(score: float) -> float | None:
    return None if math.isnan(score) else score


def _block(brackets: str, lines: Sequence[str]) -> str:
    if not lines:
        return brackets
    return brackets[0] + "\n    " + ",\n    ".join(lines) + "\n  " + brackets[1]


# Reading ---------------------------------------------------------------------------------------------------------


def _parse(text: str) -> dict[str, Any]:
    if not isinstance(text, str):
        raise BadArtifact(f"sensitivity: JSON text is needed, not {type(text).__name__}")
    if len(text) > LONGEST_TEXT:
        raise BadArtifact(f"sensitivity: the text is longer than {LONGEST_TEXT // 2**20} MiB")
    try:
        data = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    except RecursionError:
        raise BadArtifact("sensitivity: the JSON nests too deeply") from None
    except ValueError as error:  # JSONDecodeError is one, and so is a number of thousands of digits
        raise BadArtifact(f"sensitivity: not JSON, or cut off: {error}") from None
    if not isinstance(data, dict) or "secateur_sensitivity" not in data:
        raise BadArtifact(
            "sensitivity: this JSON is not a sensitivity of secateur: it has no field 'secateur_sensitivity'"
        )
    version = data["secateur_sensitivity"]
    if type(version) is not int or version not in VERSIONS:
        known = ", ".join(map(str, VERSIONS))
        raise BadArtifact(
            f"sensitivity: its version is {str(version)[:20]!r}; this release of secateur reads version {known}"
        )
    return data


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [key for key, _ in pairs]
        twice = next(key for key in names if names.count(key) > 1)
        raise BadArtifact(f"sensitivity: the key {twice[:80]!r} is there twice in one object")
    return result


def _no_constant(name: str) -> Any:
    raise BadArtifact(f"sensitivity: {name} is not a number of JSON")


def _curve(where: str, data: object, ratios: Sequence[float]) -> GroupCurve:
    count = len(ratios)
    values = _mapping(where, data)
    _keys(f"sensitivity: {where}", values, CURVE_FIELDS)
    channels = values["channels"]
    if type(channels) is not int or not 1 <= channels <= LARGEST_AXIS:
        raise BadArtifact(f"sensitivity: {where}.channels: an integer from 1 to {LARGEST_AXIS}, not {channels!r}")
    keep = tuple(_numbers(f"{where}.keep", values["keep"], (count,), _kept(channels)))
    for ratio, kept in zip(ratios, keep, strict=True):
        if kept != width_at(channels, ratio):
            raise BadArtifact(
                f"sensitivity: {where}.keep: without {ratio} of {channels} channels {width_at(channels, ratio)} are "
                f"left, not {kept}"
            )
    return GroupCurve(
        group=_text(f"{where}.group", values["group"]),
        channels=channels,
        stage=_text(f"{where}.stage", values["stage"]),
        keep=keep,
        scores=tuple(_numbers(f"{where}.scores", values["scores"], (count,), _score)),
        retrained=tuple(_numbers(f"{where}.retrained", values["retrained"], (0, count), _score)),
        importance=tuple(_numbers(f"{where}.importance", values["importance"], (0, channels), _share)),
    )


def _numbers(where: str, data: object, lengths: tuple[int, ...], read: Callable[[str, object], Any]) -> list[Any]:
    values = _list(where, data)
    if len(values) not in lengths:
        wanted = " or ".join(map(str, lengths))
        raise BadArtifact(f"sensitivity: {where}: {wanted} numbers are needed, not {len(values)}")
    return [read(f"{where}[{index}]", value) for index, value in enumerate(values)]


def _kept(channels: int) -> Callable[[str, object], int]:
    def read(where: str, value: object) -> int:
        if type(value) is not int or not 1 <= value <= channels:
            raise BadArtifact(f"sensitivity: {where}: an integer from 1 to {channels} is needed, not {value!r}")
        return value

    return read


def _score(where: str, value: object) -> float:
    return math.nan if value is None else _real(where, value)


def _share(where: str, value: object) -> float:
    number = _real(where, value)
    if not -_ROOM <= number <= 1 + _ROOM:
        raise BadArtifact(f"sensitivity: {where}: a number from 0 to 1 is needed, not {value!r}")
    return number


def _real(where: str, value: object) -> float:
    try:
        number = math.nan if isinstance(value, bool) or not isinstance(value, (int, float)) else float(value)
    except OverflowError:  # an integer of hundreds of digits
        number = math.inf
    if not math.isfinite(number):
        raise BadArtifact(f"sensitivity: {where}: a finite number is needed, not {str(value)[:40]!r}")
    return number


def _ratios(data: object) -> tuple[float, ...]:
    ratios = tuple(_real(f"ratios[{index}]", value) for index, value in enumerate(_list("ratios", data)))
    if not ratios or not all(0 < ratio < 1 for ratio in ratios) or any(a >= b for a, b in pairwise(ratios)):
        raise BadArtifact(f"sensitivity: ratios: rising numbers between 0 and 1 are needed, not {list(ratios)}")
    return ratios


def _shape(where: str, data: object) -> tuple[int, ...]:
    sizes = _list(where, data)
    if not all(type(size) is int and 0 <= size < 2**63 for size in sizes):
        raise BadArtifact(f"sensitivity: {where}: a shape is a list of integers >= 0, not {data!r}")
    return tuple(sizes)


def _keys(where: str, data: Mapping[str, Any], wanted: Iterable[str]) -> None:
    for name in wanted:
        if name not in data:
            raise BadArtifact(f"{where}: the field {name!r} is missing")
    for name in data:
        if name not in wanted:
            raise BadArtifact(f"{where}: there is no field {name[:80]!r}")


def _mapping(where: str, data: object) -> dict[str, Any]:
    if not isinstance(data, dict):
        raise BadArtifact(f"sensitivity: {where}: an object is needed, not {type(data).__name__}")
    return data


def _list(where: str, data: object) -> list[Any]:
    if not isinstance(data, list):
        raise BadArtifact(f"sensitivity: {where}: a list is needed, not {type(data).__name__}")
    return data


def _text(where: str, data: object) -> str:
    if not isinstance(data, str) or len(data) > 1000:
        raise BadArtifact(f"sensitivity: {where}: a short text is needed, not {str(data)[:40]!r}")
    return data


def _plain(made_by: Mapping[str, Any]) -> dict[str, Any]:
    try:
        return plain("made_by", made_by)
    except BadPlan as error:
        raise BadArtifact(f"sensitivity: {error}") from None
