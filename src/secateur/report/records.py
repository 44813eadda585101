"""A ``Report`` as JSON and back, so that its page can be made anew, or with others, from nothing but this text."""

from __future__ import annotations

import base64
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
from pydantic import ConfigDict, TypeAdapter, ValidationError

from secateur.core import Turnover
from secateur.errors import BadArtifact
from secateur.report.content import Curve, Filters, LayerRow, Report, Row, Whole, Zeroed
from secateur.sensitivities import Sensitivity

FORMAT = 1
_CLOSED = ConfigDict(extra="forbid", allow_inf_nan=False)


@dataclass(frozen=True)
class _Pictures:
    """Filters: ``images`` are the bytes of ``[O, K, L, 3]`` in base64."""

    layer: str
    shape: tuple[int, int, int, int]
    images: str
    norms: list[float]
    order: list[int]


@dataclass(frozen=True)
class _Choice:
    epoch: int
    entered: dict[str, tuple[int, ...]]
    left: dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class _Zeroed:
    channels: dict[str, int]
    history: list[_Choice]


@dataclass(frozen=True)
class _Record:
    """The fields of a report as JSON has them."""

    format: int
    title: str
    rows: list[Row]
    layers: list[LayerRow]
    norms: dict[str, list[float]]
    final: str = ""
    curves: list[Curve] = field(default_factory=list)
    sensitivity: str | None = None
    filters: _Pictures | None = None
    zeroed: _Zeroed | None = None
    whole: list[Whole] = field(default_factory=list)
    images: int = 0
    timing: str = ""
    law: dict[str, str] = field(default_factory=dict)
    facts: dict[str, str] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    command: str = ""


_Record.__pydantic_config__ = _CLOSED  # type: ignore[attr-defined]
_ADAPTER = TypeAdapter(_Record)
_PLAIN = "title rows layers final curves whole images timing law facts environment command".split()


def report_json(report: Report) -> str:
    """The report as JSON; ``parse_report`` reads it."""
    filters, zeroed = report.filters, report.zeroed
    values: dict[str, Any] = {name: getattr(report, name) for name in _PLAIN}
    values["norms"] = {name: own.tolist() for name, own in report.norms.items()}
    values["sensitivity"] = None if report.sensitivity is None else report.sensitivity.to_json()
    if filters is not None:
        images = base64.b64encode(np.ascontiguousarray(filters.images).tobytes()).decode()
        values["filters"] = _Pictures(
            filters.layer, filters.images.shape, images, filters.norms.tolist(), filters.order.tolist()
        )
    if zeroed is not None:
        choices = [_Choice(c.epoch, dict(c.entered), dict(c.left)) for c in zeroed.history]
        values["zeroed"] = _Zeroed(dict(zeroed.channels), choices)
    return _ADAPTER.dump_json(_Record(FORMAT, **values), indent=1).decode() + "\n"


def parse_report(text: str | bytes) -> Report:
    """What ``report_json`` wrote. Raises BadArtifact for anything else, with the first thing that is wrong."""
    try:
        record = _ADAPTER.validate_json(text)
        if record.format != FORMAT or not record.rows:
            raise ValueError(f"format {record.format} with {len(record.rows)} networks, where it should be {FORMAT}")
        values = {one.name: getattr(record, one.name) for one in fields(record) if one.name in _PLAIN}
        return Report(
            **values,
            norms={name: np.array(own) for name, own in record.norms.items()},
            sensitivity=None if record.sensitivity is None else Sensitivity.from_json(record.sensitivity),
            filters=None if record.filters is None else _filters(record.filters),
            zeroed=None if record.zeroed is None else _zeroed(record.zeroed),
        )
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise BadArtifact(f"this is no record of a report: {where}{': ' if where else ''}{first['msg']}") from error
    except (ValueError, BadArtifact) as error:
        raise BadArtifact(f"this is no record of a report: {error}") from error


def _filters(found: _Pictures) -> Filters:
    pixels = np.frombuffer(base64.b64decode(found.images, validate=True), np.uint8).reshape(found.shape)
    if not len(pixels) == len(found.norms) == len(found.order):
        raise ValueError(f"{len(pixels)} filters with {len(found.norms)} norms")
    return Filters(found.layer, pixels, np.array(found.norms), np.array(found.order))


def _zeroed(found: _Zeroed) -> Zeroed:
    return Zeroed(found.channels, tuple(Turnover(c.epoch, c.entered, c.left) for c in found.history))
