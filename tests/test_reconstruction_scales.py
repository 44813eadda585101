"""One factor for each kept channel: against brute force, where data say too little, and beside the rest."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import secateur as sc
from law import relative_error
from reader_pairs import PAIRS, D, Pair, made, pruned, rows_of
from secateur import grams
from secateur.grams import Sums, settle_
from secateur.recover import Fit, compensate_
from secateur.recover.equations import least_change


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in model.state_dict().items()}


def axis_read(reader: nn.Module) -> int:
    """The axis of a reader's weight that its inputs lie on."""
    return 0 if "Transpose" in type(reader).__name__ else 1


def owners(plan: sc.Plan, reader: nn.Module, name: str = "reader.weight") -> Tensor:
    """The kept channel, as the plan has it, of each input slice of the pruned reader's weight."""
    axis = axis_read(reader)
    owner = np.full(plan.model[name][axis], -1)
    for group in plan.groups:
        for part in group.slices:
            if (part.tensor, part.axis) == (name, axis):
                owner[part.positions] = 100 * list(plan.keep).index(group.name) + np.arange(group.channels)[:, None]
    kept = plan.kept()[name][axis]
    return torch.from_numpy(np.unique(owner[kept], return_inverse=True)[1])


def scaled(reader: nn.Module, owner: Tensor, factors: Tensor) -> nn.Module:
    """A copy of ``reader`` whose input slices are multiplied by the factors of their channels."""
    other: Any = copy.deepcopy(reader)
    axis = axis_read(reader)
    with torch.no_grad():
        other.weight.mul_(factors[owner].reshape([-1 if d == axis else 1 for d in range(other.weight.dim())]))
    return other


def by_channel(reader: nn.Module, owner: Tensor, h: Tensor) -> Tensor:
    """``[outputs at all locations, C]``: what each channel gives, found by leaving all others out."""
    bare: Any = copy.deepcopy(reader)
    with torch.no_grad():
        bare.bias.zero_()
    eye = torch.eye(int(owner.max()) + 1, dtype=D)
    return torch.stack([rows_of(scaled(bare, owner, one), h).flatten() for one in eye], 1)


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize(("sequential", "ridge"), [(False, 0.0), (True, 0.3)])
def test_factors_are_those_of_numpy(name: str, sequential: bool, ridge: float) -> None:
    """The weights are multiplied by the least-squares factors, channel by channel, and nothing else changes."""
    model, data = made(name)
    plan, small = pruned(model, data[0], {"writer": 0.5})
    before = copy.deepcopy(small)
    compensate_(small, model, plan, data, readers="scale", batchnorm=False, fit=Fit(ridge=ridge, sequential=sequential))
    x = torch.cat(data)
    h = before.between(before.writer(x)).detach()  # type: ignore[operator]
    owner = owners(plan, model.reader)
    z = by_channel(before.reader, owner, h)  # type: ignore[arg-type]
    lacks = (rows_of(model.reader, model.between(model.writer(x))) - rows_of(before.reader, h)).flatten()  # type: ignore[arg-type]
    level = ridge * z.square().sum(0).mean()
    more = torch.cat([z, level.sqrt() * torch.eye(z.shape[1], dtype=D)])
    a = np.linalg.lstsq(more.numpy(), torch.cat([lacks, torch.zeros(z.shape[1], dtype=D)]).numpy())[0]
    wanted = scaled(before.reader, owner, 1 + torch.from_numpy(a)).state_dict()  # type: ignore[arg-type]
    assert relative_error(small.reader.weight, wanted["weight"]) < 1e-9  # type: ignore[union-attr]
    assert relative_error(before.reader.weight, wanted["weight"]) > 1e-2  # type: ignore[union-attr]
    old = before.state_dict()
    assert all(torch.equal(t, old[n]) for n, t in small.state_dict().items() if n != "reader.weight")


