"""Calibration: products against backward passes, what is refused, processes, criteria on whole networks."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hooked_maps import compare, describe_all, hooked, naive
from measured_networks import LOSS, Chain, D, Stream, images, ready
from networks import NETWORKS, randomise
from secateur.calibration import collect
from secateur.errors import BadRequest, CannotPrune
from secateur.graph import trace
from secateur.groups import couple
from secateur.pipeline import plan
from secateur.processes import part
from secateur.scores import score

HERE = Path(__file__).parent

# --------------------------------------------------------------------------------------------------------- products


def _backward(model: nn.Module, x: Tensor, y: Tensor, names: list[str]) -> list[Tensor]:
    twin = copy.deepcopy(model)
    LOSS(twin(x), y).backward()
    return [twin.get_parameter(name) for name in names]


def test_products_are_those_of_a_backward_pass() -> None:
    model, coupling = ready(Stream)
    make = torch.Generator().manual_seed(0)
    data = [(x, torch.randint(2, (len(x),), generator=make)) for x in images(4, 2, 3)]
    model.train()
    model.stem.weight.grad = mine = torch.ones_like(model.stem.weight)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with torch.no_grad():  # as a caller may have it
        found = collect(coupling, coupling.groups, ("products",), data, loss=LOSS)
    assert model.stem.weight.grad is mine
    assert float(mine.min()) == float(mine.max()) == 1
    assert all(p.grad is None for name, p in model.named_parameters() if name != "stem.weight")
    assert model.training
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    writers = {"stem": ["stem"], "p": ["p", "b", "e"], "a": ["a"], "c": ["c"]}
    model.eval()
    model.stem.weight.grad = None
    for name, layers in writers.items():
        want = torch.zeros(len(found[name]["products"]), dtype=D)
        for x, y in data:
            for channel in range(len(want)):
                total = 0.0
                for weight in _backward(model, x, y, [f"{layer}.weight" for layer in layers]):
                    total += float((weight.grad[channel] * weight.detach()[channel]).sum())
                want[channel] += total**2 / len(data)
        torch.testing.assert_close(found[name]["products"], want, rtol=1e-9, atol=1e-15)


def test_products_of_tied_grouped_and_transposed_weights() -> None:
    for name in ("tied_weights", "conv_grouped", "transposed_grouped", "flatten_linear"):
        build, inputs, _ = NETWORKS[name]
        torch.manual_seed(0)
        model = randomise(build().double(), 1).eval()
        x = inputs()[0].double()
        coupling = couple(trace(model, x))

        def loss(out: Tensor, targets: Tensor) -> Tensor:
            return (out.flatten(1).sin() * targets[:, None]).mean()

        y = torch.randn(len(x), dtype=D)
        found = collect(coupling, coupling.groups, ("products",), [(x, y)], loss=loss)
        model.zero_grad()
        loss(model(x), y).backward()
        parameters = dict(model.named_parameters())
        for group in coupling.groups:
            want = torch.zeros(group.channels, dtype=D)
            for piece in group.slices:
                weight = parameters.get(piece.tensor)
                if piece.role == "writes" and weight is not None and weight.dim() > 1:
                    assert weight.grad is not None
                    for channel, row in enumerate(piece.positions):
                        product = (weight.grad * weight).detach()
                        want[channel] += product.index_select(piece.axis, torch.from_numpy(row)).sum()
            torch.testing.assert_close(found[group.name]["products"], want**2, rtol=1e-9, atol=1e-15)


def test_a_group_with_fewer_slices_is_seen_there_alone() -> None:
    """As the rule for projections passes it: one of the layers that write a stream decides."""
    model, coupling = ready(Stream)
    (x,) = images(3)
    stream = next(g for g in coupling.groups if g.name == "p")
    narrow = replace(stream, slices=tuple(s for s in stream.slices if s.role != "writes" or s.tensor == "e.weight"))
    y = x.mean((1, 2, 3)) > 0
    found = collect(coupling, [narrow], ("maps", "activations", "products"), [(x, y)], loss=LOSS)["p"]
    with hooked(model) as calls:
        model(x)
    want = naive(calls, narrow, model)
    assert want is not None
    compare(found["maps"], want)
    with torch.no_grad():
        compare(found["activations"], describe_all(model.sums(F.relu(model.stem(x)))[1]))
    (e,) = _backward(model, x, y, ["e.weight"])
    assert e.grad is not None
    want = (e.grad * e).detach().sum((1, 2, 3)) ** 2
    torch.testing.assert_close(found["products"], want, rtol=1e-9, atol=0)


# ------------------------------------------------------------------------------------------------------- from outside


def test_criteria_of_the_paper_on_a_network() -> None:
    """Li et al., section 4.5, written out on the outputs of a convolution."""
    model, coupling = ready(Chain, 2, 3, 12, 12)
    data = images(3, 4, side=12)
    evidence = collect(coupling, coupling.groups, ("maps", "activations"), data)
    with torch.no_grad():
        maps = [[x.flatten() for x in image] for image in model.a(torch.cat(data))]
        after = [[x.flatten() for x in image] for image in F.relu(model.n(model.a(torch.cat(data))))]
    for channel in range(6):
        own = [image[channel] for image in maps]
        norms = torch.stack([x.norm() for x in own])
        want = {
            "mean_mean": sum(float(x.mean()) for x in own) / 7,
            "mean_std": sum(float(x.std(correction=0)) for x in own) / 7,
            "mean_l1": sum(float(x.abs().sum()) for x in own) / 7,
            "mean_l2": float(norms.mean()),
            "var_l2": float(norms.var(correction=0)),
            "apoz": 1 - sum(float((image[channel] == 0).double().mean()) for image in after) / 7,
        }
        for name, value in want.items():
            found = score(coupling.groups[:1], coupling.graph.tensors, name, evidence=evidence)["a"]
            assert float(found[channel]) == pytest.approx(value, rel=1e-9)


def test_progress_counts_the_batches_of_all_passes() -> None:
    _, coupling = ready(Chain, 2, 3, 12, 12)
    data = [(x, torch.zeros(len(x))) for x in images(2, 2, side=12)]
    told: list[tuple[int, int]] = []
    collect(
        coupling,
        coupling.groups[:1],
        ("maps", "activations", "products"),
        data,
        loss=LOSS,
        progress=lambda *now: told.append(now),
    )
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]

    class Unsized:
        def __iter__(self) -> Iterator[Tensor]:
            yield from images(2, side=12)

    told.clear()
    collect(coupling, coupling.groups, ("maps",), Unsized(), progress=lambda *now: told.append(now))
    assert told == [(1, 0)]


def test_nothing_is_read_that_nothing_asks_for() -> None:
    _, coupling = ready(Chain, 2, 3, 12, 12)
    unread: Any = None
    assert collect(coupling, coupling.groups, ("filters",), unread) == {"a": {}, "b": {}, "c": {}}
    assert collect(coupling, (), ("maps",), unread) == {}


class Parameters(nn.Module):
    """Channels that a bare parameter makes."""

    def __init__(self) -> None:
        super().__init__()
        self.p, self.c = nn.Parameter(torch.randn(1, 4, 8, 8)), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.p * x[:, :1].mean())


def test_what_cannot_be_measured_says_why() -> None:
    _, coupling = ready(Parameters)
    for reads in ("maps", "activations"):
        with pytest.raises(
            CannotPrune, match=r"group 'p' has no feature maps: no layer writes them.*\n  do: exclude it"
        ):
            collect(coupling, coupling.groups, (reads,), images(2))
    with pytest.raises(CannotPrune, match=r"group 'p' has no filters to take gradients of.*\n  do: exclude it"):
        collect(coupling, coupling.groups, ("products",), [(images(2)[0], torch.zeros(2))], loss=LOSS)
    _, other = ready(Chain, 2, 3, 12, 12)
    with pytest.raises(CannotPrune, match=r"'nowhere' is not one of this network's free groups; .*\n  do: pass groups"):
        collect(other, [replace(other.groups[0], name="nowhere")], ("maps",), images(2, side=12))


def _loss_of(value: Any) -> Callable[[Tensor, Tensor], Any]:
    return lambda outputs, targets: value


@pytest.mark.parametrize(
    ("reads", "data", "loss", "text"),
    [
        ("maps", [], None, r"data has no batches .*\n  do: pass a DataLoader"),
        ("products", [], LOSS, r"data has no batches .*\n  do: pass a DataLoader"),
        ("maps", iter([1]), None, "data can be read only once"),
        ("maps", 3, None, "calibration needs data that can be read batch by batch, not int"),
        ("maps", [torch.zeros(2, 3, 8, 9)], None, r"batch 0 of the data does not fit the network: its shape"),
        ("products", [torch.zeros(2, 3, 8, 9)], LOSS, r"batch 0 of the data does not fit the network: its shape"),
        (
            "maps",
            [torch.full((2, 3, 12, 12), torch.nan)],
            None,
            r"the maps of group 'a' are not finite .* 6 of 6 channels",
        ),
        (
            "products",
            [(torch.zeros(2, 3, 12, 12), torch.zeros(2))],
            None,
            r"products .* need a loss, not None\n  do: pass",
        ),
        ("products", [(torch.zeros(2, 3, 12, 12), torch.zeros(2))], "mse", r"need a loss, not 'mse'"),
        (
            "products",
            [torch.zeros(2, 3, 12, 12)],
            LOSS,
            r"batch 0 of the data has no targets.*\n  do: pass batches of \(in",
        ),
        ("products", "one", _loss_of(1.0), r"the loss of batch 0 returned float, not a tensor\n  do: return a scalar"),
        ("products", "one", _loss_of(torch.zeros(2)), r"the loss of batch 0 returned the shape \[2\], not one number"),
        ("products", "one", _loss_of(torch.tensor(torch.nan)), r"the loss of batch 0 is nan"),
        ("products", "one", _loss_of(torch.zeros(())), r"the loss of batch 0 does not depend on the network's weights"),
    ],
)
def test_data_and_losses_that_will_not_do(reads: str, data: Any, loss: Any, text: str) -> None:
    _, coupling = ready(Chain, 2, 3, 12, 12)
    if data == "one":
        data = [(torch.zeros(2, 3, 12, 12), torch.zeros(2))]
    if isinstance(data, list):
        data = torch.utils._pytree.tree_map(Tensor.double, data)
    with pytest.raises(BadRequest, match=text):
        collect(coupling, coupling.groups, (reads,), data, loss=loss)


def test_an_error_in_a_users_loss_says_where_it_happened() -> None:
    _, coupling = ready(Chain, 2, 3, 12, 12)

    def mine(outputs: Tensor, targets: Tensor) -> Tensor:
        raise ZeroDivisionError("theirs")

    with pytest.raises(ZeroDivisionError, match="theirs") as caught:
        collect(coupling, coupling.groups, ("products",), [(torch.zeros(2, 3, 12, 12), torch.zeros(2))], loss=mine)
    assert caught.value.__notes__ == ["while the loss of batch 0 of the calibration data was computed"]


# ------------------------------------------------------------------------------------------ gradients that do not come


class Backbone(nn.Module):
    """A frozen part and a head."""

    def __init__(self, cut: str) -> None:
        super().__init__()
        self.a, self.b, self.h, self.fc = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 1), nn.Linear(8, 2)
        self.cut = cut

    def forward(self, x: Tensor) -> Tensor:
        with torch.set_grad_enabled(self.cut != "no_grad" and torch.is_grad_enabled()):
            x = F.relu(self.b(F.relu(self.a(x))))
        x = x.detach() if self.cut == "detach" else x
        return self.fc(F.relu(self.h(x)).mean((2, 3)))


@pytest.mark.parametrize("cut", ["detach", "no_grad"])
@pytest.mark.parametrize("normed", [False, True])
def test_filters_that_no_gradient_reaches_are_not_scored(cut: str, normed: bool) -> None:
    torch.manual_seed(0)
    model = Backbone(cut)
    if normed:
        nn.utils.parametrizations.weight_norm(model.h)
    data = [(images(2)[0].float(), torch.zeros(2))] * 2
    options: dict[str, Any] = {"ratios": 0.5, "criterion": "taylor", "data": data, "loss": LOSS}
    if cut == "detach" or not normed:  # the captured pass, which computed weights need, knows no no_grad
        text = r"no gradient .* reached the filters of 2 groups in any batch: 'a', 'b'\n.*\n  do: let gradients through"
        with pytest.raises(CannotPrune, match=text):
            plan(model, data[0][0], **options)
    assert len(plan(model, data[0][0], **options, exclude=("a", "b")).keep["h"]) == 4


def test_gradients_inside_inference_mode() -> None:
    model = Backbone("")
    data = [(images(2)[0].float(), torch.zeros(2))]
    options: dict[str, Any] = {"ratios": 0.5, "criterion": "taylor", "data": data, "loss": LOSS}
    want = plan(model, data[0][0], **options)
    with torch.inference_mode():
        assert plan(model, data[0][0], **options).keep == want.keep


# ------------------------------------------------------------------------------------------------------------- chance


class Drawing(nn.Module):
    """It draws in eval mode as well."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 12, 3), nn.Conv2d(12, 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.dropout(F.relu(self.a(x)), 0.5, True)).mean((2, 3))


