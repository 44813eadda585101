"""Networks that nobody prepared for pruning: ten of the hardest here, the rest of the list with ``-m slow``.

The check is that of ``benchmarks/coverage.py``: the law at 50 % and at random ratios, forward at batch 1 and 3,
backward in train mode, and nine convolutions in ten really smaller.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import secateur as sc

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import common
import coverage as benchmark
import families

pytestmark = pytest.mark.filterwarnings("ignore")  # other people's networks warn as they please

HARDEST = {
    "torchvision:shufflenet_v2_x1_0": 64,  # channel shuffle by views
    "torchvision:googlenet": 96,  # auxiliary heads that exist in train mode only
    "timm:res2net50_14w_8s": 64,  # splits into eight, each added to the next
    "timm:skresnet18": 64,  # softmax over branches, grouped by views
    "timm:cspresnet50": 64,  # a split across the whole stage
    "timm:ghostnet_100": 64,  # half of the channels from the other half, then sliced
    "timm:edgenext_xx_small": 64,  # uneven splits, attention over channels
    "timm:levit_128s": 224,  # attention with biases by position, built for one size
    "timm:mobilevit_xxs": 64,  # unfolding and attention
    "timm:dpn48b": 64,  # a residual and a dense path cut from one tensor
}


@pytest.mark.parametrize(("name", "size"), HARDEST.items(), ids=str)
def test_hard_networks(name: str, size: int) -> None:
    row = common.check_network(name, size, pure=benchmark.NETWORKS[name])
    assert row["problems"] == []


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in benchmark.NETWORKS if n not in HARDEST])
def test_rest_of_the_list(name: str) -> None:
    row = common.check_network(name, families.SIZES.get(name), pure=benchmark.NETWORKS[name])
    assert row["problems"] == []


# ------------------------------------------------------------------------------- the check itself can fail


def block() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten())


def found(small: nn.Module, plan: sc.Plan, model: nn.Module, x: torch.Tensor) -> list[str]:
    trained = common.gradients(model, (x,))
    model.eval()
    row = {"casts": False, **common.shares(model, small), **common.examine(model, small, plan, (x,), trained)}
    return common.problems(row, pure=True)


@pytest.fixture
def network() -> tuple[nn.Module, torch.Tensor]:
    x = torch.randn(2, 3, 8, 8)
    return common.randomise_(block(), (x,)), x


def test_a_good_result_has_no_problems(network: tuple[nn.Module, torch.Tensor]) -> None:
    model, x = network
    plan = sc.plan(model, x, ratios=0.5)
    assert found(sc.apply(model, plan), plan, model, x) == []


def test_a_wrong_weight_breaks_the_law(network: tuple[nn.Module, torch.Tensor]) -> None:
    model, x = network
    plan = sc.plan(model, x, ratios=0.5)
    small = sc.apply(model, plan)
    with torch.no_grad():
        next(small.parameters())[0] *= 1.001
    assert any("the law is off by" in problem for problem in found(small, plan, model, x))


def test_a_frozen_parameter_is_missed(network: tuple[nn.Module, torch.Tensor]) -> None:
    model, x = network
    plan = sc.plan(model, x, ratios=0.5)
    small = sc.apply(model, plan)
    small.get_parameter("0.bias").requires_grad_(False)
    assert found(small, plan, model, x) == ["backward: no gradient reaches 0.bias"]


def test_a_network_that_did_not_shrink_is_noticed(network: tuple[nn.Module, torch.Tensor]) -> None:
    model, x = network
    plan = sc.plan(model, x, ratios=0.25)
    assert found(sc.apply(model, plan), plan, model, x) == ["2 of 2 convolutions stay dense"]


def test_blindness_is_noticed(network: tuple[nn.Module, torch.Tensor]) -> None:
    model, x = network
    with torch.no_grad():
        model.get_parameter("3.weight").zero_()
    plan = sc.plan(model, x, ratios=0.5)
    assert found(sc.apply(model, plan), plan, model, x) == ["the check is blind: outputs do not depend on inputs"]


def test_nothing_is_left_at_its_initial_value() -> None:
    model = block()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    common.randomise_(model, (torch.randn(1, 3, 8, 8),))
    for name in ("1.weight", "1.bias", "1.running_mean", "1.running_var", "0.bias"):
        assert not torch.isclose(model.state_dict()[name], before[name]).any(), name
    assert not model.training


def test_work_beyond_its_limits_is_said_not_awaited() -> None:
    def forever() -> common.Row:
        while True:
            pass

    assert common.in_process(forever, cpu_s=1) == {"error": "over 1 s of processor time", "kind": "Timeout"}


def test_an_error_in_a_process_is_a_row() -> None:
    def fails() -> common.Row:
        raise ValueError("no such network in /home/somebody/models/here.py")

    assert common.in_process(fails, cpu_s=5) == {
        "error": "ValueError: no such network in here.py",
        "kind": "ValueError",
    }
