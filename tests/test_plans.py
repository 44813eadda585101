"""The plan as data: what it refuses, what it says, and that its JSON survives readers and attackers."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from example_plans import column, first_group, full, network, plan, second_group, shuffled
from secateur.core import Edit, Group, Slice
from secateur.errors import BadPlan, BadRequest, WrongModel
from secateur.plans import (
    Plan,
    check_model,
    compose,
    fingerprint,
    input_specs,
    pruned_shapes,
)

# --- what it is --------------------------------------------------------------------------------------------------


def test_kept_lists_only_axes_that_shrink_with_every_position_of_a_channel() -> None:
    kept = plan(keep={"0": tuple(range(8)), "3": (1, 4)}).kept()
    assert {tensor: list(axes) for tensor, axes in kept.items()} == {"3.weight": [0], "3.bias": [0], "5.weight": [1]}
    assert kept["3.weight"][0].tolist() == [1, 4]
    assert kept["5.weight"][1].tolist() == [4, 5, 6, 7, 16, 17, 18, 19]
    assert kept["5.weight"][1].dtype == np.int64


def test_kept_joins_the_groups_that_share_an_axis() -> None:
    """Behind a concat the reader's axis 1 belongs to two groups, and has a position that belongs to none."""
    model = {"a.weight": (2, 1, 1, 1), "b.weight": (2, 1, 1, 1), "c.weight": (1, 5, 1, 1)}
    a = Group("a", 2, (Slice("a.weight", 0, column(2), "writes"), Slice("c.weight", 1, column(2), "reads")))
    b = Group("b", 2, (Slice("b.weight", 0, column(2), "writes"), Slice("c.weight", 1, column(2, start=3), "reads")))
    kept = Plan((a, b), {"a": (1,), "b": (0,)}, model).kept()
    assert kept["c.weight"][1].tolist() == [1, 2, 3]


def test_pruned_shapes() -> None:
    shapes = pruned_shapes(plan())
    assert (shapes["0.weight"], shapes["3.weight"], shapes["5.weight"]) == ((5, 3, 3, 3), (2, 5, 3, 3), (5, 8))
    assert shapes["1.num_batches_tracked"] == ()
    assert shapes["5.bias"] == (5,)


def test_repr_is_one_line() -> None:
    assert repr(plan()) == "Plan(2 groups, 7 of 14 channels kept, by l1)"
    big = Group("w", 1024, (Slice("w", 0, column(1024), "writes"),))
    assert repr(Plan((big,), {"w": range_tuple(512)}, {"w": (1024,)})) == "Plan(1 groups, 512 of 1,024 channels kept)"


def range_tuple(stop: int) -> tuple[int, ...]:
    return tuple(range(stop))


def test_fields_cannot_be_changed() -> None:
    p = full()
    with pytest.raises(AttributeError):
        p.residual = "inner"  # type: ignore[misc]
    for mapping in (p.keep, p.model, p.inputs, p.made_by, p.constants, p.stripes):
        with pytest.raises(TypeError, match="does not support item assignment"):
            mapping["0"] = ()  # type: ignore[index]
    with pytest.raises(ValueError, match="read-only"):
        p.stripes["0"][0, 0, 0] = True


def test_later_changes_to_the_arguments_do_not_reach_the_plan() -> None:
    made_by, mask = {"ratios": {"*": 0.5}}, np.ones((8, 3, 3), dtype=bool)
    p = plan(made_by=made_by, stripes={"0": mask})
    made_by["ratios"]["*"] = 0.9
    mask[:] = False
    assert p.made_by["ratios"] == {"*": 0.5}
    assert p.stripes["0"].all()


def test_keep_is_taken_from_arrays_and_tensors_and_put_in_graph_order() -> None:
    p = plan(keep={"3": torch.tensor([1, 4]), "0": np.array([0, 1, 2, 5, 7])})
    assert p == plan()
    assert list(p.keep) == ["0", "3"]
    assert type(p.keep["0"][0]) is int


