"""Saved folders: what comes back is what was saved, and what is damaged says so and breaks nothing."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from example_plans import X, names, network, no_file_beyond, pruned, random_plan, same, trained
from secateur import artifact
from secateur.artifact import FILES, load, read_measurement, read_plan, save
from secateur.core import Edit, Measurement
from secateur.errors import BadArtifact, BadRequest, WrongModel
from secateur.plans import compose
from secateur.surgery import apply, record

# --- there and back --------------------------------------------------------------------------------------------------


def test_what_is_loaded_is_what_was_saved(tmp_path: Path) -> None:
    small, plan = pruned()
    measurement = Measurement(params=10, macs=20, accuracy=0.5, latency_ms=1.5, details={"per_layer": [1, 2]})
    assert save(tmp_path / "small", small, plan, measurement=measurement) == (tmp_path / "small").resolve()
    assert names(tmp_path) == ["small"]
    assert names(tmp_path / "small") == sorted(FILES)
    fresh = network().eval()
    before = copy.deepcopy(fresh.state_dict())
    loaded = load(tmp_path / "small", fresh)
    assert same(loaded, small)
    assert torch.equal(loaded(X), small(X))
    assert all(torch.equal(before[name], value) for name, value in fresh.state_dict().items())
    assert type(loaded) is nn.Sequential
    assert loaded[0].out_channels == 4
    assert read_measurement(tmp_path / "small") == measurement
    assert read_plan(tmp_path / "small") == plan


def test_a_loaded_network_is_like_the_dense_one_it_was_given(tmp_path: Path) -> None:
    small, plan = pruned()
    save(tmp_path / "small", small, plan)
    fresh = network().train()
    fresh[0].weight.requires_grad_(False)
    calls: list[int] = []
    fresh[2].register_forward_hook(lambda *_: calls.append(1))
    loaded = load(tmp_path / "small", fresh)
    loaded(X)
    assert loaded.training
    assert calls == [1]
    assert [p.requires_grad for p in loaded.parameters()] == [p.requires_grad for p in fresh.parameters()]


def test_dtype_and_memory_format_survive(tmp_path: Path) -> None:
    model = trained().to(memory_format=torch.channels_last)
    plan = random_plan(model, X)
    small = apply(model, plan, check=False).double()
    assert not small[0].weight.is_contiguous()
    save(tmp_path / "small", small, plan)
    loaded = load(tmp_path / "small", network().to(memory_format=torch.channels_last))
    assert same(loaded, small)
    assert loaded[0].weight.dtype == torch.float64
    assert loaded[0].weight.is_contiguous(memory_format=torch.channels_last)


class Tied(nn.Module):
    """Tied convolutions, weight norm, and a pruned buffer that ``state_dict`` leaves out."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1)
        self.a, self.b = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.b.weight = self.a.weight
        self.last = nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 6, 1))
        self.head = nn.Conv2d(6, 2, 1)
        self.register_buffer("shift", torch.linspace(0, 1, 6)[:, None, None], persistent=False)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"y": self.head(self.last(self.b(self.a(self.stem(x)).relu()).relu()) + self.shift)}


def test_tied_weights_are_stored_once_and_come_back_tied(tmp_path: Path) -> None:
    model = Tied().eval()
    plan = random_plan(model, X)
    small = apply(model, plan)
    save(tmp_path / "small", small, plan)
    stored = load_file(tmp_path / "small" / "model.safetensors")
    assert "a.weight" in stored
    assert not {"b.weight", "shift"} & set(stored)
    loaded = load(tmp_path / "small", Tied().eval())
    assert loaded.a.weight is loaded.b.weight
    assert torch.equal(loaded(X)["y"], small(X)["y"])
    assert small.shift.shape == (3, 1, 1)


