"""The networks of a sweep: what is done to one touches no other, and what is held is never what should be computed."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import secateur as sc
from secateur.groups import couple, freed
from secateur.sensitivities import parts, programs, suffix
from secateur.zoo import names
from test_sensitivity import NETS, RATIOS, images, naive, net, outputs, scores

DATA = images()
Score = Callable[[nn.Module], float]


def same(evaluate: Score, model: nn.Module | None = None, **options: Any) -> sc.Sensitivity:
    """The scores of a sweep are those of masked networks, each of which is a new one."""
    model = net("residual") if model is None else model
    found = sc.sensitivity(model, DATA[0][0][:1], evaluate, ratios=RATIOS, **options)
    assert scores(found) == naive(model, found, evaluate)
    return found


# ------------------------------------------------------------------------------------- what evaluate does to a network


def halved(network: nn.Module) -> float:
    for parameter in network.parameters():
        parameter.data.mul_(0.5)
    return outputs(network, DATA)


def written_by_numpy(network: nn.Module) -> float:
    first = outputs(network, DATA)
    for parameter in network.parameters():
        parameter.detach().numpy()[...] *= 1.05
    assert outputs(network, DATA) != first  # it is what the weights now say
    return outputs(network, DATA)


def hooked(network: nn.Module) -> float:
    network.register_forward_hook(lambda module, inputs, output: output * 2)
    return outputs(network, DATA)


def replaced(network: nn.Module) -> float:
    forward = network.forward
    network.forward = lambda *inputs: forward(*inputs) * 2  # type: ignore[method-assign]
    return outputs(network, DATA)


def gradients(network: nn.Module) -> float:
    with torch.enable_grad():
        network(DATA[0][0]).square().sum().backward()
    found = [p.grad for p in network.parameters() if p.grad is not None]
    assert found
    return float(sum(grad.double().norm() for grad in found))


def other_layout(network: nn.Module) -> float:
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return outputs(network, [(x.to(memory_format=torch.channels_last), y) for x, y in DATA])


@pytest.mark.parametrize("evaluate", [halved, written_by_numpy, hooked, replaced, gradients, other_layout])
def test_what_is_done_to_one_network_is_not_done_to_the_next(evaluate: Score) -> None:
    same(evaluate, net("chain"))


def test_networks_that_are_kept_still_compute_what_they_did() -> None:
    kept: list[nn.Module] = []

    def evaluate(network: nn.Module) -> float:
        kept.append(network)
        return outputs(network, DATA)

    found = sc.sensitivity(net("residual"), DATA[0][0][:1], evaluate, ratios=RATIOS)
    values = [outputs(network, DATA) for network in kept]
    assert sorted(values) == sorted([found.dense, *(score for row in scores(found) for score in row)])
    assert len({id(parameter) for network in kept for parameter in network.parameters()}) == len(kept) * len(
        list(kept[0].parameters())
    )


def test_what_is_held_lies_in_nothing_that_evaluate_has_in_hand() -> None:
    """A slice of a parameter is live in front of the last reader when the network has been written into."""

    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.fc = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 3), nn.Linear(6, 5)
            self.table = nn.Parameter(torch.randn(2, 5))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            row = self.table[0]
            return self.fc(F.relu(self.two(F.relu(self.one(x)))).amax((2, 3))) + row

    def evaluate(network: nn.Module) -> float:
        found = outputs(network, DATA)
        for parameter in network.parameters():
            parameter.data.zero_()
        return found

    torch.manual_seed(0)
    same(evaluate, Positions().eval())


def test_the_same_values_in_another_layout_are_another_batch() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 24, 3), nn.ReLU(), nn.Conv2d(24, 8, 3), nn.Flatten(), nn.Linear(128, 5)).eval()
    plain = DATA[0][0]
    last = plain.contiguous(memory_format=torch.channels_last)
    gaps = torch.cat([plain, plain], 1)[:, ::2]

    def evaluate(network: nn.Module) -> float:
        found = [network(x).double() for x in (plain, last, gaps)]
        return float(sum((i + 1) * (x * torch.arange(1, 6)).sum() for i, x in enumerate(found)))

    assert suffix._context([plain]) != suffix._context([last])
    same(evaluate, model)


def test_the_callers_randomness_is_left_alone() -> None:
    inputs, targets = (torch.cat(part) for part in zip(*DATA, strict=True))
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(inputs, targets), batch_size=16)
    model = net("residual")
    torch.manual_seed(5)
    np.random.seed(5)
    before, numbers = torch.get_rng_state(), np.random.get_state()[1]
    sc.sensitivity(model, inputs[:1], loader, ratios=(0.5,))
    assert torch.equal(torch.get_rng_state(), before)
    assert np.array_equal(np.random.get_state()[1], numbers)


# --------------------------------------------------------------------------------------------------- batches in parts


class Loud(nn.Module):
    """Examples have to do with each other only where one of them is loud."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.fc = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 3), nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.one(x))
        x = x / x.amax().clamp(min=3.0)
        return self.fc(F.relu(self.two(x)).mean((2, 3)))


def test_a_batch_that_shows_late_that_examples_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suffix, "PART_BYTES", 1)
    torch.manual_seed(0)
    model, quiet = Loud().eval(), DATA[0][0] * 0.1
    loud = DATA[0][0] * torch.linspace(0.5, 4, 24).view(-1, 1, 1, 1)
    same(lambda network: outputs(network, [(quiet, 0), (loud, 0)]), model)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("chain", True), ("residual", True), ("concat", True), ("attention", True), ("mixed", False)],
)
def test_which_networks_treat_examples_apart(name: str, expected: bool) -> None:
    assert set(NETS) == {"chain", "residual", "concat", "attention", "mixed"}
    assert apart(net(name)) is expected