@pytest.mark.parametrize("reads", ["maps", "products"])
def test_randomness_is_the_callers_own(reads: str) -> None:
    """A shuffled loader and a network that draws: nothing moves outside, and the same call finds the same."""
    torch.manual_seed(0)
    x = torch.randn(8, 3, 8, 8)
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(x, torch.arange(8) % 2), batch_size=3, shuffle=True
    )
    coupling = couple(trace(Drawing(), x))
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        (evidence,) = collect(coupling, coupling.groups, (reads,), loader, loss=LOSS).values()
        assert torch.equal(torch.get_rng_state(), before)
        found.append(evidence[reads] if reads == "products" else evidence[reads].mean)
    assert torch.equal(*found)


# --------------------------------------------------------------------------------------------------------- processes


def measured(parts: bool) -> dict[str, Tensor]:
    """Statistics of uneven batches as one flat dict; ``parts``: of this process's share of them."""
    _, coupling = ready(Stream)
    make = torch.Generator().manual_seed(3)
    data = [(x, torch.randint(2, (len(x),), generator=make)) for x in images(4, 1, 3, 2, 5)]
    own = data[part(len(data))] if parts else data
    found = collect(coupling, coupling.groups, ("maps", "activations", "products"), own, loss=LOSS)
    flat: dict[str, Tensor] = {}
    for name, fields in found.items():
        flat[f"{name} products"] = fields["products"]
        for field in ("maps", "activations"):
            values = dict(vars(fields[field]))
            flat[f"{name} {field} samples"] = torch.tensor(values.pop("samples"))
            flat |= {f"{name} {field} {key}": value for key, value in values.items()}
    return flat


def test_two_processes_find_what_one_finds(tmp_path: Path) -> None:
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
            torch.testing.assert_close(theirs[name], tensor, rtol=1e-9, atol=1e-15)
    assert "does not fit" in (tmp_path / "own.txt").read_text()
    assert "another process failed" in (tmp_path / "other.txt").read_text()


def _in_process(folder: Path) -> None:
    torch.distributed.init_process_group("gloo")
    number = torch.distributed.get_rank()
    found = measured(parts=True)
    save_file({n: t.contiguous() for n, t in found.items()}, str(folder / f"{number}.safetensors"))
    _, coupling = ready(Stream)
    try:
        collect(coupling, coupling.groups, ("maps",), images(2) if number else [torch.zeros(1, 2)])
    except BadRequest as error:
        (folder / ("other.txt" if number else "own.txt")).write_text(str(error))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    _in_process(Path(sys.argv[1]))
