"""Damaged saved folders: each file missing, cut off, or of another save, and what is said about it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from example_plans import network, pruned
from secateur.artifact import load, read_measurement, save
from secateur.core import Measurement
from secateur.errors import BadArtifact, BadPlan, WrongModel


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    small, plan = pruned()
    return save(tmp_path_factory.mktemp("saved") / "small", small, plan, measurement=Measurement(1, 2))


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "small"))


def test_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(BadArtifact, match=r"nowhere does not exist: a saved network is a folder with plan\.json"):
        load(tmp_path / "nowhere", network())
    (tmp_path / "file").write_text("")
    with pytest.raises(BadArtifact, match="file is a file, not a folder"):
        load(tmp_path / "file", network())
    with pytest.raises(BadArtifact, match=r"holds no plan\.json: it is no saved network, or a part of one"):
        load(tmp_path, network())


def test_missing_files(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(BadArtifact, match=r"small holds no model\.safetensors: it is no saved network"):
        load(folder, network())


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_truncated_weights(folder: Path, keep: int) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:keep])
    with pytest.raises(BadArtifact, match=r"model\.safetensors is truncated or no safetensors file"):
        load(folder, network())


def test_weights_of_another_save(folder: Path) -> None:
    weights = folder / "model.safetensors"
    stored = load_file(weights)
    save_file({k: v for k, v in stored.items() if k != "3.bias"}, weights)
    with pytest.raises(BadArtifact, match=r"tensor '3\.bias' \[3\] is missing: plan and weights are not of one save"):
        load(folder, network())
    save_file({**stored, "3.bias": torch.zeros(4)}, weights)
    with pytest.raises(BadArtifact, match=r"tensor '3\.bias' is \[4\] but the plan leaves \[3\]"):
        load(folder, network())
    save_file({**stored, "more": torch.zeros(4)}, weights)
    with pytest.raises(BadArtifact, match=r"tensor 'more' \[4\] is none of the pruned network's"):
        load(folder, network())


def test_a_damaged_plan(folder: Path) -> None:
    plan = folder / "plan.json"
    text = plan.read_text()
    plan.write_text(text[:300])
    with pytest.raises(BadPlan, match=r"plan\.json: plan: not JSON, or cut off"):
        load(folder, network())
    plan.write_text(text.replace('"keep": "', '"keep": "0-99999999999,'))
    with pytest.raises(
        BadPlan, match=r"plan\.json: plan: groups\[0\]\.keep: at '0-99999999999' there are more than the"
    ):
        load(folder, network())
    plan.write_bytes(b"\xff\xfe")
    with pytest.raises(BadArtifact, match=r"plan\.json is damaged: it is not text"):
        load(folder, network())
    with plan.open("wb") as file:
        file.truncate(65 * 2**20)
    with pytest.raises(BadArtifact, match=r"plan\.json is larger than 64 MiB"):
        load(folder, network())


def test_another_dense_network(folder: Path) -> None:
    wide = network()
    wide[3] = nn.Conv2d(8, 7, 3, padding=1)
    with pytest.raises(
        WrongModel, match=r"tensor '3.weight' is \[6, 8, 3, 3\] in the plan's network but \[7, 8, 3, 3\]"
    ):
        load(folder, wide)


def test_a_damaged_measurement(folder: Path) -> None:
    (folder / "measure.json").write_text('{"params": "many", "macs": 1}')
    with pytest.raises(BadArtifact, match=r"measure\.json: params: input should be a valid integer"):
        read_measurement(folder)
    (folder / "measure.json").write_text("[" * 10)
    with pytest.raises(BadArtifact, match=r"measure\.json: the whole: invalid json"):
        read_measurement(folder)
