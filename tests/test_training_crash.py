"""Training that is killed, interrupted or resumed gives the weights of training that never was, bit for bit."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from secateur.errors import BadArtifact, BadRequest, SecateurError, WrongModel
from secateur.recover import Hooks, Run, Training, checkpoints, fit_
from training_cases import CASES, Numbered, blobs, net, outcome, train

HERE = Path(__file__).parent


def tensors(model: nn.Module) -> list[torch.Tensor]:
    return list(model.state_dict().values())


@pytest.mark.parametrize(
    "case", ["shuffled", "numbered", *(pytest.param(case, marks=pytest.mark.slow) for case in ("loader", "workers"))]
)
def test_kill_nine_at_any_moment_changes_nothing(case: str, tmp_path: Path) -> None:
    command = [sys.executable, str(HERE / "training_cases.py"), "crash", case, str(tmp_path / "run"), "8"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent / "src")}
    done = subprocess.run(command, check=False, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    died = json.loads(done.stdout)
    assert len(died) >= 3, died
    whole, killed = ((tmp_path / "run" / name / "out").read_bytes() for name in ("whole", "killed"))
    assert whole == killed
    left = [path.name for path in (tmp_path / "run" / "killed" / "checkpoints").iterdir()]
    assert len(left) == 1  # no older ones, nothing half-written
    assert left[0].endswith("-epoch")


@pytest.mark.parametrize("case", ["shuffled", "loader", "numbered"])
def test_ctrl_c_is_resumable_and_what_is_logged_can_be_cut(case: str, tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    (tmp_path / "cut").mkdir()
    handler = signal.getsignal(signal.SIGINT)
    wanted = outcome(case, tmp_path / "whole", every=1000)
    steps: list[int] = []

    def press(done: int, total: int, facts: Any) -> None:
        steps.append(done)
        if done in (2, 3, 9):
            os.kill(os.getpid(), signal.SIGTERM if done == 3 else signal.SIGINT)

    records: list[Any] = []
    for done in (2, 3, 9):
        with pytest.raises(KeyboardInterrupt, match=r"interrupted after step \d+ of \d+; the same call goes on from"):
            train(case, tmp_path / "cut" / "checkpoints", every=1000, progress=press)
        assert steps[-1] == done
    assert outcome(case, tmp_path / "cut", every=1000, progress=lambda *a: None, log=records.append) == wanted
    assert steps == sorted(set(steps))
    assert records[0] == {"kind": "resumed", "step": steps[-1], "epoch": records[0]["epoch"]}
    assert signal.getsignal(signal.SIGINT) is handler
    again: list[Any] = []
    assert outcome(case, tmp_path / "cut", progress=lambda *a: again.append(a), every=1000) == wanted
    assert not again  # it was finished: nothing was trained


def test_ctrl_c_twice_insists(tmp_path: Path) -> None:
    def evaluate(model: nn.Module) -> float:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("went on")

    model = net().eval()
    with pytest.raises(KeyboardInterrupt, match=r"^$"):
        fit_(model, blobs(), Training(epochs=1), evaluate=evaluate)
    assert not model.training


def test_ctrl_c_during_the_last_evaluation_is_not_lost(tmp_path: Path) -> None:
    def evaluate(model: nn.Module) -> float:
        os.kill(os.getpid(), signal.SIGINT)
        return 1.0

    with pytest.raises(KeyboardInterrupt, match=r"after step 3 of 3$"):
        fit_(net(), blobs(), Training(epochs=1), evaluate=evaluate)


def refused(
    folder: Path, kind: type[SecateurError], match: str, model: nn.Module | None = None, **options: Any
) -> None:
    model = model or net()
    before = [t.clone() for t in tensors(model)]
    options = {"data": blobs(), "training": Training(epochs=2), "run": Run(folder)} | options
    with pytest.raises(kind, match=match):
        fit_(model, options.pop("data"), options.pop("training"), **options)
    assert all(torch.equal(a, b) for a, b in zip(before, tensors(model), strict=True))
    assert not list(folder.glob(".*"))


def test_checkpoints_of_other_runs_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "checkpoints"
    fit_(net(), blobs(), Training(epochs=2), run=Run(folder))
    kept = sorted(path.name for path in folder.iterdir())
    refused(folder, BadRequest, r"another run: training.lr was 0.1, and is 0.2", training=Training(epochs=2, lr=0.2))
    refused(folder, BadRequest, r"batches in an epoch was 3, and is 6", data=blobs(96))
    refused(folder, BadRequest, r"hooks with a state was \[\], and is \[0\]", hooks=Hooks(state=dict))
    refused(
        folder, WrongModel, r"tensor '6.weight' was \[3, 32\] torch.float32, and is \[4, 32\]", model=net(classes=4)
    )
    refused(folder, WrongModel, r"it has no tensor 'extra'", model=extra(net()))
    monkeypatch.setattr(checkpoints, "__version__", "99")
    refused(folder, BadArtifact, r"another run: secateur was '0.1.0', and is '99'\n  do: train into another folder")
    assert kept == sorted(path.name for path in folder.iterdir())


def extra(model: nn.Module) -> nn.Module:
    model.extra = nn.Parameter(torch.zeros(2))
    return model


def test_a_damaged_checkpoint_and_folders_that_cannot_be(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    fit_(net(), blobs(), Training(epochs=2), run=Run(folder))
    newest = next(folder.iterdir())
    saved = (newest / "tensors.safetensors").read_bytes()
    (newest / "tensors.safetensors").write_bytes(saved[:-10])
    refused(folder, BadArtifact, "is damaged: .*\n  do: delete it; training then goes on from an older one")
    (newest / "tensors.safetensors").write_bytes(saved)
    (newest / "state.json").write_text("{")
    refused(folder, BadArtifact, "is damaged")
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(BadArtifact, match="file is a file: checkpoints need a folder"):
        fit_(net(), blobs(), run=Run(file))


def test_what_a_killed_run_left_is_cleared_away_and_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    (folder / ".step-000002.partial").mkdir(parents=True)
    (folder / ".step-000001-epoch.old").mkdir()
    (folder / ".mine").mkdir()
    (folder / "notes.txt").write_text("mine")
    fit_(net(), blobs(), Training(epochs=1), run=Run(folder))
    assert sorted(path.name for path in folder.iterdir()) == [".mine", "notes.txt", "step-000003-epoch"]


def test_older_checkpoints_are_deleted_even_by_a_run_that_has_nothing_left_to_do(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    fit_(net(), blobs(), Training(epochs=2), run=Run(folder))
    shutil.copytree(folder / "step-000006-epoch", folder / "step-000005")  # killed between the two
    fit_(net(), blobs(), Training(epochs=2), run=Run(folder))
    assert [path.name for path in folder.iterdir()] == ["step-000006-epoch"]


def test_a_checkpoint_that_cannot_be_written_leaves_the_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "checkpoints"

    def full(*arguments: object) -> None:
        if (folder / "step-000003-epoch").exists():
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints.os, "fsync", full)
    with pytest.raises(BadArtifact, match=r"no checkpoint can be written to .*: No space left on device\n  do: free"):
        fit_(net(), blobs(), Training(epochs=2), run=Run(folder))
    assert [path.name for path in folder.iterdir()] == ["step-000003-epoch"]


def test_no_pickles(tmp_path: Path) -> None:
    train("shuffled", tmp_path)
    found = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert found == {"tensors.safetensors", "state.json"}
    json.loads(next(tmp_path.rglob("state.json")).read_text())


def test_every_case_ends_where_it_began(tmp_path: Path) -> None:
    """A checkpoint at every step changes nothing by itself, and neither does a folder."""
    assert set(CASES) >= {"shuffled", "numbered"}
    for case in ("shuffled", "numbered"):
        with_folder, _ = train(case, tmp_path / case)
        without, _ = train(case, None)
        assert all(torch.equal(a, b) for a, b in zip(tensors(with_folder), tensors(without), strict=True))
        shutil.rmtree(tmp_path / case)
    assert len(Numbered()) == 7
