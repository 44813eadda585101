"""FPGM's networks by name: widths, FLOPs of whole and of real-valued widths, what each variant trains, and runs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_model
from torch import nn

import secateur as sc
from made_data import write_folder
from named_runs import command, made_cifar, smoke
from secateur.errors import BadRequest
from secateur.recipes import named_recipe, parse_recipe, write_recipe
from secateur.recipes.fpgm import UNTRAINED, VARIANTS
from secateur.recipes.named import NETWORKS as EVERY
from secateur.recipes.named import named_values
from secateur.recipes.schema import OneShot, Progressive, Prune
from secateur.recover.rates import rate
from secateur.recover.settings import Training
from secateur.zoo import MODELS
from secateur.zoo.papers import ROWS, agrees, figures, fpgm_width

NETWORKS = {name: network for name, network in EVERY.items() if name.startswith("fpgm/")}
ROW = {row.id: row for row in ROWS}
TABLES = json.loads((Path(__file__).parent / "golden" / "tables.json").read_text())
GOLDEN = {entry["id"]: entry["counted"] for entry in TABLES}
MISPRINTS = {"fpgm/r20-30", "fpgm/r101-30", "fpgm/r18-30"}
"""Digits swapped; the drop of another network; a script that loses an offset."""
QUICK = ["fpgm/r20-30", "fpgm/r20-40", "fpgm/vgg-uniform20"]
OTHERS = [pytest.param(name, marks=pytest.mark.slow) for name in NETWORKS if name not in QUICK]


@cache
def graph_of(model: str) -> sc.Graph:
    torch.manual_seed(0)
    network = MODELS[model]().eval()
    return sc.trace(network, torch.zeros(1, *network.input_size))


def prune_of(name: str, variant: str = "paper") -> Prune:
    found = named_recipe(name, variant).prune
    assert found is not None
    return found


@cache
def planned(name: str, constants: str = "fold") -> sc.Plan:
    prune = prune_of(name)
    assert prune.constants == "fold"
    return sc.plan(
        graph_of(NETWORKS[name].model),
        criterion="l1",  # the widths are the same, and the norms are quicker
        ratios=prune.ratios,
        exclude=prune.exclude,
        residual=prune.residual,
        constants=constants,
    )


def expected_widths(name: str) -> dict[str, int]:
    """Every convolution but the projections without so many per cent of its filters, rounded down; in integers."""
    convolutions = {
        layer: module.out_channels
        for layer, module in graph_of(NETWORKS[name].model).model.named_modules()
        if isinstance(module, nn.Conv2d) and "downsample" not in layer
    }
    if name == "fpgm/vgg-precfg":
        halved = ("features.0", *list(convolutions)[7:])
        return {layer: convolutions[layer] // 2 for layer in halved}
    per_cent = round(100 * ROW[name].ratio)
    return {layer: width - width * per_cent // 100 for layer, width in convolutions.items()}


@pytest.mark.parametrize("name", [*QUICK, *OTHERS])
def test_widths(name: str) -> None:
    found = planned(name)
    channels = {group.name: group.channels for group in found.groups}
    narrower = {group: len(kept) for group, kept in found.keep.items() if len(kept) < channels[group]}
    assert narrower == expected_widths(name)
    assert found.residual == prune_of(name).residual
    assert {found.constants[group] for group in narrower} == {"fold"}


@pytest.mark.parametrize("name", [*QUICK, *OTHERS])
def test_flops_of_the_network_that_exists_to_the_integer(name: str) -> None:
    graph = graph_of(NETWORKS[name].model)
    small = sc.apply(graph, planned(name), check=False)
    counted = sc.count(small, torch.zeros(1, *graph.model.input_size), convention="fpgm")
    (figure,) = figures([name])
    assert counted.flops == figure.flops
    dense = sc.count(graph, convention="fpgm").flops
    assert 100 * (1 - counted.flops / dense) == pytest.approx(figure.flops_drop, rel=1e-12)
    if len(GOLDEN.get(name, ())) == 4:
        assert (counted.flops, round(100 * (1 - counted.flops / dense), 2)) == tuple(GOLDEN[name][2:])


@pytest.mark.parametrize("name", [*QUICK, *OTHERS])
def test_flops_of_real_valued_widths_are_the_papers(name: str) -> None:
    (figure,) = figures([name])
    if name in GOLDEN:
        golden = GOLDEN[name]
        assert round(figure.paper_flops_drop or 0, 2) == golden[len(golden) // 2 - 1 if len(golden) == 4 else 0]
        assert len(golden) != 4 or round(figure.paper_flops) == golden[0]
    right = [agrees(p, v) for p, v in ((ROW[name].flops, figure.paper_flops),) if p]
    right += [agrees(ROW[name].flops_drop, figure.paper_flops_drop or 0)]
    assert all(right) == (name not in MISPRINTS)


def test_the_papers_rounding() -> None:
    assert [fpgm_width(width, ratio) for width, ratio in ((16, 0.3), (16, 0.4), (64, 0.3), (10, 0.1))] == [
        12,
        10,
        45,
        9,
    ]
    assert fpgm_width(10, 1 - 0.9) == 9  # 0.0999999... of 10 is one filter
    assert fpgm_width(7, 0.0) == 7


def test_names_are_rows_of_the_paper() -> None:
    pruned = [row.id for row in ROWS if row.convention == "fpgm"]
    assert list(NETWORKS) == pruned
    assert all(ROW[name].of == network.model for name, network in NETWORKS.items())


# Variants --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
def test_every_variant_is_a_whole_recipe(name: str) -> None:
    for variant in VARIANTS:
        recipe = named_recipe(name, variant)
        assert parse_recipe(write_recipe(recipe)) == recipe
        prune = recipe.prune
        assert prune is not None
        assert (prune.ratios, prune.residual) == (NETWORKS[name].ratios, NETWORKS[name].residual)
        assert prune.constants == ("drop" if variant in ("scratch", "tuned") else "fold")
        assert recipe.data.validation == 0
        if variant in UNTRAINED:
            assert (recipe.model.weights, recipe.train) == ("random", None)
        else:
            given = named_recipe(name, variant, weights="w.pth")
            assert (given.model.weights, given.train) == ("w.pth", None)
            assert given.model_copy(update={"model": recipe.model, "train": recipe.train}) == recipe


def test_ablations_change_nothing_but_the_criterion() -> None:
    for variant, criterion in (("l1", "l1"), ("random", "random"), ("mix", "fpgm_mix")):
        values, paper = named_values("fpgm/r56-40", variant), named_values("fpgm/r56-40")
        assert (values["prune"].pop("criterion"), paper["prune"].pop("criterion")) == (criterion, "fpgm")
        assert values == paper
    soft, sfp = named_values("fpgm/r110-30", "soft"), named_values("fpgm/r110-30", "sfp")
    assert (soft["prune"].pop("criterion"), sfp["prune"].pop("criterion")) == ("fpgm", "l2")
    assert soft == sfp
    hard = named_values("fpgm/r110-30")
    assert (soft["prune"]["schedule"].pop("soft"), hard["prune"]["schedule"].pop("soft")) == (True, False)
    del soft["prune"]["schedule"], hard["prune"]["schedule"], hard["prune"]["criterion"]
    assert soft == hard


def rates(training: Training) -> Iterator[tuple[int, float]]:
    """The epochs at which the learning rate changes, and what it is then."""
    before = None
    for epoch in range(training.epochs):
        now = round(rate(training, 100 * epoch + 99, 100), 12)
        if now != before:
            yield epoch, now
        before = now


def zeroing_of(name: str, variant: str = "paper") -> Training:
    schedule = prune_of(name, variant).schedule
    assert isinstance(schedule, Progressive)
    assert (schedule.every, schedule.grow, schedule.at_start) == (1, 0, True)
    return schedule.training


CIFAR_RATES = [(0, 0.1), (60, 0.02), (120, 0.004), (160, 0.0008)]
IMAGENET_RATES = [(0, 0.1), (30, 0.01), (60, 0.001), (90, 0.0001)]


@pytest.mark.parametrize(
    ("name", "batch", "epochs", "decay", "expected"),
    [
        ("fpgm/r20-40", 128, 200, 5e-4, CIFAR_RATES),
        ("fpgm/r56-40", 128, 200, 5e-4, CIFAR_RATES),
        ("fpgm/r110-40", 128, 200, 5e-4, CIFAR_RATES),
        ("fpgm/r18-30", 256, 100, 1e-4, IMAGENET_RATES),
        ("fpgm/r50-0.6", 256, 100, 1e-4, IMAGENET_RATES),
        ("fpgm/r101-30", 256, 100, 1e-4, IMAGENET_RATES),
        ("fpgm/vgg-uniform20", 64, 160, 1e-4, [(0, 0.1), (80, 0.01), (120, 0.001)]),
    ],
)
def test_the_papers_schedule(
    name: str, batch: int, epochs: int, decay: float, expected: list[tuple[int, float]]
) -> None:
    paper, pretrained = named_recipe(name), named_recipe(name, "pretrained")
    scratch = zeroing_of(name)
    assert (scratch.epochs, scratch.momentum, scratch.weight_decay, scratch.keep) == (epochs, 0.9, decay, "last")
    assert (paper.data.batch, paper.finetune) == (batch, None)
    assert list(rates(scratch)) == expected
    assert scratch.warmup == (1 if "r110" in name else 0)
    assert pretrained.train == named_recipe(name, "scratch").finetune == scratch
    again = zeroing_of(name, "pretrained")
    assert again.warmup == 0
    assert list(rates(again)) == [(epoch, pytest.approx(now / 10)) for epoch, now in expected]
    once = named_recipe(name, "one-shot")
    assert once.prune is not None
    assert isinstance(once.prune.schedule, OneShot)
    assert once.finetune == (scratch if "vgg" in name else again)


def test_zeroing_on_imagenet_spares_projections() -> None:
    found = planned("fpgm/r18-30")
    channels = {group.name: group.channels for group in found.groups}
    projections = {name for name in channels if "downsample" in name}
    assert len(projections) == 3
    assert all(len(found.keep[name]) == channels[name] for name in projections)


def test_values_can_be_changed_without_changing_the_table() -> None:
    for variant in ("paper", "one-shot", "tuned"):
        values = named_values("fpgm/vgg-uniform20", variant)
        before = json.dumps(values)
        values["data"]["batch"] = values["prune"]["ratios"]["features.0"] = 1
        for section in (
            values.get("finetune"),
            values["prune"].get("schedule", {}).get("training"),
            values.get("train"),
        ):
            if section is not None:
                section["epochs"] = 1
        assert json.dumps(named_values("fpgm/vgg-uniform20", variant)) == before


def test_weights_where_training_starts_from_none() -> None:
    with pytest.raises(
        BadRequest,
        match=r"fpgm/r20-40: the variant 'soft' starts from random weights, and cannot from those in w\.pth\n"
        r"  do: leave the weights out, or choose one of the variants pretrained, one-shot, tuned$",
    ):
        named_recipe("fpgm/r20-40", "soft", weights="w.pth")


def test_the_list() -> None:
    text = command("run", "--list")
    for name, network in NETWORKS.items():
        (line,) = [line for line in text.splitlines() if f" {name} " in line]
        assert network.model in line
        assert f" −{ROW[name].flops_drop} % " in line
        assert f" {round(100 * (ROW[name].ratio or 0.5))} % " in line
    assert f"variants of fpgm: {', '.join(VARIANTS)}" in text


# Runs ------------------------------------------------------------------------------------------------------------


def pruned_of(folder: Path, model: str) -> float:
    small = sc.load(folder / "pruned", MODELS[model]())
    return sc.count(small, torch.zeros(1, 3, 32, 32), convention="fpgm").flops


CUT_LATER, TRAINED_LATER = {"zero": "zeroed", "prune": "pruned"}, {"prune": "pruned", "finetune": "fine-tuned"}
PHASES = {
    **dict.fromkeys(VARIANTS, CUT_LATER),
    "one-shot": TRAINED_LATER,
    "tuned": {"prune": "pruned", "compensate": "compensated", "finetune": "fine-tuned"},
    "scratch": TRAINED_LATER,
}
"""By variant, behind the dense network: the phases, and what their networks are called."""


@pytest.mark.parametrize("variant", [v if v == "paper" else pytest.param(v, marks=pytest.mark.slow) for v in VARIANTS])
def test_every_variant_on_files_of_cifar(variant: str, tmp_path: Path) -> None:
    made_cifar(tmp_path)
    rows, facts, folder = smoke(tmp_path, "fpgm/r20-40", "--variant", variant)
    assert list(facts) == ["dense", *PHASES[variant], "measure", "save"]
    first = "untrained" if variant in UNTRAINED else "dense"
    assert [row["name"] for row in rows] == [first, *PHASES[variant].values()]
    assert pruned_of(folder, "resnet20") == 19_585_728
    if "zero" in PHASES[variant]:  # nothing is lost where the zeros are cut
        zeroed, small = MODELS["resnet20"](), sc.load(folder / "pruned", MODELS["resnet20"]())
        load_model(zeroed, folder / "phases" / "zero.safetensors")
        x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
        with torch.no_grad():
            before, after = (network.double().eval()(x) for network in (zeroed, small))
        assert float((before - after).abs().max() / before.abs().max()) < 1e-6  # the cut weights are float32


@pytest.mark.slow
def test_the_cut_network_is_exported_and_reported(tmp_path: Path) -> None:
    made_cifar(tmp_path)
    quick = ["measure.latency=false", "data.batch=4", f"data.root={tmp_path}"]
    folder = tmp_path / "run"
    command("run", "fpgm/r20-40", "--smoke", "--cpu", *(p for text in quick for p in ("--set", text)), "-o", folder)
    (exported,) = (e for e in json.loads((folder / "run.json").read_text())["done"] if e["phase"] == "export")
    assert exported["facts"]["max_difference"] < 1e-5
    report = (folder / "report.html").read_text()
    for fact in ("scatter", "folded into what reads them", "424 of 688 kept", "progressive"):
        assert fact in report
    assert "zeroed" in report


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["paper", "one-shot"])
def test_vgg_on_files_of_cifar(variant: str, tmp_path: Path) -> None:
    made_cifar(tmp_path)
    rows, _, folder = smoke(tmp_path, "fpgm/vgg-uniform20", "--variant", variant)
    assert pruned_of(folder, "vgg16_cifar") == 202_386_960
    assert rows[-1]["name"] == ("pruned" if variant == "paper" else "fine-tuned")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::secateur.zoo.torchvision_shim.TorchvisionMismatch")
def test_resnet18_on_folders_as_imagenets(tmp_path: Path) -> None:
    write_folder(tmp_path)
    torch.save(MODELS["resnet18"](classes=2).state_dict(), tmp_path / "w.pth")
    values = ("data.name=folder:.", "data.workers=0", "data.size=64", "model.options={classes: 2}")
    line: list[Any] = ["--variant", "pretrained", "--weights", str(tmp_path / "w.pth")]
    rows, _, folder = smoke(tmp_path, "fpgm/r18-30", *line, *(part for text in values for part in ("--set", text)))
    found = sc.Plan.from_json((folder / "plan.json").read_text())
    channels = {group.name: group.channels for group in found.groups}
    assert {name: len(kept) for name, kept in found.keep.items() if len(kept) < channels[name]} == {
        name: fpgm_width(channels[name], 0.3) for name in channels if "conv" in name
    }
    assert [row["name"] for row in rows] == ["dense", "zeroed", "pruned"]
