"""Li's and ThiNet's networks by name: widths, parameters and FLOPs to the integer, and what each variant trains."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import secateur as sc
from made_data import write_folder
from named_runs import command, made_cifar, smoke
from secateur.errors import BadRequest
from secateur.recipes import named_recipe, parse_recipe, write_recipe
from secateur.recipes.entries import first_of_block
from secateur.recipes.named import NETWORKS as EVERY
from secateur.recipes.named import VARIANTS, named_values
from secateur.recipes.pruning import training_after
from secateur.recipes.schema import Iterative, LayerByLayer, Sensitivity
from secateur.zoo import MODELS
from secateur.zoo.papers import ROWS, agrees

GOLDEN: Mapping[str, Mapping[str, Any]] = {
    name: values
    for paper in ("li", "thinet")
    for name, values in json.loads((Path(__file__).parent / "golden" / f"{paper}.json").read_text()).items()
}
NETWORKS = {name: network for name, network in EVERY.items() if name.startswith(("li/", "thinet/"))}
ROW = {row.id: row for row in ROWS}


@cache
def graph_of(model: str, head: str = "own") -> sc.Graph:
    torch.manual_seed(0)
    network = MODELS[model]().eval()
    example = torch.zeros(1, *network.input_size)
    return sc.trace(network if head == "own" else sc.pool_head(network, example, check=False), example)


def dense_of(name: str) -> sc.Graph:
    return graph_of(NETWORKS[name].model, NETWORKS[name].head)


def planned(name: str, variant: str = "paper") -> sc.Plan:
    prune = named_recipe(name, variant).prune
    assert prune is not None
    return sc.plan(
        dense_of(name),
        criterion=prune.criterion if name.startswith("li") else "l1",  # the others need data, and the widths do not
        ratios=prune.ratios,
        exclude=prune.exclude,
        residual=prune.residual,
    )


def cut(name: str) -> nn.Module:
    return sc.apply(dense_of(name), planned(name), check=False)


CIFAR = [name for name in NETWORKS if NETWORKS[name].data == "cifar10" and "110" not in name]
OTHERS = [pytest.param(name, marks=pytest.mark.slow) for name in NETWORKS if name not in CIFAR]


@pytest.mark.parametrize("name", [*CIFAR, *OTHERS])
def test_parameters_and_flops_to_the_integer(name: str) -> None:
    golden, dense, row = GOLDEN[name], dense_of(name), ROW[name]
    counted = sc.count(cut(name), torch.zeros(1, *dense.model.input_size), convention=row.convention)
    assert (counted.flops, counted.params) == (golden["flops"], golden["params"])
    if name.startswith("thinet"):
        assert agrees(row.params, counted.params)
        assert agrees(row.flops, counted.flops) == (name != "thinet/r50-30")  # printed: twice the rounded 1.10 GMAC
        return
    before = sc.count(dense, convention="li")
    assert abs(100 * (1 - counted.flops / before.flops) - float(row.flops_drop)) < 0.1
    assert abs(100 * (1 - counted.params / before.params) - float(row.params_drop)) < 0.1


def expected_widths(name: str) -> dict[str, int]:
    """The groups that get narrower, and how wide they are then; from the golden file, which is the paper's list."""
    golden, groups = GOLDEN[name], {g.name: g.channels for g in sc.find_groups(dense_of(name))}
    if "stream" in golden:
        return dict(golden["stream"])
    if "convolutions" in golden:
        widths = dict(
            zip(
                [g for g in groups if g.startswith("features") and "input" not in g],
                golden["convolutions"],
                strict=True,
            )
        )
    elif name.startswith("thinet"):
        inside = [f"layer{s + 1}.{b}" for s, blocks in enumerate((3, 4, 6, 3)) for b in range(blocks)]
        widths = {f"{b}.conv{n}": golden["inner"][int(b[5]) - 1] for b in inside for n in (1, 2)}
    else:
        inner = [g for g in groups if g.endswith("conv1") and g != "conv1" and g not in golden["whole"]]
        widths = {g: golden["inner"][int(g.removeprefix("layer").partition(".")[0]) - 1] for g in inner}
    return {g: width for g, width in widths.items() if width < groups[g]}


LAST_OF_LI = next(param for param in OTHERS if param.values[0] == "li/resnet34-C")


@pytest.mark.parametrize("name", [*CIFAR, "li/resnet34-C", *(param for param in OTHERS if param is not LAST_OF_LI)])
def test_widths(name: str) -> None:
    found = planned(name)
    channels = {group.name: group.channels for group in found.groups}
    narrower = {group: len(kept) for group, kept in found.keep.items() if len(kept) < channels[group]}
    assert narrower == expected_widths(name)
    assert found.made_by.get("residual", "coupled") == NETWORKS[name].residual


