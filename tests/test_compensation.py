"""Recovery without training: against brute force, the law afterwards, and every way of refusing."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import secateur as sc
from law import Inputs, call, fresh, leaves, relative_error, to_double
from networks import NETWORKS, randomise
from reader_pairs import PAIRS, D, Pair, made, pruned, rows_of
from secateur.interpreter import walk
from secateur.recover import Fit, compensate_, compensation
from secateur.recover.reconstruction import Fitted, solve
from secateur.statistics import Moments


def removed_only(model: Pair, plan: sc.Plan, x: Tensor) -> Tensor:
    """What the reader reads, nothing but removed channels in it, kept ones zero."""
    kept = plan.kept()["writer.weight"][0]
    h = model.writer(x).clone()
    gone = torch.ones(h.shape[-1 if isinstance(model.writer, nn.Linear) else 1], dtype=torch.bool)
    gone[kept] = False
    a = model.between(h)
    mask = gone.repeat_interleave(4) if a.dim() == 2 and h.dim() == 4 else gone
    axis = -1 if a.dim() == 2 or isinstance(model.reader, nn.Linear) else 1
    return a * mask.reshape([-1 if d == axis % a.dim() else 1 for d in range(a.dim())])


@pytest.mark.parametrize("name", PAIRS)
def test_bias_is_the_mean_contribution_of_the_removed_channels(name: str) -> None:
    """Only the bias changes, by the mean over samples and positions of what the reader makes of removed channels."""
    model, data = made(name)
    plan, small = pruned(model, data[0], {"writer": 0.5})
    before = copy.deepcopy(small.state_dict())
    compensate_(small, model, plan, data, readers="bias", batchnorm=False, fit=Fit(sequential=False))
    bias = model.reader.bias.detach()  # type: ignore[union-attr]
    want = rows_of(model.reader, removed_only(model, plan, torch.cat(data))).mean(0)  # the bias is in it
    after = small.state_dict()
    assert relative_error(after["reader.bias"], want) < 1e-12
    assert relative_error(want, bias) > 1e-3
    assert all(torch.equal(after[n], t) for n, t in before.items() if n != "reader.bias")


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("sequential", [False, True])
def test_least_squares_are_those_of_numpy(name: str, sequential: bool) -> None:
    """The design matrix is built by differentiating the reader's output by its weights: no patches of ours."""
    model, data = made(name)
    plan, small = pruned(model, data[0], {"writer": 0.5})
    compensate_(small, model, plan, data, batchnorm=False, fit=Fit(ridge=0.0, sequential=sequential))
    x = torch.cat(data)
    target = rows_of(model.reader, model.between(model.writer(x)))
    h = small.between(small.writer(x)).detach()  # type: ignore[operator]
    reader: Any = copy.deepcopy(small.reader)
    columns = []
    for i in range(reader.weight.numel()):
        with torch.no_grad():
            reader.weight.zero_().view(-1)[i] = 1.0
            reader.bias.zero_()
        columns.append(rows_of(reader, h))  # [N, O]: all but one output are zero
    design = torch.stack(columns, -1)  # [N, O, weights]
    fitted = rows_of(small.reader, h)  # type: ignore[arg-type]
    for output in range(target.shape[1]):
        a = torch.cat([design[:, output], torch.ones(len(design), 1, dtype=D)], 1)
        used = a.abs().amax(0) > 0
        best = torch.linalg.lstsq(a[:, used], target[:, output], driver="gelsd").solution
        assert relative_error(fitted[:, output], a[:, used] @ best) < 1e-8


def test_exact_combinations_are_restored() -> None:
    """Removed channels that are sums of kept ones cost nothing."""
    torch.manual_seed(0)
    model = Pair(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 5, 3, padding=1), lambda x: x * 2).double().eval()
    writer: Any = model.writer
    with torch.no_grad():
        mix = torch.randn(4, 4, dtype=D) * 0.1
        writer.weight[:4] = torch.einsum("oi,ichw->ochw", mix, writer.weight[4:])
        writer.bias[:4] = mix @ writer.bias[4:]
    data = [torch.randn(16, 3, 8, 8, dtype=D)]
    plan, small = pruned(model, data[0], {"writer": 0.5})
    assert plan.keep["writer"] == (4, 5, 6, 7)
    assert relative_error(small(data[0]), model(data[0])) > 1e-2
    compensate_(small, model, plan, data, batchnorm=False, fit=Fit(ridge=1e-12))
    x = torch.randn(5, 3, 8, 8, dtype=D)
    assert relative_error(small(x), model(x)) < 1e-6