def apart(model: nn.Module, shape: tuple[int, ...] = (1, 3, 8, 8)) -> bool:
    return parts.treats_examples_apart(freed(couple(sc.trace(model, torch.randn(shape)))).graph.captures[0])


@pytest.mark.parametrize("name", ["zoo:resnet56", "zoo:vgg16_cifar"])
def test_the_papers_networks_treat_examples_apart(name: str) -> None:
    torch.manual_seed(0)
    assert apart(names.build(name).eval(), (1, 3, 32, 32))


MIXING: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "loudest": lambda x: x / x.amax(),
    "mean": lambda x: x - x.mean(0, keepdim=True),
    "cumsum": lambda x: x.cumsum(0),
    "sorted": lambda x: x.sort(0).values,
    "flipped": lambda x: x.flip(0),
    "softmax": lambda x: x.softmax(0),
    "count": lambda x: x / x.shape[0],
    "numbers": lambda x: x + torch.arange(x.shape[0])[:, None],
    "first": lambda x: x + x[:1],
    "gram": lambda x: (x @ x.T) @ x,
    "reordered": lambda x: x.T.reshape(x.shape),
    "batch norm": lambda x: F.batch_norm(x, None, None, training=True),
    "attention": lambda x: F.scaled_dot_product_attention(x[None], x[None], x[None])[0],
    "rolled": lambda x: x.roll(1, 0),
}


@pytest.mark.parametrize("name", MIXING)
def test_what_looks_from_example_to_example(name: str) -> None:
    class Net(nn.Module):
        def __init__(self, mix: Callable[[torch.Tensor], torch.Tensor]) -> None:
            super().__init__()
            self.one, self.two, self.mix = nn.Linear(6, 6), nn.Linear(6, 5), mix

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.two(self.mix(F.relu(self.one(x))))

    assert apart(Net(lambda x: x.softmax(1) * 2), (3, 6))
    assert not apart(Net(MIXING[name]), (3, 6))


# -------------------------------------------------------------------------------------------- infinite, not a number


@pytest.mark.parametrize(
    "swallow",
    [
        lambda y: y.nan_to_num(0.0),
        lambda y: torch.where(y > 0, y, torch.zeros_like(y)),
        lambda y: F.one_hot(y.argmax(1), 5).float(),
        lambda y: (y > 0).float(),
        lambda y: y.masked_fill(y.isnan(), 1.0),
        lambda y: y.topk(2, 1).indices.float() @ torch.ones(2, 5),
    ],
    ids=["nan_to_num", "where", "argmax", "greater", "masked_fill", "topk"],
)
def test_infinite_activations_behind_which_nan_gets_lost(swallow: Callable[[torch.Tensor], torch.Tensor]) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 5, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return swallow(self.two(F.relu(self.one(x)).exp()).mean((2, 3)))

    torch.manual_seed(0)
    model = Net().eval()
    with torch.no_grad():
        model.one.weight[0] *= 1e-3  # the smallest filter, which goes first
        model.one.bias[0] = 200.0  # type: ignore[index]
    same(lambda network: float(network(DATA[0][0]).nan_to_num(9.0, 1e3, -1e3).double().sum()), model, groups="one")


CARRYING: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "relu": F.relu,
    "leaky_relu": F.leaky_relu,
    "hardtanh": F.hardtanh,
    "hardswish": F.hardswish,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "tanh": torch.tanh,
    "gelu": F.gelu,
    "elu": F.elu,
    "add": lambda x: x + torch.ones_like(x),
    "sub": lambda x: 1 - x,
    "mul": lambda x: x * torch.zeros_like(x),
    "mean": lambda x: x.mean((2, 3), keepdim=True),
    "sum": lambda x: x.sum((2, 3), keepdim=True),
    "amax": lambda x: x.amax((2, 3), keepdim=True),
    "max_pool2d": lambda x: F.max_pool2d(x, 3, 1, 1),
    "avg_pool2d": lambda x: F.avg_pool2d(x, 3, 1, 1),
    "adaptive_avg_pool2d": lambda x: F.adaptive_avg_pool2d(x, 1),
    "max_pool1d": lambda x: F.max_pool1d(x.flatten(2), 3, 1, 1),
    "avg_pool1d": lambda x: F.avg_pool1d(x.flatten(2), 3, 1, 1),
    "adaptive_avg_pool1d": lambda x: F.adaptive_avg_pool1d(x.flatten(2), 1),
    "conv2d": lambda x: F.conv2d(x, torch.zeros(4, 4, 3, 3), padding=1),
    "conv_transpose2d": lambda x: F.conv_transpose2d(x, torch.zeros(4, 4, 3, 3), padding=1),
    "linear": lambda x: F.linear(x, torch.zeros(7, 7)),
    "layer_norm": lambda x: F.layer_norm(x, (7, 7)),
    "group_norm": lambda x: F.group_norm(x, 2),
    "instance_norm": F.instance_norm,
    "batch_norm": lambda x: F.batch_norm(x, torch.zeros(4), torch.ones(4)),
}


@pytest.mark.parametrize("name", CARRYING)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_what_is_said_to_carry_nan_does(name: str, layout: torch.memory_format) -> None:
    assert name in programs.CARRIERS
    for at in ((0, 0, 0, 0), (1, 2, 3, 3), (2, 3, 6, 6)):
        x = torch.randn(3, 4, 7, 7).contiguous(memory_format=layout)
        x[at] = torch.nan
        assert CARRYING[name](x).isnan().any(), at