def test_kept_filters_are_those_of_the_largest_norms() -> None:
    model = graph_of("resnet56").model
    kept = planned("li/resnet56-B").keep
    for name in ("layer1.0.conv1", "layer2.3.conv1", "layer3.4.conv1"):
        assert kept[name] == largest_norms(model, f"{name}.weight", len(kept[name]))


def test_the_projection_decides_for_the_whole_third_stage_of_resnet34_c() -> None:
    model = graph_of("resnet34").model
    kept = planned("li/resnet34-C").keep["layer3.0.conv2"]
    assert kept == largest_norms(model, "layer3.0.downsample.0.weight", 204)
    assert kept != largest_norms(model, "layer3.0.conv2.weight", 204)


def largest_norms(model: nn.Module, name: str, count: int) -> tuple[int, ...]:
    """The paper's rule as a loop: sum up each filter, and take the smallest out one by one."""
    sums = {}
    for number, weights in enumerate(model.state_dict()[name].double()):
        sums[number] = sum(abs(value) for value in weights.flatten().tolist())
    while len(sums) > count:
        del sums[min(sums, key=lambda number: sums[number])]
    return tuple(sorted(sums))


def test_names_are_rows_of_the_paper() -> None:
    pruned = [row.id for row in ROWS if row.convention in ("li", "thinet") and row.of]
    assert list(NETWORKS) == pruned == list(GOLDEN)
    assert all(ROW[name].of == network.model for name, network in NETWORKS.items())


# Variants --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "variant"), [(n, v) for n in NETWORKS for v in VARIANTS[n.partition("/")[0]]])
def test_every_variant_is_a_whole_recipe(name: str, variant: str) -> None:
    recipe = named_recipe(name, variant)
    assert parse_recipe(write_recipe(recipe)) == recipe
    assert recipe.prune is not None
    assert recipe.prune.ratios == NETWORKS[name].ratios
    assert recipe.finetune is not None
    assert recipe.finetune.keep == "last"  # nothing is chosen by the test images
    if variant == "scratch":
        assert (recipe.model.weights, recipe.train) == ("random", None)
        assert recipe.finetune == named_recipe(name).train
    else:
        given = named_recipe(name, variant, weights="w.pth")
        assert (given.model.weights, given.train) == ("w.pth", None)
        assert given.model_copy(update={"model": recipe.model, "train": recipe.train}) == recipe


@pytest.mark.parametrize(("name", "epochs", "dense"), [("li/vgg16-A", 40, 160), ("li/resnet34-B", 20, 80)])
def test_the_papers_retraining(name: str, epochs: int, dense: int) -> None:
    """Constant 0.001, a quarter of the dense network's epochs."""
    recipe = named_recipe(name)
    assert recipe.finetune is not None
    assert recipe.train is not None
    assert (recipe.finetune.epochs, recipe.finetune.lr, recipe.finetune.schedule) == (epochs, 0.001, "constant")
    assert (recipe.train.epochs, recipe.train.lr, recipe.train.schedule) == (dense, 0.1, "step")
    assert recipe.compensate is None
    iterative = named_recipe(name, "iterative")
    assert iterative.prune is not None
    assert iterative.finetune is not None
    assert isinstance(iterative.prune.schedule, Iterative)
    assert iterative.prune.schedule.training == iterative.finetune
    assert iterative.prune.schedule.steps * iterative.finetune.epochs == epochs


def test_ablations_change_nothing_but_the_criterion() -> None:
    for criterion in ("random", "largest"):
        values = named_values("li/resnet56-A", criterion)
        assert values["prune"].pop("criterion") == criterion
        paper = named_values("li/resnet56-A")
        assert paper["prune"].pop("criterion") == "l1"
        assert values == paper

    for criterion in ("random", "l1"):
        values = named_values("thinet/r50-50", criterion)
        assert values["prune"].pop("criterion") == criterion
        paper = named_values("thinet/r50-50")
        assert paper["prune"].pop("criterion") == "thinet_sampled"
        assert paper["prune"].pop("per_class") == 10  # they look at no images
        assert values == paper


VGG_EPOCHS = {
    "features.0": 1, "features.2": 2, "features.5": 1, "features.7": 2, "features.10": 1, "features.12": 1,
    "features.14": 2, "features.17": 1, "features.19": 1,
}  # fmt: skip
"""Of ThiNet's VGG-16 after each layer but the last, conv4_3."""