@pytest.mark.parametrize("change", [
    {"keep": {"0": (0,), "3": (1, 4)}}, {"residual": "inner"}, {"constants": {"0": "fold"}}, {"made_by": {}},
    {"stripes": {"0": np.ones((8, 3, 3), dtype=bool)}}, {"edits": (Edit("attribute", "0", "n", 1),)}, {"inputs": {}},
])  # fmt: skip
def test_equality_sees_every_field(change: dict[str, Any]) -> None:
    assert plan() == plan()
    assert hash(plan()) == hash(plan())
    assert plan(**change) != plan()
    assert plan() != "plan"


def test_equality_sees_single_stripes_and_ignores_the_graph() -> None:
    mask = np.ones((8, 3, 3), dtype=bool)
    other = mask.copy()
    other[7, 2, 2] = False
    assert plan(stripes={"0": mask}) != plan(stripes={"0": other})
    assert plan(graph=object()) == plan()


@pytest.mark.parametrize("copier", [copy.copy, copy.deepcopy, lambda p: pickle.loads(pickle.dumps(p))])
def test_copies_are_equal_and_leave_the_graph_behind(copier: Any) -> None:
    p = replace(full(), graph=lambda: None)  # neither copies nor pickles
    other = copier(p)
    assert other == p
    assert other.graph is None
    assert p.graph is not None


def test_input_specs_keep_the_form() -> None:
    indices = torch.zeros(1, dtype=torch.int64)
    specs = input_specs((torch.zeros(2, 3), [indices]), {"scale": 2, "m": {"x": torch.ones(1)}})
    assert specs == {
        "args": [{"shape": [2, 3], "dtype": "float32"}, [{"shape": [1], "dtype": "int64"}]],
        "kwargs": {"scale": {"value": 2}, "m": {"x": {"shape": [1], "dtype": "float32"}}},
    }


# --- what it refuses ---------------------------------------------------------------------------------------------

