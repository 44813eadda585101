"""Killed at any moment, the same command goes on, and ends with the same weights to the last bit. Real processes, real
signals."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tiny_runs import Command, Warm, environment, recipe, until, warm, write

ITERATIVE = {"schedule": {"kind": "iterative", "steps": 2, "training": {"epochs": 1, "lr": 0.05}}}
FULL = recipe(prune=ITERATIVE, scratch="epochs")
PHASES = "dense prune-1 compensate-1 train-1 prune-2 compensate-2 finetune scratch measure save".split()
TITLES = {
    "dense": "training dense", "prune-1": "pruning 1/2", "compensate-1": "compensating 1/2", "train-1": "training 1/2",
    "prune-2": "pruning 2/2", "compensate-2": "compensating 2/2", "finetune": "fine-tuning",
    "scratch": "training from scratch", "measure": "measuring", "save": "saving",
}  # fmt: skip
TRAINED = ("dense", "train-1", "finetune", "scratch")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Warm]:
    with warm(tmp_path_factory.mktemp("output")) as found:
        yield found


@pytest.fixture(scope="module")
def whole(server: Warm, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    server.run("run", write(folder / "r.yaml", FULL), "-o", folder / "run", "--allow-import")
    return folder / "run"


def kept(folder: Path) -> dict[str, Any]:
    """All that a run leaves but times and machine: weights, plans, metrics without speeds."""
    files = [*folder.rglob("*.safetensors"), *folder.rglob("*plan.json"), *folder.rglob("zeroed.json")]
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in metrics:
        line.pop("images_per_s", None)
    return {"metrics": metrics, **{str(path.relative_to(folder)): path.read_bytes() for path in files}}


def begun(folder: Path, phase: str) -> bool:
    log = folder / "log.txt"
    return log.exists() and f"  {TITLES[phase]} ...\n" in log.read_text()


def over(folder: Path, phase: str) -> bool:
    return f"  {TITLES[phase]}: " in (folder / "log.txt").read_text()


def has_checkpoint(folder: Path, phase: str, step: int) -> bool:
    found = (folder / "phases" / f"{phase}.checkpoint").glob("step-*")
    return any(int(path.name.split("-")[1]) >= step for path in found)


def stopped(server: Warm, path: Path, folder: Path, phase: str, step: int, pause: float, by: signal.Signals) -> Command:
    """The command, begun or gone on with, and sent a signal in ``phase``: after ``step`` if it trains, and a pause."""
    command = server.start("run", path, "-o", folder, "--allow-import")
    if until(lambda: begun(folder, phase), command):
        if phase in TRAINED:
            until(lambda: has_checkpoint(folder, phase, step) or over(folder, phase), command)
        time.sleep(pause)
    if not command.ended():
        os.kill(command.pid, by)
    command.wait()
    return command


def test_killed_and_interrupted(server: Warm, whole: Path, tmp_path: Path) -> None:
    """Each run goes on from where the last was stopped."""
    folder, path = tmp_path / "run", write(tmp_path / "r.yaml", FULL)
    kill, ctrl_c = signal.SIGKILL, signal.SIGINT
    for phase, step, pause, by in (
        ("dense", 6, 0.0, kill),
        ("prune-1", 0, 0.1, kill),
        ("compensate-1", 0, 0.1, kill),
        ("prune-2", 0, 0.0, ctrl_c),
        ("finetune", 2, 0.02, kill),
        ("scratch", 4, 0.0, ctrl_c),
    ):
        command = stopped(server, path, folder, phase, step, pause, by)
        assert command.status == (130 if by == ctrl_c else -kill), command.text()
        assert "Traceback" not in command.text()
        if by == ctrl_c:
            assert command.text().splitlines()[-1] == f"interrupted: the same command goes on from here, in {folder}/"
    server.run("run", path, "-o", folder, "--allow-import")
    assert kept(folder) == kept(whole)
    assert not list(folder.rglob(".*"))


@pytest.mark.slow
def test_killed_in_every_phase(server: Warm, whole: Path, tmp_path: Path) -> None:
    """Three kills in each phase, at steps and moments that a seed draws."""
    draw = random.Random(0)
    folder, path = tmp_path / "run", write(tmp_path / "r.yaml", FULL)
    killed = []
    for phase in [phase for phase in PHASES for _ in range(3)]:
        command = stopped(server, path, folder, phase, draw.randrange(1, 6), draw.random() * 0.3, signal.SIGKILL)
        killed += [phase] if command.status == -signal.SIGKILL else []
    assert set(PHASES[:8]) <= set(killed)  # the last two are over in a moment
    server.run("run", path, "-o", folder, "--allow-import")
    assert kept(folder) == kept(whole)
    assert not list(folder.rglob(".*"))


def test_two_runs_in_one_folder(server: Warm, tmp_path: Path) -> None:
    folder, path = tmp_path / "run", write(tmp_path / "r.yaml", FULL)
    first = server.start("run", path, "-o", folder, "--allow-import")
    assert until(lambda: begun(folder, "dense"), first)
    os.kill(first.pid, signal.SIGSTOP)
    text = server.run("run", path, "-o", folder, "--allow-import", code=2)
    assert f"error: another run is writing to {folder} (process {first.pid})" in text
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    second = server.start("run", path, "-o", folder, "--allow-import")  # the kernel has taken the lock back
    assert until(lambda: (folder / "log.txt").read_text().count("training dense ...") == 2, second), second.text()
    os.kill(second.pid, signal.SIGKILL)
    second.wait()


SCHEDULES: dict[str, dict[str, Any]] = {
    "one-shot": {"kind": "one-shot"},
    "layer-by-layer": {"kind": "layer-by-layer", "training": {"epochs": 1, "lr": 0.05}},
    "hard": {"kind": "progressive", "at_start": True, "training": {"epochs": 2, "lr": 0.05}},
    "soft": {"kind": "progressive", "soft": True, "grow": 1, "training": {"epochs": 2, "lr": 0.05}},
    "greg": {"kind": "sparse", "penalty": {"choose_at": 2e-4, "every": 3}, "training": {"epochs": 2, "lr": 0.05}},
    "depgraph": {"kind": "sparse", "penalty": {"kind": "depgraph", "every": 3}, "training": {"epochs": 2, "lr": 0.05}},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SCHEDULES)
def test_killed_at_random_under_every_schedule(name: str, server: Warm, tmp_path: Path) -> None:
    values = recipe(
        prune={"schedule": SCHEDULES[name], "ratios": 0.5},
        scratch="compute",
        distil={"features": 0.1},
        finetune={"epochs": 2, "lr": 0.05, "keep": "best", "ema": 0.9, "mixup": 0.2},
        export={"onnx": True, "report": True},
        checkpoint_every=1,
    )
    path = write(tmp_path / "r.yaml", values)
    begin = time.monotonic()
    server.run("run", path, "-o", tmp_path / "whole", "--allow-import")
    lasts = time.monotonic() - begin
    draw, killed = random.Random(name), 0
    while killed < 12:
        command = server.start("run", path, "-o", tmp_path / "run", "--allow-import")
        time.sleep(draw.random() * lasts / 3)
        if command.ended():
            break
        os.kill(command.pid, signal.SIGKILL)
        killed += command.wait() == -signal.SIGKILL
    assert killed >= 3
    server.run("run", path, "-o", tmp_path / "run", "--allow-import")
    assert kept(tmp_path / "run") == kept(tmp_path / "whole")


@pytest.mark.slow
def test_the_real_command(whole: Path, tmp_path: Path) -> None:
    """The same with ``python -m secateur`` itself, killed from outside."""
    folder, path = tmp_path / "run", write(tmp_path / "r.yaml", FULL)
    line = [sys.executable, "-m", "secateur", "run", str(path), "-o", str(folder), "--allow-import"]
    for phase in ("dense", "compensate-1", "finetune", "scratch"):
        process = subprocess.Popen(line, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        until(lambda phase=phase: begun(folder, phase))
        process.kill()
        assert process.wait() == -signal.SIGKILL
    subprocess.run(line, env=environment(), check=True, capture_output=True)
    assert kept(folder) == kept(whole)
