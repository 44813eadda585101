"""Output moments of whole networks against forward hooks in plain torch."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from measured_networks import Chain, D, Stream, images, ready
from networks import NETWORKS, randomise
from secateur.calibration import collect
from secateur.consumers import consumers_of
from secateur.core import Group, OutputMoments
from secateur.errors import BadRequest, CannotPrune, SecateurWarning
from secateur.graph import trace
from secateur.groups import Coupling, couple, freed
from secateur.processes import part
from secateur.zoo.names import build

LAYERS = (nn.Linear, nn.modules.conv._ConvNd)


def naive(model: nn.Module, coupling: Coupling, group: Group, x: Any) -> list[tuple[str, Tensor, Tensor]]:
    """For every call of a module that reads ``group``: its name, ``[C, outputs]`` through each channel, and all."""
    found: list[tuple[str, Tensor, Tensor]] = []
    consumers, _ = consumers_of(freed(coupling), group)
    left = list(consumers)

    def hook(module: nn.Module, args: tuple[Tensor, ...], name: str) -> None:
        own = next((c for c in left if c.name == name), None)
        if own is None:
            return
        left.remove(own)
        axis = own.call.layout.channels_axis
        zero = module.forward(torch.zeros_like(args[0]))
        parts = []
        for channel in range(group.channels):
            kept = torch.zeros_like(args[0]).movedim(axis, 0)
            index = own.columns[own.channels == channel]
            kept[index] = args[0].movedim(axis, 0)[index]
            parts.append((module.forward(kept.movedim(0, axis)) - zero).flatten())
        found.append((name, torch.stack(parts), (module.forward(args[0]) - zero).flatten()))

    handles = [
        module.register_forward_pre_hook(lambda m, a, name=name: hook(m, a, name))
        for name, module in model.named_modules()
        if isinstance(module, LAYERS)
    ]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    assert not left
    return found


def compare(moments: OutputMoments, want: list[tuple[str, Tensor, Tensor]]) -> None:
    assert moments.readers == tuple(name for name, _, _ in want)
    for index, (_, z, y) in enumerate(want):
        for found, wanted in (
            (moments.gram, z @ z.mT),
            (moments.target, z @ z.sum(0)),
            (moments.goal, z.sum(0).square().sum()),
            (moments.energy, y.square().sum()),
        ):
            assert (found.dtype, found.device.type) == (D, "cpu")
            torch.testing.assert_close(found[index], wanted, rtol=1e-9, atol=1e-9 * float(wanted.abs().max()))
        assert float(moments.samples[index]) == z.shape[1]


@pytest.mark.parametrize("network", [Chain, Stream])
def test_outputs_are_what_forward_hooks_see(network: type[nn.Module]) -> None:
    shape = (2, 3, 12, 12) if network is Chain else ()
    model, coupling = ready(network, *shape)
    (x,) = images(4, side=12) if network is Chain else images(4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SecateurWarning)
        found = collect(coupling, coupling.groups, ("outputs",), [x])
    for group in coupling.groups:
        compare(found[group.name]["outputs"], naive(model, coupling, group, x))


KINDS = "conv_grouped transposed_grouped flatten_linear cat residual_stage linear_on_last_axis".split()


@pytest.mark.parametrize("name", [n for n in NETWORKS if n in KINDS])
@pytest.mark.filterwarnings("ignore::secateur.SecateurWarning")
def test_outputs_in_many_constructs(name: str) -> None:
    make, inputs, _ = NETWORKS[name]
    torch.manual_seed(0)
    model = randomise(make().double(), 1).eval()
    (x,) = (t.double() for t in inputs())
    coupling = couple(trace(model, x))
    found = collect(coupling, coupling.groups, ("outputs",), [x])
    for group in coupling.groups:
        compare(found[group.name]["outputs"], naive(model, coupling, group, x))


class Dense(nn.Module):
    """Each layer reads all that came before it."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(3 + 4 * i, 4, 3, padding=1) for i in range(3))
        self.norms = nn.ModuleList(nn.BatchNorm2d(3 + 4 * i) for i in range(3))
        self.head = nn.Linear(15, 2)

    def forward(self, x: Tensor) -> Tensor:
        for norm, layer in zip(self.norms, self.layers, strict=True):
            x = torch.cat([x, layer(torch.relu_(norm(x)))], 1)
        return self.head(x.mean((2, 3)))


def vgg() -> nn.Module:
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, 6), (6, 8), (8, 8)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(True)]
    head = [nn.Flatten(), nn.Linear(8 * 16, 12), nn.ReLU(True), nn.Dropout(), nn.Linear(12, 5)]
    return nn.Sequential(*layers[:6], nn.MaxPool2d(2), *layers[6:], *head)


REAL = {
    "resnet20": lambda: build("zoo:resnet20"),
    "mobilenet": lambda: build("torchvision:mobilenet_v2", width_mult=0.1, num_classes=5),
    "densenet": Dense,
    "vgg": vgg,
}