GROUP = first_group()
TWICE = column(6, k=4).copy()
TWICE[5, 3] = 0
NARROW = {**fingerprint(network()), "0.weight": (8, 3, 3)}
BAD: list[tuple[dict[str, Any], str]] = [
    ({"keep": {"0": (0,)}}, r"keep\['3'\] is missing: every group is listed"),
    ({"keep": {"0": (0,), "3": (1,), "33": (1,)}}, r"keep: the plan has no group '33'; did you mean '3'\?"),
    ({"keep": {"0": (), "3": (1,)}}, r"keep\['0'\] is empty: at least one of its 8 channels"),
    ({"keep": {"0": (0, 8), "3": (1,)}}, r"keep\['0'\]: index 8 is outside 0\.\.7"),
    ({"keep": {"0": (-1, 0), "3": (1,)}}, r"keep\['0'\]: index -1 is outside 0\.\.7"),
    ({"keep": {"0": (2, 2), "3": (1,)}}, r"keep\['0'\]: index 2 is there twice"),
    ({"keep": {"0": (3, 2), "3": (1,)}}, r"keep\['0'\]: 3 stands before 2; indices are sorted"),
    ({"keep": {"0": (0.5,), "3": (1,)}}, r"keep\['0'\]: a list of channel indices is needed"),
    ({"keep": {"0": (True,), "3": (1,)}}, r"keep\['0'\]: a list of channel indices is needed"),
    ({"keep": {"0": "0-3", "3": (1,)}}, r"keep\['0'\]: a list of channel indices is needed, not str"),
    ({"keep": [(0,), (1,)]}, "keep: a mapping is needed, not list"),
    ({"keep": {0: (1,)}}, "keep: names are strings, not 0"),
    ({"groups": (GROUP, GROUP), "keep": {"0": (0,)}}, "group '0' is there twice"),
    ({"groups": (replace(GROUP, locked="softmax"),), "keep": {"0": (0,)}}, r"group '0' is locked \(softmax\)"),
    ({"groups": (replace(GROUP, channels=7),), "keep": {"0": (0,)}}, "positions are .8, 1. but the group has 7"),
    ({"groups": (replace(GROUP, slices=()),), "keep": {"0": (0,)}}, "group '0' lies in no tensor"),
    ({"groups": (replace(GROUP, partitions=0),), "keep": {"0": (0,)}}, "partitions is an integer >= 1, not 0"),
    ({"groups": ("0",), "keep": {}}, "groups: a Group is needed, not str"),
    ({"groups": (GROUP, replace(GROUP, name="1")), "keep": {"0": (0,), "1": (0,)}},
     "group '1': a position on axis 0 of '0.weight' belongs to two channels"),
    ({"groups": (GROUP, shuffled(second_group(), 2, TWICE))}, "group '3', '5.weight': a position is there twice"),
    ({"groups": (GROUP, shuffled(second_group(), 2, column(6, k=4, start=1)))}, r"a position is outside 0\.\.23 of"),
    ({"groups": (GROUP, shuffled(second_group(), 2, column(6, k=4) - 1))}, r"a position is outside 0\.\.23 of axis 1"),
    ({"groups": (GROUP, shuffled(second_group(), 2, column(6, k=4).astype(np.int32)))}, "positions are an int64 array"),
    ({"groups": (GROUP, shuffled(second_group(), 2, np.zeros((6, 0), dtype=np.int64)))}, "positions are .6, 0. but"),
    ({"groups": (replace(GROUP, slices=(Slice("0.weigth", 0, column(8), "writes"),)),), "keep": {"0": (0,)}},
     r"no tensor '0\.weigth'; did you mean '0\.weight'\?"),
    ({"groups": (replace(GROUP, slices=(Slice("0.bias", 1, column(8), "writes"),)),), "keep": {"0": (0,)}},
     r"there is no axis 1 in a tensor of shape \[8\]"),
    ({"groups": (replace(GROUP, slices=(Slice("0.bias", 0, column(8), "wrote"),)),), "keep": {"0": (0,)}},  # type: ignore[arg-type]
     "role: 'wrote' is none of writes, reads, scales, follows"),
    ({"model": {"0.weight": (8, -3)}}, r"model\['0\.weight'\]: a shape is a list of integers >= 0"),
    ({"model": {**fingerprint(network()), "0.weight": (2**40, 3, 3, 3)}}, "axis 0 is longer than"),
    ({"edits": (Edit("graph", "0"),)}, r"edits\[0\]: a graph edit has neither target nor name nor value"),
    ({"inputs": {"args": [{"shape": [2**14, 2**15], "dtype": "int8"}], "kwargs": {}}}, "inputs: more than 268435456"),
    ({"inputs": {"args": [{"shape": [2], "dtype": "nn"}], "kwargs": {}}}, r"inputs\.args\[0\]\.dtype: 'nn' is none of"),
    ({"inputs": {"args": [{"shape": [-2], "dtype": "int8"}], "kwargs": {}}}, r"args\[0\]\.shape: a shape is a list"),
    ({"inputs": {"args": [3], "kwargs": {}}}, r"inputs\.args\[0\]: 3 describes no input: give shape and dtype"),
    ({"inputs": {"args": []}}, "inputs: the keys are args and kwargs, not args"),
    ({"inputs": {"args": {}, "kwargs": {}}}, "inputs: args is a list and kwargs a mapping"),
    ({"made_by": {"budget": object()}}, "made_by.budget: object is nothing that JSON can hold"),
    ({"made_by": {"a": [1.0, float("nan")]}}, r"made_by\.a\[1\]: nan is not a number that JSON can hold"),
    ({"made_by": {"a": {1: 2}}}, "made_by.a: names are strings, not 1"),
    ({"constants": {"0": "keep"}}, r"constants\['0'\]: 'keep' is none of drop, fold"),
    ({"constants": {"4": "drop"}}, r"constants: the plan has no group '4'"),
    ({"residual": "joined"}, "residual: 'joined' is none of coupled, inner, scatter"),
    ({"residual": ["inner"]}, "residual: .'inner'. is none of"),
    ({"stripes": {"0": np.ones((8, 3, 2), dtype=bool)}},
     r"stripes\['0'\]: the mask is \[8, 3, 2\] but the filters are \[8, 3, 3\]"),
    ({"stripes": {"0": np.ones((8, 3, 3))}}, r"stripes\['0'\]: a bool array is needed"),
    ({"stripes": {"5": np.ones((8, 3, 3), dtype=bool)}}, r"stripes\['5'\]: the model has no 2-d convolution"),
    ({"edits": (Edit("pooled_head", "0", "n", 1),)}, r"edits\[0\]\.kind: 'pooled_head' is none of attribute"),
    ({"edits": (Edit("attribute", "0", "__class__", 1),)}, r"edits\[0\]\.name: an attribute's name is needed"),
    ({"edits": (Edit("attribute", "0", "n", "1"),)}, r"edits\[0\]\.value: an integer or a list"),  # type: ignore[arg-type]
    ({"edits": (Edit("attribute", "0", "n", True),)}, r"edits\[0\]\.value: an integer or a list"),
    ({"edits": (Edit("attribute", "0", "n"),)}, r"edits\[0\]\.value: an integer or a list"),
    ({"edits": ("attribute",)}, r"edits\[0\]: an Edit is needed, not str"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "text"), BAD, ids=[text[:40] for _, text in BAD])