def test_without_a_ridge_they_are_the_papers() -> None:
    """``w = (Z'Z)^-1 Z'y``, with ``y`` what the dense network's reader gives without its bias."""
    model, data = made("stride")
    plan, small = pruned(model, data[0], {"writer": 0.5})
    before: Any = copy.deepcopy(small)
    compensate_(small, model, plan, data, readers="scale", batchnorm=False, fit=Fit(ridge=0.0))
    x, owner = torch.cat(data), owners(plan, model.reader)
    z = by_channel(before.reader, owner, before.between(before.writer(x)).detach())
    y = rows_of(model.reader, model.between(model.writer(x))) - model.reader.bias.detach()  # type: ignore[operator]
    w = torch.linalg.solve(z.mT @ z, z.mT @ y.flatten())
    assert relative_error(small.reader.weight, scaled(before.reader, owner, w).weight) < 1e-9  # type: ignore[union-attr]


def test_multiples_are_restored() -> None:
    """Removed channels that are multiples of kept ones, and are read in the same proportion, cost nothing."""
    model, data = made("padding")
    writer, reader = model.writer, model.reader
    model.between = lambda x: x * 2
    multiples = torch.tensor([-0.5, 0.25, 0.1, -0.3], dtype=D).view(4, 1, 1, 1)
    with torch.no_grad():
        writer.weight[:4] = multiples * writer.weight[4:]  # type: ignore[index, operator]
        writer.bias[:4] = multiples.flatten() * writer.bias[4:]  # type: ignore[index, operator]
        reader.weight[:, :4] = 2 * reader.weight[:, 4:]  # type: ignore[index, operator]
    plan, small = pruned(model, data[0], {"writer": 0.5})
    assert plan.keep["writer"] == (4, 5, 6, 7)
    before = small.reader.weight.clone()  # type: ignore[union-attr, operator]
    assert relative_error(small(data[0]), model(data[0])) > 1e-2
    compensate_(small, model, plan, data, readers="scale", batchnorm=False, fit=Fit(ridge=0.0))
    assert relative_error(small(data[0]), model(data[0])) < 1e-10
    assert relative_error(small.reader.weight, before * (1 + 2 * multiples.view(1, 4, 1, 1))) < 1e-10  # type: ignore[union-attr]


# ------------------------------------------------------------------------------------------- several groups and calls


class Beside(nn.Module):
    """A reader of two pruned groups, one that stays whole, and the input, which nobody can prune."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 6, 1), nn.Conv2d(3, 4, 1)
        self.reader = nn.Conv2d(21, 5, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.reader(torch.cat([F.softplus(self.a(x)), self.b(x).tanh(), F.softplus(self.c(x)), x], 1))


def test_a_concatenation_is_fitted_as_a_whole() -> None:
    torch.manual_seed(0)
    model = Beside().double().eval()
    data = [torch.randn(10, 3, 7, 7, dtype=D) for _ in range(2)]
    plan, small = pruned(model, data[0], {"a": 0.5, "b": 0.5})
    before: Any = copy.deepcopy(small)
    assert before.reader.weight.shape[1] == 4 + 3 + 4 + 3
    compensate_(small, model, plan, data, readers="scale", batchnorm=False, fit=Fit(ridge=0.0))
    x = torch.cat(data)
    h = torch.cat([F.softplus(before.a(x)), before.b(x).tanh(), F.softplus(before.c(x)), x], 1).detach()
    z = by_channel(before.reader, torch.arange(14), h)
    y = (model(x) - model.reader.bias.view(-1, 1, 1)).detach().movedim(1, -1).flatten()
    w = torch.from_numpy(np.linalg.lstsq(z.numpy(), y.numpy())[0])
    assert relative_error(small.reader.weight, scaled(before.reader, torch.arange(14), w).weight) < 1e-9  # type: ignore[union-attr]
    assert float((w - 1).abs().min()) > 1e-4


class Shared(nn.Module):
    """One layer that is called twice, and one behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.i, self.s, self.o = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.o(F.softplus(self.s(F.softplus(self.s(F.softplus(self.i(x)))))))


