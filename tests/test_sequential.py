"""Selection on statistics that are measured anew for every group, against networks that are pruned by hand."""

from __future__ import annotations

import copy
import os
import random
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import secateur as sc
from law import assert_law, fresh, to_double
from measured_networks import Chain, Stream, images, ready
from networks import NETWORKS, randomise
from secateur import sequential
from secateur.criteria import thinet_with
from secateur.criteria.outputs import pooled
from secateur.generators import kept_randomness, seed_all
from secateur.groups import Coupling, couple
from secateur.processes import part
from secateur.selection import forward_order
from secateur.sequential import front_to_back_on_data
from turns_by_hand import Keep, pursued_by_loops, removed_by_loops, rows_of

D = torch.float64
HERE = Path(__file__).parent


def conv(cin: int, cout: int, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(cin, cout, 3, padding=1, **options)


class Concatenated(nn.Module):
    """Two branches read together, one of them twice; a grouped convolution, and a linear layer behind a flattening."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = conv(3, 6), conv(3, 5), conv(16, 8, stride=2)
        self.d, self.head = conv(8, 8, groups=2), nn.Linear(8 * 16, 3)

    def forward(self, x: Tensor) -> Tensor:
        a, b = F.relu(self.a(x)), F.gelu(self.b(x))
        return self.head(F.relu(self.d(F.relu(self.c(torch.cat([b, a, b], 1))))).flatten(1))


CASES: list[tuple[type[nn.Module], dict[str, int], tuple[int, ...]]] = [
    (Chain, {"a": 3, "b": 2, "c": 5}, (2, 3, 12, 12)),
    (Stream, {"stem": 3, "p": 3, "a": 2, "c": 2}, (2, 3, 8, 8)),
    (Concatenated, {"a": 3, "b": 3, "c": 2, "d": 2}, (2, 3, 8, 8)),
]


def turns(
    net: nn.Module, coupling: Coupling, widths: Mapping[str, int], data: list[Tensor], order: str = "removal"
) -> Keep:
    """Every group in ``widths``, which names them in the order of the forward pass, on what is left of those before."""
    groups = {group.name: group for group in coupling.groups}
    keep: Keep = {}
    for name, width in widths.items():
        parts, target = rows_of(net, groups, name, keep, data)
        if order == "removal":
            gone = removed_by_loops(parts, target, groups[name].channels - width)
            keep[name] = tuple(c for c in range(groups[name].channels) if c not in gone)
        else:
            keep[name] = tuple(sorted(pursued_by_loops(parts, target, width)))
    return keep


def only(plan: sc.Plan, names: Any) -> Keep:
    return {name: plan.keep[name] for name in names}


@pytest.mark.parametrize("case", range(len(CASES)))
@pytest.mark.parametrize("order", ["removal", "pursuit"])
def test_every_group_is_chosen_on_what_is_left_of_the_ones_before(case: int, order: Any) -> None:
    build, ratios, shape = CASES[case]
    net, coupling = ready(build, *shape)
    data = images(3, 2, side=shape[2])
    criterion = thinet_with(order=order)
    found = sc.plan(coupling.graph, criterion=criterion, ratios=ratios, data=data, greedy=True)
    assert only(found, ratios) == turns(net, coupling, ratios, data, order)
    alone = sc.plan(coupling.graph, criterion=criterion, ratios=ratios, data=data)
    assert found.keep != alone.keep, "the network does not tell turns from the dense network's statistics"
    assert found.keep["a"] == alone.keep["a"] or case == 1  # nothing is gone yet: b is read beside it, and whole
    if order == "removal":
        named = sc.plan(coupling.graph, criterion="thinet_sequential", ratios=ratios, data=data)
        assert named.keep == found.keep
    assert_law(coupling.graph, torch.randn(shape, dtype=D, generator=torch.Generator().manual_seed(1)), found)


class Shown:
    """``thinet``, and what it was shown last of each group."""

    reads = ("outputs",)

    def __init__(self) -> None:
        self.seen: dict[str, sc.core.OutputMoments] = {}

    def __call__(self, view: sc.GroupView, /) -> Tensor:
        assert view.outputs is not None
        self.seen[view.name] = view.outputs
        return sc.CRITERIA["thinet"](view)


def shown(coupling: Coupling, ratios: Any, data: Any) -> tuple[sc.Plan, dict[str, sc.core.OutputMoments]]:
    criterion = Shown()
    return sc.plan(coupling.graph, criterion=criterion, ratios=ratios, data=data, greedy=True), criterion.seen


@pytest.mark.parametrize("case", range(len(CASES)))
def test_what_is_measured_is_that_of_two_networks(case: int) -> None:
    """The pruned one's parts, without the filters that are gone themselves, against the dense one's outputs."""
    build, ratios, shape = CASES[case]
    net, coupling = ready(build, *shape)
    assert [name for name in forward_order(coupling) if name in ratios] == list(ratios)
    data = images(3, 2, side=shape[2])
    plan, seen = shown(coupling, ratios, data)
    groups = {group.name: group for group in coupling.groups}
    for at, name in enumerate(ratios):
        parts, target = rows_of(net, groups, name, only(plan, list(ratios)[:at]), data)
        gram, slope = pooled(seen[name])
        torch.testing.assert_close(gram, parts.mT @ parts, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(slope, parts.mT @ target, rtol=1e-9, atol=1e-12)
        assert int(seen[name].samples.sum()) == len(target)


@pytest.mark.parametrize("build", [build for build, _, _ in CASES])
def test_sums_of_a_network_in_float32_are_those_of_float64(build: type[nn.Module]) -> None:
    """Where nothing is gone yet, the target is the sum of the parts, to the last digits."""
    _, coupling = ready(build, *(next(shape for b, _, shape in CASES if b is build)))
    net = copy.deepcopy(coupling.graph.model).float()
    (x,) = images(5, side=12 if build is Chain else 8)
    _, seen = shown(couple(sc.trace(net, x[:2].float())), 0.5, [x.float()])
    first = seen[next(iter(seen))]
    torch.testing.assert_close(first.target, first.gram.sum(2), rtol=1e-12, atol=1e-12 * float(first.gram.abs().max()))
    torch.testing.assert_close(first.goal, first.gram.sum((1, 2)), rtol=1e-12, atol=0)
    assert all(own.gram.dtype == own.target.dtype == D for own in seen.values())


def test_samples_are_drawn_anew_too_and_all_of_them_are_the_exact_ones() -> None:
    """With one location and one filter to draw from, the samples are the outputs."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 12), nn.ReLU(), nn.Linear(12, 9), nn.Tanh(), nn.Linear(9, 1)).double().eval()
    data = [torch.randn(40, 5, dtype=D)]
    graph = sc.trace(net, data[0])
    ratios = {"2": 4}
    drawn = thinet_with(statistics="samples", locations=1)
    found = [sc.plan(graph, criterion=c, ratios=ratios, data=data, greedy=True) for c in (drawn, thinet_with())]
    assert found[0].keep == found[1].keep
    both = {"0": 5, "2": 4}
    one, other = (
        sc.plan(graph, criterion=thinet_with(statistics="samples"), ratios=both, data=data, greedy=True, seed=seed)
        for seed in (0, 1)
    )
    again = sc.plan(graph, criterion=thinet_with(statistics="samples"), ratios=both, data=data, greedy=True, seed=0)
    assert one.keep == again.keep
    assert [len(kept) for kept in one.keep.values()] == [len(kept) for kept in other.keep.values()]


class Drawing:
    """Batches that are drawn anew whenever they are read, by every generator there is."""

    def __iter__(self) -> Iterator[Tensor]:
        for count in (3, 2):
            yield torch.randn(count, 3, 12, 12, dtype=D) * (0.5 + random.random()) + float(np.random.rand())


def test_data_that_draw_are_the_same_whenever_they_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """For every group, and of the dense network before: what is held between groups makes no difference."""
    _, coupling = ready(Chain, 2, 3, 12, 12)
    with kept_randomness(torch.device("cpu")):
        seed_all(0, 0)
        drawn = list(Drawing())
    found = []
    for data, limit in ((drawn, 2**30), (Drawing(), 2**30), (Drawing(), 0)):
        monkeypatch.setattr(sequential, "MOST", limit)
        torch.manual_seed(len(found))
        found.append(shown(coupling, {"a": 3, "b": 2, "c": 4}, data))
    for plan, seen in found[1:]:
        assert plan.keep == found[0][0].keep
        for name, own in seen.items():
            torch.testing.assert_close(own.gram, found[0][1][name].gram, rtol=1e-12, atol=0)
            torch.testing.assert_close(own.goal, found[0][1][name].goal, rtol=1e-12, atol=0)


@pytest.mark.parametrize("case", range(len(CASES)))
@pytest.mark.parametrize("most", [0, 40_000])
def test_what_memory_is_spent_makes_no_difference(case: int, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    build, ratios, shape = CASES[case]
    _, coupling = ready(build, *shape)
    data = images(3, 2, 1, side=shape[2])
    plans = []
    for limit in (2**30, most):
        monkeypatch.setattr(sequential, "MOST", limit)
        plans.append(sc.plan(coupling.graph, criterion="thinet_sequential", ratios=ratios, data=data))
    assert plans[0].keep == plans[1].keep


class Counted:
    """Batches that count how often they are read."""

    def __init__(self, data: list[Tensor]) -> None:
        self.data, self.reads = data, 0

    def __iter__(self) -> Iterator[Tensor]:
        self.reads += 1
        yield from self.data


def test_a_chain_is_run_once() -> None:
    """The walks go on from where they stand; ratios need no statistics of the dense network beforehand."""
    _, coupling = ready(Chain, 2, 3, 12, 12)
    data, told = Counted(images(3, 2, side=12)), []
    ratios = {"a": 3, "b": 2, "c": 4}
    sc.plan(coupling.graph, criterion="thinet_sequential", ratios=ratios, data=data)
    assert data.reads == 1
    groups = {group.name: group for group in coupling.groups}
    front_to_back_on_data(coupling, groups, ratios, "thinet", data, progress=lambda *at: told.append(at))
    assert told == [(1, 3), (2, 3), (3, 3)]
    sc.plan(coupling.graph, criterion="thinet_sequential", budget=sc.Budget(keep=0.6), data=data)
    assert data.reads == 4  # and once more to meet a budget


def test_how_batches_are_cut_makes_no_difference() -> None:
    _, coupling = ready(Stream, 2, 3, 8, 8)
    whole = images(6)[0]
    for criterion in ("thinet_sequential", thinet_with(statistics="samples")):
        plans = [
            sc.plan(coupling.graph, criterion=criterion, ratios=0.5, data=list(whole.split(n)), greedy=True)
            for n in (6, 4, 1)
        ]
        assert plans[0].keep == plans[1].keep == plans[2].keep


def test_a_criterion_that_looks_at_more_sees_that_of_the_dense_network() -> None:
    """Maps and filters beside the outputs: the filters without what is gone, the maps as they were."""
    _, coupling = ready(Chain, 2, 3, 12, 12)
    data, seen = images(3, side=12), {}

    def mixed(view: sc.GroupView, /) -> Tensor:
        assert view.maps is not None
        assert view.outputs is not None
        seen[view.name] = view
        return sc.CRITERIA["thinet"](view)

    mixed.reads = ("filters", "maps", "outputs")  # type: ignore[attr-defined]
    ratios = {"a": 3, "b": 2}
    plan = sc.plan(coupling.graph, criterion=mixed, ratios=ratios, data=data, greedy=True)
    named = sc.plan(coupling.graph, criterion="thinet_sequential", ratios=ratios, data=data)
    assert plan.keep == named.keep
    greedy = dict(seen)
    sc.plan(coupling.graph, criterion=mixed, ratios=ratios, data=data)
    assert torch.equal(greedy["b"].maps.mean, seen["b"].maps.mean)
    gone = [c for c in range(6) if c not in plan.keep["a"]]
    filters = greedy["b"].filters.reshape(4, 6, 9)
    assert not filters[:, gone].any()
    assert bool(filters[:, list(plan.keep["a"])].any())
    assert not torch.equal(greedy["b"].outputs.gram, seen["b"].outputs.gram)


def test_residual_rules_and_exclusions_hold() -> None:
    _, coupling = ready(Stream, 2, 3, 8, 8)
    data = images(4)
    streams = {"p"}
    for residual, whole in (("inner", streams), ("projection", set()), ("coupled", set())):
        plan = sc.plan(
            coupling.graph, criterion="thinet_sequential", ratios=0.5, data=data, exclude="c", residual=residual
        )
        cut = {g.name for g in plan.groups if len(plan.keep[g.name]) < g.channels}
        assert cut == {"stem", "p", "a", "c"} - whole - {"c"}


def test_the_users_network_and_generators_are_left_alone() -> None:
    net, coupling = ready(Stream, 2, 3, 8, 8)
    before = {name: t.clone() for name, t in net.state_dict().items()}
    data = images(4)
    kept = [t.clone() for t in data]
    torch.manual_seed(3)
    sc.plan(coupling.graph, criterion="thinet_sequential", ratios=0.5, data=data)
    drawn = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.rand(1))
    assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())
    assert all(torch.equal(a, b) for a, b in zip(data, kept, strict=True))


