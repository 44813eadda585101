"""Counting: the papers' integers, costs without surgery against those of the pruned network, PyTorch's own count."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import secateur as sc
from law import call
from networks import NETWORKS
from networks.architectures import Inception, InvertedResidual, PreActivation
from networks.attention import OnTokens, SelfAttention
from networks.common import Sandwich
from secateur.costs import evaluate
from secateur.counting import CONVENTIONS, is_projection
from secateur.groups import Coupling, couple
from secateur.operations import costs_of, operations
from secateur.zoo import MODELS
from secateur.zoo.papers import ROWS, figures, line
from secateur.zoo.resnet import Bottleneck
from secateur.zoo.vgg import LI_A

GOLDEN: list[dict[str, Any]] = json.loads((Path(__file__).parent / "golden" / "tables.json").read_text())
DOCUMENT = (Path(__file__).parents[1] / "docs" / "papers.md").read_text().splitlines()
COSTED = """residual_stage inverted_residual shuffle_unit inception conv_grouped_in_a_row depthwise_separable
transposed_grouped conv1d cat_with_network_input shared_module tied_weights attention_by_hand attention_sdpa""".split()
DEAD = ("attention_shared_query_key",)  # its k is never read: the dense network runs it, a captured graph does not
FLOPPED = """residual_stage inverted_residual transposed_grouped conv1d conv3d attention_sdpa non_local einsum_of_maps
hyper_conv""".split()


@cache
def graph_of(name: str) -> sc.Graph:
    """A network of the zoo, captured; shared by the tests, which only read it."""
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    return sc.trace(model, torch.zeros(1, *model.input_size))


# The papers' integers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", GOLDEN, ids=[row["id"] for row in GOLDEN])
def test_row_of_the_papers_tables(row: Mapping[str, Any]) -> None:
    (figure,) = figures([row["id"]])
    real = figure.row.ratio > 0
    counted = {
        "FLOP": figure.flops,
        "params": figure.params,
        "frac FLOP": round(figure.paper_flops),
        "frac drop%": round(figure.paper_flops_drop or 0, 2),
        "int FLOP": figure.flops,
        "int drop%": round(figure.flops_drop or 0, 2),
        "drop%": round((figure.paper_flops_drop if real else figure.flops_drop) or 0, 2),
    }
    columns = [column.strip() for column in row["columns"].split(",")]
    assert [counted[column] for column in columns] == row["counted"]
    assert line(figure) in DOCUMENT, "make docs/papers.md anew: python -m secateur.zoo.papers > docs/papers.md"


def test_a_literal_transcript_of_the_printed_figures() -> None:
    """``ROWS`` prints what the golden file says the papers print."""
    rows = {row.id: row for row in ROWS}
    for golden in GOLDEN:
        row = rows[golden["id"]]
        printed = [text for text in (row.flops, row.params, row.flops_drop) if text]
        for ours, theirs in zip(printed, golden["printed_in_paper"], strict=False):
            assert float(ours) == theirs if isinstance(theirs, float) else theirs.split()[0] == ours


def small(graph: sc.Graph, ratios: Mapping[str, float], *, check: bool = False) -> nn.Module:
    # where slicing is enough, the proof is left to the law's own tests: it takes half the time
    return sc.apply(graph, sc.plan(graph, ratios=ratios), check=check)


@pytest.mark.parametrize(
    ("ratios", "whole", "expected"),
    [
        pytest.param((0.1, 0.1, 0.1), (16, 20, 38, 54), (112_435_840, 769_456), id="A", marks=pytest.mark.slow),
        pytest.param((0.6, 0.3, 0.1), (16, 18, 20, 34, 38, 54), (90_907_264, 732_016), id="B"),
    ],
)
def test_li_resnet56_pruned_by_a_plan(ratios: Sequence[float], whole: Sequence[int], expected: tuple[int, int]) -> None:
    """Li et al., Section 4.2: a ratio for each stage, the sensitive layers left whole; layer 2b + 2 begins block b."""
    asked = {f"layer{stage}.*.conv1": ratio for stage, ratio in enumerate(ratios, start=1)}
    asked |= {f"layer{1 + (layer // 2 - 1) // 9}.{(layer // 2 - 1) % 9}.conv1": 0.0 for layer in whole}
    pruned = sc.count(small(graph_of("resnet56"), asked), torch.zeros(1, 3, 32, 32), convention="li")
    assert (pruned.flops, pruned.params) == expected


def test_li_vgg16_a_pruned_by_a_plan() -> None:
    graph = graph_of("vgg16_cifar")
    convolutions = [layer.name for layer in sc.layer_table(graph) if layer.kind == "conv"]
    pruned = small(graph, dict(zip(convolutions, LI_A, strict=True)))
    counted = sc.count(pruned, torch.zeros(1, 3, 32, 32), convention="li")
    assert (counted.flops, counted.params) == (206_279_680, 5_390_176)


def test_layer_table_gives_the_columns_of_lis_table_2() -> None:
    """FLOP of the first two layers as printed, and the per cent that VGG-16-A saves in each layer."""
    dense, pruned = sc.layer_table(graph_of("vgg16_cifar")), sc.layer_table(graph_of("vgg16_cifar_a"))
    assert [f"{layer.macs:.1e}" for layer in dense[:2]] == ["1.8e+06", "3.8e+07"]
    saved = [100 - 100 * b.macs / a.macs for a, b in zip(dense, pruned, strict=True)]
    assert saved == [50, 50, 0, 0, 0, 0, 0, 50, 75, 75, 75, 75, 75, 50, 0]
    assert [layer.map_size for layer in dense[:3]] == [(32, 32), (32, 32), (16, 16)]
    assert (dense[7].in_channels, dense[7].out_channels, pruned[7].out_channels) == (256, 512, 256)


# The conventions, by hand -----------------------------------------------------------------------------------------


class EveryTerm(nn.Module):
    """One of each thing that a convention counts or leaves out, small enough to count by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.conv, self.bn1 = nn.Conv2d(4, 6, 3, 2, 1, bias=False), nn.BatchNorm2d(6)
        self.project, self.bn2 = nn.Conv2d(4, 6, 1, 2, bias=False), nn.BatchNorm2d(6)
        self.relu, self.pool, self.fc = nn.ReLU(), nn.MaxPool2d(2), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn(self.stem(x)))
        x = self.relu(self.bn1(self.conv(x)) + self.bn2(self.project(x)))
        return self.fc(F.relu(self.pool(x)).mean((2, 3)))