@pytest.mark.filterwarnings("ignore::secateur.zoo.torchvision_shim.TorchvisionMismatch")
@pytest.mark.parametrize("name", REAL)
def test_outputs_of_real_networks(name: str) -> None:
    torch.manual_seed(0)
    model = randomise(REAL[name]().double(), 1).eval()
    x = torch.randn(3, 3, 32 if name == "mobilenet" else 8, 32 if name == "mobilenet" else 8, dtype=D)
    coupling = couple(trace(model, x))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SecateurWarning)
        found = collect(coupling, coupling.groups, ("outputs",), [x[:1], x[1:]])
    assert len(coupling.groups) >= 3
    for group in coupling.groups:
        compare(found[group.name]["outputs"], naive(model, coupling, group, x))


class Sequence(nn.Module):
    """A transformer's feed-forward layers on sequences ``[L, N, I]``: examples are counted by axis 1."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(3, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(2).permute(2, 0, 1)
        return (rows + self.down(F.gelu(self.up(rows)))).mean(0)


@pytest.mark.filterwarnings("ignore::secateur.SecateurWarning")
def test_draws_from_sequences_are_of_each_image() -> None:
    _, coupling = ready(Sequence)
    data = images(4, 1, 3)
    group = next(g for g in coupling.groups if g.name == "up")
    one, other = (
        collect(coupling, [group], ("samples",), own, locations=5)["up"]["samples"] for own in (data, [torch.cat(data)])
    )
    assert float(one.samples[0]) == 8 * 5
    torch.testing.assert_close(one.gram, other.gram, rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("ignore::secateur.SecateurWarning")
def test_draws_do_not_depend_on_how_batches_are_cut() -> None:
    _, coupling = ready(Chain, 2, 3, 12, 12)
    data = images(4, 1, 3, side=12)
    runs = [
        collect(coupling, coupling.groups, ("outputs", "samples"), batches, locations=7, seed=seed)
        for batches, seed in ((data, 0), ([torch.cat(data)], 0), (data, 1))
    ]
    for group in coupling.groups:
        one, other, third = (run[group.name]["samples"] for run in runs)
        assert float(one.samples[0]) == 8 * 7
        torch.testing.assert_close(one.gram, other.gram, rtol=1e-12, atol=1e-12)
        assert not torch.allclose(one.gram, third.gram)
        exact = runs[0][group.name]["outputs"]
        torch.testing.assert_close(exact.gram, runs[1][group.name]["outputs"].gram, rtol=1e-11, atol=1e-11)


@pytest.mark.filterwarnings("ignore::secateur.SecateurWarning")
def test_many_draws_are_like_all_outputs() -> None:
    _, coupling = ready(Chain, 2, 3, 12, 12)
    data = images(8, side=12)
    found = collect(coupling, coupling.groups, ("outputs", "samples"), data, locations=20000)
    for group in coupling.groups:
        exact, drawn = found[group.name]["outputs"], found[group.name]["samples"]
        scale = float(exact.samples[0] / drawn.samples[0])
        gap = (drawn.gram * scale - exact.gram).norm() / exact.gram.norm()
        assert float(gap) < 0.05
        assert float(drawn.energy[0]) * scale == pytest.approx(float(exact.energy[0]), rel=0.05)


class Changed(nn.Module):
    """What is read is changed in place afterwards: maps, rows, and a weight that is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 7, 3, padding=1), nn.Conv2d(7, 6, 1)
        self.w = nn.Parameter(torch.randn(5, 6))

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        y = self.b(x)
        torch.relu_(x)
        z = self.c(y)
        y *= 2
        z = z.mean((2, 3))
        weight = self.w * 2
        found = F.linear(z, weight)
        weight.mul_(3)
        z += 1
        return found + x.sum() + y.sum() + z.sum() + weight.sum()

    def read(self, x: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """The input and the weight of what reads each layer, as unfolded rows and a matrix."""
        x = self.a(x)
        y = self.b(x)
        z = self.c(y).mean((2, 3))
        rows = F.unfold(x, 3, padding=1).mT.flatten(0, 1)
        return {
            "a": (rows, self.b.weight.flatten(1)),
            "b": (y.movedim(1, 3).flatten(0, 2), self.c.weight.flatten(1)),
            "c": (z, self.w * 2),
        }


@pytest.mark.parametrize("dtype", [torch.float32, D])
@pytest.mark.filterwarnings("ignore::secateur.SecateurWarning")
def test_what_is_changed_in_place_afterwards(dtype: torch.dtype) -> None:
    """Small inputs are held back, and summed together later."""
    torch.manual_seed(0)
    model = Changed().to(dtype).eval()
    data = [x.to(dtype) for x in images(2, 3, 2)]
    coupling = couple(trace(model, data[0]))
    found = collect(coupling, coupling.groups, ("outputs",), data)
    assert {*found} == {"a", "b", "c"}
    with torch.no_grad():
        for name, (rows, weight) in copy.deepcopy(model).double().read(torch.cat(data).double()).items():
            channels = found[name]["outputs"].gram.shape[-1]
            parts = rows.unflatten(1, (channels, -1)), weight.unflatten(1, (channels, -1))
            z = torch.einsum("nck,ock->cno", *parts).flatten(1)
            gram = z @ z.mT
            gap = (found[name]["outputs"].gram.sum(0) - gram).norm() / gram.norm()
            assert float(gap) < (1e-5 if dtype == torch.float32 else 1e-10)


def test_few_samples_are_said() -> None:
    _, coupling = ready(Chain, 2, 3, 12, 12)
    with pytest.warns(SecateurWarning, match="fewer samples than channels to tell apart in 'a' "):
        collect(coupling, coupling.groups, ("samples",), images(1, side=12), locations=1)


def test_outputs_that_are_not_finite() -> None:
    _, coupling = ready(Chain, 2, 3, 12, 12)
    (x,) = images(2, side=12)
    x[0, 0, 0, 0] = torch.inf
    with pytest.raises(BadRequest, match="the outputs of the layers that read group 'a' are not finite"):
        collect(coupling, coupling.groups, ("outputs",), [x])


class Gate(nn.Module):
    """One group is read by nothing that is affine."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 4), nn.Linear(3, 4), nn.Linear(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.c((self.a(x) * self.b(x)).unsqueeze(1) @ self.a(x).unsqueeze(2)).flatten(1)


def test_a_group_that_nothing_affine_reads() -> None:
    _, coupling = ready(Gate, 2, 3)
    with pytest.raises(CannotPrune) as told:
        collect(coupling, coupling.groups, ("outputs",), [torch.randn(4, 3, dtype=D)])
    assert str(told.value).startswith("no convolution or linear layer whose outputs could be compared reads group ")
    assert "matmul multiplies activations with each other" in str(told.value)
    assert "\n  do: leave them whole, exclude=[" in str(told.value)
    assert str(told.value).endswith("or use a criterion that looks at weights, such as 'l1'")


class Half(nn.Module):
    """One group is read by a linear layer, and by a product of activations."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 4), nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x)
        return self.c(a) + (a.unsqueeze(1) @ self.b(x).unsqueeze(2)).flatten(1)


def test_readers_that_are_not_affine_are_named() -> None:
    _, coupling = ready(Half, 2, 3)
    group = next(g for g in coupling.groups if g.name == "a")
    with pytest.warns(SecateurWarning) as told:
        found = collect(coupling, [group], ("outputs",), [torch.randn(5, 3, dtype=D)])
    (text,) = (str(w.message) for w in told)
    assert "some readers of 1 groups are not affine in what they read, and their outputs do not count: 'a': " in text
    assert text.endswith("(matmul multiplies activations with each other)")
    assert found["a"]["outputs"].readers == ("c",)


# -------------------------------------------------------------------------------------------------------- processes


def measured(*, parts: bool) -> dict[str, Tensor]:
    """The moments of uneven batches as one flat dict; ``parts``: of this process's share of them."""
    _, coupling = ready(Stream)
    data = images(4, 1, 3, 2, 5)
    own = data[part(len(data))] if parts else data
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SecateurWarning)
        found = collect(coupling, coupling.groups, ("outputs", "samples"), own, locations=6)
    return {
        f"{name} {kind} {key}": value
        for name, kinds in found.items()
        for kind, moments in kinds.items()
        for key, value in vars(moments).items()
        if key != "readers"
    }


def test_two_processes_find_what_one_finds(tmp_path: Path) -> None:
    """All outputs, and as many draws; the two draw differently, and both know what they drew together."""
    here = Path(__file__).parent
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", __file__]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{here.parent / 'src'}:{here}"}
    told = subprocess.run(
        [*command, str(tmp_path)], check=False, env=environment, capture_output=True, text=True, timeout=300
    )
    assert told.returncode == 0, told.stderr
    want = measured(parts=False)
    one, other = (load_file(tmp_path / f"{process}.safetensors") for process in (0, 1))
    assert one.keys() == other.keys() == want.keys()
    for name, tensor in want.items():
        torch.testing.assert_close(one[name], other[name], rtol=0, atol=0)
        if "outputs" in name or name.endswith("samples samples"):
            torch.testing.assert_close(one[name], tensor, rtol=1e-9, atol=1e-9 * float(tensor.abs().max()))


def _in_process(folder: Path) -> None:
    torch.distributed.init_process_group("gloo")
    number = torch.distributed.get_rank()
    save_file({n: t.contiguous() for n, t in measured(parts=True).items()}, str(folder / f"{number}.safetensors"))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    _in_process(Path(sys.argv[1]))
