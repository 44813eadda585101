"""Weights load from what training scripts write, and from nothing else; a refused file changes nothing."""

from __future__ import annotations

import argparse
import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from secateur.errors import BadArtifact, BadRequest, WrongModel
from secateur.zoo.weights import load_weights


class Net(nn.Module):
    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, width, 3)
        self.bn = nn.BatchNorm2d(width)


def filled(value: float) -> dict[str, torch.Tensor]:
    return {name: torch.full_like(tensor, value) for name, tensor in Net().state_dict().items()}


def holds(model: nn.Module, value: float) -> bool:
    return all(bool((tensor == value).all()) for tensor in model.state_dict().values())


def prefixed(prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {prefix + name: tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    "content",
    [
        filled(2),
        {"state_dict": filled(2), "epoch": 3, "state_dict_ema": filled(5)},
        {"model": filled(2), "model_ema": filled(5), "args": argparse.Namespace(lr=0.1)},
        {"model": "resnet", "model_state_dict": prefixed("module.", filled(2)), "ema": {"module": filled(5)}},
        {"state_dict": {**prefixed("model.", filled(2)), **prefixed("ema_model.module.", filled(5))}},
        {**prefixed("_orig_mod.module.", filled(2)), **prefixed("ema.", filled(5))},
    ],
)
def test_containers_and_prefixes(content: dict[str, object], tmp_path: Path) -> None:
    torch.save(content, tmp_path / "net.pth")
    model = Net()
    assert load_weights(model, tmp_path / "net.pth") is model
    assert holds(model, 2)
    if content.keys() == Net().state_dict().keys():  # the bare weights: no others beside them
        with pytest.raises(BadRequest, match="holds no averaged weights"):
            load_weights(model, tmp_path / "net.pth", ema=True)
        assert holds(model, 2)
    else:
        assert holds(load_weights(Net(), tmp_path / "net.pth", ema=True), 5)


@pytest.mark.parametrize(
    "prefix", ["module.", "model.", "module.model.", "_orig_mod.", "ema.", "ema.module.", "ema_model."]
)
def test_prefixes_in_safetensors(prefix: str, tmp_path: Path) -> None:
    save_file(prefixed(prefix, filled(2)), tmp_path / "net.safetensors")
    assert holds(load_weights(Net(), tmp_path / "net.safetensors"), 2)


def test_averaged_model_of_torch(tmp_path: Path) -> None:
    averaged = torch.optim.swa_utils.AveragedModel(Net())
    averaged.module.load_state_dict(filled(2))
    torch.save({"ema": averaged.state_dict()}, tmp_path / "net.pt")
    assert holds(load_weights(Net(), tmp_path / "net.pt", ema=True), 2)


def test_a_prefix_that_is_the_models_own_stays(tmp_path: Path) -> None:
    outer = nn.ModuleDict({"model": Net()})
    save_file(prefixed("module.model.", filled(2)), tmp_path / "net.safetensors")
    assert holds(load_weights(outer, tmp_path / "net.safetensors"), 2)
    tensors = prefixed("model.", filled(3))
    del tensors["model.bn.bias"]
    save_file(tensors, tmp_path / "short.safetensors")
    with pytest.raises(WrongModel, match=r"'model\.bn\.bias' is missing in the file\n"):
        load_weights(outer, tmp_path / "short.safetensors")
    assert holds(outer, 2)


def test_a_wrapper_around_a_model_that_has_a_part_of_that_name(tmp_path: Path) -> None:
    outer = nn.ModuleDict({"module": Net(), "head": Net()})
    tensors = {**prefixed("module.module.", filled(2)), **prefixed("module.head.", filled(2))}
    save_file(tensors, tmp_path / "net.safetensors")
    assert holds(load_weights(outer, tmp_path / "net.safetensors"), 2)


def test_wrapped_model_cast_and_old_batch_norm(tmp_path: Path) -> None:
    tensors = {name: tensor.half() for name, tensor in filled(2).items() if "tracked" not in name}
    save_file(tensors, tmp_path / "net.safetensors")
    model = Net().double()
    load_weights(nn.DataParallel(model), tmp_path / "net.safetensors")
    assert model.conv.weight.dtype == torch.float64
    assert bool((model.conv.weight == 2).all())
    assert model.bn.num_batches_tracked == 0


def test_tied_weights_need_one_name(tmp_path: Path) -> None:
    tied = nn.ModuleDict({"a": nn.Linear(2, 2, bias=False), "b": nn.Linear(2, 2, bias=False)})
    tied["b"].weight = tied["a"].weight
    save_file({"b.weight": torch.full((2, 2), 2.0)}, tmp_path / "net.safetensors")
    assert holds(load_weights(tied, tmp_path / "net.safetensors"), 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"conv.weight": None}, r"net.pth does not fit this Net: 'conv\.weight' is missing in the file\n"),
        ({"fc.bias": torch.zeros(2), "fc.weight": torch.zeros(2)}, r"'fc\.bias' of the file .*\(and 1 more\)"),
        ({"bn.bias": torch.zeros(4)}, r"'bn\.bias' is \[4\] in the file and \[3\] in the model"),
        ({"bn.bias": torch.zeros(3, dtype=torch.int8)}, r"torch\.int8 in the file and torch\.float32"),
    ],
)
def test_weights_of_another_network(change: dict[str, torch.Tensor | None], message: str, tmp_path: Path) -> None:
    tensors = {name: tensor for name, tensor in {**filled(2), **change}.items() if tensor is not None}
    torch.save(tensors, tmp_path / "net.pth")
    model = Net()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(WrongModel, match=message):
        load_weights(model, tmp_path / "net.pth")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


class Hostile:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return (os.mkdir, (str(self.path),))


@pytest.mark.parametrize("plain_pickle", [False, True])
def test_code_in_a_file_is_refused(plain_pickle: bool, tmp_path: Path) -> None:
    content = {"state_dict": filled(2), "more": Hostile(tmp_path / "owned")}
    if plain_pickle:
        (tmp_path / "net.pth").write_bytes(pickle.dumps(Hostile(tmp_path / "owned"), protocol=2))
    else:
        torch.save(content, tmp_path / "net.pth")
    with pytest.raises(BadArtifact, match=r"holds more than weights: its pickle calls '\w+\.mkdir'") as caught:
        load_weights(Net(), tmp_path / "net.pth")
    assert "weights_only" not in str(caught.value)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("gone.pth", None, "there is no file"),
        ("", None, "is a folder.*\n.*secateur.load"),
        ("net.onnx", b"x", r"unknown kind of file '\.onnx'"),
        ("net.pth", b"", "is damaged, or torch.save did not write it"),
        ("net.pth", b"PK\x03\x04 cut off", "is damaged, or torch.save did not write it"),
        ("net.safetensors", b"\x10\x00\x00\x00\x00\x00\x00\x00{", "is not a readable safetensors file"),
    ],
)
def test_files_that_cannot_be_read(name: str, content: bytes | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(BadArtifact, match=message):
        load_weights(Net(), tmp_path / name)


def test_file_without_weights(tmp_path: Path) -> None:
    torch.save({"epoch": 3, "optimizer": {"lr": 0.1}}, tmp_path / "net.pth")
    with pytest.raises(BadArtifact, match=r"no weights that could be found \(keys 'epoch', 'optimizer'\)"):
        load_weights(Net(), tmp_path / "net.pth")
