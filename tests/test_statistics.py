"""Streamed statistics: affine operations as patches, moments as sums, batches led from stop to stop."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import secateur as sc
from law import relative_error
from secateur.graph import with_free_batch
from secateur.groups import couple
from secateur.interpreter import run_masked, walk
from secateur.patches import layout_of, matrix, outputs, patches, weight_from
from secateur.statistics import Moments, Stops, batches, check_repeatable, live_bytes, moment_bytes

D = torch.float64
OPERATIONS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "conv1d": (nn.Conv1d(4, 6, 5, stride=3, padding=2), (2, 4, 17)),
    "conv2d": (nn.Conv2d(6, 8, 3, stride=2, padding=1, groups=2, dilation=2), (3, 6, 11, 9)),
    "conv2d same": (nn.Conv2d(6, 4, (3, 2), padding="same"), (3, 6, 7, 7)),
    "conv2d uneven": (nn.Conv2d(3, 4, (1, 3), stride=(2, 1), padding=(0, 2)), (2, 3, 5, 6)),
    "conv3d": (nn.Conv3d(4, 6, 3, padding=1, groups=2), (2, 4, 5, 6, 7)),
    "linear": (nn.Linear(5, 7), (2, 3, 5)),
    "transposed 1d": (nn.ConvTranspose1d(4, 6, 4, stride=3, padding=2, dilation=2), (2, 4, 9)),
    "transposed 2d": (nn.ConvTranspose2d(6, 8, 3, stride=2, padding=1, output_padding=1, groups=2), (2, 6, 5, 6)),
    "transposed crop": (nn.ConvTranspose2d(4, 3, 2, stride=2, padding=2), (2, 4, 5, 5)),
    "transposed 3d": (nn.ConvTranspose3d(4, 6, 2, stride=2), (2, 4, 3, 4, 5)),
}


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("chunk", [1, 2**25])
def test_every_affine_operation_is_a_matrix_on_patches(name: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("secateur.patches.CHUNK", chunk)
    module, shape = OPERATIONS[name]
    module = module.double()
    weight, bias = (p.detach() for p in (module.weight, module.bias))  # type: ignore[union-attr]
    x = torch.randn(shape, dtype=D, generator=torch.Generator().manual_seed(0))
    call = next(n for n in sc.trace(module, x).captures[0].graph.nodes if n.op == "call_function")
    layout = layout_of(call, turned=False)
    y = module(x).detach().movedim(1 if layout.kernel else -1, -1).flatten(0, -2) - bias  # [N, all outputs]
    want = y.unflatten(1, (layout.groups, -1)).transpose(0, 1)
    whole = matrix(weight, layout)
    assert torch.equal(weight_from(whole, layout), weight)
    assert relative_error(outputs(x, whole, layout), want) < 1e-12
    found = torch.cat(list(patches(x, layout, D)), 1)
    assert relative_error(found @ whole.flatten(2).mT, want) < 1e-12


def test_patches_of_a_convolution_are_those_of_unfold() -> None:
    conv, x = nn.Conv2d(4, 2, 3, stride=2, padding=1, dilation=2), torch.randn(3, 4, 9, 8)
    call = next(n for n in sc.trace(conv, x).captures[0].graph.nodes if n.op == "call_function")
    found = torch.cat(list(patches(x, layout_of(call, turned=False), torch.float32)), 1)[0]
    want = F.unfold(x, 3, dilation=2, padding=1, stride=2).movedim(1, -1).flatten(0, 1)
    assert torch.equal(found, want)


def test_the_transpose_of_a_parameter() -> None:
    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(5, 7))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.w

    model, x = Turned(), torch.randn(4, 5)
    call = next(n for n in sc.trace(model, x).captures[0].graph.nodes if n.op == "call_function")
    layout = layout_of(call, turned=False)
    assert layout.turned
    assert relative_error(outputs(x, matrix(model.w, layout), layout)[0], model(x)) < 1e-6
    assert layout_of(call, turned=True).turned is False


def test_moments_are_sums_and_shared_ones_count_once() -> None:
    g = torch.Generator().manual_seed(0)
    p, r, s = (torch.randn(2, 9, k, dtype=D, generator=g) for k in (5, 3, 4))
    one = Moments.zeros((2, 3, 5), torch.device("cpu"), second=True, shared=None)
    two = Moments.zeros((2, 4, 5), torch.device("cpu"), second=True, shared=one)
    for part in (slice(0, 4), slice(4, 9)):
        one.add_(r[:, part], p[:, part], own=True)
        two.add_(s[:, part], p[:, part], own=False)
    assert float(one.count) == float(two.count) == 9
    for got, want in (
        (one.pp, torch.einsum("gni,gnj->gij", p, p)),
        (two.pp, torch.einsum("gni,gnj->gij", p, p)),
        (two.p, p.sum(1)),
        (one.rp, torch.einsum("gno,gni->goi", r, p)),
        (two.r, s.sum(1)),
    ):
        assert relative_error(got, want) < 1e-12
    owned = sum(t.numel() * 8 for t in one.tensors()) - 8
    assert moment_bytes((2, 3, 5), torch.device("cpu"), shared=False) == owned
    assert moment_bytes((2, 4, 5), torch.device("cpu"), shared=True) == 2 * 4 * 6 * 8
    means = Moments.zeros((2, 3, 5), torch.device("cpu"), second=False, shared=None)
    means.add_(r, None, own=False)
    assert [tuple(t.shape) for t in means.tensors()] == [(), (2, 3)]


# ------------------------------------------------------------------------------------------------- batches and stops


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(F.relu_(self.b(F.relu_(self.a(x)))).mean((2, 3)))


def setup() -> tuple[Net, Any, list[Tensor]]:
    torch.manual_seed(0)
    model = Net().double().eval()
    data = [torch.randn(n, 3, 8, 8, dtype=D) for n in (4, 1, 3)]
    coupling = couple(with_free_batch(sc.trace(model, data[0])))
    return model, coupling, data


@pytest.mark.parametrize("most", [0, 5_000, 2**30])
def test_stops_give_the_same_whatever_is_held(most: int) -> None:
    model, coupling, data = setup()
    graph = coupling.graph.captures[0].graph
    order = {node: i for i, node in enumerate(graph.nodes)}
    readers = [n for n in graph.nodes if n in coupling.passes[0].readers]
    keep = torch.ones(len(coupling.group_of), dtype=torch.bool)
    reads = 0

    def read() -> Iterator[list[Tensor]]:
        nonlocal reads
        reads += 1
        yield from batches(data, coupling.graph, torch.device("cpu"), D)

    stops = Stops(read, lambda x: (walk(coupling, keep, coupling.graph.tensors, x, 0, set(readers)),), order, most)
    wants = [
        data,
        [F.relu(model.a(x)) for x in data],
        [F.relu(model.b(F.relu(model.a(x)))).mean((2, 3)) for x in data],
    ]
    for node, want in [*zip(readers, wants, strict=True), (readers[2], wants[2])]:
        for (env,), x in zip(stops.at(node), want, strict=True):
            assert relative_error(env[node.args[0]], x) < 1e-12
            assert live_bytes(env) > 0
    assert reads == 1 if most == 2**30 else reads > 1
    for (env,), x in zip(stops.at(readers[1]), wants[1], strict=True):  # back again
        assert relative_error(env[readers[1].args[0]], x) < 1e-12
    stops.forget()
    assert len(list(stops.at(readers[0]))) == 3


def test_a_walk_sees_what_is_changed_on_the_way() -> None:
    _, coupling, data = setup()
    keep = torch.ones(len(coupling.group_of), dtype=torch.bool)
    state = {name: t.detach().clone() for name, t in coupling.graph.tensors.items()}
    added: dict[Any, Tensor] = {}
    nodes = [n for n in coupling.graph.captures[0].graph.nodes if n in coupling.passes[0].readers]
    walking = walk(coupling, keep, state, [data[0].clone()], 0, set(nodes), added)
    assert next(walking)[0] is nodes[0]
    state["c.weight"].zero_()
    added[nodes[2]] = torch.ones(4, dtype=D)
    next(walking)
    next(walking)
    with pytest.raises(StopIteration) as end:
        next(walking)
    want = run_masked(coupling, keep, state, [data[0].clone()])[0] + 1
    assert torch.equal(end.value.value[0], want)
    assert float(want.std(0).max()) == 0


@pytest.mark.parametrize(
    ("batch", "text"),
    [
        (torch.zeros(2, 3, 9, 8), "its shape is [2, 3, 9, 8], and the network was captured on [any, 3, 8, 8]"),
        ((torch.zeros(2, 3, 8), torch.zeros(2)), "does not fit the network"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.int64), "its dtype is torch.int64"),
        (torch.zeros(0, 3, 8, 8), "it is empty"),
        ("text", "batch 0 of the data does not fit"),
    ],
)
def test_batches_that_do_not_fit(batch: Any, text: str) -> None:
    _, coupling, _ = setup()
    with pytest.raises(sc.BadRequest, match="do: pass batches of inputs") as error:
        list(batches([batch], coupling.graph, torch.device("cpu"), D))
    assert text in str(error.value)


def test_batches_are_inputs_or_pairs_and_become_the_models_dtype() -> None:
    _, coupling, data = setup()
    x = data[0].float()
    for batch in (x, (x, torch.zeros(4)), [x, torch.zeros(4)], {"x": x}, (x,)):
        found = list(batches([batch], coupling.graph, torch.device("cpu"), D))
        assert torch.equal(found[0][0], x.double())
    (same,) = next(batches([data[0]], coupling.graph, torch.device("cpu"), None))
    assert same.data_ptr() != data[0].data_ptr(), "an in-place operation would reach the user's data"


def test_a_model_that_writes_down_its_batch_size() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(6, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x.reshape(4, 6))

    graph = with_free_batch(sc.trace(Fixed(), torch.zeros(4, 6)))
    assert len(next(batches([torch.zeros(4, 6)], graph, torch.device("cpu"), None))) == 1
    with pytest.raises(sc.BadRequest, match="it has 3 examples, and the model writes down a batch size of 4"):
        next(batches([torch.zeros(3, 6)], graph, torch.device("cpu"), None))


def test_data_that_can_be_read_once() -> None:
    with pytest.raises(sc.BadRequest, match=r"read only once \(generator\)"):
        check_repeatable((x for x in [1]), "compensation")
    with pytest.raises(sc.BadRequest, match="not int"):
        check_repeatable(3, "compensation")  # type: ignore[arg-type]
    state = torch.get_rng_state()
    check_repeatable(torch.utils.data.DataLoader([1, 2], shuffle=True), "compensation")  # type: ignore[arg-type]
    assert torch.equal(torch.get_rng_state(), state)


def test_a_walk_that_waits_holds_what_is_live_alone() -> None:
    _, coupling, data = setup()
    graph = coupling.graph.captures[0].graph
    second = [n for n in graph.nodes if n in coupling.passes[0].readers][1]
    keep = torch.ones(len(coupling.group_of), dtype=torch.bool)
    x = data[0].clone()
    gone = weakref.ref(x)
    waiting = walk(coupling, keep, coupling.graph.tensors, [x], 0, {second})
    del x
    with torch.no_grad():
        node, _ = next(waiting)
    assert node is second
    gc.collect()
    assert gone() is None
    waiting.close()
