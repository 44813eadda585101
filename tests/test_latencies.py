"""Latency as a function of widths: tables, stairs, the fit to whole networks, and plans that meet milliseconds."""

import itertools
import json
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import secateur as sc
from secateur.costs import Dim, make_cost, marginals
from secateur.groups import couple
from secateur.latencies import Latencies, Whole, latencies_of, measuring, network_latency, predicted_ms, timers
from secateur.latencies.fits import fit_prices
from secateur.latencies.geometries import Geometry, placed_layers
from secateur.latencies.grids import grid, levels
from secateur.latencies.measuring import cut, with_batch
from secateur.latencies.staircases import LESS, group_steps, stairs, steps_of
from secateur.latencies.store import Setting, open_store
from secateur.latencies.tables import Layers, NetworkLatency, Table, curve_through
from secateur.latencies.timers import Sized, time_layers
from secateur.schedules import iterative
from secateur.timing import summary

X = torch.randn(2, 3, 12, 12)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 64, 3, padding=1),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.Conv2d(64, 64, 3, stride=2, padding="valid", groups=64),
        nn.ReLU(),
        nn.Conv2d(64, 48, 1, bias=False),
        nn.ReLU(),
        nn.Conv2d(48, 96, 3, padding="same", dilation=2, groups=4),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(96, 10),
    )


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def stair_ms(sized: Sized, step: int = 8) -> float:
    """A machine whose kernels compute ``step`` channels at a time."""
    geometry, into, out = sized
    wide = math.ceil(into / step) * math.ceil(out / step) * step**2
    kernel = math.prod(geometry.kernel)
    wide = math.ceil(out / step) * step if geometry.depthwise else wide // max(geometry.groups, 1)
    return 0.001 + 1e-6 * wide * kernel * math.prod(geometry.size)


