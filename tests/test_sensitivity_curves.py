"""The JSON of a sensitivity: there and back, and nothing else is read."""

import json
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import secateur as sc
from secateur.errors import BadArtifact, WrongModel
from secateur.plans import fingerprint


def model(width: int = 4) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.Conv2d(width, 2, 1))


def example() -> sc.Sensitivity:
    first = sc.GroupCurve("0", 4, "6x6", (2, 1), (0.75, 0.5), (0.8, 0.7), (1.0, 0.75, 0.5, 0.0))
    second = sc.GroupCurve("\u00e9", 3, "1", (1, 1), (1, -0.5))
    return sc.Sensitivity(fingerprint(model()), "l1", (0.5, 0.75), 0.875, (first, second), {"seed": 0, "note": [None]})


def test_there_and_back() -> None:
    text = example().to_json()
    assert sc.Sensitivity.from_json(text) == example()
    assert text.isascii()
    assert text.endswith("}\n")
    assert list(json.loads(text)) == [
        "secateur_sensitivity",
        "criterion",
        "ratios",
        "dense",
        "made_by",
        "curves",
        "model",
    ]
    assert sum(line.startswith('    {"group"') for line in text.splitlines()) == 2
    empty = replace(example(), curves=(), model={})
    assert sc.Sensitivity.from_json(empty.to_json()) == empty


def test_what_is_missing_is_null_and_not_a_result() -> None:
    first, second = example().curves
    part = replace(example(), curves=(replace(first, scores=(0.75, math.nan)), second))
    assert json.loads(part.to_json())["curves"][0]["scores"] == [0.75, None]
    with pytest.raises(BadArtifact, match="is not finished: 1 of 7 evaluations are missing\n  do: run the same"):
        sc.Sensitivity.from_json(part.to_json())


def test_another_model() -> None:
    example().check(model())
    with pytest.raises(WrongModel, match=r"tensor '0\.weight' is \[4, 3, 3, 3\] in the network that the sensitivity"):
        example().check(model(5))
    with pytest.raises(WrongModel, match=r"tensor '0\.bias' \[4\] of the network .* is missing in this model"):
        example().check(nn.Sequential(nn.Conv2d(3, 4, 3, bias=False)))
    cached = model()
    cached.register_buffer("table", torch.zeros(7), persistent=False)
    example().check(cached)  # a cache


@pytest.mark.parametrize(
    ("place", "value", "text"),
    [
        (["secateur_sensitivity"], 2, "its version is '2'; this release of secateur reads version 1"),
        (["secateur_sensitivity"], True, "its version is 'True'"),
        (["extra"], 1, "there is no field 'extra'"),
        (["criterion"], 3, "criterion: a short text is needed, not '3'"),
        (["dense"], "x", "dense: a finite number is needed, not 'x'"),
        (["dense"], True, "dense: a finite number is needed"),
        (["ratios"], [], "ratios: rising numbers between 0 and 1"),
        (["ratios"], [0.5, 0.5], "ratios: rising numbers between 0 and 1"),
        (["ratios"], [0.5, 1], "ratios: rising numbers between 0 and 1"),
        (["ratios"], {}, "ratios: a list is needed, not dict"),
        (["made_by"], [], "made_by: an object is needed, not list"),
        (["model"], {"w": [-1]}, "model['w']: a shape is a list of integers >= 0"),
        (["curves"], {}, "curves: a list is needed"),
        (["curves", 0], 3, "curves[0]: an object is needed, not int"),
        (["curves", 0, "group"], None, "curves[0].group: a short text"),
        (["curves", 1, "group"], "0", "the group '0' is there twice"),
        (["curves", 0, "channels"], 0, "curves[0].channels: an integer from 1"),
        (["curves", 0, "channels"], 10**30, "curves[0].channels: an integer from 1"),
        (["curves", 0, "keep"], [5, 1], "curves[0].keep[0]: an integer from 1 to 4 is needed, not 5"),
        (["curves", 0, "keep"], [2, 2], "curves[0].keep: without 0.75 of 4 channels 1 are left, not 2"),
        (["dense"], 10**400, "dense: a finite number is needed, not '1000"),
        (["curves", 0, "keep"], [1], "curves[0].keep: 2 numbers are needed, not 1"),
        (["curves", 0, "scores"], [0.5, [1]], "curves[0].scores[1]: a finite number"),
        (["curves", 0, "retrained"], [0.5], "curves[0].retrained: 0 or 2 numbers are needed, not 1"),
        (["curves", 0, "importance"], [0.5], "curves[0].importance: 0 or 4 numbers are needed, not 1"),
        (["curves", 0, "importance"], [2, 1, 1, 1], "curves[0].importance[0]: a number from 0 to 1"),
        (["curves", 0, "color"], "red", "curves[0]: there is no field 'color'"),
    ],
)
def test_fields_that_are_not_right(place: list[Any], value: Any, text: str) -> None:
    data = json.loads(example().to_json())
    at = data
    for key in place[:-1]:
        at = at[key]
    at[place[-1]] = value
    with pytest.raises(BadArtifact) as caught:
        sc.Sensitivity.from_json(json.dumps(data))
    assert text in str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "not JSON, or cut off"),
        ("[]", "this JSON is not a sensitivity of secateur"),
        ('{"secateur_plan": 1}', "it has no field 'secateur_sensitivity'"),
        ('{"secateur_sensitivity": 1}', "the field 'criterion' is missing"),
        ('{"a": 1, "a": 2}', "the key 'a' is there twice"),
        ('{"a": NaN}', "NaN is not a number of JSON"),
        ("[" * 100_000, "nests too deeply"),
        (b"{}", "JSON text is needed, not bytes"),
        (example().to_json()[:-20], "not JSON, or cut off"),
    ],
)
def test_texts_that_are_none(text: Any, said: str) -> None:
    with pytest.raises(BadArtifact) as caught:
        sc.Sensitivity.from_json(text)
    assert said in str(caught.value)
