"""Two processes give what one gives, on a network whose examples do not see each other. Real launches, gloo."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from secateur.sensitivities import Sensitivity
from tiny_runs import environment, recipe, write

GROUPED = recipe(
    model={"name": "tiny_runs:grouped"},
    train={"epochs": 1, "lr": 0.05},
    prune={
        "criterion": "mean_l2",
        "calibration": 2,
        "sensitivity": {"ratios": [0.2, 0.5, 0.8]},
        "schedule": {"kind": "iterative", "steps": 2, "training": {"epochs": 1, "lr": 0.02}},
    },
    compensate={"batches": 2},
    finetune={"epochs": 1, "lr": 0.02},
    data={"name": "digits", "batch": 64, "size": 8, "limit": 256, "augment": "none"},
)
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


def launch(processes: int, path: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    start = TORCHRUN if processes == 2 else [sys.executable]
    line = [*start, "-m", "secateur", "run", str(path), "-o", str(folder), "--allow-import", "--cpu"]
    return subprocess.run(line, env=environment(), capture_output=True, text=True, check=False, timeout=150)


def test_two_processes_give_what_one_gives(tmp_path: Path) -> None:
    path = write(tmp_path / "r.yaml", GROUPED)
    for processes in (1, 2):
        done = launch(processes, path, tmp_path / str(processes))
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("fine-tuned") == 1  # one table: only the main process speaks
        assert done.stderr.count("training dense: ") == 1
    one, two = tmp_path / "1", tmp_path / "2"
    found = [Sensitivity.from_json((folder / "sensitivity.json").read_text()) for folder in (one, two)]
    assert found[0].dense == found[1].dense
    assert [(c.keep, c.scores) for c in found[0].curves] == [(c.keep, c.scores) for c in found[1].curves]
    for name in ("plan.json", "phases/prune-1.plan.json", "phases/prune-2.plan.json"):
        assert (one / name).read_bytes() == (two / name).read_bytes()
    for name in ("dense.safetensors", "pruned/model.safetensors"):
        first, second = load_file(one / name), load_file(two / name)
        worst = max(float((first[key] - second[key]).abs().max() / first[key].abs().max()) for key in first)
        assert worst < 1e-6, name
    rows = [json.loads((folder / "results.json").read_text())["rows"] for folder in (one, two)]
    assert [row["accuracy"] for row in rows[0]] == [row["accuracy"] for row in rows[1]]
    sessions = json.loads((two / "environment.json").read_text())["sessions"]
    assert [session["processes"] for session in sessions] == [2]


@pytest.mark.slow
def test_errors_of_two_processes_are_told_once(tmp_path: Path) -> None:
    path = write(tmp_path / "r.yaml", {**GROUPED, "prune": {"budget": {"keep": 1e-6}}})
    done = launch(2, path, tmp_path / "run")
    assert done.returncode != 0
    assert done.stderr.count("error: ") == 1
    assert not (tmp_path / "run").exists()