STEM, CONV, PROJECT, FC = 4 * 3 * 9 * 64, 6 * 4 * 9 * 16, 6 * 4 * 16, 5 * 6
ALL = STEM + CONV + PROJECT + FC
WEIGHTS, NORMS, BIAS = 4 * 3 * 9 + 6 * 4 * 9 + 6 * 4 + 5 * 6, 2 * (4 + 6 + 6), 5
SWP_EXTRAS = BIAS + 2 * (4 * 64 + 6 * 16) + (4 * 64 + 6 * 16) + 4 * (6 * 4)


@pytest.mark.parametrize(
    ("convention", "expected"),
    [
        ("torch", (ALL, 2 * ALL, WEIGHTS + NORMS + BIAS)),
        ("li", (ALL - PROJECT, ALL - PROJECT, WEIGHTS - 6 * 4)),
        ("thinet", (ALL, 2 * ALL, WEIGHTS + NORMS)),
        ("fpgm", (ALL - FC, ALL - FC, WEIGHTS + NORMS + BIAS)),
        ("swp", (ALL, 2 * ALL + SWP_EXTRAS, WEIGHTS + NORMS + BIAS)),
    ],
)
@pytest.mark.parametrize("batch", [1, 3])
def test_convention_on_a_network_counted_by_hand(convention: str, expected: tuple[int, int, int], batch: int) -> None:
    got = sc.count(EveryTerm().eval(), torch.zeros(batch, 3, 8, 8), convention=convention)
    assert (got.macs, got.flops, got.params) == expected


def test_unknown_convention() -> None:
    with pytest.raises(sc.BadRequest, match=r"unknown convention 'thinnet'; did you mean 'thinet'\?"):
        sc.count(nn.Linear(3, 2), torch.zeros(1, 3), convention="thinnet")
    assert CONVENTIONS == ("torch", "li", "thinet", "fpgm", "swp")


# Projections ------------------------------------------------------------------------------------------------------


