"""Criteria see the weights that layers read: under a parametrisation as in the plain network of the same function."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import secateur as sc
from secateur.calibration import collect
from secateur.graph import trace
from secateur.groups import Coupling, couple
from secateur.layer_weights import as_read
from secateur.scores import score

D = torch.float64
X = torch.randn(4, 3, 8, 8, dtype=D, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([0, 1, 2, 3])
WEIGHTS = ("l1", "l2", "largest", "fpgm", "whc")


class Standardised(nn.Conv2d):
    """Weight standardisation."""

    def read(self) -> Tensor:
        w = self.weight
        return (w - w.mean((1, 2, 3), keepdim=True)) / w.std((1, 2, 3), keepdim=True)

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.read(), self.bias)


class Turned(Standardised):
    """The mask comes first, and the parameter has its inputs in front."""

    def __init__(self, *args: int, **kwargs: int) -> None:
        super().__init__(*args, **kwargs)
        self.turned = nn.Parameter(self.weight.detach().transpose(0, 1).clone())
        del self.weight
        self.register_buffer("mask", (torch.rand(8, 8, 1, 1) > 0.3).double())

    def read(self) -> Tensor:
        return self.mask * self.turned.transpose(0, 1)


class LowRank(Standardised):
    """What is trained is added to what is not."""

    def __init__(self, *args: int, **kwargs: int) -> None:
        super().__init__(*args, **kwargs)
        self.up, self.down = nn.Parameter(torch.randn(8, 2)), nn.Parameter(torch.randn(2, 8))

    def read(self) -> Tensor:
        return self.weight + (self.up @ self.down)[:, :, None, None]


def _normed(module: nn.Module) -> nn.Module:
    parametrizations.weight_norm(module)
    module.parametrizations.weight.original1.data.mul_(torch.rand(8, 1, 1, 1) * 10)  # any length is as good
    return module


def _normed_of_old(module: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        nn.utils.weight_norm(module)
    module.weight_v.data.mul_(torch.rand(8, 1, 1, 1) * 10)
    return module


def conv() -> nn.Conv2d:
    return nn.Conv2d(8, 8, 3, padding=1)


MADE: dict[str, Callable[[], nn.Module]] = {
    "weight_norm": lambda: _normed(conv()),
    "weight_norm_old": lambda: _normed_of_old(conv()),
    "standardised": lambda: Standardised(8, 8, 3, padding=1),
    "turned": lambda: Turned(8, 8, 3, padding=1),
    "low_rank": lambda: LowRank(8, 8, 3, padding=1),
}


class Net(nn.Module):
    """The layer in question lies in a stream, reads the same channels that it writes, and is called twice."""

    def __init__(self, middle: nn.Module, residual: bool) -> None:
        super().__init__()
        self.a, self.middle, self.b, self.fc = nn.Conv2d(3, 8, 3), middle, nn.Conv2d(8, 6, 3), nn.Linear(6, 5)
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))
        x = F.relu(x + self.middle(F.relu(x + self.middle(x)))) if self.residual else F.relu(self.middle(x))
        return self.fc(F.relu(self.b(x)).mean((2, 3)))


def pair(name: str, residual: bool = False) -> tuple[nn.Module, nn.Module]:
    """A network with a computed weight, and the plain one of the same function."""
    torch.manual_seed(0)
    net = Net(MADE[name](), residual).double().eval()
    with torch.no_grad():
        net(X)
        weight = net.middle.read() if isinstance(net.middle, Standardised) else net.middle.weight
        middle = conv().double()
        middle.weight.copy_(weight)
        middle.bias.copy_(net.middle.bias)
        plain = Net(middle, residual).double().eval()
        for layer in ("a", "b", "fc"):
            getattr(plain, layer).load_state_dict(getattr(net, layer).state_dict())
        torch.testing.assert_close(plain(X), net(X), rtol=1e-12, atol=1e-14)
    return net, plain


def scores(coupling: Coupling, criterion: str) -> dict[str, Tensor]:
    groups = [g for g in coupling.groups if any(s.tensor.split(".")[0] in ("a", "b", "fc") for s in g.slices)]
    kinds = {"taylor": ("products",), "mean_l1": ("maps",)}
    evidence = collect(coupling, groups, kinds.get(criterion, ()), [(X, Y)], loss=F.cross_entropy)
    shown, tensors = as_read(coupling, groups)
    found = score(shown, tensors, criterion, evidence=evidence)
    return {name.split(".")[0]: own for name, own in found.items()}


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("name", MADE)
def test_criteria_see_what_the_layer_reads(name: str, residual: bool) -> None:
    made, plain = pair(name, residual)
    before = {key: tensor.clone() for key, tensor in made.state_dict().items()}
    couplings = [couple(trace(net, X)) for net in (plain, made)]
    for criterion in (*WEIGHTS, "taylor", "mean_l1"):
        want, found = (scores(coupling, criterion) for coupling in couplings)
        assert found.keys() == want.keys()
        for group, own in want.items():
            torch.testing.assert_close(found[group], own, rtol=1e-8, atol=1e-14, msg=f"{criterion} {group}")
    assert all(torch.equal(before[key], tensor) for key, tensor in made.state_dict().items())
    assert all(p.grad is None for p in made.parameters())


def test_plans_are_those_of_the_plain_network() -> None:
    """Readers too: greedy selection leaves out input slices of the weight that the layer reads."""
    made, plain = pair("weight_norm")
    for options in ({"ratios": 0.5}, {"ratios": 0.5, "greedy": True}, {"budget": sc.Budget(keep=0.4)}):
        for criterion in ("l1", "fpgm"):
            found = sc.plan(made, X, criterion=criterion, **options)  # type: ignore[arg-type]
            assert found.keep == sc.plan(plain, X, criterion=criterion, **options).keep  # type: ignore[arg-type]
    taylor = {"criterion": "taylor", "data": [(X, Y)], "loss": F.cross_entropy, "ratios": 0.5}
    assert sc.plan(made, X, **taylor).keep == sc.plan(plain, X, **taylor).keep  # type: ignore[arg-type]


def test_a_sweep_knows_the_maps_of_a_computed_weight() -> None:
    made, plain = pair("weight_norm")
    curves = [sc.sensitivity(net, X, lambda m: float(m(X).sum()), ratios=(0.5,)).curves for net in (made, plain)]
    assert [c.stage for c in curves[0]] == [c.stage for c in curves[1]] == ["6x6", "6x6", "4x4"]
    for a, b in zip(*curves, strict=True):
        assert a.importance == pytest.approx(b.importance, rel=1e-9)


def test_a_weight_that_is_changed_in_place_on_the_way() -> None:
    class Clipped(Standardised):
        def read(self) -> Tensor:
            w = self.weight * 1
            w.clamp_(-0.05, 0.05)
            return w

    torch.manual_seed(0)
    net = Net(Clipped(8, 8, 3, padding=1), False).double().eval()
    coupling = couple(trace(copy.deepcopy(net), X))
    shown, tensors = as_read(coupling, coupling.groups)
    middle = next(g for g in shown if g.name == "middle")
    writer = next(s for s in middle.slices if s.role == "writes")
    torch.testing.assert_close(tensors[writer.tensor], net.middle.read().detach(), rtol=0, atol=0)


def test_networks_that_compute_no_weights_are_seen_as_they_are() -> None:
    _, plain = pair("weight_norm", residual=True)
    coupling = couple(trace(plain, X))
    groups, tensors = as_read(coupling, coupling.groups)
    assert groups == list(coupling.groups)
    assert tensors.keys() == coupling.graph.tensors.keys()
    assert all(tensors[name] is tensor for name, tensor in coupling.graph.tensors.items())