def test_a_network_by_name(tmp_path: Path) -> None:
    from secateur.zoo.names import build

    model = build("zoo:resnet20").eval()
    plan = random_plan(model, torch.randn(1, 3, 32, 32))
    save(tmp_path / "small", apply(model, plan, check=False), plan)
    loaded = load(tmp_path / "small", "zoo:resnet20")
    assert same(loaded, apply(model, plan, check=False))
    with pytest.raises(BadRequest, match=r"would import code from 'example_plans', which is not allowed here"):
        load(tmp_path / "small", "example_plans:network")
    with pytest.raises(WrongModel, match=r"tensor '.*' .* of the plan's network is missing in this model"):
        load(tmp_path / "small", "example_plans:network", allow_import=True)


def test_pruned_twice_and_trained_loads_from_the_original(tmp_path: Path) -> None:
    once, first = pruned()
    second = random_plan(once, X, seed=1, ratio=0.4)
    twice = apply(once, second)
    with torch.no_grad():
        twice[0].weight.mul_(2)
    save(tmp_path / "small", twice, second)
    assert same(load(tmp_path / "small", network().eval()), twice)
    whole = record(twice).plan  # type: ignore[union-attr]
    assert dict(read_plan(tmp_path / "small").keep) == dict(compose(first, second).keep) == dict(whole.keep)
    save(tmp_path / "again", copy.deepcopy(twice), whole)
    assert same(load(tmp_path / "again", network().eval()), twice)


