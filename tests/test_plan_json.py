"""The plan's JSON: readable, exact, and proof against readers who edit and attackers who mean it."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from example_plans import first_group, full, plan, second_group, shuffled
from secateur.errors import BadPlan
from secateur.plan_schema import parse_ranges, ranges
from secateur.plans import Plan, pruned_shapes


@pytest.mark.parametrize("make", [plan, full, lambda: Plan((), {}, {})])
def test_json_gives_the_plan_back(make: Any) -> None:
    text = make().to_json()
    assert Plan.from_json(text) == make()
    assert Plan.from_json(text).to_json() == text


def test_json_reads_well() -> None:
    text = full().to_json()
    assert '{"name": "0", "channels": 8, "keep": "0-2,5,7", "partitions": 1, "slices": [' in text
    assert '{"start": 0, "count": [8, 1], "step": [1, 1]}' in text
    assert '"0.weight": [8, 3, 3, 3],' in text
    assert '{"kind": "attribute", "target": "0", "name": "splits", "value": [2, 3]}' in text
    assert text.count('"ranges"') == 1
    assert text.isascii()
    assert max(map(len, text.splitlines())) < 200
    bits = json.loads(text)["stripes"]["0"][0]
    assert bits == " ".join("".join(map(str, row.astype(int))) for row in full().stripes["0"][0])


@pytest.mark.parametrize(("positions", "pattern"), [
    (np.arange(24).reshape(6, 4), {"start": 0, "count": [6, 4], "step": [4, 1]}),
    (np.arange(24).reshape(4, 6).T, {"start": 0, "count": [6, 4], "step": [1, 6]}),
    (np.arange(24).reshape(6, 4)[::-1], {"start": 20, "count": [6, 4], "step": [-4, 1]}),
    (np.roll(np.arange(24), 1).reshape(6, 4), {"count": [6, 4], "ranges": "23,0-22"}),
])  # fmt: skip
def test_positions_of_every_kind_survive(positions: np.ndarray, pattern: dict[str, Any]) -> None:
    p = plan(groups=(first_group(), shuffled(second_group(), 2, np.ascontiguousarray(positions))))
    assert json.loads(p.to_json())["groups"][1]["slices"][2]["positions"] == pattern
    assert np.array_equal(Plan.from_json(p.to_json()).groups[1].slices[2].positions, positions)


@given(st.lists(st.integers(0, 60), max_size=40))
def test_ranges_keep_any_order(numbers: list[int]) -> None:
    assert parse_ranges("here", ranges(numbers), 40) == numbers


def edited(change: Any) -> str:
    data = json.loads(full().to_json())
    change(data)
    return json.dumps(data)


def at(path: str, value: Any) -> Any:
    def change(data: Any) -> None:
        *way, last = [int(step) if step.isdigit() and not isinstance(data, dict) else step for step in path.split("/")]
        for step in way:
            data = data[int(step)] if isinstance(data, list) else data[step]
        if isinstance(data, list):
            data[int(last)] = value
        else:
            data[last] = value

    return change


P = "groups/1/slices/2/positions"
HOSTILE: list[tuple[str, Any, str]] = [
    ("groups/0/keep", "0-99999999999", "groups.0..keep: at '0-99999999999' there are more than the 8 numbers"),
    ("groups/0/keep", "0-9999999999999999", "groups.0..keep: '0-9999999999999999' is neither a number nor a range"),
    ("groups/0/keep", "5-2", "groups.0..keep: the range '5-2' runs backwards"),
    ("groups/0/keep", "0,,1", "groups.0..keep: '' is neither a number nor a range such as 4-7"),
    ("groups/0/keep", "-1", "groups.0..keep: '-1' is neither"),
    ("groups/0/keep", "\u0661", "groups.0..keep: '\u0661' is neither"),
    ("groups/0/keep", "0,8", r"keep\['0'\]: index 8 is outside 0\.\.7"),
    ("groups/0/keep", "3,3", r"keep\['0'\]: index 3 is there twice"),
    ("groups/0/keep", "", r"keep\['0'\] is empty"),
    ("groups/0/keep", [1, 2], r"plan: groups\[0\]\.keep: input should be a valid string"),
    ("groups/0/channels", 10**15, r"groups\[0\]\.slices\[0\]: positions of 8 channels in a group of 1000000000000000"),
    ("groups/0/channels", 10**30, r"groups\[0\]\.channels: input should be less than"),
    ("groups/0/channels", True, r"groups\[0\]\.channels: input should be a valid integer"),
    ("groups/0/channels", 8.0, r"groups\[0\]\.channels: input should be a valid integer"),
    ("groups/0/slices", [], r"groups\[0\]\.slices: list should have at least 1 item"),
    ("groups/1/name", "0", r"groups\[1\]\.name: '0' is there twice"),
    ("groups/0/hidden", 1, r"groups\[0\]\.hidden: extra inputs are not permitted"),
    ("groups/0/slices/0/tensor", "x", r"groups\[0\]\.slices\[0\]: the model has no tensor 'x'"),
    ("groups/0/slices/0/tensor", "x" * 5000, r"groups\[0\]\.slices\[0\]\.tensor: string should have at most 1000"),
    ("groups/0/slices/0/axis", 4, r"groups\[0\]\.slices\[0\]: there is no axis 4 in a tensor of shape \[8, 3, 3, 3\]"),
    ("groups/0/slices/0/axis", -1, r"groups\[0\]\.slices\[0\]\.axis: input should be greater than or equal to 0"),
    ("groups/0/slices/0/role", "wrote", r"groups\[0\]\.slices\[0\]\.role: input should be 'writes'"),
    (P, {"start": 0, "count": [6, 10**12], "step": [1, 1]}, r"\[2\]: 6 x 1000000000000 positions on an axis of 24"),
    (P, {"start": 0, "count": [10**12, 0], "step": [1, 1]}, r"positions\.count\[1\]: input should be greater than or"),
    (P, {"start": 0, "count": [6, 4], "step": [2**61, 1]}, "start and step reach beyond any tensor"),
    (P, {"start": 0, "count": [6, 4], "step": [5, 1]}, r"a position is outside 0\.\.23"),
    (P, {"start": 0, "count": [6, 4], "step": [1, 1]}, "a position is there twice on axis 1"),
    (P, {"start": 0, "count": [6, 4]}, "positions: either start and step are needed, or ranges"),
    (P, {"start": 0, "count": [6, 4], "step": [4, 1], "ranges": "0-23"}, "either start and step are needed, or ranges"),
    (P, {"count": [6, 4], "ranges": "0-22"}, "positions: 23 positions where count says 6 x 4"),
    (P, {"count": [6, 4], "ranges": "0-24"}, "at '0-24' there are more than the 24 numbers"),
    (P, {"count": [6], "ranges": "0-24"}, r"positions\.count: list should have at least 2 items"),
    ("model/0.weight", [2**40, 3, 3, 3], "plan: it spans more than 16777216 positions"),
    ("model/0.weight", "8", r"model\.0\.weight: input should be a valid list"),
    ("model", [], r"plan: model: input should be a valid dictionary \(and|model: input should be a valid dictionary"),
    ("residual", "joined", "residual: input should be 'coupled', 'inner' or 'scatter'"),
    ("constants/0", "keep", r"constants\.0: input should be 'drop' or 'fold'"),
    ("constants/nobody", "drop", "constants: the plan has no group 'nobody'"),
    ("stripes/0/0", "111 111", r"stripes\.0\[0\]: 3 rows of 3 bits are needed, such as '111 010 111'"),
    ("stripes/0/0", "111 111 112", r"stripes\.0\[0\]: 3 rows of 3 bits"),
    ("stripes/0", ["111 111 111"], r"stripes\.0: 1 filters where the weight has 8"),
    ("stripes/9", ["1"], r"stripes\.9: the model has no 2-d convolution"),
    ("edits/0/kind", "import", r"edits\[0\]\.kind: input should be 'attribute', 'graph', 'bias', 'scatter', 'gather'"),
    ("edits/0/name", "__dict__", r"edits\[0\]\.name: an attribute's name is needed, not '__dict__'"),
    ("edits/0/value", "os.system", r"edits\[0\]\.value: input should be a valid integer"),
    ("edits/0/value", [2**70], r"edits\[0\]\.value: an integer or a list of integers is needed"),
    ("made_by", 3, "made_by: input should be a valid dictionary"),
    ("inputs", {"args": 1}, "inputs: the keys are args and kwargs"),
    ("secateur_plan", 2, "plan: its version is 2; this release of secateur reads version 1"),
    ("secateur_plan", "1", r"plan: its version is no small integer \(str\); this release of secateur reads version 1"),
    ("secateur_plan", True, r"its version is no small integer \(bool\)"),
    ("surprise", 1, "plan: surprise: extra inputs are not permitted"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "value", "text"), HOSTILE, ids=[f"{p}={str(v)[:20]}" for p, v, _ in HOSTILE])
def test_hostile_json_is_refused_with_its_place(path: str, value: Any, text: str) -> None:
    with pytest.raises(BadPlan, match=text):
        Plan.from_json(edited(at(path, value)))


NOT_PLANS: list[tuple[Any, str]] = [
    ("", "plan: not JSON, or cut off"),
    (full().to_json()[:-40], "plan: not JSON, or cut off"),
    ("[1, 2]", "it has no field 'secateur_plan'"),
    ("{}", "it has no field 'secateur_plan'"),
    ("[" * 200_000, "plan: the JSON nests too deeply"),
    ('{"a":' * 100_000 + "1" + "}" * 100_000, "plan: the JSON nests too deeply"),
    (plan().to_json().replace('"l1"', "[" * 900 + "]" * 900), "made_by: nested deeper than 20|nests too deeply"),
    (plan().to_json().replace('"l1"', "NaN"), "plan: NaN is not a number of JSON"),
    (plan().to_json().replace('"l1"', "-Infinity"), "plan: -Infinity is not a number of JSON"),
    (plan().to_json().replace('"l1"', "1e999"), "made_by.criterion: inf is not a number that JSON can hold"),
    (plan().to_json().replace('"l1"', "1" * 5000), "plan: .*digits"),
    (plan().to_json().replace('"residual"', '"edits": [], "residual"'), "plan: the key 'edits' is there twice"),
    (plan().to_json().replace('"name": "0"', '"name": "\\ud800"'), "plan: "),
    (" " * (64 * 2**20 + 1), "plan: the text is longer than 64 MiB"),
    (b"{}", "plan: JSON text is needed, not bytes"),
    (None, "plan: JSON text is needed, not NoneType"),
]


@pytest.mark.parametrize(("text", "message"), NOT_PLANS, ids=[message[:40] for _, message in NOT_PLANS])
def test_what_is_no_plan_is_refused(text: Any, message: str) -> None:
    with pytest.raises(BadPlan, match=message):
        Plan.from_json(text)


def test_a_missing_field_is_named() -> None:
    for name in json.loads(full().to_json()):
        with pytest.raises(BadPlan, match=name):
            Plan.from_json(edited(lambda data, name=name: data.pop(name)))


VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.sampled_from([-1, 0, 1, 2, 3, 7, 8, 24, 2**24, 2**31, 2**63, 10**18]),
    st.floats(), st.text(max_size=8),
    st.sampled_from(["0-3", "0,2", "7-7", "0", "3", "0.weight", "fold", "101 111 000"]),
    st.lists(st.integers(-2, 30), max_size=3), st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)  # fmt: skip


@settings(max_examples=120)
@given(st.data())
def test_fuzzed_json_loads_as_a_valid_plan_or_is_a_bad_plan(data: st.DataObject) -> None:
    text = json.loads(full().to_json())
    for _ in range(data.draw(st.integers(1, 3))):
        node, parent, key = text, None, None
        while isinstance(node, (dict, list)) and node and data.draw(st.integers(0, 9)):
            parent, key = node, data.draw(st.sampled_from(list(node) if isinstance(node, dict) else range(len(node))))
            node = parent[key]
        if parent is None:
            continue
        if data.draw(st.booleans()) and isinstance(parent, dict):
            parent[data.draw(st.text(max_size=6))] = parent.pop(key)
        else:
            parent[key] = data.draw(VALUES)
    raw = json.dumps(text)
    cut = data.draw(st.one_of(st.just(len(raw)), st.integers(0, len(raw))))
    try:
        loaded = Plan.from_json(raw[:cut])
    except BadPlan:
        return
    assert Plan.from_json(loaded.to_json()) == loaded
    assert all(size >= 0 for shape in pruned_shapes(loaded).values() for size in shape)