@pytest.mark.parametrize(
    ("data", "error", "text"),
    [
        ([], sc.BadRequest, "data has no batches"),
        (iter([torch.zeros(2, 3, 8, 8)]), sc.BadRequest, "data can be read only once"),
        ([torch.zeros(2, 3, 9, 8)], sc.BadRequest, "batch 0 of the data does not fit the network: its shape is"),
        ([torch.full((2, 3, 8, 8), torch.inf)], sc.BadRequest, "are not finite .* on the calibration data"),
        (None, sc.BadRequest, r"criterion 'thinet_sequential' looks at outputs\n  do: give data="),
    ],
)
def test_bad_data_are_refused(data: Any, error: type[Exception], text: str) -> None:
    _, coupling = ready(Stream, 2, 3, 8, 8)
    with pytest.raises(error, match=text):
        sc.plan(coupling.graph, criterion="thinet_sequential", ratios=0.5, data=data)


NORMED = """group_norm layer_norm instance_norm cat residual_stage shared_module tied_weights conv_grouped
depthwise_multiplier_2 transposed_grouped squeeze_excite""".split()


@pytest.mark.parametrize("name", [n for n in NETWORKS if n in NORMED])
def test_walks_that_go_on_find_what_walks_from_the_start_do(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms over channels, streams and shared layers: where what was decided matters to what was already run."""
    build, inputs, _ = NETWORKS[name]
    torch.manual_seed(0)
    model = randomise(build().double(), 1).eval()
    x = to_double(inputs())
    coupling = couple(sc.trace(model, x))
    data = [x, fresh(x, 2, 1)]
    plans = []
    for limit in (2**30, 0):
        monkeypatch.setattr(sequential, "MOST", limit)
        plans.append(sc.plan(coupling.graph, criterion="thinet_sequential", ratios=0.5, data=data))
    assert plans[0].keep == plans[1].keep
    assert_law(coupling.graph, x, plans[0])


# --------------------------------------------------------------------------------------------------------- processes


def measured(*, parts: bool) -> dict[str, Tensor]:
    """What every group keeps and was shown, of every network, as one flat dict; ``parts``: on this process's share of
    the batches, of which the last network has but one for all."""
    flat: dict[str, Tensor] = {}
    for (build, ratios, shape), sizes in zip(CASES, ((4, 1, 3, 2, 5), (3, 2), (5,)), strict=True):
        _, coupling = ready(build, *shape)
        data = images(*sizes, side=shape[2])
        plan, seen = shown(coupling, ratios, data[part(len(data))] if parts else data)
        for name, own in seen.items():
            flat[f"{build.__name__} {name} keep"] = torch.tensor(plan.keep[name])
            for field in ("gram", "target", "goal", "energy", "samples"):
                flat[f"{build.__name__} {name} {field}"] = getattr(own, field)
    return flat


def test_two_processes_choose_what_one_chooses(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", __file__]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{HERE.parent / 'src'}:{HERE}"}
    told = subprocess.run(
        [*command, str(tmp_path)], check=False, env=environment, capture_output=True, text=True, timeout=300
    )
    assert told.returncode == 0, told.stderr
    want = measured(parts=False)
    for process in (0, 1):
        theirs = load_file(tmp_path / f"{process}.safetensors")
        assert theirs.keys() == want.keys()
        for name, tensor in want.items():
            torch.testing.assert_close(theirs[name], tensor, rtol=1e-9, atol=1e-9 * float(tensor.abs().max()))
    assert "does not fit" in (tmp_path / "own.txt").read_text()
    assert "another process failed" in (tmp_path / "other.txt").read_text()


def _in_process(folder: Path) -> None:
    torch.distributed.init_process_group("gloo")
    number = torch.distributed.get_rank()
    found = measured(parts=True)
    save_file({n: t.contiguous() for n, t in found.items()}, str(folder / f"{number}.safetensors"))
    _, coupling = ready(Stream, 2, 3, 8, 8)
    try:
        shown(coupling, 0.5, images(2) if number else [torch.zeros(1, 2)])
    except sc.BadRequest as error:
        (folder / ("other.txt" if number else "own.txt")).write_text(str(error))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    _in_process(Path(sys.argv[1]))