@pytest.fixture
def machine(cache: Path, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Layers take what ``stair_ms`` says, and whole networks the sum of their layers twice. Returns the numbers of
    layers that were timed, and minus one for every whole network."""
    timed: list[int] = []

    def timer(layers: Sequence[Sized], batch: int, threads: int, rounds: int) -> list[list[float]]:
        timed.append(len(layers))
        return [[batch * stair_ms(layer)] * rounds for layer in layers]

    def take_turns(runs: Mapping[str, Any], **options: Any) -> dict[str, Any]:
        timed.extend([-1] * len(runs))
        return {name: summary([_whole_ms(run) for _ in range(3)]) for name, run in runs.items()}

    monkeypatch.setitem(timers.TIMERS, "torch", timer)
    monkeypatch.setattr(measuring, "take_turns", take_turns)
    return timed


def _whole_ms(run: Any) -> float:
    model = run.function
    batch = len(run.args[0])
    coupling = couple(sc.trace(model, run.args[0]))
    layers, _ = placed_layers(coupling)
    return batch * 2 * sum(stair_ms((layer.geometry, *layer.geometry.channels)) for layer in layers) + 0.05


# Layers and their widths -----------------------------------------------------------------------------------------


def test_geometries_are_what_the_modules_say() -> None:
    layers, others = placed_layers(couple(sc.trace(net(), X)))
    assert not others
    assert [layer.geometry for layer in layers] == [
        Geometry("conv", (3, 64), (12, 12), (3, 3), (1, 1), (1, 1), (1, 1)),
        Geometry("conv", (64, 64), (12, 12), (3, 3), (2, 2), (0, 0), (1, 1), groups=0),
        Geometry("conv", (64, 48), (5, 5), (1, 1), (1, 1), (0, 0), (1, 1)),
        Geometry("conv", (48, 96), (5, 5), (3, 3), (1, 1), (2, 2), (2, 2), groups=4),
        Geometry("linear", (96, 10), ()),
    ]
    assert [layer.geometry.family for layer in layers] == ["spatial", "depthwise", "1x1", "grouped spatial", "linear"]
    assert len({layer.geometry.text() for layer in layers}) == 5
    assert [layer.name for layer in layers] == ["0", "3", "5", "7", "10"]


def test_widths_are_those_of_the_network_that_apply_makes() -> None:
    graph = sc.trace(net(), X)
    coupling = couple(graph)
    draw = np.random.default_rng(0)
    for _ in range(3):
        ratios = {group.name: float(draw.uniform(0, 0.9)) for group in coupling.groups}
        plan = sc.plan(graph, ratios=ratios)
        keep = [len(plan.keep[group.name]) for group in coupling.groups]
        found = [(_width(each.into, keep), _width(each.out, keep)) for each in placed_layers(coupling)[0]]
        small = sc.layer_table(sc.apply(graph, plan), X)
        assert found == [(layer.in_channels, layer.out_channels) for layer in small]


def _width(dim: Dim, keep: Sequence[int]) -> float:
    return dim[0] + sum(count * keep[group] for group, count in dim[1].items())


def test_rows_of_a_linear_layer_and_products_without_a_table() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.out = nn.Linear(12, 36), nn.Linear(12, 12)
            self.up = nn.ConvTranspose1d(12, 6, 2, stride=2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k, v = self.qkv(x).chunk(3, -1)
            mixed = nn.functional.scaled_dot_product_attention(q, k, v, scale=1.0)
            return self.up(self.out(mixed).transpose(1, 2))

    layers, others = placed_layers(couple(sc.trace(Attention(), torch.randn(2, 7, 12))))
    assert [layer.geometry.size for layer in layers] == [(7,), (7,)]
    assert sorted({operation.kind for operation in others}) == ["conv", "matmul"]


def test_grid() -> None:
    layers, _ = placed_layers(couple(sc.trace(net(), X)))
    first, depthwise, pointwise, grouped, linear = layers
    steps = {"spatial": 8, "depthwise": 16, "1x1": 8, "grouped spatial": 1}
    assert [sized[1:] for sized in grid(first, steps)] == [(3, out) for out in (64, 48, 32, 16, 8)]
    assert [sized[1:] for sized in grid(depthwise, steps)] == [(n, n) for n in (64, 48, 32, 16)]
    assert len(grid(pointwise, steps)) == 5 * 5
    assert {into for _, into, _ in grid(grouped, steps)} == {48, 36, 24, 12, 8}  # multiples of its groups
    assert [sized[1:] for sized in grid(linear, steps)] == [(into, 10) for into in (96, 72, 48, 24, 12)]
    assert levels(10, 8) == [10, 8]
    assert levels(3, 16) == [3]


# Timing layers ---------------------------------------------------------------------------------------------------

ODD = [
    (Geometry("conv", (3, 8), (9, 7), (3, 3), (2, 1), (1, 1), (1, 1)), 3, 8),
    (Geometry("conv", (512, 512), (14, 14), (3, 3), (1, 1), (1, 1), (1, 1)), 512, 512),
    (Geometry("conv", (16, 16), (9, 9), (3, 3), (1, 1), (1, 1), (1, 1), groups=0), 12, 12),
    (Geometry("conv", (16, 32), (9, 9), (1, 1), (1, 1), (0, 0), (1, 1), groups=4), 12, 20),
    (Geometry("conv", (6, 5), (20,), (5,), (1,), (4,), (2,)), 6, 5),
    (Geometry("conv", (6, 5), (4, 5, 6), (3, 3, 3), (1, 1, 1), (1, 1, 1), (1, 1, 1)), 6, 5),
    (Geometry("linear", (64, 10), ()), 33, 10),
    (Geometry("linear", (64, 32), (7,)), 33, 31),
]


@pytest.mark.parametrize("engine", sorted(timers.TIMERS))
def test_every_layer_is_timed_and_none_for_another(engine: str) -> None:
    if engine in ("onnxruntime", "openvino"):
        pytest.importorskip(engine)
    found = time_layers(ODD, engine=engine, batch=2, rounds=3)
    assert len(found) == len(ODD)
    assert all(ms > 0 for place, ms in enumerate(found) if engine != "openvino" or place in (1,))
    assert max(found) == found[1]  # hundreds of times the work of any other


def test_layers_of_an_engine_that_does_not_tell() -> None:
    with pytest.raises(
        sc.BadRequest, match=r"timed one by one in engine 'inductor'.*\n  do: plan for the latency in one"
    ):
        time_layers(ODD, engine="inductor")


# Tables and fits -------------------------------------------------------------------------------------------------


def test_a_table_is_exact_where_time_is_a_product() -> None:
    def ms(into: float, out: float) -> float:
        return 0.5 + 0.01 * into + 0.02 * out + 0.003 * into * out

    table = Table.of({(i, o): ms(i, o) for i in (8, 32, 64) for o in (16, 128)})
    into, out = np.array([8.0, 20, 64, 4, 33]), np.array([16.0, 100, 128, 8, 17])
    np.testing.assert_allclose(table.at(into, out), [ms(i, o) for i, o in zip(into, out, strict=True)], rtol=1e-12)


def test_no_time_falls_as_a_width_grows() -> None:
    table = Table.of({(8, 8): 1.0, (8, 16): 3.0, (16, 8): 2.0, (16, 16): 2.5})
    assert table.ms.tolist() == [[1.0, 3.0], [2.0, 3.0]]
    assert table.at(np.array([1.0]), np.array([1.0]))[0] == 0.0  # not below it


def test_one_width_is_a_table_too() -> None:
    table = Table.of({(3, 8): 1.0, (3, 16): 2.0})
    np.testing.assert_allclose(table.at(np.array([3.0, 3]), np.array([12.0, 16])), [1.5, 2.0])


def test_marginals_are_differences() -> None:
    coupling = couple(sc.trace(net(), X))
    layers, _ = placed_layers(coupling)
    tables = [Table.of({sized[1:]: stair_ms(sized) for sized in _corners(layer.geometry)}) for layer in layers]
    curve = curve_through(np.array([0.5, 3.0]), np.array([0.4, 5.0]))
    cost = NetworkLatency(
        (Layers.of(layers, tables, 3), make_cost([(2.0, [(0.0, {1: 1.0})])])), np.array([1.5, 0.1]), *curve
    )
    keep, steps = np.array([40.0, 6, 20]), np.array([8.0, -6, 4])
    by_hand = []
    for group in range(3):
        less = keep.copy()
        less[group] -= steps[group]
        by_hand.append(float(cost.at(keep[None])[0] - cost.at(less[None])[0]))
    np.testing.assert_allclose(marginals(cost, keep, steps), by_hand, rtol=1e-9)
    assert cost.at(np.stack([keep, keep / 2])).shape == (2,)


def test_the_curve_rises_through_what_was_timed() -> None:
    fitted, timed = curve_through(np.array([4.0, 1.0, 2.0, 1.0]), np.array([8.0, 3.0, 2.5, 2.0]))
    assert (fitted.tolist(), timed.tolist()) == ([1.0, 2.0, 4.0], [2.0, 2.5, 8.0])
    cost = NetworkLatency((), np.zeros(0), fitted, timed)
    np.testing.assert_allclose(cost.corrected(np.array([0.0, 0.5, 1.5, 3, 4, 5])), [0, 1, 2.25, 5.25, 8, 10.75])
    assert curve_through(np.array([1.0, 2.0]), np.array([3.0, 2.0]))[1].tolist() == [3.0, 3.0]


def _corners(geometry: Geometry) -> list[Sized]:
    into, out = geometry.channels
    if geometry.depthwise:
        return [(geometry, into, o) for o in (out, out // 2)]
    return [(geometry, i, o) for i in (into, max(into // 2, 1)) for o in (out, out // 2)]


def test_the_fit_finds_what_the_times_were_made_of() -> None:
    draw = np.random.default_rng(0)
    seen = np.abs(draw.normal(size=(8, 5))) + np.array([10.0, 100, 1000, 0, 1])
    seen[:, 3], seen[:, 4] = 0, 1
    prices = np.array([1.1, 0.02, 0.003, 0.0, 0.5])
    found = fit_prices(seen, seen @ prices)
    assert (found >= 0).all()
    np.testing.assert_allclose(seen @ found, seen @ prices, rtol=5e-3)


def test_one_network_is_told_by_its_layers() -> None:
    found = fit_prices(np.array([[8.0, 1e6, 1e6, 0, 1]]), [10.0])
    assert 0.9 < found[0] < 1.3


def test_times_that_are_none() -> None:
    with pytest.raises(sc.BadRequest, match="must be positive numbers of milliseconds"):
        fit_prices(np.ones((2, 5)), [1.0, 0.0])


# Stairs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [1, 4, 8, 16])
def test_steps_are_found(step: int) -> None:
    geometries = [layer.geometry for layer in placed_layers(couple(sc.trace(net(), X)))[0]]
    times = {sized: stair_ms(sized, step) - 0.001 for geometry in geometries for sized in stairs(geometry)}
    assert steps_of(times) == {"spatial": step, "depthwise": step, "1x1": step}
    # what every call costs besides hides nothing, until it hides everything
    assert steps_of({sized: ms + max(times.values()) for sized, ms in times.items()})["spatial"] == step
    assert set(steps_of({sized: ms + 1000 for sized, ms in times.items()}).values()) == {1}


def test_layers_without_stairs() -> None:
    assert stairs(Geometry("linear", (512, 512), ())) == []
    assert stairs(Geometry("conv", (16, 16), (8, 8), (3, 3))) == []  # too narrow to tell
    assert [out for _, _, out in stairs(Geometry("conv", (3, 100), (8, 8), (3, 3)))] == [64 - less for less in LESS]


def test_narrow_groups_keep_two_widths_at_least() -> None:
    coupling = couple(sc.trace(net(), X))
    layers, _ = placed_layers(coupling)
    steps = {"spatial": 32, "1x1": 64, "grouped spatial": 4}
    assert [(group.channels, group.partitions) for group in coupling.groups] == [(64, 1), (12, 4), (24, 4)]
    assert group_steps(layers, steps, coupling.groups) == [32, 16, 4]


# What is kept ----------------------------------------------------------------------------------------------------


def test_measured_once(machine: list[int], cache: Path) -> None:
    coupling = couple(sc.trace(net(), X))
    told: list[tuple[int, int, str]] = []
    first = latencies_of(coupling, engine="torch", progress=lambda *step: told.append(step))
    assert told[-1] == (1, 1, "whole networks in torch")
    assert machine.count(-1) == len(first.whole) == 5
    assert first.whole[0].widths == {group.name: group.channels for group in coupling.groups}
    machine.clear()
    again = latencies_of(couple(sc.trace(net(), X)), engine="torch")
    assert machine == []
    assert again.points == first.points
    assert again.whole == first.whole
    latencies_of(coupling, engine="torch", batch=4)
    assert machine  # another setting
    assert len(list(cache.iterdir())) == 2


def test_networks_whose_tensors_have_the_same_shapes(machine: list[int], cache: Path) -> None:
    def digest_of(model: nn.Module, **options: Any) -> str:
        return latencies_of(couple(sc.trace(model, X), **options), engine="torch").network

    strided, smooth = net(), net()
    strided[0].stride, smooth[2] = (2, 2), nn.GELU()
    known = [digest_of(net()), digest_of(strided), digest_of(smooth), digest_of(net(), scatter=True)]
    assert len(set(known)) == 4
    assert digest_of(net()) == known[0]  # weights do not matter
    half = sc.plan(strided, X, budget=latency(0.7)).made_by["latency"]
    assert half["dense_ms"] < 0.7 * sc.plan(net(), X, budget=latency(0.7)).made_by["latency"]["dense_ms"]


def test_ways_of_coupling_have_latencies_of_their_own(machine: list[int]) -> None:
    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 64, 3), nn.Conv2d(32, 32, 3, padding=1), nn.Conv2d(64, 8, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            left, right = self.a(x).relu().chunk(2, 1)
            return self.c(torch.cat([self.b(left), right], 1)).mean((2, 3))

    graph = sc.trace(Halves(), X)
    plans = [sc.plan(graph, budget=latency(0.7), prefer=prefer) for prefer in ("channels", "module", "channels")]
    assert [len(plan.groups) for plan in plans] == [3, 2, 3]
    assert plans[0].keep == plans[2].keep


@pytest.mark.parametrize("engine", ["torch", "onnxruntime"])
def test_generators_of_chance_are_left_alone(engine: str, cache: Path) -> None:
    if engine == "onnxruntime":
        pytest.importorskip(engine)
    model = nn.Sequential(nn.Conv2d(3, 12, 3), nn.ReLU(), nn.Conv2d(12, 8, 1))
    before = torch.get_rng_state(), np.random.get_state()[1:3]  # type: ignore[index]
    sc.measure_latencies(model, X, engine=engine)
    after = torch.get_rng_state(), np.random.get_state()[1:3]  # type: ignore[index]
    assert torch.equal(before[0], after[0])
    assert (before[1][0] == after[1][0]).all()
    assert before[1][1] == after[1][1]


def test_settings_that_are_none(machine: list[int], cache: Path) -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.last = nn.Conv2d(3, 32, 3), nn.Linear(32, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(self.conv(x).relu().view(4, 32, 100).mean(2))

    with pytest.raises(sc.BadRequest, match="no residual rule 'scater'; did you mean 'scatter'"):
        sc.measure_latencies(net(), X, engine="torch", residual="scater")
    for options, match in (({"batch": 0}, "batch must be a whole"), ({"threads": "2"}, "threads must be a whole")):
        with pytest.raises(sc.BadRequest, match=match):
            sc.measure_latencies(net(), X, engine="torch", **options)  # type: ignore[arg-type]
    with pytest.raises(sc.BadRequest, match=r"on its example inputs alone.*not on a batch of 1\n  do: say batch=4"):
        sc.plan(Pair(), torch.cat([X, X]), budget=latency(1.0))
    assert machine == []


def test_interrupted_it_goes_on(machine: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    coupling = couple(sc.trace(net(), X))
    whole = len(timers_called(coupling, machine, cache=False))
    timer, calls = timers.TIMERS["torch"], itertools.count()

    def interrupted(*arguments: Any) -> list[list[float]]:
        if next(calls) == 7:
            raise KeyboardInterrupt
        return timer(*arguments)

    monkeypatch.setitem(timers.TIMERS, "torch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        latencies_of(coupling, engine="torch")
    monkeypatch.setitem(timers.TIMERS, "torch", timer)
    assert len(timers_called(coupling, machine, cache=True)) == whole - 7


def timers_called(coupling: Any, machine: list[int], *, cache: bool) -> list[int]:
    machine.clear()
    latencies_of(coupling, engine="torch", cache=cache)
    return [count for count in machine if count > 0]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"machine": "abacus"}, r"was measured with another machine: 'abacus'.*\n  do: delete the file"),
        ({"version": "0.1"}, r"another version: '0.1'"),
        ({"format": 0}, "holds no latencies of format 1"),
        ({"layers": {"conv": {"1x1": "fast"}}}, "damaged: not all times"),
        ({"networks": []}, "damaged: not all times"),
        ({"layers": {"conv": 3}}, "damaged: not all times"),
        ({"networks": {"abc": [{"ms": 1.0}]}}, "damaged: not all times"),
    ],
)
def test_a_cache_that_is_not_ours(cache: Path, change: dict[str, Any], match: str) -> None:
    store = open_store(Setting("torch", "2", 1, 1))
    store.layers = {"conv": {"1x1": 0.5}}
    store.keep()
    assert store.path is not None
    store.path.write_text(json.dumps({**json.loads(store.path.read_text()), **change}))
    with pytest.raises(sc.BadArtifact, match=match):
        open_store(Setting("torch", "2", 1, 1))


def test_a_cache_that_is_no_json(cache: Path) -> None:
    store = open_store(Setting("torch", "2", 1, 1))
    store.keep()
    assert store.path is not None
    store.path.write_text("{")
    with pytest.raises(sc.BadArtifact, match=r"cannot be read: .*\n  do: delete it, and measure again"):
        open_store(Setting("torch", "2", 1, 1))


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path / "file"))
    store = open_store(Setting("torch", "2", 1, 1))
    with pytest.warns(sc.SecateurWarning, match="cannot be kept in .*\n  do: set SECATEUR_CACHE"):
        store.keep()
    store.keep()  # told once


def test_json(machine: list[int]) -> None:
    found = latencies_of(couple(sc.trace(net(), X)), engine="torch")
    assert Latencies.from_json(found.to_json()) == found


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("{", "no JSON"),
        ("[]", "no latencies of format 1"),
        ('{"format": 1}', "damaged: engine: field required"),
    ],
)
def test_json_that_is_none(text: str, match: str) -> None:
    with pytest.raises(sc.BadArtifact, match=match):
        Latencies.from_json(text)


# Plans -----------------------------------------------------------------------------------------------------------


def latency(keep: float, **options: Any) -> sc.Budget:
    return sc.Budget(keep=keep, of="latency", engine="torch", **options)


@pytest.mark.parametrize("keep", [0.7, 0.4])
def test_a_plan_in_milliseconds(machine: list[int], keep: float) -> None:
    graph = sc.trace(net(), X)
    plan = sc.plan(graph, budget=latency(keep))
    told = plan.made_by["latency"]
    assert len(plan.keep["0"]) % 8 == 0  # the others are of grouped layers, which have no stairs
    assert 0.95 * keep * told["dense_ms"] <= told["measured_ms"] <= 1.005 * keep * told["dense_ms"]
    assert told["measured_ms"] == pytest.approx(told["predicted_ms"], rel=0.1)
    small, coupling = sc.apply(graph, plan), couple(graph)
    by_hand = cut(coupling, {name: len(kept) for name, kept in plan.keep.items()})
    assert [p.shape for p in small.parameters()] == [p.shape for p in by_hand.parameters()]
    machine.clear()
    assert sc.plan(graph, budget=latency(keep)).keep == plan.keep
    assert sc.plan(net(), X, budget=latency(keep)).made_by["latency"]["measured_ms"] == told["measured_ms"]
    assert machine == []  # all of it is known by now


def test_milliseconds_may_be_asked_for(machine: list[int]) -> None:
    graph = sc.trace(net(), X)
    dense = sc.plan(graph, budget=latency(1.0)).made_by["latency"]["dense_ms"]
    budget = sc.Budget(at_most=0.6 * dense, of="latency", engine="torch")
    assert sc.plan(graph, budget=budget).made_by["latency"]["measured_ms"] <= 0.603 * dense
    with pytest.raises(sc.Unreachable, match=r"has at most 0\.0001 milliseconds"):
        sc.plan(graph, budget=sc.Budget(at_most=1e-4, of="latency", engine="torch"))


def test_by_turns(machine: list[int]) -> None:
    graph = sc.trace(net(), X)
    dense = predicted_ms(couple(graph), sc.measure_latencies(graph, engine="torch"), {})
    seen: list[float] = []
    iterative(graph, steps=2, between=lambda small, step: seen.append(_ms_of(small)), budget=latency(0.5))
    assert 0.9 * 0.5**0.5 * dense <= seen[0] <= 1.005 * 0.5**0.5 * dense
    assert 0.9 * 0.5 * dense <= seen[1] <= 1.005 * 0.5 * dense


def test_latencies_are_not_for_schedules(machine: list[int]) -> None:
    graph = sc.trace(net(), X)
    found = sc.measure_latencies(graph, engine="torch")
    with pytest.raises(sc.BadRequest, match=r"networks on the way as well\n  do: leave latencies out"):
        iterative(graph, steps=2, between=lambda *_: None, budget=latency(0.5), latencies=found)  # type: ignore[call-arg]


def test_a_budget_that_is_missed_is_told(machine: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    graph = sc.trace(net(), X)
    sc.measure_latencies(graph, engine="torch")
    monkeypatch.setattr(measuring, "take_turns", lambda runs, **_: {name: summary([5.0]) for name in runs})
    with pytest.warns(sc.SecateurWarning, match=r"takes .* ms, and the budget is .* ms: of \d networks"):
        plan = sc.plan(graph, budget=latency(0.7))
    told = plan.made_by["latency"]
    assert told["measured_ms"] > 0.7 * told["dense_ms"]


def test_latencies_of_another_machine_are_taken_as_given(machine: list[int]) -> None:
    graph = sc.trace(net(), X)
    found = sc.measure_latencies(graph, engine="torch")
    machine.clear()
    plan = sc.plan(graph, budget=latency(0.5), latencies=found)
    assert machine == []
    assert "measured_ms" not in plan.made_by["latency"]
    assert plan.made_by["latency"]["machine"] == found.machine
    widths = {name: len(kept) for name, kept in plan.keep.items()}
    assert plan.made_by["latency"]["predicted_ms"] == pytest.approx(
        predicted_ms(couple(graph), found, widths), abs=1e-4
    )


def test_latencies_that_do_not_fit(machine: list[int]) -> None:
    graph = sc.trace(net(), X)
    found = sc.measure_latencies(graph, engine="torch")
    with pytest.raises(sc.BadRequest, match="one of threads=2, and the latencies are of threads=1"):
        sc.plan(graph, budget=latency(0.5, threads=2), latencies=found)
    other = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))
    with pytest.raises(sc.WrongModel, match=r"are of another network.*\n  do: measure them"):
        sc.plan(other, X, budget=latency(0.5), latencies=found)
    wider = net()
    wider[0], wider[1] = nn.Conv2d(3, 64, 5, padding=2), nn.BatchNorm2d(64)
    with pytest.raises(sc.WrongModel, match="are of another network"):
        network_latency(couple(sc.trace(wider, X)), found)


def test_an_optimistic_prediction_is_corrected(machine: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where whole networks once took other times than they take now, the plan is decided anew on what is timed now."""
    graph = sc.trace(net(), X)
    coupling = couple(graph)
    found = sc.measure_latencies(graph, engine="torch", cache=False)
    flat = [Whole(one.widths, (one.ms + found.whole[0].ms) / 2) for one in found.whole]
    store = open_store(Setting("torch", found.version, 1, 1))
    store.layers = {text: dict(own) for text, own in found.points.items()}
    store.networks = {found.network: [asdict(one) for one in flat]}
    store.keep()
    plan = sc.plan(graph, budget=latency(0.7))
    told = plan.made_by["latency"]
    real = _ms_of(cut(coupling, {name: len(kept) for name, kept in plan.keep.items()}))
    assert told["measured_ms"] == pytest.approx(real, rel=0.01)
    assert real == pytest.approx(0.7 * told["dense_ms"], rel=0.05)


def _ms_of(model: nn.Module) -> float:
    class Run:
        function, args = staticmethod(model), (X[:1],)

    run = Run()
    run.function = model  # type: ignore[method-assign]
    return _whole_ms(run)


def test_batches() -> None:
    graph = sc.trace(net(), X)
    assert with_batch(graph, 5)[0].shape[0] == 5
    assert torch.equal(with_batch(graph, 1)[0], X[:1])


@pytest.mark.parametrize(
    "engine",
    ["torch", *(pytest.param(name, marks=pytest.mark.slow) for name in ("channels_last", "onnxruntime", "openvino"))],
)
def test_real_engines(engine: str, cache: Path) -> None:
    if engine in ("onnxruntime", "openvino"):
        pytest.importorskip(engine)
    model = nn.Sequential(nn.Conv2d(3, 96, 5), nn.ReLU(), nn.Conv2d(96, 96, 3), nn.ReLU(), nn.Conv2d(96, 8, 1))
    graph = sc.trace(model, torch.randn(1, 3, 40, 40))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", sc.SecateurWarning)  # a machine that is busy may not meet it
        plan = sc.plan(graph, budget=sc.Budget(keep=0.7, of="latency", engine=engine, batch=2))
    told = plan.made_by["latency"]
    assert told["measured_ms"] > 0
    assert sc.count(sc.apply(graph, plan), X).macs < sc.count(model, X).macs