def test_solve_never_gives_nan() -> None:
    g = torch.Generator().manual_seed(0)
    for rank, samples in ((0, 4), (1, 50), (3, 2)):
        p = torch.randn(1, samples, max(rank, 1), dtype=D, generator=g) @ torch.randn(1, max(rank, 1), 6, dtype=D)
        r = torch.randn(1, samples, 2, dtype=D, generator=g)
        sums = Moments.zeros((1, 2, 6), torch.device("cpu"), second=True, shared=None)
        sums.add_(r, p * bool(rank), own=True)
        for ridge in (0.0, 1e-3):
            for intercept in (True, False):
                change, constant = solve(sums, ridge, intercept=intercept)
                assert bool(torch.isfinite(change).all() and torch.isfinite(constant).all())
                assert float(change.abs().max()) < 1e6


# ------------------------------------------------------------------------------------------------------ the law


@pytest.fixture
def fitted(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the last compensation fitted, and on which capture."""
    box: dict[str, Any] = {}
    write = compensation._write_

    def spy(small: nn.Module, plan: sc.Plan, found: Fitted, coupling: Any, factors: Mapping[str, Tensor]) -> None:
        box.update(found=found, coupling=coupling)
        write(small, plan, found, coupling, factors)

    monkeypatch.setattr(compensation, "_write_", spy)
    return box


def law_after(small: nn.Module, plan: sc.Plan, inputs: Inputs, box: dict[str, Any]) -> float:
    """Relative difference between ``small`` and the masked network with the fitted tensors."""
    found, coupling = box["found"], box["coupling"]
    args = inputs if isinstance(inputs, tuple) else () if isinstance(inputs, dict) else (inputs,)
    flat_inputs = coupling.graph.inputs.flat(args, inputs if isinstance(inputs, dict) else {})
    walking = walk(coupling, coupling.class_keep(plan.keep), found.state, flat_inputs, 0, (), found.added)
    with pytest.raises(StopIteration) as end, torch.no_grad():
        next(walking)
    with torch.no_grad():
        return relative_error(tuple(leaves(call(small, inputs))), end.value.value)


WAYS: list[tuple[Any, bool]] = [("least-squares", True), ("bias", False), ("scale", True)]
CHOSEN = [*list(NETWORKS)[5::48], "attention_module", "attention_sdpa", "weight_standardisation_by_batch_norm"]
CASES = [pytest.param(n, marks=() if n in CHOSEN else pytest.mark.slow) for n in NETWORKS]


@pytest.mark.parametrize("name", CASES)
def test_the_law_holds_afterwards(name: str, fitted: dict[str, Any]) -> None:
    factory, example, expect = NETWORKS[name]
    torch.manual_seed(0)
    model, inputs = randomise(factory(), seed=1).double().eval(), to_double(example())
    plan = sc.plan(sc.trace(model, inputs), ratios=0.5)
    data = [fresh(inputs, 4, seed) for seed in (5, 6)]
    for readers, sequential in WAYS:
        small = sc.apply(model, plan)
        try:
            done = compensate_(
                small, model, plan, data, readers=readers, batchnorm=False, fit=Fit(sequential=sequential)
            )
        except sc.BadRequest:  # the model bakes in its batch size, or the shape of an input without examples
            data = [inputs, inputs]
            done = compensate_(
                small, model, plan, data, readers=readers, batchnorm=False, fit=Fit(sequential=sequential)
            )
        assert law_after(small, plan, data[0], fitted) <= expect.tol, readers
        assert all(done.steps[1].skipped.values())
        assert all(bool(torch.isfinite(t).all()) for t in small.state_dict().values() if t.is_floating_point())
