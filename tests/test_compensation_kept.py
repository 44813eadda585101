"""Compensation beside the rest: added biases are saved, queries rescaled, processes agree, errors change nothing."""

from __future__ import annotations

import copy
import dataclasses
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import secateur as sc
from networks.common import randomise
from secateur.processes import part, world
from secateur.recover import Compensation, Fit, compensate_, recalibrate_

D = torch.float64
HERE = Path(__file__).parent


class Net(nn.Module):
    """A batch norm behind the first reader, nothing but an activation behind the second, which has no bias."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.n = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, bias=False), nn.BatchNorm2d(8)
        self.c, self.d = nn.Conv2d(8, 6, 1, bias=False), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.softplus(self.n(self.b(F.softplus(self.a(x)))))
        return self.d(F.softplus(self.c(x)).mean((2, 3)))


def net() -> Net:
    torch.manual_seed(0)
    model = Net().double().eval()
    randomise(model, 1)
    return model


def data(seed: int = 2) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(8, 3, 8, 8, dtype=D, generator=g) for _ in range(3)]


def made(ratio: float = 0.5) -> tuple[Net, sc.Plan, nn.Module]:
    model = net()
    plan = sc.plan(model, data()[0], ratios=ratio)
    return model, plan, sc.apply(model, plan)


def gap(small: nn.Module, model: nn.Module, x: Tensor | None = None) -> float:
    """The mean square difference of their outputs."""
    x = torch.cat(data(3)) if x is None else x
    with torch.no_grad():
        return float((small(x) - model(x)).square().mean())


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in model.state_dict().items()}


def test_every_step_reports_and_helps() -> None:
    model, plan, _ = made()
    gaps: dict[tuple[str, bool], float] = {}
    told: list[tuple[str, int, int]] = []
    for readers in ("none", "bias", "scale", "least-squares"):
        for batchnorm in (False, True):
            small = sc.apply(model, plan)
            told.clear()
            done = compensate_(
                small,
                model,
                plan,
                data(),
                readers=readers,  # type: ignore[arg-type]
                batchnorm=batchnorm,
                evaluate=lambda m: -gap(m, model),
                progress=lambda *seen: told.append(seen),
            )
            names = ["none"] + [readers] * (readers != "none") + ["batch norm"] * batchnorm
            assert [s.name for s in done.steps] == names
            assert done.steps[-1].accuracy == pytest.approx(-gap(small, model))
            assert done.steps[0].accuracy == pytest.approx(-gap(sc.apply(model, plan), model))
            assert list(dict.fromkeys(name for name, _, _ in told)) == names[1:]
            gaps[readers, batchnorm] = gap(small, model)
    assert gaps["least-squares", False] < gaps["bias", False] < gaps["none", False]
    assert gaps["least-squares", False] < gaps["scale", False] < gaps["none", False]
    assert gaps["least-squares", True] < gaps["none", True]


def test_where_constants_go() -> None:
    model, plan, small = made()
    done = compensate_(small, model, plan, data(), readers="bias", batchnorm=False, fit=Fit(sequential=False))
    assert set(done.steps[1].changed) == {"b", "c", "d"}
    kept = plan.kept()["b.weight"][0]
    mean: Any = small.get_submodule("n").running_mean
    assert not torch.allclose(mean, model.n.running_mean[kept])  # type: ignore[index]
    bias: Any = small.get_submodule("c").bias
    assert isinstance(bias, nn.Parameter)
    assert sc.record(small).plan.edits == (sc.core.Edit("bias", "c", "", len(bias)),)  # type: ignore[union-attr]


def test_added_biases_are_saved_loaded_exported_and_replayed(tmp_path: Path) -> None:
    model, plan, small = made()
    compensate_(small, model, plan, data())
    x = data(4)[0]
    sc.save(tmp_path / "net", small, plan)
    again = sc.load(tmp_path / "net", net())
    assert torch.equal(again(x), small(x))
    assert list(state(again)) == list(state(small))
    whole = sc.record(small).plan  # type: ignore[union-attr]
    assert sc.Plan.from_json(whole.to_json()) == whole
    replayed = sc.apply(model, whole)
    assert float(replayed.get_submodule("c").bias.detach().abs().max()) == 0  # type: ignore[operator, union-attr]
    assert sc.record(replayed).tier == "module"  # type: ignore[union-attr]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    sc.rebind(optimizer, small, plan)
    written = sc.export_onnx(copy.deepcopy(small).float(), tmp_path / "net.onnx", x.float())
    assert written.max_difference < 1e-4


def test_a_second_round_composes() -> None:
    model, plan, small = made(0.25)
    compensate_(small, model, plan, data(), readers="bias")
    second = sc.plan(small, data()[0], ratios=0.4)
    smaller = sc.apply(small, second)
    done = compensate_(smaller, small, second, data())
    assert done.steps[1].changed
    bias: Any = smaller.get_submodule("c").bias
    (edit,) = (e for e in sc.record(smaller).plan.edits if e.kind == "bias")  # type: ignore[union-attr]
    assert edit.value == len(bias) < len(small.get_submodule("c").bias)  # type: ignore[arg-type]


def test_two_rounds_are_saved(tmp_path: Path) -> None:
    model, plan, small = made(0.25)
    compensate_(small, model, plan, data(), readers="bias")
    second = sc.plan(small, data()[0], ratios=0.4)
    smaller = sc.apply(small, second)
    compensate_(smaller, small, second, data())
    sc.save(tmp_path / "net", smaller, second)
    assert torch.equal(sc.load(tmp_path / "net", model)(data()[0]), smaller(data()[0]))


class Attention(nn.Module):
    """No scale is given, so that the pruned queries are rescaled in the small network."""

    def __init__(self) -> None:
        super().__init__()
        self.i, self.q, self.k, self.v = nn.Linear(6, 10), nn.Linear(10, 8), nn.Linear(10, 8), nn.Linear(10, 8)
        self.o = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.softplus(self.i(x))
        return self.o(F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x)))


@pytest.mark.parametrize("sequential", [False, True])
def test_rescaled_queries(sequential: bool) -> None:
    torch.manual_seed(0)
    model = Attention().double().eval()
    x = [torch.randn(16, 5, 6, dtype=D) for _ in range(3)]
    plan = sc.plan(model, x[0], ratios={"i": 0.3, "q": 0.5})
    small = sc.apply(model, plan)
    before = gap(small, model, x[0])
    done = compensate_(small, model, plan, x, fit=Fit(sequential=sequential))
    assert set(done.steps[1].changed) >= {"q", "k", "v"}
    assert any("scaled_dot_product_attention" in why for why in done.steps[1].skipped.values())
    assert gap(small, model, x[0]) < 0.5 * before


def test_a_shared_layer_is_fitted_on_all_its_calls() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.i, self.s, self.o = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.o(F.softplus(self.s(F.softplus(self.s(F.softplus(self.i(x)))))))

    torch.manual_seed(0)
    model = Shared().double().eval()
    x = [torch.randn(64, 5, dtype=D) for _ in range(2)]
    plan = sc.plan(model, x[0], ratios=0.4)
    errors = []
    for most in (2**30, 30_000):
        small = sc.apply(model, plan)
        before = gap(small, model, x[0])
        compensate_(small, model, plan, x, fit=Fit(max_bytes=most))
        errors.append(gap(small, model, x[0]))
    assert errors[0] < 0.1 * before
    assert errors[1] == pytest.approx(errors[0], rel=1e-6)


def test_memory_is_bounded_and_said() -> None:
    model, plan, small = made()
    done = compensate_(small, model, plan, data(), batchnorm=False, fit=Fit(max_bytes=3000))
    notes = done.steps[1].notes
    assert notes["b"].startswith("its sums need ")
    assert notes["b"].endswith("more than max_bytes (0.0 MiB): bias only")
    assert "b" in done.steps[1].changed
    kept = plan.kept()["b.weight"]
    assert torch.equal(small.get_submodule("b").weight, model.b.weight[kept[0]][:, kept[1]])  # type: ignore[arg-type]


def test_few_samples_are_noted_and_keep_the_weights_near() -> None:
    model, plan, small = made()
    one = [data()[0][:1, :, :5, :5]]
    plan = sc.plan(model, one[0], ratios=0.5)
    small = sc.apply(model, plan)
    done = compensate_(small, model, plan, one, batchnorm=False)
    assert done.steps[1].notes["b"] == "1 samples for 37 unknowns: held by the ridge alone"
    assert all(bool(torch.isfinite(t).all()) for t in small.state_dict().values())


def test_nothing_removed_nothing_changed() -> None:
    model, plan, small = made(0.0)
    before = state(small)
    done = compensate_(small, model, plan, data(), batchnorm=False)
    assert done.steps[1].changed == ()
    assert all(torch.equal(t, before[n]) for n, t in small.state_dict().items())


# ------------------------------------------------------------------------------------------------------------ errors


def refused(error: type[BaseException], text: str | None, *args: Any, **options: Any) -> None:
    small = args[0]
    before, edits = state(small), sc.record(small)
    with pytest.raises(error, match=text):
        compensate_(*args, **options)
    assert state(small).keys() == before.keys()
    assert all(torch.equal(t, before[n]) for n, t in small.state_dict().items())
    assert sc.record(small) == edits


def test_bad_requests() -> None:
    model, plan, small = made()
    bad = [torch.full((4, 3, 8, 8), float("nan"), dtype=D)]
    refused(sc.BadRequest, "what 'b' reads on the calibration data is not finite", small, model, plan, bad)
    refused(sc.BadRequest, "data has no batches", small, model, plan, [])
    refused(sc.BadRequest, "read only once", small, model, plan, iter(data()))
    refused(sc.BadRequest, "does not fit the network", small, model, plan, [torch.zeros(2, 3, 9, 9)])
    refused(sc.BadRequest, "did you mean 'bias'", small, model, plan, data(), readers="biass")
    refused(sc.BadRequest, "ridge=-1", small, model, plan, data(), fit=Fit(ridge=-1))

    def fails(model: nn.Module) -> float:
        if "c.bias" in model.state_dict():
            raise KeyboardInterrupt
        return 0.0

    refused(KeyboardInterrupt, None, small, model, plan, data(), evaluate=fails)


def test_it_belongs_right_after_apply() -> None:
    model, plan, small = made()
    with torch.no_grad():
        small.get_submodule("a").weight[0, 0, 0, 0] += 1e-3  # type: ignore[index, operator, union-attr]
    refused(sc.BadRequest, "'a.weight' of small is not that of the dense network any more", small, model, plan, data())
    _, _, small = made()
    compensate_(small, model, plan, data())
    refused(sc.BadRequest, "do: compensate right after apply", small, model, plan, data())


def test_wrong_models() -> None:
    model, plan, small = made()
    other = sc.apply(model, sc.plan(model, data()[0], ratios=0.25))
    refused(sc.WrongModel, "in the pruned network of the plan but", other, model, plan, data())
    with pytest.raises(sc.WrongModel, match="small was not made by apply"):
        compensate_(model, model, plan, data())
    same = dataclasses.replace(plan, keep={**plan.keep, "a": (0, 1, 2, 3)})
    if same.keep != plan.keep:
        refused(sc.BadRequest, "is not that of the dense network", small, model, same, data())


@pytest.mark.parametrize(
    ("edits", "text"),
    [
        ([("bias", "a", "", 4)], "'a' has a bias"),
        ([("bias", "nobody", "", 4)], "no layer 'nobody'"),
        ([("bias", "c", "x", 4)], "a bias edit has no name"),
        ([("bias", "c", "", 0)], "a length from 1"),
        ([("bias", "c", "", 3), ("bias", "c", "", 3)], "no second one"),
        ([("bias", "c", "", 3), ("graph", "", "", None)], "captured graph"),
    ],
)
def test_bad_bias_edits(edits: list[tuple[Any, ...]], text: str) -> None:
    _, plan, _ = made()
    with pytest.raises(sc.BadPlan, match=text):
        dataclasses.replace(plan, edits=tuple(sc.core.Edit(*e) for e in edits))


def test_a_bias_of_another_width_is_refused() -> None:
    model, plan, _ = made()
    wrong = dataclasses.replace(plan, edits=(sc.core.Edit("bias", "c", "", 6),))
    with pytest.raises(sc.SecateurError, match="no layer without bias of that width"):
        sc.apply(model, wrong)


# --------------------------------------------------------------------------------------------------------- processes


class Parts:
    """Every process's part of each batch."""

    def __iter__(self) -> Iterator[Tensor]:
        for batch in data():
            yield batch[part(len(batch))]


