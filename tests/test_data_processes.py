"""Two real processes side by side read, bit for bit, what one process reads."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import secateur
from made_data import write_fashion, write_folder
from secateur.errors import BadRequest
from secateur.zoo.data import DataSettings, open_data

pytestmark = pytest.mark.filterwarnings("ignore::secateur.zoo.torchvision_shim.TorchvisionMismatch")

READ = """
import sys
import torch
from torch import distributed
from secateur.errors import BadRequest
from secateur.zoo.data import DataSettings, open_data

distributed.init_process_group("gloo")
torch.manual_seed(100 + distributed.get_rank())
root, out = sys.argv[1:]
found = {}
for name, size, workers in (("fashion-mnist", 16, 0), ("fashion-mnist", 16, 1), ("folder:images", 24, 0)):
    data = open_data(DataSettings(name, root, batch=8, size=size, limit=64, workers=workers), seed=5)
    for part in ("train", "validation", "test", "calibration")[: 1 if workers else 4]:
        loader = getattr(data, part)
        found[f"{name} {workers} {part}"] = list(loader.epoch(3, 1)), len(loader), loader.samples
try:
    open_data(DataSettings("fashion-mnist", root, batch=7))
except BadRequest as error:
    found["refused"] = str(error)
torch.save(found, f"{out}/{distributed.get_rank()}.pt")
distributed.barrier()
distributed.destroy_process_group()
"""


def test_the_parts_of_two_processes_are_the_batches_of_one(tmp_path: Path) -> None:
    script = tmp_path / "read.py"
    script.write_text(READ)
    write_folder(tmp_path / "images")
    write_fashion(tmp_path, train=200, test=45)
    env = {**os.environ, "PYTHONPATH": str(Path(secateur.__file__).parent.parent), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    subprocess.run([*command, str(script), str(tmp_path), str(tmp_path)], check=True, env=env, capture_output=True)
    ours, theirs = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    for name, size in (("fashion-mnist", 16), ("folder:images", 24)):
        data = open_data(DataSettings(name, tmp_path, batch=8, size=size, limit=64), seed=5)
        for part in ("train", "validation", "test", "calibration"):
            loader = getattr(data, part)
            expected = list(loader.epoch(3, 1))
            for workers in (0, 1) if (name, part) == ("fashion-mnist", "train") else (0,):
                (one, length, samples), (other, _, _) = (found[f"{name} {workers} {part}"] for found in (ours, theirs))
                assert (length, samples) == (len(loader), loader.samples)
                assert len(expected) == len(other) >= len(one)
                for n, (inputs, targets) in enumerate(expected):
                    parts = [side[n] for side in (one, other) if n < len(side)]
                    assert torch.equal(torch.cat([part[0] for part in parts]), inputs)
                    assert torch.equal(torch.cat([part[1] for part in parts]), targets)
                    assert max(len(part[1]) for part in parts) == -(-len(targets) // 2)
    assert ours["refused"] == theirs["refused"]
    assert "batch=7 is shared by 2 processes" in ours["refused"]
    assert "do: choose a multiple of 2" in ours["refused"]


def test_a_process_without_a_part_of_the_last_batch_does_not_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    data = open_data(DataSettings("digits", batch=358))
    monkeypatch.setattr("secateur.processes.world", lambda: 2)
    monkeypatch.setattr("secateur.processes.rank", lambda: 0)
    assert [len(targets) for _, targets in data.test] == [179]
    monkeypatch.setattr("secateur.processes.rank", lambda: 1)
    assert [len(targets) for _, targets in data.test] == [179, 1]
    monkeypatch.setattr("secateur.processes.world", lambda: 3)
    with pytest.raises(BadRequest, match="batch=358 is shared by 3 processes"):
        data.test.epoch(0)


def test_whole_batches_are_read_by_every_process(monkeypatch: pytest.MonkeyPatch) -> None:
    data = open_data(DataSettings("digits", batch=100))
    expected = [(inputs.clone(), targets.clone()) for inputs, targets in data.validation.first(2)]
    monkeypatch.setattr("secateur.processes.world", lambda: 3)  # of which 100 is no multiple
    monkeypatch.setattr("secateur.processes.rank", lambda: 1)
    for loader in (data.validation.first(2).whole(), data.validation.whole().first(2)):
        seen = list(loader)
        assert len(seen) == len(expected) == 2
        assert all(
            torch.equal(a, b)
            for one, other in zip(seen, expected, strict=True)
            for a, b in zip(one, other, strict=True)
        )
    with pytest.raises(BadRequest, match="batch=100 is shared by 3 processes"):
        data.validation.epoch(0)