@pytest.mark.parametrize("most", [2**30, 2000])
def test_a_shared_layer_is_fitted_on_all_its_calls(most: int) -> None:
    torch.manual_seed(0)
    model = Shared().double().eval()
    data = [torch.randn(40, 5, dtype=D) for _ in range(2)]
    plan, small = pruned(model, data[0], 0.4)
    before: Any = copy.deepcopy(small)
    compensate_(small, model, plan, data, readers="scale", batchnorm=False, fit=Fit(ridge=0.0, max_bytes=most))
    x = torch.cat(data)
    kept = plan.kept()["s.weight"]
    dense_in, small_in, z, y = F.softplus(model.i(x)), F.softplus(before.i(x)), [], []
    for _ in range(2):
        z.append(by_channel(before.s, torch.arange(len(kept[1])), small_in.detach()))
        y.append((model.s(dense_in) - model.s.bias)[:, kept[0]].detach().flatten())
        dense_in, small_in = F.softplus(model.s(dense_in)), F.softplus(before.s(small_in))
    w = torch.from_numpy(np.linalg.lstsq(torch.cat(z).numpy(), torch.cat(y).numpy())[0])
    assert relative_error(small.s.weight, before.s.weight * w) < 1e-9  # type: ignore[union-attr]
    behind: Any = copy.deepcopy(small)  # the layer behind reads what the rescaled one gives
    small_in = F.softplus(behind.s(F.softplus(behind.s(F.softplus(behind.i(x)))))).detach()
    z_behind = by_channel(before.o, torch.arange(len(kept[0])), small_in)
    w = torch.from_numpy(
        np.linalg.lstsq(z_behind.numpy(), (dense_in @ model.o.weight.mT).detach().flatten().numpy())[0]
    )
    assert relative_error(small.o.weight, before.o.weight * w) < 1e-9  # type: ignore[union-attr]


def test_in_sequence_each_is_fitted_on_what_those_before_it_now_give() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 12), nn.Softplus(), nn.Linear(12, 12), nn.Softplus(), nn.Linear(12, 4))
    model = model.double().eval()
    data = [torch.randn(80, 5, dtype=D)]
    plan, small = pruned(model, data[0], 0.5)
    before: Any = copy.deepcopy(small)
    compensate_(small, model, plan, data, readers="scale", batchnorm=False, fit=Fit(ridge=0.0))
    for number in (2, 4):
        h = small[:number](data[0]).detach()  # type: ignore[index]
        rows = plan.kept().get(f"{number}.weight", {}).get(0, np.arange(4))
        y = (model[:number](data[0]) @ model[number].weight.mT)[:, rows].detach().flatten()
        z = by_channel(before[number], torch.arange(h.shape[1]), h)
        w = torch.from_numpy(np.linalg.lstsq(z.numpy(), y.numpy())[0])
        assert relative_error(small[number].weight, before[number].weight * w) < 1e-9  # type: ignore[index]


def test_only_readers_that_lost_inputs_are_rescaled() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 12), nn.Softplus(), nn.Linear(12, 6), nn.Softplus(), nn.Linear(6, 4))
    model = model.double().eval()
    data = [torch.randn(80, 5, dtype=D)]
    plan, small = pruned(model, data[0], {"0": 0.5})
    done = compensate_(small, model, plan, data, readers="scale", batchnorm=False)
    assert done.steps[1].changed == ("2",)
    assert done.steps[1].name == "scale"


# ----------------------------------------------------------------------------------------- where data say too little


def degenerate(rank: int, samples: int) -> tuple[Tensor, Tensor]:
    """``Z [samples, 8]`` of a given rank, and a target."""
    g = torch.Generator().manual_seed(3)
    z = torch.randn(samples, max(rank, 1), dtype=D, generator=g) @ torch.randn(max(rank, 1), 8, dtype=D, generator=g)
    return z * bool(rank), torch.randn(samples, 3, dtype=D, generator=g)