def compensated(readers: Any) -> tuple[nn.Module, Compensation]:
    model, plan, small = made()
    return small, compensate_(small, model, plan, Parts(), readers=readers)


def test_two_processes_give_what_one_gives(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", __file__]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{HERE.parent / 'src'}:{HERE}"}
    told = subprocess.run(
        [*command, str(tmp_path)], check=False, env=environment, capture_output=True, text=True, timeout=300
    )
    assert told.returncode == 0, told.stderr
    for readers in ("scale", "least-squares"):
        small, _ = compensated(readers)
        for process in (0, 1):
            theirs = load_file(tmp_path / f"{readers}{process}.safetensors")
            assert set(theirs) == set(small.state_dict())
            for name, tensor in small.state_dict().items():
                torch.testing.assert_close(theirs[name], tensor, rtol=1e-9, atol=1e-11)
    assert "more data" in (tmp_path / "uneven.txt").read_text()
    assert "does not fit" in (tmp_path / "own.txt").read_text()
    assert "another process" in (tmp_path / "other.txt").read_text()


def _in_process(folder: Path) -> None:
    torch.distributed.init_process_group("gloo")
    number = torch.distributed.get_rank()
    assert world() == 2
    for readers in ("scale", "least-squares"):
        small, _ = compensated(readers)
        tensors = {n: t.contiguous() for n, t in small.state_dict().items()}
        save_file(tensors, str(folder / f"{readers}{number}.safetensors"))
    model, plan, small = made()
    try:
        recalibrate_(small, data()[: 1 + number])
    except sc.BadRequest as error:
        (folder / "uneven.txt").write_text(str(error))
    try:
        compensate_(small, model, plan, data() if number else [torch.zeros(1, 2)])
    except sc.BadRequest as error:
        (folder / ("other.txt" if number else "own.txt")).write_text(str(error))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    _in_process(Path(sys.argv[1]))