class Shuffled(nn.Module):
    """A channel shuffle by sizes written in the forward, which no attribute reaches: it comes back as a graph."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.a(x)
        x = x.reshape(x.shape[0], 2, 4, x.shape[2], x.shape[3]).transpose(1, 2).flatten(1, 2)
        return self.b(x) * torch.tensor(2.0)


def test_a_network_that_is_a_graph_comes_back_as_one(tmp_path: Path) -> None:
    once: nn.Module = Shuffled().eval()
    for seed in (0, 1):  # the second round prunes the graph
        plan = random_plan(once, X, seed=seed, ratio=0.3)
        small = once = apply(once, plan)
        assert record(small).tier == "graph"  # type: ignore[union-attr]
        save(tmp_path / "small", small, plan)
        assert read_plan(tmp_path / "small").edits == (Edit("graph", ""),)
        assert torch.equal(load(tmp_path / "small", Shuffled().eval())(X), small(X))


def test_made_by_is_written_as_given(tmp_path: Path) -> None:
    from dataclasses import replace

    small, plan = pruned()
    save(tmp_path / "small", small, replace(plan, made_by={**plan.made_by, "model": "zoo:mine"}))
    assert dict(read_plan(tmp_path / "small").made_by) == {"criterion": "random", "model": "zoo:mine"}


def test_a_network_pruned_by_other_means_is_saved_by_its_plan(tmp_path: Path) -> None:
    small, plan = pruned()
    bare = copy.deepcopy(small)
    del bare.__dict__["_secateur_record"]
    save(tmp_path / "small", bare, plan)
    assert same(load(tmp_path / "small", network()), small)


def test_the_environment_is_told(tmp_path: Path) -> None:
    small, plan = pruned()
    folder = save(tmp_path / "small", small, plan)
    told = json.loads((folder / "environment.json").read_text())
    assert told["torch"] == torch.__version__
    assert told["model"] == "torch.nn.modules.container.Sequential"
    assert told.keys() == {"secateur", "python", "torch", "platform", "model", "dtype", "device"}
    assert read_measurement(folder) is None


# --- what is refused when saving -------------------------------------------------------------------------------------


def test_a_plan_for_another_network_is_not_saved(tmp_path: Path) -> None:
    small, plan = pruned()
    with pytest.raises(
        WrongModel, match=r"tensor '0.weight' is \[4, 3, 3, 3\] in the pruned network of the plan but \[8, 3"
    ):
        save(tmp_path / "small", trained(), plan)
    assert names(tmp_path) == []
    small[5] = nn.Linear(3, 5)
    with pytest.raises(
        WrongModel, match=r"tensor '5.weight' is \[5, 12\] in the pruned network of the plan but \[5, 3\]"
    ):
        save(tmp_path / "small", small, plan)


def test_what_was_added_after_pruning_is_not_dropped_silently(tmp_path: Path) -> None:
    small, plan = pruned()
    more = copy.deepcopy(small)
    more.add_module("6", nn.Linear(5, 2))
    with pytest.raises(
        WrongModel, match=r"tensor '6\.weight' \[2, 5\] of the network to be saved is unknown to the plan's"
    ):
        save(tmp_path / "small", more, plan)
    assert names(tmp_path) == []


def test_what_cannot_be_written_without_pickle_is_refused(tmp_path: Path) -> None:
    class Extra(nn.Sequential):
        def get_extra_state(self) -> Any:
            return {"any": "thing"}

    small, plan = pruned()
    with pytest.raises(BadArtifact, match=r"'_extra_state' \(dict\) is no tensor but extra state"):
        save(tmp_path / "small", Extra(*small), plan)
    with pytest.raises(BadRequest, match=r"measurement\.accuracy: nan is not a number that JSON can hold"):
        save(tmp_path / "small", small, plan, measurement=Measurement(1, 1, accuracy=float("nan")))
    assert names(tmp_path) == []


def test_only_saved_networks_are_replaced(tmp_path: Path) -> None:
    small, plan = pruned()
    folder = tmp_path / "deep" / "small"
    save(folder, small, plan, measurement=Measurement(1, 2))
    other, plan = pruned(seed=3)
    save(folder, other, plan)
    assert same(load(folder, network()), other)
    assert read_measurement(folder) is None  # nothing of the old one is left
    (tmp_path / "empty").mkdir()
    save(tmp_path / "empty", small, plan)
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(BadArtifact, match=r"holds other files \(notes\.txt\) and is not replaced"):
        save(folder, small, plan)
    assert (folder / "notes.txt").read_text() == "mine"
    part = tmp_path / "part"
    part.mkdir()
    (part / "plan.json").write_text("{}")
    with pytest.raises(BadArtifact, match="is not a whole saved network and is not replaced"):
        save(part, small, plan)
    with pytest.raises(BadArtifact, match="is a file\n  do: choose another folder"):
        save(part / "plan.json", small, plan)
    assert names(tmp_path) == ["deep", "empty", "part"]
    assert names(tmp_path / "deep") == ["small"]


@pytest.mark.parametrize("room", [500, 5000])  # the weights do not fit; weights and plan do, the measurement does not
@pytest.mark.parametrize("existing", [False, True])
def test_a_full_disk_leaves_nothing_half_written(tmp_path: Path, existing: bool, room: int) -> None:
    small, plan = pruned()
    if existing:
        save(tmp_path / "new" / "small", small, plan)
    changed, second = pruned(seed=5)
    long = Measurement(1, 2, details={"numbers": list(range(2000))})
    with no_file_beyond(room), pytest.raises(BadArtifact, match=r"small cannot be written: .*File too large"):
        save(tmp_path / "new" / "small", changed, second, measurement=long)
    if existing:
        assert names(tmp_path / "new") == ["small"]
        assert same(load(tmp_path / "new" / "small", network()), small)
    else:
        assert names(tmp_path) == []


@pytest.mark.parametrize("step", ["fsync", "rename", "write_text", "mkdir"])
@pytest.mark.parametrize("existing", [False, True])
def test_a_failure_at_any_step_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, existing: bool
) -> None:
    small, plan = pruned()
    folder = tmp_path / "new" / "small"
    if existing:
        save(folder, small, plan)
    changed, second = pruned(seed=5)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    def full_at_last(self: Path, target: Path) -> Any:
        return full() if self.name.endswith(".partial") else os.rename(self, target)

    if step == "fsync":
        monkeypatch.setattr(artifact.os, "fsync", full)
    else:
        monkeypatch.setattr(Path, step, full_at_last if step == "rename" else full)
    with pytest.raises(BadArtifact, match="small cannot be written: No space left on device"):
        save(folder, changed, second)
    monkeypatch.undo()
    assert names(tmp_path) == (["new"] if existing else [])
    if existing:
        assert names(tmp_path / "new") == ["small"]
        assert same(load(folder, network()), small)


def test_an_interrupt_leaves_nothing_either(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    small, plan = pruned()
    monkeypatch.setattr(artifact.os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path / "small", small, plan)
    assert names(tmp_path) == []