@pytest.mark.parametrize(("rank", "samples"), [(0, 20), (1, 20), (7, 20), (8, 3), (8, 1), (8, 20)])
def test_the_smallest_of_the_best_changes(rank: int, samples: int) -> None:
    """Without a ridge the minimum-norm solution, of moments as well as numpy finds it from the samples themselves."""
    z, y = degenerate(rank, samples)
    found = least_change((z.mT @ z)[None], (y.mT @ z)[None], 0.0)[0]
    wanted = torch.from_numpy(np.linalg.lstsq(z.numpy(), y.numpy())[0]).mT
    assert float((found - wanted).abs().max()) < 1e-9 * max(1.0, float(wanted.abs().max()))
    for ridge in (1e-3, 1e6):
        held = least_change((z.mT @ z)[None], (y.mT @ z)[None], ridge)[0]
        level = ridge * (float(z.square().sum(0).mean()) or 1.0)
        direct = torch.linalg.solve(z.mT @ z + level * torch.eye(8, dtype=D), z.mT @ y).mT
        assert float((held - direct).abs().max()) < 1e-9 * max(1.0, float(direct.abs().max()))


def test_a_pivot_of_rounding_is_no_pivot() -> None:
    """Equal channels leave a last pivot that is nothing but rounding, on which the change would depend."""
    g = torch.Generator().manual_seed(0)
    for trial in range(30):
        z = torch.randn(50, 4, dtype=D, generator=g)[:, [0, 1, 2, 3, 3]] * 10.0 ** (trial % 7 - 3)
        y = torch.randn(50, 1, dtype=D, generator=g)
        found = least_change((z.mT @ z)[None], (y.mT @ z)[None], 0.0)[0, 0]
        assert float((found[3] - found[4]).abs()) < 1e-9 * float(found.abs().max())


def broken(change: Any, data: Sequence[Tensor], ridge: float) -> tuple[Any, Any, Any, sc.Plan]:
    """The pair with ``change(writer, reader)`` done to it, before and after; kept are channels 4 to 7."""
    model, _ = made("padding")
    with torch.no_grad():
        change(model.writer, model.reader)
    plan = sc.plan(model, data[0], ratios=0.5)
    assert plan.keep["writer"] == (4, 5, 6, 7)
    small = sc.apply(model, plan)
    before = copy.deepcopy(small)
    done = compensate_(small, model, plan, data, readers="scale", batchnorm=False, fit=Fit(ridge=ridge))
    assert all(bool(torch.isfinite(t).all()) for t in small.state_dict().values())
    return before, small, done, plan


@pytest.mark.parametrize("ridge", [0.0, 1e-2])
def test_equal_channels_share_what_there_is_to_do(ridge: float) -> None:
    def change(writer: Any, reader: Any) -> None:
        writer.weight[:4] *= 0.1
        writer.weight[5:7], writer.bias[5:7] = writer.weight[4], writer.bias[4]
        reader.weight[:, 5:7] = reader.weight[:, 4:5]

    before, small, _, _ = broken(change, [torch.randn(9, 3, 7, 6, dtype=D)], ridge)
    factors = (small.reader.weight / before.reader.weight)[0, :, 1, 1].detach()
    assert float((factors[1:3] - factors[0]).abs().max()) < 1e-9 * float(factors.abs().max())
    assert float((factors - 1).abs().min()) > 1e-3


@pytest.mark.parametrize("ridge", [0.0, 1e-2])
def test_dead_channels_stay_as_they_are(ridge: float) -> None:
    """Of a channel that gives nothing, or that is not read, no factor can be told."""

    def change(writer: Any, reader: Any) -> None:
        writer.weight[:4] *= 0.1
        reader.weight[:, 4] = 0
        writer.bias[5] = -1e6  # softplus of it is 0

    before, small, _, _ = broken(change, [torch.randn(9, 3, 7, 6, dtype=D)], ridge)
    assert torch.equal(small.reader.weight[:, :2], before.reader.weight[:, :2])
    assert not torch.equal(small.reader.weight[:, 2:], before.reader.weight[:, 2:])


@pytest.mark.parametrize("ridge", [0.0, 1e-2])
def test_nothing_alive_nothing_changed(ridge: float) -> None:
    def change(writer: Any, reader: Any) -> None:
        writer.weight[:4] *= 0.1
        reader.weight[:, 4:] = 0

    before, small, _, _ = broken(change, [torch.randn(9, 3, 7, 6, dtype=D)], ridge)
    assert torch.equal(small.reader.weight, before.reader.weight)