class TwoInputs(nn.Module):
    """Runs on one input or on two; the second changes what the batch norm sees."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.n, self.c = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 6, 1), nn.BatchNorm2d(6), nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor, extra: Tensor | None = None) -> Tensor:
        x = F.relu(self.a(x if extra is None else x + extra))
        return self.c(F.relu(self.n(self.b(x))))


def test_all_steps_run_on_the_same_inputs() -> None:
    torch.manual_seed(0)
    model = TwoInputs().double().eval()
    batches = [(x, 5 * y) for x, y in zip(data(), data(3), strict=True)]
    plan = sc.plan(model, batches[0], ratios={"a": 0.5})
    small = sc.apply(model, plan)
    compensate_(small, model, plan, batches, readers="none")
    wanted = torch.cat([small.b(F.relu(small.a(x + y))).movedim(1, 0).flatten(1) for x, y in batches], 1)
    assert torch.allclose(small.n.running_var, wanted.var(1), rtol=1e-9)
    assert not torch.allclose(small.n.running_var, model.n.running_var)


def test_an_added_bias_and_a_captured_graph_do_not_go_together() -> None:
    edits = (sc.Edit("bias", "c", "", 3), sc.Edit("graph", ""))
    _, plan, _ = made()
    with pytest.raises(sc.BadPlan, match="plan with prefer='module', or compensate only after the last cut"):
        dataclasses.replace(plan, edits=edits)
