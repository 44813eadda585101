"""A report as JSON: nothing is lost on the way, and what is damaged is told."""

import json
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from torch import nn

from secateur.core import Turnover
from secateur.errors import BadArtifact
from secateur.report import Report, Zeroed, first_filters, parse_report, render, report_json
from secateur.report.content import Curve
from test_report import example
from test_report_sensitivity import FOUND

PIXEL = {"layer": "", "shape": [1, 1, 1, 3], "images": "AAAA", "norms": [1], "order": [0]}


def full() -> Report:
    torch.manual_seed(0)
    history = (Turnover(0, {"a": (1, 2)}, {}), Turnover(1, {"a": (0,)}, {"a": (2,)}))
    return replace(
        example(),
        final="pruned",
        curves=[Curve("dense", [2.0, 1.0], [None, 0.5])],
        sensitivity=FOUND,
        filters=first_filters(nn.Sequential(nn.Conv2d(3, 5, 3))),
        zeroed=Zeroed({"a": 8}, history),
    )


def test_nothing_is_lost() -> None:
    report = full()
    found = parse_report(report_json(report))
    for field in fields(Report):
        before, after = getattr(report, field.name), getattr(found, field.name)
        if field.name == "norms":
            assert list(before) == list(after)
            for name, norms in before.items():
                np.testing.assert_array_equal(after[name], norms)
        elif field.name == "filters":
            for part in ("images", "norms", "order"):
                np.testing.assert_array_equal(getattr(after, part), getattr(before, part))
        else:
            assert after == before, field.name
    assert report_json(found) == report_json(report)


@pytest.mark.slow
def test_the_page_is_the_same() -> None:
    report = full()
    assert render(parse_report(report_json(report))) == render(report)


@pytest.mark.parametrize(
    ("where", "value", "told"),
    [
        ("rows", [], "format 1 with 0 networks"),
        ("format", 2, "format 2"),
        ("rows", [{"name": "a"}], "rows.0.params: Field required"),
        ("title", None, "title: Input should be a valid string"),
        ("more", 1, "more: Unexpected keyword argument"),
        ("norms", {"a": ["x"]}, "norms.a.0: "),
        ("norms", {"a": [float("nan")]}, "norms.a.0: "),
        ("filters", {**PIXEL, "shape": [1, 3, 3, 3]}, "cannot reshape"),
        ("filters", {**PIXEL, "norms": []}, "1 filters with 0"),
        ("sensitivity", "{}", "this is no record of a report: "),
    ],
)  # fmt: skip
def test_what_is_damaged_is_told(where: str, value: object, told: str) -> None:
    values = {**json.loads(report_json(full())), where: value}
    with pytest.raises(BadArtifact) as error:
        parse_report(json.dumps(values))
    assert str(error.value).startswith("this is no record of a report: ")
    assert told in str(error.value)


def test_text_that_is_no_json_is_told() -> None:
    with pytest.raises(BadArtifact, match="this is no record of a report: Invalid JSON"):
        parse_report("{")