def test_bad_fields_are_refused(change: dict[str, Any], text: str) -> None:
    with pytest.raises(BadPlan, match=text):
        plan(**change)


def test_made_by_may_not_nest_without_end() -> None:
    bomb: dict[str, Any] = {}
    for _ in range(2000):
        bomb = {"a": bomb}
    with pytest.raises(BadPlan, match="made_by: nested deeper than 20"):
        plan(made_by=bomb)


# --- which network it belongs to -----------------------------------------------------------------------------------


class Odd(nn.Module):
    """Tied weights, a parametrised one, and a buffer that ``state_dict`` leaves out."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.b = nn.Linear(4, 4)
        self.b.weight = self.a.weight
        self.c = nn.utils.parametrizations.weight_norm(nn.Linear(4, 2))
        self.register_buffer("cache", torch.zeros(7), persistent=False)


def test_fingerprint_names_every_tensor_once() -> None:
    assert fingerprint(Odd()) == {
        "a.weight": (4, 4), "a.bias": (4,), "b.bias": (4,), "c.bias": (2,),
        "c.parametrizations.weight.original0": (2, 1), "c.parametrizations.weight.original1": (2, 4), "cache": (7,),
    }  # fmt: skip
    assert fingerprint(nn.DataParallel(network())) == fingerprint(network())
    with pytest.raises(BadRequest, match=r"'weight' has no shape yet, its module is lazy: run the model once"):
        fingerprint(nn.LazyLinear(3))


def test_check_model_names_the_first_tensor_that_differs() -> None:
    p = plan()
    check_model(p, network())
    wide, other = network(), network()
    wide[3] = nn.Conv2d(8, 7, 3, padding=1)
    with pytest.raises(WrongModel, match=r"'3.weight' is \[6, 8, 3, 3\] in the plan's network but \[7, 8, 3, 3\]"):
        check_model(p, wide)
    other[1] = nn.BatchNorm2d(8, affine=False)
    with pytest.raises(WrongModel, match=r"tensor '1.weight' \[8\] of the plan's network is missing in this model"):
        check_model(p, other)
    more = network()
    more.add_module("6", nn.Linear(5, 5))
    with pytest.raises(WrongModel, match=r"tensor '6.weight' \[5, 5\] of this model is unknown to the plan's network"):
        check_model(p, more)


def test_check_model_does_not_look_at_caches_unless_they_are_pruned() -> None:
    odd = Odd()
    p = Plan((), {}, fingerprint(odd))
    odd.cache = torch.zeros(9)
    check_model(p, odd)
    pruned = Group("cache", 7, (Slice("cache", 0, column(7), "follows"),))
    with pytest.raises(WrongModel, match=r"tensor 'cache' is \[7\] in the plan's network but \[9\]"):
        check_model(Plan((pruned,), {"cache": (0,)}, fingerprint(Odd())), odd)


# --- one plan after another ------------------------------------------------------------------------------------------


def after(first: Plan, **changes: Any) -> Plan:
    """A plan for the network that ``first`` leaves: 5 and 2 channels."""
    fields: dict[str, Any] = {
        "groups": (first_group(5), second_group(2)), "keep": {"0": (1, 4), "3": (0, 1)}, "model": pruned_shapes(first),
        "made_by": {"criterion": "fpgm"},
    }  # fmt: skip
    return Plan(**{**fields, **changes})


def test_compose_counts_in_the_original_network() -> None:
    first = plan()
    both = compose(first, after(first))
    assert dict(both.keep) == {"0": (1, 7), "3": (1, 4)}
    assert both.model == first.model
    assert both.inputs == first.inputs
    assert both.made_by == {"criterion": "fpgm", "after": dict(first.made_by)}
    assert pruned_shapes(both) == pruned_shapes(after(first))


def test_compose_is_the_same_as_slicing_twice() -> None:
    first = plan()
    second = after(first, keep={"0": (0, 2, 3), "3": (1,)})
    both = compose(first, second).kept()
    for name, tensor in network().state_dict().items():
        once, twice = tensor, tensor
        for step in (first.kept(), second.kept()):
            for axis, positions in step.get(name, {}).items():
                twice = twice.index_select(axis, torch.from_numpy(positions))
        for axis, positions in both.get(name, {}).items():
            once = once.index_select(axis, torch.from_numpy(positions))
        assert torch.equal(once, twice), name


def test_compose_joins_edits_stripes_and_residual() -> None:
    mask = np.ones((8, 3, 3), dtype=bool)
    mask[0, 0, 0] = mask[7, 2, 2] = False
    edits = (Edit("attribute", "0", "n", 5), Edit("attribute", "3", "n", 2))
    first = plan(edits=edits, stripes={"0": mask}, residual="inner")
    later = np.ones((5, 3, 3), dtype=bool)
    later[4, 0, 0] = False  # the filter that was 7 before
    second = after(
        first, edits=(Edit("attribute", "0", "n", 2),), stripes={"0": later}, constants={"3": "fold"}, residual="inner"
    )
    with pytest.raises(BadPlan, match="the constants of group '3' are 'drop' in the first plan and 'fold' in"):
        compose(first, replace(second, keep={"0": (1, 4), "3": (0,)}))
    both = compose(first, second)
    assert both.edits == (Edit("attribute", "0", "n", 2), Edit("attribute", "3", "n", 2))
    assert np.argwhere(~both.stripes["0"]).tolist() == [[0, 0, 0], [7, 0, 0], [7, 2, 2]]
    assert both.residual == "inner"
    assert compose(first, replace(second, residual="coupled")).residual == "coupled"  # its streams are cut by one
    assert compose(first, replace(second, residual="scatter")).residual == "inner"  # the groups are the first plan's
    assert compose(replace(first, residual="scatter"), second).residual == "scatter"
    assert both.constants == {"3": "fold"}
    assert np.count_nonzero(~mask) == 2


def test_compose_allows_a_network_that_was_returned_as_a_graph() -> None:
    """It has tables of its own, and lacks what its forward does not read."""
    first = plan()
    model = {**pruned_shapes(first), "_eval_table": (7,)}
    del model["1.num_batches_tracked"]
    both = compose(first, after(first, model=model, edits=(Edit("graph", ""),)))
    assert both.model == first.model
    assert both.edits == (Edit("graph", ""),)
    table = Group("t", 7, (Slice("_eval_table", 0, column(7), "writes"),))
    with pytest.raises(WrongModel, match=r"tensor '_eval_table' \[7\] of the second plan's network is unknown to"):
        compose(first, after(first, model=model, groups=(table,), keep={"t": (0,)}))


def test_compose_refuses_what_does_not_fit() -> None:
    first = plan()
    with pytest.raises(WrongModel, match=r"'0.weight' is \[5, 3, 3, 3\] in the once pruned network but \[8, 3, 3, 3\]"):
        compose(first, plan())
    # the second plan knows a linear layer's inputs one by one, the first only four at a time
    fine = Group("5", 8, (Slice("5.weight", 1, column(8), "reads"),))
    with pytest.raises(BadPlan, match="of channel 4 of '3' the second removes a part only"):
        compose(first, after(first, groups=(fine,), keep={"5": (0, 1, 2, 3, 4)}))
    locked = Group("5", 5, (Slice("5.weight", 0, column(5), "writes"),))
    with pytest.raises(BadPlan, match=r"the second cuts axis 0 of '5\.weight', where the first plan has no channel"):
        compose(first, after(first, groups=(locked,), keep={"5": (0,)}))
    with pytest.raises(BadPlan, match="the constants of group '0' are 'drop' in the first plan and 'fold' in"):
        compose(first, after(first, constants={"0": "fold"}))
