"""Runs whose widths are found by trying, and criteria that look at data: decided once, kept by every schedule, gone on
with where they were stopped."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import secateur as sc
from secateur.errors import BadArtifact, SecateurError
from secateur.recipes import Outcome, make_recipe, run_recipe
from secateur.sensitivities import Sensitivity
from secateur.sensitivities.choice import ratios_from
from tiny_runs import recipe, small, until, warm, write

RATIOS = [0.25, 0.5, 0.75]
TOLERANT = {"sensitivity": {"ratios": RATIOS, "tolerance": 0.1}}
BARE = {"compensate": None, "finetune": None}


def go(values: dict[str, Any], folder: Path, **options: Any) -> Outcome:
    return run_recipe(make_recipe(values), folder, allow_import=True, cpu=True, **options)


def facts_of(folder: Path) -> dict[str, Any]:
    return {entry["phase"]: entry["facts"] for entry in json.loads((folder / "run.json").read_text())["done"]}


def curves_in(folder: Path) -> Sensitivity:
    return Sensitivity.from_json((folder / "sensitivity.json").read_text())


def dense_of(folder: Path) -> torch.nn.Module:
    model = small().eval()
    model.load_state_dict(load_file(folder / "dense.safetensors"))
    return model


def widths_of(plan: sc.Plan) -> dict[str, int]:
    channels = {group.name: group.channels for group in plan.groups}
    return {name: len(kept) for name, kept in plan.keep.items() if len(kept) < channels[name]}


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """A run whose widths follow from a tolerance."""
    values = recipe(prune=TOLERANT, export={"onnx": False, "report": True})
    return go(values, tmp_path_factory.mktemp("run") / "run")


def test_widths_follow_from_what_was_found(done: Outcome) -> None:
    found = curves_in(done.folder)
    assert [curve.group for curve in found.curves] == ["0", "3"]
    assert found.ratios == tuple(RATIOS)
    ratios = ratios_from(found, tolerance=0.1)
    dense = dense_of(done.folder)
    wanted = widths_of(sc.plan(dense, torch.zeros(1, 1, 8, 8), ratios=ratios))
    assert wanted
    assert widths_of(sc.Plan.from_json((done.folder / "plan.json").read_text())) == wanted
    facts = facts_of(done.folder)
    assert list(facts)[:3] == ["dense", "sensitivity", "prune"]
    assert facts["sensitivity"]["widths"] == wanted
    assert facts["sensitivity"]["dense"] == found.dense == facts["dense"]["validation"]
    assert (facts["sensitivity"]["tried"], facts["sensitivity"]["narrower"]) == (2, len(wanted))


def test_what_was_found_is_told(done: Outcome) -> None:
    assert done.sensitivity == curves_in(done.folder)
    text = (done.folder / "report.html").read_text()
    assert "the largest ratio of each group at which accuracy falls by 10 points at most; " in text
    assert text.count("<h2>Sensitivity</h2>") == 1
    assert 'alt="filter ' in text
    assert f"measuring sensitivity: {facts_of(done.folder)['sensitivity']['narrower']} of 2 groups get narrower" in (
        (done.folder / "log.txt").read_text()
    )
    again = go(recipe(prune=TOLERANT, export={"onnx": False, "report": True}), done.folder)
    assert again.again
    assert again.sensitivity == done.sensitivity


def test_a_budget_is_met_with_the_least_predicted_loss(tmp_path: Path) -> None:
    prune = {"sensitivity": {"ratios": RATIOS, "batches": 1}, "budget": {"keep": 0.6}, "criterion": "l2"}
    outcome = go(recipe(prune=prune, **BARE), tmp_path / "run")
    dense, found = dense_of(outcome.folder), curves_in(outcome.folder)
    wanted = sc.plan(dense, torch.zeros(1, 1, 8, 8), budget=sc.Budget(keep=0.6), sensitivity=found)
    assert widths_of(sc.Plan.from_json((outcome.folder / "plan.json").read_text())) == widths_of(wanted)
    assert found.criterion == "l2"  # tried by what prunes
    assert outcome.rows[1].macs <= 0.6 * outcome.rows[0].macs
    assert found.dense * 64 == pytest.approx(round(found.dense * 64))  # a batch of 64


@pytest.mark.parametrize(
    "schedule",
    [
        {"kind": "iterative", "steps": 2},
        {"kind": "layer-by-layer"},
        {"kind": "progressive", "training": {"epochs": 1, "lr": 0.05}},
        {"kind": "sparse", "training": {"epochs": 1, "lr": 0.05}},
    ],
    ids=lambda schedule: schedule["kind"],
)
def test_every_schedule_ends_with_the_widths_that_were_found(schedule: dict[str, Any], tmp_path: Path) -> None:
    prune = {**TOLERANT, "schedule": schedule, "sensitivity": {**TOLERANT["sensitivity"], "tolerance": 0.9}}
    outcome = go(recipe(prune=prune, train={"epochs": 1, "lr": 0.1}, **BARE), tmp_path / "run")
    assert facts_of(outcome.folder)["sensitivity"]["widths"] == {"0": 2, "3": 3}
    assert widths_of(sc.Plan.from_json((outcome.folder / "plan.json").read_text())) == {"0": 2, "3": 3}


def test_what_the_recipe_says_itself_goes_first(tmp_path: Path) -> None:
    tried = {"ratios": [0.5], "tolerance": 0.9}
    for prune, widths, curves in (
        ({"ratios": {"0": 6}, "sensitivity": tried}, {"0": 6, "3": 6}, ["3"]),
        ({"exclude": ["0"], "sensitivity": tried}, {"3": 6}, ["3"]),
        ({"sensitivity": {**tried, "skip": ["0"]}}, {"3": 6}, ["0", "3"]),
    ):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        go(recipe(prune=prune, train=None, model={"name": "tiny_runs:small", "weights": "random"}, **BARE), folder)
        assert facts_of(folder)["sensitivity"]["widths"] == widths
        assert [curve.group for curve in curves_in(folder).curves] == curves


def test_nothing_within_the_tolerance_prunes_nothing(tmp_path: Path) -> None:
    """And the run goes on to its end."""
    prune = {"sensitivity": {"ratios": [0.75], "tolerance": 0.0}}
    outcome = go(recipe(prune=prune, finetune={"epochs": 1, "lr": 0.01}), tmp_path / "run")
    assert facts_of(outcome.folder)["sensitivity"]["widths"] == {}
    assert outcome.rows[1].macs == outcome.rows[0].macs


def test_smoke_tries_the_ends_only(tmp_path: Path) -> None:
    go(recipe(prune=TOLERANT, train={"epochs": 5}), tmp_path / "run", smoke=True)
    assert curves_in(tmp_path / "run").ratios == (0.25, 0.75)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prune": {"sensitivity": {"skip": ["conv*"]}}}, "'conv*'"),
        (
            {"prune": {"sensitivity": {"ratios": [0.1]}, "budget": {"keep": 0.3}}},
            "no group is narrower than the sensitivity analysis has tried it",
        ),
        ({"prune": {"sensitivity": {"criterion": "bn_scale"}}, "model": {"name": "tiny_runs:plain"}}, "has no scales"),
        ({"prune": TOLERANT, "data": {"name": "tiny_runs:unvalidated"}}, "do: hold some out"),
        ({"prune": {"criterion": "bn_scale"}, "model": {"name": "tiny_runs:plain"}}, "has no scales"),
        ({"prune": {"criterion": "random", "greedy": True}}, "greedy means nothing to criterion 'random'"),
        (
            {"prune": {"residual": "inner", "ratios": {"0": 0.5}}, "model": {"name": "tiny_runs:added"}},
            "residual='inner' leaves it whole",
        ),
    ],
)
def test_what_cannot_work_is_told_before_anything_is_written(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(SecateurError) as caught:
        go(recipe(**changes), tmp_path / "run")
    assert message in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("criterion", ["mean_std", "apoz", "taylor"])
def test_criteria_that_look_at_training_images(criterion: str, tmp_path: Path) -> None:
    """Kept is what ``plan`` keeps with the same images."""
    prune = {"criterion": criterion, "ratios": 0.5, "calibration": 2}
    folder = go(recipe(prune=prune, **BARE), tmp_path / "run").folder
    plan = sc.Plan.from_json((folder / "plan.json").read_text())
    assert plan.made_by["criterion"] == criterion
    assert plan.keep == sc.plan(
        dense_of(folder), torch.zeros(1, 1, 8, 8), criterion=criterion, ratios=0.5, data=calibration(2),
        loss=torch.nn.functional.cross_entropy if criterion == "taylor" else None,
    ).keep  # fmt: skip


def calibration(batches: int) -> list[Any]:
    from secateur.recipes.job import derived_seed
    from secateur.zoo.data import open_data

    settings = make_recipe(recipe()).data
    return list(open_data(settings, seed=derived_seed(0, "data")).calibration.first(batches))


def test_zeroing_by_activations(tmp_path: Path) -> None:
    prune = {"criterion": "apoz", "ratios": 0.5, "schedule": {"kind": "progressive", "training": {"epochs": 2}}}
    folder = go(recipe(prune=prune, **BARE), tmp_path / "run").folder
    assert facts_of(folder)["prune"]["kept"] == 10


# Interrupted -----------------------------------------------------------------------------------------------------


def missing(folder: Path) -> int:
    """How many trials are still to come."""
    file = folder / "sensitivity.json"
    return file.read_text().count("null") if file.exists() else 1000


@pytest.mark.parametrize("by", [signal.SIGKILL, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_stopped_while_trying_and_gone_on(by: signal.Signals, tmp_path: Path) -> None:
    """What was tried is not tried again, and the end is the same."""
    fine = {"sensitivity": {"ratios": [n / 40 for n in range(1, 40)], "tolerance": 0.1}}
    path = write(tmp_path / "r.yaml", recipe(prune=fine))
    whole, folder = tmp_path / "whole", tmp_path / "run"
    with warm(tmp_path) as server:
        server.run("run", path, "-o", whole, "--allow-import")
        command = server.start("run", path, "-o", folder, "--allow-import")
        until(lambda: missing(folder) < 60, command)
        if not command.ended():
            os.kill(command.pid, by)
        assert command.wait() == (130 if by == signal.SIGINT else -by), command.text()
        with pytest.raises(BadArtifact):
            curves_in(folder)
        assert "sensitivity" not in facts_of(folder)
        server.run("run", path, "-o", folder, "--allow-import")
    assert (folder / "sensitivity.json").read_bytes() == (whole / "sensitivity.json").read_bytes()
    assert (folder / "plan.json").read_bytes() == (whole / "plan.json").read_bytes()
    assert not list(folder.rglob(".*"))


def test_damaged_curves_are_told(done: Outcome) -> None:
    path = done.folder / "sensitivity.json"
    before = path.read_text()
    try:
        path.write_text(before[:100])
        with pytest.raises(BadArtifact, match=r"sensitivity\.json is damaged"):
            go(recipe(prune=TOLERANT, export={"onnx": False, "report": True}), done.folder)
    finally:
        path.write_text(before)
