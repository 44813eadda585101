"""Calibration: feature maps against forward hooks in plain torch."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hooked_maps import compare, describe_all, hooked, naive
from law import call
from measured_networks import LOSS, Chain, D, Stream, images, ready
from networks import NETWORKS, randomise
from secateur.calibration import collect
from secateur.core import Group
from secateur.errors import CannotPrune
from secateur.graph import trace
from secateur.groups import Coupling, couple

# ------------------------------------------------------------------------------------------------------------- maps


def check_network(name: str) -> None:
    build, inputs, _ = NETWORKS[name]
    torch.manual_seed(0)
    model = randomise(build().double(), 1).eval()
    x = torch.utils._pytree.tree_map(lambda t: t.double() if t.is_floating_point() else t, inputs())
    coupling = couple(trace(model, x))
    with hooked(model) as calls:
        call(model, x)
    want = {group: naive(calls, group, model) for group in coupling.groups}
    plain = [group for group in want if want[group] is not None]
    found = collect(coupling, plain, ("maps", "activations"), [x])
    for group in plain:
        compare(found[group.name]["maps"], want[group])
        assert len(found[group.name]["activations"].zeros) == group.channels
    for group in want.keys() - set(plain):  # made by bare parameters: measured or refused, nothing else
        why = refusal(coupling, group, x)
        assert not why or "has no feature maps" in why or "on one axis with the examples" in why


def refusal(coupling: Coupling, group: Group, x: Any) -> str:
    """Why nothing can be measured of a group; empty if it can be."""
    try:
        collect(coupling, [group], ("maps", "activations"), [x])
    except CannotPrune as error:
        return str(error)
    return ""


KINDS = """conv_grouped depthwise_multiplier_2 transposed_grouped flatten_linear cat residual_stage tied_weights
shared_module linear_on_last_axis squeeze_excite""".split()


@pytest.mark.parametrize("name", [n for n in NETWORKS if n in KINDS])
def test_maps_are_what_forward_hooks_see(name: str) -> None:
    check_network(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in NETWORKS if n not in KINDS])
def test_maps_are_what_forward_hooks_see_in_every_construct(name: str) -> None:
    check_network(name)


def test_batches_of_any_size_are_streamed() -> None:
    model, coupling = ready(Chain, 2, 3, 12, 12)
    data = images(4, 1, 3, side=12)
    found = collect(coupling, coupling.groups, ("maps", "activations"), data)
    again = collect(coupling, coupling.groups, ("maps", "activations"), [torch.cat(data)])
    for group in coupling.groups:
        with hooked(model) as calls:
            model(torch.cat(data))
        want = naive(calls, group, model)
        assert want is not None
        compare(found[group.name]["maps"], want)
        for field in ("maps", "activations"):
            one, other = (vars(run[group.name][field]) for run in (found, again))
            assert one.pop("samples") == other.pop("samples") == 8
            for key, value in one.items():
                assert (value.dtype, value.device.type, value.shape) == (D, "cpu", (group.channels, 1))
                torch.testing.assert_close(value, other[key], rtol=1e-12, atol=1e-13)


def test_chunks_do_not_change_what_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    _, coupling = ready(Chain, 2, 3, 12, 12)
    whole = collect(coupling, coupling.groups, ("maps",), images(5, side=12))
    monkeypatch.setattr("secateur.calibration.CHUNK", 1)
    single = collect(coupling, coupling.groups, ("maps",), images(5, side=12))
    for group in coupling.groups:
        torch.testing.assert_close(single[group.name]["maps"].std, whole[group.name]["maps"].std, rtol=1e-12, atol=0)


def test_activations_of_a_chain() -> None:
    """Behind the ReLU even if it works in place, before the pooling; where there is none, what is read."""
    model, coupling = ready(Chain, 2, 3, 12, 12)
    (x,) = images(5, side=12)
    found = {name: own["activations"] for name, own in collect(coupling, coupling.groups, ["activations"], [x]).items()}
    with torch.no_grad():
        a = F.relu(model.n(model.a(x)))
        b = F.relu(model.b(a))
        c = model.c(F.max_pool2d(b, 2).flatten(1))
    for name, want in (("a", a), ("b", b), ("c", c)):
        compare(found[name], describe_all(want))
    assert float(found["a"].zeros.mean()) > 0.2
    assert float(found["c"].zeros.sum()) == 0


def test_activations_of_a_stream_stand_behind_the_sums() -> None:
    model, coupling = ready(Stream)
    (x,) = images(3)
    found = collect(coupling, coupling.groups, ("maps", "activations"), [x])
    with torch.no_grad():
        sums = model.sums(F.relu(model.stem(x)))
        compare(found["p"]["activations"], torch.cat([describe_all(y) for y in sums], 2))
        compare(found["stem"]["activations"], describe_all(F.relu(model.stem(x))))
    assert found["p"]["maps"].mean.shape == (6, 3)


def test_a_bias_that_the_forward_adds_belongs_to_the_map() -> None:
    class Added(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.b, self.c = nn.Parameter(torch.randn(3, 5)), nn.Parameter(torch.randn(5)), nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(x @ self.w + self.b)

    torch.manual_seed(0)
    model, coupling = ready(Added, 2, 3)
    x = torch.randn(6, 3, dtype=D)
    found = collect(coupling, coupling.groups, ("maps",), [x])["w"]["maps"]
    compare(found, describe_all((x @ model.w + model.b).detach()))


def test_half_precision_is_measured_in_single() -> None:
    model, coupling = ready(Chain, 2, 3, 12, 12)
    x = images(3, side=12)[0].bfloat16()
    half = copy.deepcopy(model).bfloat16()
    found = collect(couple(trace(half, x)), coupling.groups, ("maps", "activations"), [x])
    want = collect(couple(trace(half.float(), x.float())), coupling.groups, ("maps", "activations"), [x.float()])
    for group in coupling.groups:
        torch.testing.assert_close(found[group.name]["maps"].l1, want[group.name]["maps"].l1, rtol=1e-9, atol=0)


class Inplace(nn.Module):
    """Writes into its own input."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.a(x.sub_(0.5)))).mean((2, 3))


def test_the_users_data_are_not_written_into() -> None:
    _, coupling = ready(Inplace)
    x = images(2)[0]
    before = x.clone()
    collect(coupling, coupling.groups, ("maps", "products"), [(x, torch.zeros(2))], loss=LOSS)
    assert torch.equal(x, before)