@pytest.mark.parametrize("name", ["thinet/conv", "thinet/gap"])
def test_thinets_schedule_of_vgg16(name: str) -> None:
    recipe = named_recipe(name)
    assert recipe.prune is not None
    assert recipe.finetune is not None
    schedule = recipe.prune.schedule
    assert isinstance(schedule, LayerByLayer)
    found = {layer: training_after(schedule, layer) for layer in list(recipe.prune.ratios)[:-1]}  # type: ignore[arg-type]
    assert {layer: training.epochs for layer, training in found.items() if training} == VGG_EPOCHS
    for training in found.values():
        assert training is not None
        assert (training.lr, training.momentum, training.weight_decay) == (0.001, 0.9, 0.0005)
        assert (training.schedule, training.milestones[:1]) in (("constant", (0.5,)), ("step", (0.5,)))
    last = recipe.finetune
    assert (last.epochs, last.lr, last.schedule, last.milestones) == (12, 0.001, "step", (1 / 3, 2 / 3))
    assert (recipe.prune.criterion, recipe.prune.per_class) == ("thinet_sampled", 10)
    assert recipe.compensate is not None
    assert (recipe.compensate.readers, recipe.compensate.batchnorm) == ("scale", False)
    assert recipe.model.head == NETWORKS[name].head
    once = named_recipe(name, "one-shot")
    assert once.finetune is not None
    assert once.finetune.epochs == sum(VGG_EPOCHS.values()) + 12


def test_thinets_schedule_of_resnet50() -> None:
    recipe = named_recipe("thinet/r50-30")
    assert recipe.prune is not None
    assert recipe.finetune is not None
    assert isinstance(recipe.prune.schedule, LayerByLayer)
    assert training_after(recipe.prune.schedule, "layer2.1.conv1") is None
    between = training_after(recipe.prune.schedule, "layer2.1.conv2")
    assert between is not None
    assert (between.epochs, between.lr, between.schedule) == (1, 0.0001, "constant")
    last = recipe.finetune
    assert (last.epochs, last.lr, last.schedule, last.milestones) == (9, 0.001, "step", (1 / 3, 2 / 3))
    once = named_recipe("thinet/r50-30", "one-shot")
    assert once.finetune is not None
    assert once.finetune.epochs == 15 + 9


def test_values_can_be_changed_without_changing_the_table() -> None:
    values = named_values("li/resnet56-A", "tuned")
    values["finetune"]["epochs"] = values["prune"]["ratios"]["layer*.conv1"] = 1
    values["data"]["batch"] = values["prune"]["exclude"].pop()
    assert named_values("li/resnet56-A", "tuned") != values
    assert named_values("li/resnet56-A", "tuned")["finetune"]["epochs"] == 160


@pytest.mark.slow
def test_the_iterative_variant_ends_as_wide_as_the_others() -> None:
    model = MODELS["resnet56"]().eval()
    example, prune = torch.zeros(1, 3, 32, 32), named_recipe("li/resnet56-B", "iterative").prune
    assert prune is not None
    options: Any = {"ratios": prune.ratios, "exclude": prune.exclude, "residual": prune.residual}
    start = sc.schedules.starting_point(model, example, **options)
    for step in range(5):
        _, model = sc.schedules.iterative_step(model, example, start=start, step=step, steps=5, **options)
    counted = sc.count(model, example, convention="li")
    assert (counted.flops, counted.params) == (90_907_264, 732_016)


# Errors ----------------------------------------------------------------------------------------------------------


def test_unknown_names_and_variants() -> None:
    with pytest.raises(BadRequest, match=r"there is no recipe called 'li/resnet56-C'; did you mean 'li/resnet56-B'\?"):
        named_recipe("li/resnet56-C")
    with pytest.raises(BadRequest, match=r"li/vgg16-A has no variant 'tune'; did you mean 'tuned'\?"):
        named_recipe("li/vgg16-A", "tune")
    with pytest.raises(BadRequest, match=r"starts from random weights, and cannot from those in w\.pth\n  do: leave"):
        named_recipe("li/vgg16-A", "scratch", weights="w.pth")
    for layer in (1, 3, 19, 56):
        with pytest.raises(BadRequest, match=f"layer {layer} begins no block"):
            first_of_block(layer, (9, 9, 9))


def test_the_list() -> None:
    text = command("run", "--list")
    for name, network in NETWORKS.items():
        (line,) = [line for line in text.splitlines() if f" {name} " in line]
        assert network.model in line
        assert f" {f'−{ROW[name].flops_drop} %' if name.startswith('li') else ROW[name].flops} " in line
    assert "variants of li: paper, tuned, iterative, scratch, random, largest" in text
    assert "variants of thinet: paper, tuned, one-shot, scratch, l1, random" in text


