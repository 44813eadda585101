"""``secateur sensitivity``, and what ``plan`` makes of it: files, tables, refusals, processes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner

import secateur as sc
from secateur.cli import app
from secateur.measurement import accuracy
from secateur.plans import Plan
from secateur.sensitivities import Sensitivity
from secateur.sensitivities.choice import losses, ratios_from
from secateur.zoo.data import DataSettings, open_data
from tiny_runs import environment, small, until, warm

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
DATA = ("--data", "digits", "--set", "data.size=8")


@pytest.fixture(autouse=True, scope="module")
def _wide_terminal() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "200")
        patch.setenv("TERM", "dumb")
        yield


def run(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output + repr(result.exception)
    return result.output


def trained() -> nn.Module:
    """``small``, trained a little: good enough that pruning it shows."""
    torch.manual_seed(0)
    images = open_data(DataSettings("digits", size=8, batch=64))
    model = small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for epoch in range(4):
        for inputs, targets in images.train.epoch(epoch):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs), targets).backward()
            optimizer.step()
    return model.eval()


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "small.safetensors"
    save_file(trained().state_dict(), path)
    return path


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory, weights: Path) -> tuple[Path, str]:
    """The folder of a sweep, and what was printed."""
    folder = tmp_path_factory.mktemp("sweep") / "found"
    return folder, run("sensitivity", "tiny_runs:small", "--weights", weights, *DATA, "-o", folder)


def read(folder: Path) -> Sensitivity:
    return Sensitivity.from_json((folder / "sensitivity.json").read_text())


def test_it_writes_curves_and_pictures_and_prints_a_table(swept: tuple[Path, str], weights: Path) -> None:
    folder, text = swept
    assert sorted(path.name for path in folder.iterdir()) == ["accuracy.svg", "norms.svg", "sensitivity.json"]
    found = read(folder)
    assert [(curve.group, curve.channels, curve.stage) for curve in found.curves] == [("0", 8, "8x8"), ("3", 12, "4x4")]
    for name in ("accuracy.svg", "norms.svg"):
        root = ET.fromstring((folder / name).read_text())
        assert root.tag.endswith("svg")
        assert root.attrib["aria-labelledby"]
    for word in ("Each group alone, not retrained", "90 %", "up to", "8x8", "of 144 held-out images right when dense"):
        assert word in text
    assert "secateur plan ... --sensitivity" in text
    assert "random" not in text


def test_scores_are_those_of_the_held_out_images(swept: tuple[Path, str], weights: Path) -> None:
    found = read(swept[0])
    model = trained()
    images = open_data(DataSettings("digits", size=8))
    assert found.dense == accuracy(model, images.validation)
    plan = sc.plan(model, torch.zeros(1, 1, 8, 8), ratios={"3": 0.5})
    assert found.curves[1].scores[4] == accuracy(sc.masked(model, plan), images.validation)
    assert accuracy(model, images.test) != found.dense


def test_what_is_beyond_the_tolerance_is_red(swept: tuple[Path, str]) -> None:
    from rich.console import Console

    from secateur.cli_output import sensitivity_table

    found = read(swept[0])
    console = Console(force_terminal=True, color_system="standard", width=200, _environ={"TERM": "xterm"})
    with console.capture() as caught:
        console.print(sensitivity_table(found, 0.05))
    plain = re.sub("\x1b\\[[0-9;]*m", "", caught.get()).splitlines()
    red, green = caught.get().count("\x1b[31m"), caught.get().count("\x1b[32m")
    drops = [found.dense - score for curve in found.curves for score in curve.scores]
    assert red == sum(drop > 0.05 + 1e-9 for drop in drops)
    assert green == len(drops) - red > 0
    limits = ratios_from(found, tolerance=0.05)
    assert any(limits.values())
    for name, ratio in limits.items():
        line = next(line for line in plain if line.split()[:1] == [name])
        assert line.rstrip().endswith(f"{100 * ratio:g} %" if ratio else "–")


def test_it_fits_a_narrow_terminal(swept: tuple[Path, str], weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    text = run("sensitivity", "tiny_runs:small", "--weights", weights, *DATA, "-o", swept[0])
    assert "…" not in text
    assert "90  up to" in text


def test_options_reach_the_sweep(weights: Path, tmp_path: Path) -> None:
    arguments = ("--weights", weights, *DATA, "--set", "data.batch=32", "--batches", 2, "--ratio-grid", "0.25,0.5")
    text = run(
        "sensitivity", "tiny_runs:small", *arguments, "--criterion", "mean_std", "--group", "3", "-o", tmp_path / "a"
    )
    found = read(tmp_path / "a")
    assert found.criterion == "mean_std"
    assert found.ratios == (0.25, 0.5)
    assert [curve.group for curve in found.curves] == ["3"]
    assert "of 64 held-out images" in text
    run("sensitivity", "tiny_runs:small", *arguments, "--criterion", "taylor", "--exclude", "3", "-o", tmp_path / "b")
    assert [curve.group for curve in read(tmp_path / "b").curves] == ["0"]
    text = run(
        "sensitivity",
        "tiny_runs:small",
        *arguments,
        "--group",
        "3",
        "--retrain-epochs",
        1,
        "--cpu",
        "-o",
        tmp_path / "c",
    )
    (curve,) = read(tmp_path / "c").curves
    assert sum(curve.retrained) > sum(curve.scores)
    assert "Each group alone, retrained" in text


# Plans -----------------------------------------------------------------------------------------------------------


def planned(weights: Path, folder: Path, *arguments: object) -> Plan:
    run("plan", "tiny_runs:small", "--weights", weights, "--input", "1,1,8,8", *arguments, "-o", folder / "plan.json")
    return Plan.from_json((folder / "plan.json").read_text())


def test_a_tolerance_becomes_ratios(swept: tuple[Path, str], weights: Path, tmp_path: Path) -> None:
    folder, _ = swept
    plan = planned(weights, tmp_path, "--sensitivity", folder, "--tolerance", 0.05)
    limits = ratios_from(read(folder), tolerance=0.05)
    widths = {curve.group: curve.channels for curve in read(folder).curves}
    assert {name: len(indices) for name, indices in plan.keep.items()} == {
        name: int(n * (1 - limits[name]) + 1e-9) for name, n in widths.items()
    }
    plan = planned(
        weights, tmp_path, "--sensitivity", folder / "sensitivity.json", "--tolerance", 0.9, "--exclude", "3"
    )
    assert len(plan.keep["3"]) == 12
    assert len(plan.keep["0"]) == 1
    assert planned(weights, tmp_path, "--sensitivity", folder, "--tolerance", 0.05, "--per", "stage").keep


def test_a_budget_is_met_with_the_least_loss(swept: tuple[Path, str], weights: Path, tmp_path: Path) -> None:
    folder, _ = swept
    plan = planned(weights, tmp_path, "--sensitivity", folder, "--keep", 0.6)
    table = losses(read(folder))
    model, example = small().eval(), torch.zeros(1, 1, 8, 8)
    dense = sc.count(model, example).macs

    def macs(a: int, b: int) -> int:
        return 64 * 9 * a + 16 * 9 * a * b + 4 * 10 * b

    assert macs(8, 12) == dense
    near = [(a, b) for a in range(1, 9) for b in range(1, 13) if 0.99 * 0.6 * dense <= macs(a, b) <= 0.6 * dense]
    lost = sum(table[name][len(indices)] for name, indices in plan.keep.items())
    assert lost == pytest.approx(min(table["0"][a] + table["3"][b] for a, b in near), rel=1e-9)


def test_plans_with_data_residual_rules_and_greedy_selection(weights: Path, tmp_path: Path) -> None:
    out = ("-o", tmp_path / "p.json")
    run("plan", "tiny_runs:small", "--weights", weights, *DATA, "--criterion", "taylor", "--batches", 2, *out)
    assert Plan.from_json((tmp_path / "p.json").read_text()).made_by["criterion"] == "taylor"
    run("plan", "tiny_runs:small", "--weights", weights, *DATA, "--criterion", "apoz", "--ratio", "0.5", *out)
    greedy = planned(weights, tmp_path, "--greedy", "--ratio", "0.5")
    assert greedy.made_by["greedy"] is True
    run("plan", "zoo:resnet20", "--residual", "inner", "--ratio", "0.5", *out)
    inner = Plan.from_json((tmp_path / "p.json").read_text())
    assert inner.residual == "inner"
    narrower = {group.name for group in inner.groups if len(inner.keep[group.name]) < group.channels}
    assert narrower == {f"layer{stage}.{block}.conv1" for stage in (1, 2, 3) for block in range(3)}


def test_random_criteria_follow_the_seed(tmp_path: Path) -> None:
    plans = []
    for seed in (0, 0, 1):
        run(
            "plan", "zoo:resnet20", "--criterion", "random", "--ratio", "0.5", "--seed", seed, "-o", tmp_path / "p.json"
        )
        plans.append(Plan.from_json((tmp_path / "p.json").read_text()).keep)
    assert plans[0] == plans[1] != plans[2]


# Refusals --------------------------------------------------------------------------------------------------------

SWEEP = ("sensitivity", "tiny_runs:small", *DATA, "-o", "found")
PLAN = ("plan", "tiny_runs:small", "--input", "1,1,8,8", "-o", "p.json")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((*SWEEP, "--ratio-grid", "0.1;0.2"), "do: write fractions to remove, as in --ratio-grid 0.1,0.3,0.5"),
        ((*SWEEP, "--ratio-grid", "0.5,1"), "1.0 is not a ratio between 0 and 1"),
        ((*SWEEP, "--ratio-grid", "0.5,0.1"), "do not rise"),
        ((*SWEEP, "--set", "data.validation=0"), "of digits no images are held out to choose ratios on"),
        ((*SWEEP, "--set", "data.sise=8"), "unknown key 'sise'; did you mean 'size'"),
        ((*SWEEP, "--set", "prune.criterion=l2"), "is not about the data\n  do: write data.KEY=VALUE"),
        ((*SWEEP, "--criterion", "l3"), "there is no criterion 'l3'"),
        ((*SWEEP, "--group", "9"), "groups: no group is called, or matches, '9'"),
        ((*SWEEP, "--group", "8"), "groups: '8' asks for group '8', which is locked"),
        ((*SWEEP, "--residual", "outer"), "residual='outer' is not known"),
        ((*SWEEP, "--batches", "0"), "at least one batch"),
        (("sensitivity", "tiny_runs:small", "--data", "digitz", "-o", "found"), "did you mean 'digits'"),
        (("sensitivity", "zoo:resnet20", "--data", "digits", "-o", "found"), "cannot run on the inputs of digits"),
        (
            (*PLAN, "--sensitivity", "nothing"),
            "cannot be read: No such file or directory\n  do: make one with secateur",
        ),
        ((*PLAN, "--tolerance", "0.1"), "do: name that with --sensitivity"),
        ((*PLAN, "--per", "stage"), "--per is about what secateur sensitivity found"),
        ((*PLAN, "--criterion", "apoz"), "do: give data="),
        ((*SWEEP, "--residual", "scatter"), "residual='scatter' is nothing that an analysis tries out"),
        ((*PLAN, *DATA), "--input says how large inputs are, and so do the images\n  do: say --set data.size=N"),
    ],
)
def test_refusals(arguments: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = run(*arguments, code=2)
    assert text.startswith("error: ")
    assert message in text
    assert "Traceback" not in text
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--tolerance", "0.1", "--keep", "0.5"), "and so do --keep, --at-most and --ratio"),
        (("--tolerance", "0.1", "--ratio", "0=0.5"), "and so do --keep, --at-most and --ratio"),
        (("--tolerance", "2"), "2.0 points of accuracy are 0.02"),
        (("--tolerance", "0.1", "--per", "layer"), "per='layer' means nothing"),
        (("--per", "stage"), "do: give --tolerance too"),
        (("--keep", "0.01"), "no group is narrower than the sensitivity analysis has tried it"),
    ],
)
def test_refusals_of_what_was_found(
    arguments: tuple[str, ...], message: str, swept: tuple[Path, str], tmp_path: Path
) -> None:
    text = run(*PLAN[:-2], "--sensitivity", swept[0], *arguments, "-o", tmp_path / "p.json", code=2)
    assert message in text
    assert list(tmp_path.iterdir()) == []


def test_files_of_others_are_refused(swept: tuple[Path, str], weights: Path, tmp_path: Path) -> None:
    folder, _ = swept
    for how in (("--tolerance", "0.05"), ("--keep", "0.5")):
        text = run("plan", "zoo:resnet20", "--sensitivity", folder, *how, "-o", tmp_path / "p.json", code=2)
        assert "0.weight" in text or "conv1.weight" in text
    values = json.loads((folder / "sensitivity.json").read_text())
    (tmp_path / "bad.json").write_text(json.dumps({**values, "dense": "high"}))
    text = run(*PLAN[:-2], "--sensitivity", tmp_path / "bad.json", "-o", tmp_path / "p.json", code=2)
    assert text.startswith(f"error: {tmp_path / 'bad.json'}: ")
    before = (folder / "sensitivity.json").read_bytes()
    again = ("sensitivity", "tiny_runs:small", "--weights", weights, *DATA, "-o", folder)
    for more, message in (
        (("--set", "data.validation=0.2"), "was made with note.data.validation=0.1, and now it is 0.2"),
        (("--batches", 1), "was made with note.batches=None, and now it is 1"),
        (("--retrain-epochs", 1), "was made without note.retraining, and now it is {'epochs': 1, 'lr': 0.001}"),
    ):
        assert message in run(*again, *more, code=2)
        assert (folder / "sensitivity.json").read_bytes() == before
    text = run(*SWEEP[:-2], "-o", folder, code=2)  # of the same network with random weights
    assert "other weights" in text
    assert (folder / "sensitivity.json").read_bytes() == before


# Processes -------------------------------------------------------------------------------------------------------


def slow() -> nn.Module:
    """``small``, in a process that takes its time to evaluate: enough to be interrupted."""
    from secateur import measurement
    from secateur.sensitivities import requests

    def patient(*arguments: Any, **options: Any) -> float:
        time.sleep(0.25)
        return measurement.accuracy(*arguments, **options)

    requests.accuracy = patient  # type: ignore[attr-defined]
    return small()


def command(weights: Path, folder: Path, model: str = "tiny_runs:small") -> list[str]:
    return ["sensitivity", model, "--weights", str(weights), *DATA, "--cpu", "-o", str(folder)]


def test_interrupted_and_given_again_it_goes_on(swept: tuple[Path, str], weights: Path, tmp_path: Path) -> None:
    file = tmp_path / "found" / "sensitivity.json"
    arguments = command(weights, file.parent, f"{__name__}:slow")
    with warm(tmp_path) as server:
        process = server.start(*arguments)
        assert until(lambda: file.exists() and file.read_text().count("null") < 16, process)
        os.kill(process.pid, signal.SIGINT)
        assert process.wait() == 130, process.text()
        assert process.text() == f"interrupted: the same command goes on from here, in {file.parent}/\n"
        left = json.loads(file.read_text())
        scores = [score for curve in left["curves"] for score in curve["scores"]]
        done = [score for score in scores if score is not None]
        assert 2 <= len(done) < 18
        for place, curve in enumerate(left["curves"]):  # what is there is taken as it is: it is not tried again
            left["curves"][place]["scores"] = [None if score is None else 0.5 for score in curve["scores"]]
        file.write_text(json.dumps(left))
        server.run(*arguments)
    found = read(file.parent)
    for curve, before, expected in zip(found.curves, left["curves"], read(swept[0]).curves, strict=True):
        for score, old, new in zip(curve.scores, before["scores"], expected.scores, strict=True):
            assert score == (new if old is None else 0.5)
    assert sorted(path.name for path in file.parent.iterdir()) == ["accuracy.svg", "norms.svg", "sensitivity.json"]


def launch(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    line = [*TORCHRUN, "-m", "secateur", *arguments]
    return subprocess.run(line, env=environment(), capture_output=True, text=True, check=False, timeout=200)


def test_two_processes_find_what_one_does(swept: tuple[Path, str], weights: Path, tmp_path: Path) -> None:
    done = launch(command(weights, tmp_path / "found"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("held-out images right") == 1
    names = sorted(path.name for path in (tmp_path / "found").iterdir())
    assert names == ["accuracy.svg", "norms.svg", "sensitivity.json"]
    one, two = read(swept[0]), read(tmp_path / "found")
    assert (one.dense, one.curves) == (two.dense, two.curves)


@pytest.mark.slow
def test_retraining_is_not_shared_by_processes(weights: Path, tmp_path: Path) -> None:
    done = launch([*command(weights, tmp_path / "found"), "--retrain-epochs", "1"])
    assert done.returncode != 0
    assert done.stderr.count("error: --retrain-epochs trains one small network after the other") == 1
    assert not (tmp_path / "found").exists()


def test_the_command_is_listed() -> None:
    assert " sensitivity " in run("--help")
    text = run("sensitivity", "--help")
    for option in ("--ratio-grid", "--tolerance", "--retrain-epochs", "--residual", "--batches", "--set"):
        assert option in text
