"""Wired modules by themselves: tables, kernels of ones, classes, and edits that do not fit."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from law import relative_error
from networks.common import tensor
from secateur.core import Edit
from secateur.errors import BadPlan, WrongModel
from secateur.wiring import Wired, constant_map, fill_, rewire_, scatter_table, scattered, takes_kernel

MASK = torch.tensor([False, True, True, False, True])


# Scattering ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("with_constants", [False, True])
def test_scattered_is_assignment_by_index(axis: int, with_constants: bool) -> None:
    shape = [2, 4, 6]
    shape[axis] = 3
    narrow = tensor(*shape).double()
    constants = torch.tensor([7.0, -2.0]) if with_constants else None
    shape[axis] = 5
    want = torch.zeros(shape, dtype=torch.float64)
    want.index_copy_(axis, torch.nonzero(MASK).flatten(), narrow)
    if constants is not None:
        for place, value in zip(torch.nonzero(~MASK).flatten().tolist(), constants, strict=True):
            want.select(axis, place).fill_(float(value))
    table = scatter_table(MASK, constants=with_constants)
    assert table.dtype == torch.int64
    assert torch.equal(scattered(narrow, axis, table, constants), want)


@pytest.mark.parametrize("mask", [[True, True], [False, False, True], [True]])
def test_any_number_may_be_missing(mask: list[bool]) -> None:
    kept = torch.tensor(mask)
    x = tensor(1, int(kept.sum()), 2)
    found = scattered(x, 1, scatter_table(kept))
    assert torch.equal(found[:, kept], x)
    assert float(found[:, ~kept].abs().sum()) == 0
    constants = torch.ones(int((~kept).sum()))
    found = scattered(x, 1, scatter_table(kept, constants=True), constants)
    assert torch.equal(found[:, kept], x)
    assert bool((found[:, ~kept] == 1).all())


def test_gradients_of_what_is_scattered() -> None:
    x = tensor(2, 3, 4).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda t: scattered(t, 1, scatter_table(MASK)), (x,))


# Kernels of ones -----------------------------------------------------------------------------------------------------

CONVOLUTIONS: dict[str, Any] = {
    "plain": lambda c: nn.Conv2d(c, 4, 3, padding=1),
    "one axis": lambda c: nn.Conv1d(c, 4, 3, padding=2, stride=2),
    "three axes": lambda c: nn.Conv3d(c, 4, 2, padding=1),
    "same": lambda c: nn.Conv2d(c, 4, (4, 3), padding="same", dilation=2),
    "valid": lambda c: nn.Conv2d(c, 4, 3, padding="valid", stride=2),
    "transposed": lambda c: nn.ConvTranspose2d(c, 4, 3, stride=2, padding=1, output_padding=1),
    "transposed, one axis": lambda c: nn.ConvTranspose1d(c, 4, 5, stride=3, padding=2, dilation=2),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize("batched", [True, False])
def test_a_kernel_reads_one_more_channel_of_ones(name: str, batched: bool) -> None:
    torch.manual_seed(0)
    wide = CONVOLUTIONS[name](3).double()
    rank = len(wide.kernel_size)
    x = tensor(*([2] if batched else []), 3, *[7, 6, 5][:rank]).double()
    x.select(-rank - 1, 2).fill_(1.0)
    narrow = CONVOLUTIONS[name](2).double()
    axis = 0 if wide.transposed else 1
    with torch.no_grad():
        narrow.weight.copy_(wide.weight.narrow(axis, 0, 2))
        narrow.bias.copy_(wide.bias)
    kernel, small = wide.weight.detach().narrow(axis, 2, 1), x.narrow(-rank - 1, 0, 2)
    rewire_(narrow, [Edit("constant", "", "", tuple(kernel.shape))])
    fill_(narrow, {"constant_kernel": kernel})
    assert relative_error(narrow(small), wide(x)) < 1e-12
    out = narrow(small)
    assert constant_map(narrow, kernel, small, out.shape).shape == (out[:1] if batched else out).shape


@pytest.mark.parametrize("size", [13, 14])
def test_a_transposed_convolution_that_is_told_its_size(size: int) -> None:
    torch.manual_seed(0)
    wide, narrow = (nn.ConvTranspose2d(c, 4, 3, stride=2, padding=1, bias=False).double() for c in (3, 2))
    x = tensor(2, 3, 7, 7).double()
    x[:, 2] = 1.0
    with torch.no_grad():
        narrow.weight.copy_(wide.weight[:2])
    rewire_(narrow, [Edit("constant", "", "", (1, 4, 3, 3))])
    fill_(narrow, {"constant_kernel": wide.weight.detach()[2:]})
    found = narrow(x[:, :2], output_size=[size, size])
    assert relative_error(found, wide(x, output_size=[size, size])) < 1e-12


def test_who_takes_a_kernel() -> None:
    class Own(nn.Conv2d):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) * 2

    class Renamed(nn.Conv2d):
        pass

    assert takes_kernel(nn.Conv2d(2, 2, 3))
    assert takes_kernel(Renamed(2, 2, 3))
    assert not takes_kernel(Own(2, 2, 3))
    assert not takes_kernel(nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect"))
    assert not takes_kernel(nn.Linear(2, 2))
    assert not takes_kernel(None)


# Classes -------------------------------------------------------------------------------------------------------------

SCATTER, GATHER = Edit("scatter", "n", "", (-1, 0, 1, -1, 2), 1), Edit("gather", "c", "", (1, 2, 4), 1)


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.n, self.c = nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(input=self.n(x))


def wired(*edits: Edit) -> Any:
    torch.manual_seed(0)
    model = Pair().double().eval()
    rewire_(model, edits or (SCATTER, GATHER))
    return model


def test_scatter_and_gather_undo_each_other() -> None:
    model, x = wired(), tensor(2, 3, 4, 4).double()
    torch.manual_seed(0)
    plain = Pair().double().eval()
    assert torch.equal(model(x), plain(x))
    assert model.n(x).shape == (2, 5, 4, 4)
    assert not bool(model.n(x)[:, [0, 3]].any())
    assert list(model.state_dict()) == list(plain.state_dict())


def test_its_class_is_the_users_and_one_for_all() -> None:
    one, two = wired(), wired()
    assert type(one.n) is type(two.n)
    assert type(one.n).__name__ == "WiredBatchNorm2d"
    assert isinstance(one.n, nn.BatchNorm2d)
    assert isinstance(one.n, Wired)
    assert type(nn.BatchNorm2d(3)) is nn.BatchNorm2d


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_twins_are_wired_and_share_nothing(twin: Any) -> None:
    model, x = wired(), tensor(2, 3, 4, 4).double()
    other = twin(model)
    assert type(other.n) is type(model.n)
    assert torch.equal(other(x), model(x))
    with torch.no_grad():
        other.n.weight.zero_()
        other.n._buffers["scatter_table"].zero_()
    assert bool(model.n(x).any())


def test_constants_are_kept_in_the_state_and_move_with_it() -> None:
    constant = Edit("scatter", "n", "scatter_constants", (-1, 0, 1, -1, 2), 1)
    model, x = wired(constant, GATHER), tensor(2, 3, 4, 4).double()
    assert model.state_dict()["n.scatter_constants"].tolist() == [0.0, 0.0]
    fill_(model, {"n.scatter_constants": torch.tensor([3.0, -1.0])})
    found = model.float().n(x.float())
    assert found.dtype == torch.float32
    assert found[:, 0].unique().tolist() == [3.0]
    assert found[:, 3].unique().tolist() == [-1.0]
    assert model.n.scatter_constants.dtype == torch.float32


def test_constants_also_go_into_biases_and_shared_modules() -> None:
    inner = nn.Conv2d(2, 3, 1)
    model = nn.ModuleDict({"a": inner, "b": inner})
    assert inner.bias is not None
    before = inner.bias.detach().clone()
    fill_(model, {"b.bias": torch.ones(3, dtype=torch.float64)})  # what is there already goes on counting
    assert torch.equal(inner.bias, before + 1)


# Edits that do not fit -----------------------------------------------------------------------------------------------


def test_a_module_that_is_not_there() -> None:
    with pytest.raises(WrongModel, match="the plan rewires 'm', which this model does not have"):
        wired(Edit("scatter", "m", "", (0, 1, 2), 1))


@pytest.mark.parametrize(
    "edits",
    [
        (SCATTER, SCATTER),
        (GATHER, GATHER),
        (Edit("constant", "n", "", (3, 1, 1, 1)),),
        (Edit("constant", "c", "", (4, 1, 3, 3)),),
        (Edit("constant", "c", "", (4, 2, 1, 1)),),
        (Edit("constant", "c", "", (4, 1, 1)),),
    ],
    ids=lambda edits: "-".join(f"{e.kind}{list(e.value)}" for e in edits),
)
def test_an_edit_that_does_not_fit(edits: tuple[Edit, ...]) -> None:
    text = f"the plan has a {edits[-1].kind} edit for '{edits[-1].target}', a .* that it does not fit\n  do: do not use"
    with pytest.raises(BadPlan, match=text):
        wired(*edits)


def test_other_edits_are_left_to_others() -> None:
    model = wired(Edit("bias", "c", "", 4), Edit("attribute", "c", "groups", 1))
    assert not any(isinstance(module, Wired) for module in model.modules())