def test_mistakes_on_the_command_line(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text("model: {name: 'zoo:resnet20', weights: random}\ndata: {name: digits}\n")
    for line, message in (
        (
            ("li/resnet56-C",),
            "neither a file nor the name of a recipe; did you mean 'li/resnet56-B'?\n  do: secateur run",
        ),
        (("li/resnet56-A", "--variant", "best"), "li/resnet56-A has no variant 'best'; did you mean 'largest'?"),
        (("li/resnet56-A", "--set", "finetune.epoch=2"), "li/resnet56-A: finetune: unknown key 'epoch'; did you mean"),
        (("li/resnet56-A", "--set", "finetune"), "--set 'finetune' is not understood\n  do: write SECTION.KEY=VALUE"),
        (("li/resnet56-A", "--set", "model.name.x=1"), "--set 'model.name.x=1': 'name' is no section"),
        ((path, "--variant", "tuned"), "--variant is for a recipe with a name, and"),
        ((path, "--weights", "w.pth"), "do: add --set model.weights=w.pth --set train=null"),
        ((path, "--set", "finetune.epochs=0"), "own.yaml: finetune.epochs: cannot train with epochs=0"),
        ((tmp_path / "other.yaml",), "other.yaml cannot be read: No such file"),
    ):
        assert message in command("run", *line, "-o", tmp_path / "out", code=2)
        assert not (tmp_path / "out").exists()


# Runs ------------------------------------------------------------------------------------------------------------


def pruned_of(folder: Path, model: str) -> tuple[float, float]:
    counted = sc.count(sc.load(folder / "pruned", MODELS[model]()), torch.zeros(1, 3, 32, 32), convention="li")
    return counted.flops, counted.params


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("li/vgg16-A", (206_279_680, 5_390_176)),
        pytest.param("li/resnet56-B", (90_907_264, 732_016), marks=pytest.mark.slow),
    ],
)
def test_smoke_on_files_of_cifar(name: str, size: tuple[int, int], tmp_path: Path) -> None:
    made_cifar(tmp_path)
    rows, facts, folder = smoke(tmp_path, name)
    assert [row["name"] for row in rows] == ["dense", "pruned", "fine-tuned"]
    assert list(facts) == ["dense", "prune", "finetune", "measure", "save"]
    assert pruned_of(folder, NETWORKS[name].model) == size


@pytest.mark.slow
@pytest.mark.parametrize("variant", [variant for variant in VARIANTS["li"] if variant != "paper"])
def test_every_variant_on_files_of_cifar(variant: str, tmp_path: Path) -> None:
    made_cifar(tmp_path)
    rows, facts, folder = smoke(tmp_path, "li/vgg16-A", "--variant", variant)
    assert pruned_of(folder, "vgg16_cifar") == (206_279_680, 5_390_176)
    phases = {"tuned": ["prune", "compensate"], "iterative": ["prune-1", "train-1", "prune-2"]}.get(variant, ["prune"])
    assert list(facts) == ["dense", *phases, "finetune", "measure", "save"]
    assert facts["dense"].get("epochs") == (None if variant == "scratch" else 1)
    assert rows[-1]["name"] == "fine-tuned"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::secateur.zoo.torchvision_shim.TorchvisionMismatch")
def test_resnet34_c_on_folders_as_imagenets(tmp_path: Path) -> None:
    write_folder(tmp_path)
    torch.save(MODELS["resnet34"](classes=2).state_dict(), tmp_path / "w.pth")
    line = (
        "li/resnet34-C",
        "--weights",
        str(tmp_path / "w.pth"),
        "--set",
        "data.name=folder:.",
        "--set",
        "data.workers=0",
    )
    rows, _, folder = smoke(tmp_path, *line, "--set", "model.options={classes: 2}", "--set", "data.size=64")
    found = sc.Plan.from_json((folder / "plan.json").read_text())
    assert {name: len(kept) for name, kept in found.keep.items()}["layer3.0.conv2"] == 204
    assert rows[1]["params"] < rows[0]["params"]


def test_the_documents_recipe_can_be_read() -> None:
    text = (Path(__file__).parents[1] / "docs" / "recipes-of-the-papers.md").read_text()
    blocks = re.findall(r"^```yaml\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    start = "model: {name: 'zoo:resnet56', weights: r.pth}\ndata: {name: cifar10}\n"
    layered, zeroed, found = (parse_recipe(start + block).prune for block in blocks)
    assert found is not None
    assert found.sensitivity == Sensitivity(tolerance=0.01, per="stage")
    assert layered is not None
    assert isinstance(layered.schedule, LayerByLayer)
    assert layered.schedule.together == ["layer*.conv1"]
    assert zeroed is not None
    assert (zeroed.residual, zeroed.constants, zeroed.schedule.kind) == ("scatter", "fold", "progressive")


def test_the_documents_code_runs() -> None:
    text = (Path(__file__).parents[1] / "docs" / "recipes-of-the-papers.md").read_text()
    for block in re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        exec(block, {})
