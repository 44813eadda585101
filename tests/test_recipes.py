"""What a recipe may say, how it is read, and how a mistake in it is told: with its line and what was meant."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from pydantic import TypeAdapter

from secateur.errors import BadRequest
from secateur.recipes import Recipe, json_schema, make_recipe, parse_recipe, read_recipe, write_recipe
from secateur.recipes.schema import as_values, first_difference, known_keys
from secateur.recipes.yaml_nodes import parse_yaml
from secateur.recover.settings import Training

ROOT = Path(__file__).parents[1]
GOOD = """\
model: {name: "zoo:resnet20", options: {in_channels: 1}}
data: {name: digits, size: 8}
train: &t {epochs: 3, lr: 1e-1, milestones: [0.3, 0.6]}
prune:
  budget: {keep: 0.5}
  schedule: {kind: iterative, steps: 3, training: {<<: *t, epochs: 1}}
finetune: {epochs: 2}
"""


def test_a_good_recipe() -> None:
    recipe = parse_recipe(GOOD)
    assert recipe.train == Training(epochs=3, lr=0.1, milestones=(0.3, 0.6))
    assert recipe.prune is not None
    assert recipe.prune.schedule.training == Training(epochs=1, lr=0.1, milestones=(0.3, 0.6))  # type: ignore[union-attr]
    assert recipe.data.size == 8
    assert recipe.finetune == Training(epochs=2)


def test_resolved_it_means_the_same() -> None:
    recipe = parse_recipe(GOOD)
    text = write_recipe(recipe)
    assert "weight_decay: 0.0005" in text  # every default is written out
    assert parse_recipe(text) == recipe


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.yaml")), ids=lambda path: path.name)
def test_examples_can_be_read(path: Path) -> None:
    recipe = read_recipe(path)
    assert parse_recipe(write_recipe(recipe)) == recipe


def change(old: str, new: str) -> str:
    assert old in GOOD
    return GOOD.replace(old, new)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (change("{epochs: 2", "{epoch: 2"), "line 7: finetune: unknown key 'epoch'; did you mean 'epochs'?"),
        (GOOD + "modle: 2\n", "line 8: unknown key 'modle'; did you mean 'model'?"),
        (change("steps: 3", "stepz: 3"), "line 6: prune.schedule: unknown key 'stepz'; did you mean 'steps'?"),
        (change("size: 8", "sise: 8"), "line 2: data: unknown key 'sise'; did you mean 'size'?"),
        (change("keep: 0.5", "keeep: 0.5"), "line 5: prune.budget: unknown key 'keeep'; did you mean 'keep'?"),
        (change("kind: iterative, ", ""), "line 6: prune.schedule: the key 'kind' is missing"),
        (
            change("iterative", "iterativ"),
            "line 6: prune.schedule: kind: 'iterativ' is none of one-shot, iterative, layer-by-layer, progressive, "
            "sparse; did you mean 'iterative'?",
        ),
        (change("epochs: 2", "epochs: 1.5"), "line 7: finetune.epochs: should be a whole number, not 1.5"),
        (change("epochs: 2", 'epochs: "2"'), "line 7: finetune.epochs: should be a whole number, not '2'"),
        (change("epochs: 2", "epochs: yes"), "line 7: finetune.epochs: should be a whole number, not 'yes'"),
        (change("epochs: 2", "epochs: true"), "line 7: finetune.epochs: should be a whole number, not true"),
        (change("epochs: 2", "lr: -1"), "line 7: finetune.lr: cannot train with lr=-1.0: lr is a number above 0"),
        (change("epochs: 2", "schedule: steps"), "line 7: finetune.schedule: 'steps' is none of cosine, one-cycle"),
        (change("{epochs: 2}", "3"), "line 7: finetune: should be a mapping of keys, not 3"),
        (change("steps: 3", "steps: 1"), "line 6: prune.schedule.steps: should be greater than or equal to 2, not 1"),
        (change("name: digits", "name: digit"), "line 2: data: there is no data set 'digit'; did you mean 'digits'?"),
        (change("keep: 0.5", "keep: 0.5, at_most: 3"), "line 5: prune.budget: give one of keep"),
        (change("keep: 0.5", "keep: 1.5"), "line 5: prune.budget.keep: a fraction of the dense cost"),
        (change("keep: 0.5", "at_most: 0"), "line 5: prune.budget: Budget.at_most=0.0 is not a positive number of"),
        (change("keep: 0.5", "keep: 0.5, of: latency"), "line 5: prune.budget: a latency is that of an engine"),
        (
            change("keep: 0.5", "keep: 0.5, of: latency, engine: onxruntime"),
            "line 5: prune.budget.engine: there is no engine 'onxruntime'; did you mean 'onnxruntime'?",
        ),
        (
            "".join(
                line
                for line in change("keep: 0.5}", "keep: 0.5, of: memory}\n  constants: fold").splitlines(True)
                if "schedule: {kind" not in line
            ),
            "line 5: prune.budget: memory is not foreseen where constants are folded",
        ),
        (change("budget: {keep: 0.5}", "criterion: l3"), "line 5: prune.criterion: there is no criterion 'l3'"),
        (change("keep: 0.5}", "keep: 0.5}\n  residual: scattered"), "line 6: prune.residual: 'scattered' is none of"),
        (
            change("keep: 0.5}", "keep: 0.5}\n  constants: hold"),
            "line 6: prune.constants: 'hold' is none of drop, fold; did you mean 'fold'?",
        ),
        (
            change("keep: 0.5}", "keep: 0.5}\n  constants: {a: x}"),
            "line 6: prune.constants.a: 'x' is none of drop, fold",
        ),
        (
            change("keep: 0.5}", "keep: 0.5}\n  constants: 3"),
            "line 6: prune.constants: 3 is none of drop, fold, nor a mapping of keys",
        ),
        (change("keep: 0.5}", "keep: 0.5}\n  greedy: 1"), "line 6: prune.greedy: should be true or false, not 1"),
        (change("keep: 0.5}", "keep: 0.5}\n  calibration: 0"), "line 6: prune.calibration: should be greater than or"),
        (
            change("keep: 0.5}", "keep: 0.5}\n  sensitivity: {tolerence: 0.1}"),
            "line 6: prune.sensitivity: unknown key 'tolerence'; did you mean 'tolerance'?",
        ),
        (
            change("keep: 0.5}", "keep: 0.5}\n  sensitivity: {tolerance: 1.0}"),
            "line 6: prune.sensitivity.tolerance: should be less than 1, not 1",
        ),
        (change("budget: {keep: 0.5}", "ratios: {a: x}"), "line 5: prune.ratios.a: should be a whole number or"),
        (change("budget: {keep: 0.5}", "ratios: 1.5"), "line 5: prune.ratios: 1.5 is neither a fraction to remove"),
        (GOOD + "export: {onnx: no}\n", "line 8: export.onnx: should be true or false, not 'no'"),
        (GOOD + "distil: {weight: 2}\n", "line 8: distil.weight: should be less than or equal to 1, not 2"),
        (GOOD.replace("train: &t", "x: &t"), "line 3: unknown key 'x'"),
        (GOOD + "model: 3\n", "line 8: model is given twice, here and in line 1"),
        (change("epochs: 2", "epochs: 2, epochs: 3"), "line 7: finetune.epochs is given twice, here and in line 7"),
        (GOOD + "\tseed: 3\n", "line 8: a tab, where YAML takes only spaces"),
        ("data: {name: digits}\n", "line 1: the key 'model' is missing"),
        ("", "recipe.yaml: there is nothing in it"),
        ("# nothing\n", "recipe.yaml: there is nothing in it"),
        ("- a\n- b\n", "recipe.yaml: a recipe is a mapping of keys (model, data, ...), not a list"),
        ("a: [", "line 1: this is no YAML: expected the node content"),
        ("a: b: c", "line 1: this is no YAML: mapping values are not allowed here"),
        ("a: 1\n---\nb: 2\n", "line 2: a second document begins here (---): a recipe is one"),
        ("a: *x", "line 1: this is no YAML: found undefined alias 'x'"),
        ("a: 1\nb: &b [*b]\n", "line 2: an alias stands for what it stands in"),
        ("a: !!python/object/apply:os.system [ls]", "line 1: the tag !!python/object/apply:os.system is not"),
        ("a: 1\nb: .nan\n", "line 2: .nan is no number that a recipe can mean"),
        ("a: 1\nb: \x00\n", "line 2: a character that no YAML holds"),
        ("a: 1\n? [x]\n: 2\n", "line 2: a key must be a word"),
        ("[" * 3000, "nested deeper than any recipe"),
        (
            "a: &a [1,1,1,1,1,1,1,1,1,1]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a,*a,*a]\n"
            "c: &c [*b,*b,*b,*b,*b,*b,*b,*b,*b,*b]\nd: &d [*c,*c,*c,*c,*c,*c,*c,*c,*c,*c]\ne: [*d,*d,*d,*d,*d,*d]\n",
            "line 1: unfolds to more than 20,000 values",
        ),
    ],
)  # fmt: skip
def test_mistakes(text: str, message: str) -> None:
    with pytest.raises(BadRequest) as caught:
        parse_recipe(text, name="recipe.yaml")
    told = str(caught.value)
    assert told.startswith("recipe.yaml")
    assert message in told
    assert "\n" not in told


NET = "model: {name: 'zoo:resnet20', weights: random}\ndata: {name: digits}\n"
SENSITIVE = f"""{NET}prune:
  budget: {{keep: 0.5}}
  sensitivity:
    criterion: l1
    ratios: [0.5]