class InPlaceBlock(nn.Module):
    """As torchvision writes it: ``out += identity``, in-place ReLU; the shortcut comes last, without a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(12, 8, 3, 2, 1), nn.Conv2d(8, 16, 3, 1, 1)
        self.relu, self.shortcut = nn.ReLU(inplace=True), nn.Conv2d(12, 16, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv2(self.relu(self.conv1(x)))
        out += self.shortcut(x)
        return self.relu(out)


@pytest.mark.parametrize(
    ("block", "out", "expected"),
    [
        (lambda: Bottleneck(12, 16, inner=4, stride=2), 16, ["middle.downsample.0.weight"]),
        (lambda: Bottleneck(12, 12, inner=4, stride=1), 12, []),
        (InPlaceBlock, 16, ["middle.shortcut.weight"]),
        (lambda: Inception(12), 27, []),
        (lambda: InvertedResidual(12, 8), 12, []),
        (lambda: PreActivation(12, 8), 12, []),
    ],
    ids=["bottleneck", "identity", "in_place", "inception", "inverted_residual", "pre_activation"],
)
def test_projections(block: Any, out: int, expected: list[str]) -> None:
    graph = sc.trace(Sandwich(block(), out=out).eval(), torch.zeros(2, 3, 8, 8))
    assert [o.weight for o in operations(graph) if is_projection(o)] == expected


# Costs without surgery --------------------------------------------------------------------------------------------


def random_widths(coupling: Coupling, seed: int) -> dict[str, int]:
    rng = np.random.default_rng(seed)
    return {g.name: int(rng.integers(1, max(g.channels, 2))) for g in coupling.groups}


def assert_costs(graph: sc.Graph, seed: int, *, check: bool = True) -> None:
    """The cost at random kept counts is the count of the network that ``apply`` makes of them, to the integer."""
    coupling = couple(graph)
    widths = random_widths(coupling, seed)
    dense = sc.count(graph)
    pruned = sc.count(small(graph, widths, check=check), graph.kwargs or graph.args)
    for of in ("macs", "params"):
        cost = costs_of(coupling, of)
        whole = np.array([g.channels for g in coupling.groups])
        assert evaluate(cost, whole) == getattr(dense, of)
        assert evaluate(cost, np.array([widths[g.name] for g in coupling.groups])) == getattr(pruned, of)
    assert pruned.macs <= dense.macs
    assert pruned.params < dense.params


@pytest.mark.parametrize("name", COSTED)
def test_costs_of_small_networks(name: str) -> None:
    make, inputs, _ = NETWORKS[name]
    torch.manual_seed(0)
    assert_costs(sc.trace(make().eval(), inputs()), seed=len(name))


@pytest.mark.parametrize("name", ["resnet20", "resnet20_projection", "vgg16_cifar"])
def test_costs_of_the_papers_networks(name: str) -> None:
    assert_costs(graph_of(name), seed=1, check=False)


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in NETWORKS if n not in (*COSTED, *DEAD)])
def test_costs_of_all_test_networks(name: str) -> None:
    make, inputs, _ = NETWORKS[name]
    torch.manual_seed(0)
    graph = sc.trace(make().eval(), inputs())
    if all(g.channels == 1 for g in couple(graph).groups):
        pytest.skip("nothing of it can be pruned")
    assert_costs(graph, seed=2)


def test_costs_take_real_valued_widths() -> None:
    """FPGM's own convention on a network without shortcuts: 80 % of every convolution's filters, 35.91 % saved."""
    graph = graph_of("vgg16_cifar")
    coupling = couple(graph)
    convolutions = {layer.name for layer in sc.layer_table(graph) if layer.kind == "conv"}
    keep = np.array([g.channels * (0.8 if g.name in convolutions else 1.0) for g in coupling.groups])
    linear = 0.8 * 512 * 512 + 512 * 10
    kept = evaluate(costs_of(coupling), keep) - linear
    assert kept == pytest.approx(200_728_903.68, rel=1e-9)
    assert round(100 - 100 * kept / sc.count(graph, convention="fpgm").macs, 2) == 35.91


# PyTorch's own count, and the per-layer table ---------------------------------------------------------------------


@pytest.mark.parametrize("name", FLOPPED)
def test_twice_the_macs_are_what_torch_counts(name: str) -> None:
    make, inputs, _ = NETWORKS[name]
    model, x = make().eval(), inputs()
    one = tuple(t[:1] for t in x) if isinstance(x, tuple) else x[:1]
    # of the kernels behind scaled_dot_product_attention on a CPU, torch counts only this one
    with sdpa_kernel(SDPBackend.MATH), torch.no_grad(), FlopCounterMode(display=False) as counter:
        call(model, one)
    got = sc.count(model, x)
    assert got.flops == 2 * got.macs == counter.get_total_flops() > 0


def test_attention_counted_by_hand() -> None:
    """Tokens ``N`` = 64 of ``D`` = 12: projections to 3D and D, then N x N products over D, twice."""
    model = Sandwich(OnTokens(SelfAttention(12, 3, "sdpa"), 12))
    got = sc.count(model.eval(), torch.zeros(2, 3, 8, 8))
    convolutions = 64 * (12 * 3 * 9 + 5 * 12)
    assert got.macs == convolutions + 64 * 12 * (3 * 12 + 12) + 2 * 64 * 64 * 12


@pytest.mark.parametrize("name", ["residual_stage", "depthwise_separable", "transposed_grouped", "conv3d", "conv1d"])
def test_layer_table_adds_up(name: str) -> None:
    make, inputs, _ = NETWORKS[name]
    model = make().eval()
    graph = sc.trace(model, inputs())
    table = sc.layer_table(graph)
    assert sum(layer.macs for layer in table) == sc.count(graph).macs
    modules = dict(model.named_modules())
    for layer in table:
        module = modules[layer.name]
        assert layer.params == sum(p.numel() for p in module.parameters())
        assert (layer.kind == "linear") == isinstance(module, nn.Linear)
        if layer.kind == "conv":
            theirs = (module.in_channels, module.out_channels, module.groups, tuple(module.kernel_size))
            assert (layer.in_channels, layer.out_channels, layer.groups, layer.kernel) == theirs


def test_a_module_called_twice_costs_twice_and_has_its_parameters_once() -> None:
    make, inputs, _ = NETWORKS["shared_module"]
    model, x = make().eval(), inputs()
    rows = [layer for layer in sc.layer_table(model, x) if layer.name == "middle.conv"]
    assert [layer.macs for layer in rows] == [12 * 12 * 9 * 64] * 2
    assert [layer.params for layer in rows] == [12 * 12 * 9 + 12, 0]
    weights = 12 * 3 * 9 + 12 * 12 * 9 + 5 * 12
    assert sc.count(model, x, convention="li").params == weights
    assert sc.count(model, x).params == sum(p.numel() for p in model.parameters())