@pytest.mark.parametrize("ridge", [0.0, 1e-2])
def test_few_samples_are_noted(ridge: float) -> None:
    torch.manual_seed(0)
    model = Pair(nn.Linear(4, 40), nn.Linear(40, 3)).double().eval()
    data = [torch.randn(2, 4, dtype=D)]
    plan, small = pruned(model, data[0], 0.5)
    before: Any = copy.deepcopy(small)
    done = compensate_(small, model, plan, data, readers="scale", batchnorm=False, fit=Fit(ridge=ridge))
    held = "held by the ridge alone" if ridge else "of all that fit, the smallest change"
    assert done.steps[1].notes == {"reader": f"6 samples for 20 unknowns: {held}"}
    assert all(bool(torch.isfinite(t).all()) for t in small.state_dict().values())
    factors = (small.reader.weight / before.reader.weight).detach()  # type: ignore[union-attr, operator]
    assert float(factors.std(0).max()) < 1e-9
    assert float((factors - 1).abs().max()) < 2
    gap = relative_error(small(data[0]), model(data[0]))
    assert gap < 1e-9 if ridge == 0 else gap < relative_error(before(data[0]), model(data[0]))


def test_a_large_ridge_holds_the_factors_at_one() -> None:
    model, data = made("padding")
    plan, small = pruned(model, data[0], 0.5)
    before = state(small)
    compensate_(small, model, plan, data, readers="scale", batchnorm=False, fit=Fit(ridge=1e12))
    assert relative_error(small.reader.weight, before["reader.weight"]) < 1e-9  # type: ignore[union-attr]


def test_too_much_to_hold_is_left_and_said() -> None:
    model, data = made("padding")
    plan, small = pruned(model, data[0], 0.5)
    before = state(small)
    done = compensate_(small, model, plan, data, readers="scale", batchnorm=False, fit=Fit(max_bytes=100))
    assert done.steps[1].changed == ()
    assert done.steps[1].skipped == {"reader": "its sums need 0.0 MiB, more than max_bytes (0.0 MiB)"}
    assert all(torch.equal(t, before[n]) for n, t in small.state_dict().items())


def test_data_that_are_not_finite_change_nothing() -> None:
    model, data = made("padding")
    plan, small = pruned(model, data[0], 0.5)
    before = state(small)
    bad = [data[0], torch.full_like(data[1], float("nan"))]
    with pytest.raises(sc.BadRequest, match="what 'reader' reads on the calibration data is not finite"):
        compensate_(small, model, plan, bad, readers="scale")
    with pytest.raises(sc.BadRequest, match="data has no batches"):
        compensate_(small, model, plan, [], readers="scale")
    assert all(torch.equal(t, before[n]) for n, t in small.state_dict().items())


# ----------------------------------------------------------------------------------------------- beside the rest