"""
FOLDER = "model: {name: some/folder}\ndata: {name: digits}\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (NET.replace(", weights: random", ""), "line 1: model: the network would have random weights"),
        (NET + "distil: {}\n", "line 3: distil: distillation happens while fine-tuning"),
        (NET + "compensate: {}\n", "line 3: compensate: there is nothing to make up for"),
        (
            NET + "prune: {constants: {a: drop, '*': fold}}\ncompensate: {readers: bias}\n",
            "line 4: compensate.readers: constants that are folded into the readers leave nothing to make up for:",
        ),
        (NET + "scratch: epochs\n", "line 3: scratch: there is no pruned architecture"),
        (NET.replace("weights", "base"), "line 1: model.base: this is for a saved folder"),
        (FOLDER.replace("folder}", "folder, weights: a.pth}"), "line 1: model.weights: a saved folder has its own"),
        (
            NET + "prune: {constants: {'*': fold}, schedule: {kind: layer-by-layer}}\n",
            "line 3: prune.constants: what one cut folds into a layer is in the way of the cut of that layer",
        ),
        (
            NET + "prune: {residual: scatter, schedule: {kind: iterative}}\n",
            "line 3: prune.residual: the end of a branch that one cut has rewired is not cut once more",
        ),
        (
            NET + "prune: {schedule: {kind: progressive, training: {keep: best}}}\n",
            "line 3: prune.schedule.training.keep: the best epoch is mostly one from before",
        ),
        (
            NET + "prune: {schedule: {kind: sparse, training: {keep: best}}}\n",
            "would undo the penalty: write keep: last",
        ),
        (
            NET + "measure: {engine: openvin}\n",
            "line 3: measure.engine: there is no engine 'openvin'; did you mean 'openvi",
        ),
        (
            NET + "measure: {engine: [torch, both]}\n",
            "line 3: measure.engine.1: there is no engine 'both'; known: 'torch'",
        ),
        (NET + "measure: {engine: [torch, all]}\n", "line 3: measure.engine.1: all is for all engines, and others are"),
        (NET + "measure: {engine: [torch, torch]}\n", "line 3: measure.engine.1: 'torch' is there already"),
        (
            NET + "measure: {engine: []}\n",
            "line 3: measure.engine: an empty list: name an engine, or say all, or latency",
        ),
        (NET + "finetune: {}\ndistil: {features: 1.0}\n", "line 4: distil.features: feature maps are compared on"),
        (
            SENSITIVE.replace("ratios: [0.5]", "ratios: []"),
            "line 7: prune.sensitivity.ratios: fractions to remove, between 0 and 1 and ascending, not []",
        ),
        (SENSITIVE.replace("[0.5]", "[0.5, 0.5]"), "line 7: prune.sensitivity.ratios: fractions to remove, between"),
        (SENSITIVE.replace("[0.5]", "[0.0]"), "line 7: prune.sensitivity.ratios: fractions to remove, between"),
        (SENSITIVE.replace("[0.5]", "[1.0]"), "line 7: prune.sensitivity.ratios: fractions to remove, between"),
        (
            SENSITIVE.replace("l1", "l11"),
            "line 6: prune.sensitivity.criterion: there is no criterion 'l11'; did you mean 'l1'?",
        ),
        (
            SENSITIVE.replace("digits", "digits, validation: 0"),
            "line 5: prune.sensitivity: it is measured on validation images, and data.validation holds none out",
        ),
        (
            SENSITIVE.replace("  budget: {keep: 0.5}", "  ratios: 0.5"),
            "line 4: prune.ratios: one ratio fixes every group, which leaves nothing to find by trying: give one of",
        ),
        (
            SENSITIVE.replace("  budget: {keep: 0.5}", "  ratios: {a: 0.5}"),
            "line 5: prune.sensitivity: the ratios say all that goes, and nothing is left to find: add a budget, or",
        ),
        (
            SENSITIVE + "  allocation: uniform\n",
            "line 8: prune.allocation: what is found by trying differs from group to group: leave uniform out",
        ),
        (
            SENSITIVE + "  residual: scatter\n",
            "line 8: prune.residual: what a branch bears that is pruned on its own is not tried out: take another rule",
        ),
        (
            SENSITIVE + "  prefer: module\n",
            "line 8: prune.prefer: groups are tried as they are coupled, halves of splits one by one: leave module out",
        ),
        (
            SENSITIVE + "    per: stage\n",
            "line 8: prune.sensitivity.per: one ratio a stage follows from a tolerance, and there is none",
        ),
        (
            SENSITIVE + "    tolerance: 0.01\n",
            "line 8: prune.sensitivity.tolerance: a tolerance says how much goes, and so does the budget: give one of",
        ),
        (FOLDER + "train: {}\n", "line 3: train: a saved folder is trained"),
        (FOLDER + "finetune: {}\ndistil: {}\n", "line 4: distil: a saved folder"),
    ],
)
def test_sections_that_do_not_go_together(text: str, message: str) -> None:
    with pytest.raises(BadRequest, match=re.escape(message)):
        parse_recipe(text, name="recipe.yaml")


def test_several_mistakes_are_told_at_once_in_order() -> None:
    text = GOOD.replace("epochs: 2", "epoch: 2, lr: x").replace("keep: 0.5", "keep: half") + "prunes: 3\n"
    with pytest.raises(BadRequest) as caught:
        parse_recipe(text)
    assert [int(re.findall(r"line (\d+)", line)[0]) for line in str(caught.value).splitlines()] == [5, 7, 7, 8]


def test_values_mean_what_they_look_like() -> None:
    text = "{a: 1e-3, b: no, c: 010, d: 2024-01-01, e: 1:30, f: .5, g: 0x10, h: ~, i: True, j: '1', k: -2, l: 1_000}"
    found = parse_yaml(text).value
    expected = [0.001, "no", 10, "2024-01-01", "1:30", 0.5, 16, None, True, "1", -2, "1_000"]
    assert list(found.values()) == expected
    assert [type(value) for value in found.values()] == [type(value) for value in expected]


def test_merged_keys_give_way_to_ones_own() -> None:
    found = parse_yaml("a: &a {x: 1, y: 2}\nb: &b {y: 3, z: 4}\nc: {<<: [*a, *b], x: 5}\n")
    assert found.value["c"] == {"x": 5, "y": 2, "z": 4}
    assert found.lines[("c", "x")] == 3


def test_files_that_are_no_recipe(tmp_path: Path) -> None:
    for name, content, message in (
        ("a.yaml", None, "a.yaml cannot be read: No such file"),
        ("b.yaml", b"\xff\xfe\x00", "b.yaml is not text"),
        ("c.yaml", b"# " + b"x" * 2**18, "c.yaml is larger than 256 KiB"),
    ):
        path = tmp_path / name
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(BadRequest, match=message):
            read_recipe(path)
    with pytest.raises(BadRequest, match="is a folder, not a recipe"):
        read_recipe(tmp_path)
    (tmp_path / "d.yaml").write_bytes(b"\xef\xbb\xbf" + GOOD.encode())  # as Windows' editor writes
    assert read_recipe(tmp_path / "d.yaml") == parse_recipe(GOOD)


def test_values_without_a_file_are_told_without_lines() -> None:
    with pytest.raises(BadRequest, match=r"^finetune: finetune: unknown key 'epoch'; did you mean 'epochs'\?$"):
        make_recipe({"model": {"name": "x"}, "data": {"name": "digits"}, "finetune": {"epoch": 3}}, name="finetune")


def test_the_published_schema_is_up_to_date() -> None:
    """``secateur run --schema > docs/recipe.schema.json`` writes it."""
    assert (ROOT / "docs" / "recipe.schema.json").read_text() == json_schema()


def test_the_schema_knows_every_section() -> None:
    schema = json.loads(json_schema())
    assert schema["additionalProperties"] is False
    for name, section in schema["$defs"].items():
        assert section.get("additionalProperties") is False, name
    assert set(known_keys(("finetune",))) == set(TypeAdapter(Training).json_schema()["properties"])
    assert "steps" in known_keys(("prune", "schedule"), kind="iterative")
    assert known_keys(("prune", "schedule"), kind="one-shot") == ["kind"]
    assert known_keys(("seed",)) == []


def test_first_difference() -> None:
    one = as_values(parse_recipe(GOOD))
    assert first_difference(one, one) is None
    other = as_values(parse_recipe(change("epochs: 2", "epochs: 3")))
    assert first_difference(one, other) == "finetune.epochs"
    assert first_difference({"a": 1}, {"a": 1, "b": 2}) == "b"
    assert first_difference({"a": True}, {"a": 1}) == "a"


def test_recipes_are_frozen() -> None:
    recipe: Recipe = parse_recipe(GOOD)
    with pytest.raises(ValueError, match="frozen"):
        recipe.seed = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            change(
                "{kind: iterative, steps: 3, training: {<<: *t, epochs: 1}}",
                "{kind: layer-by-layer, longer: {a: {lr: 0}}}",
            ),
            "line 6: prune.schedule.longer.a.lr: cannot train with lr=0.0: lr is a number above 0",
        ),
        (
            change("{kind: iterative, steps: 3, training: {<<: *t, epochs: 1}}", "{kind: layer-by-layer, together: a}"),
            "line 6: prune.schedule.together: should be a list, not 'a'",
        ),
        (
            change("budget: {keep: 0.5}", "per_class: 0"),
            "line 5: prune.per_class: should be greater than or equal to 1",
        ),
        (
            change("budget: {keep: 0.5}", "beside: [thinets]"),
            "line 5: prune.beside.0: there is no criterion 'thinets'; did you mean 'thinet'?",
        ),
        (change("budget: {keep: 0.5}", "beside: [l2, l2]"), "line 5: prune.beside.1: 'l2' is there already"),
        (
            change("budget: {keep: 0.5}", "beside: [l2]"),
            "line 5: prune.beside: criteria are compared where all is cut at once: take the schedule one-shot",
        ),
        (change("options:", "head: none, options:"), "line 1: model.head: 'none' is none of own, pooled"),
    ],
)
def test_mistakes_about_thinets_schedule(text: str, message: str) -> None:
    with pytest.raises(BadRequest) as raised:
        parse_recipe(text)
    assert message in str(raised.value)