class Tiers(nn.Module):
    """A reader behind what ``moved`` does to the channels."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.width = how, 12
        self.a, self.n = nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12)
        self.b, self.head = nn.Conv2d(12, 10, 3, bias=False), nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.softplus(self.n(self.a(x)))
        if self.how == "attributes":
            x = x.reshape(x.shape[0], self.width, -1).reshape(x.shape[0], self.width, *x.shape[2:])
        elif self.how == "graph":
            x = x.roll(5, 1)
        return self.head(F.softplus(self.b(x)).mean((2, 3)))


@pytest.mark.parametrize("tier", ["module", "attributes", "graph"])
def test_every_tier_is_rescaled_saved_and_loaded(tier: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Tiers(tier).double().eval()
    data = [torch.randn(12, 3, 7, 7, dtype=D) for _ in range(2)]
    plan, small = pruned(model, data[0], {"a": 7, "b": 4})
    assert sc.record(small).tier == tier  # type: ignore[union-attr]
    before = {name: t.detach().clone() for name, t in small.named_parameters()}
    gap = relative_error(small(data[0]), model(data[0]))
    done = compensate_(small, model, plan, data, readers="scale", batchnorm=False)
    assert set(done.steps[1].changed) == {"b", "head"}
    assert relative_error(small(data[0]), model(data[0])) < 0.9 * gap
    after = dict(small.named_parameters())
    assert {name for name, t in after.items() if not torch.equal(t, before[name])} == {"b.weight", "head.weight"}
    kinds = {edit.kind for edit in sc.record(small).plan.edits}  # type: ignore[union-attr]
    assert kinds == {"module": set(), "attributes": {"attribute"}, "graph": {"graph"}}[tier]
    sc.save(tmp_path / "net", small, plan)
    again = sc.load(tmp_path / "net", Tiers(tier).double().eval())
    assert torch.equal(again(data[0]), small(data[0]))


class Attention(nn.Module):
    """No scale is given, so that the pruned queries are rescaled in the small network."""

    def __init__(self) -> None:
        super().__init__()
        self.i, self.q, self.k, self.v = nn.Linear(6, 10), nn.Linear(10, 8), nn.Linear(10, 8), nn.Linear(10, 8)
        self.o = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.softplus(self.i(x))
        return self.o(F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x)))


def test_queries_keep_their_own_factor() -> None:
    torch.manual_seed(0)
    model = Attention().double().eval()
    data = [torch.randn(16, 5, 6, dtype=D) for _ in range(2)]
    plan, small = pruned(model, data[0], {"i": 0.3, "q": 0.5})
    before: Any = copy.deepcopy(small)
    done = compensate_(small, model, plan, data, readers="scale", fit=Fit(ridge=0.0))
    assert set(done.steps[1].changed) == {"q", "k", "v"}
    h, kept = F.softplus(before.i(torch.cat(data))), plan.kept()["q.weight"]
    z = by_channel(before.q, torch.arange(h.shape[-1]), h.detach())
    stretch = float((before.q.weight[0, 0] / model.q.weight[kept[0][0], kept[1][0]]).detach())
    y = stretch * (F.softplus(model.i(torch.cat(data))) @ model.q.weight.mT)[..., kept[0]].detach().flatten()
    w = torch.from_numpy(np.linalg.lstsq(z.numpy(), y.numpy())[0])
    assert abs(stretch - 1) > 0.1
    assert relative_error(small.q.weight, before.q.weight * w) < 1e-9  # type: ignore[union-attr]


def test_batches_and_float32() -> None:
    """However the data are cut, and in the network's own precision, the factors are the same."""
    model, data = made("groups")
    plan, small = pruned(model, data[0], 0.5)
    compensate_(small, model, plan, data, readers="scale")
    other = sc.apply(model, plan)
    compensate_(other, model, plan, torch.cat(data).split(7), readers="scale")
    assert relative_error(other.reader.weight, small.reader.weight) < 1e-10  # type: ignore[union-attr]
    single = model.float()
    other = sc.apply(single, plan)
    compensate_(other, single, plan, [x.float() for x in data], readers="scale")
    assert other.reader.weight.dtype == torch.float32  # type: ignore[union-attr]
    assert relative_error(other.reader.weight, small.reader.weight) < 1e-5  # type: ignore[union-attr]


def test_small_batches_that_are_held_back_are_added() -> None:
    """Images one by one, of a reader with more weights than an image has moments: some are held back to the end."""
    torch.manual_seed(0)
    model = Pair(nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(32, 40, 3, padding=1)).double().eval()
    x = torch.randn(40, 3, 4, 4, dtype=D)
    plan, small = pruned(model, x[:1], {"writer": 0.5})
    before: Any = copy.deepcopy(small)
    held: list[int] = []

    def settled(sums: Sums) -> None:
        if sums.held is not None:
            held.append(sum(map(len, sums.held.images)))
        settle_(sums)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grams, "settle_", settled)
        compensate_(small, model, plan, x.split(1), readers="scale", batchnorm=False, fit=Fit(ridge=0.0))
    assert sum(held) == 40
    assert held[-1] > 1
    h, owner = before.between(before.writer(x)).detach(), owners(plan, model.reader)
    y = rows_of(model.reader, model.between(model.writer(x))) - model.reader.bias.detach()  # type: ignore[operator]
    w = torch.from_numpy(np.linalg.lstsq(by_channel(before.reader, owner, h).numpy(), y.flatten().numpy())[0])
    assert relative_error(small.reader.weight, scaled(before.reader, owner, w).weight) < 1e-9  # type: ignore[union-attr]
