"""Runs whose filters are zeroed while the network trains: nothing is lost at the cut, and what changed is told."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import secateur as sc
from secateur.errors import BadArtifact, BadRequest
from secateur.recipes import Outcome, Tell, make_recipe, run_recipe
from secateur.recipes.folder import RunFolder
from secateur.recipes.turnovers import open_turnovers
from secateur.report import Zeroed
from secateur.report.turnovers import summary
from tiny_runs import added, recipe

TRAINING = {"epochs": 3, "lr": 0.1}
PRUNE = {"criterion": "fpgm", "ratios": 0.4, "residual": "scatter", "constants": "fold"}


def values(*, report: bool = False, **schedule: Any) -> dict[str, Any]:
    """A residual network, from random weights."""
    how = {"kind": "progressive", "at_start": True, "training": TRAINING, **schedule}
    return recipe(
        model={"name": "tiny_runs:added", "weights": "random"},
        train=None,
        prune={**PRUNE, "schedule": how},
        compensate=None,
        finetune=None,
        export={"onnx": False, "report": report},
    )


def go(what: dict[str, Any], folder: Path, **options: Any) -> Outcome:
    return run_recipe(make_recipe(what), folder, allow_import=True, cpu=True, **options)


def zeroed_in(folder: Path) -> Zeroed:
    found = open_turnovers(RunFolder(folder, smoke=False))
    assert found is not None
    return found


def last(zeroed: Zeroed) -> dict[str, set[int]]:
    zero: dict[str, set[int]] = {name: set() for name in zeroed.channels}
    for choice in zeroed.history:
        for name in zero:
            zero[name] = (zero[name] | set(choice.entered.get(name, ()))) - set(choice.left.get(name, ()))
    return zero


@pytest.fixture(scope="module")
def soft(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    return go(values(soft=True, report=True), tmp_path_factory.mktemp("soft") / "run")


def test_nothing_is_lost_at_the_cut(soft: Outcome) -> None:
    rows = {row.name: row for row in soft.rows}
    assert rows["pruned"].accuracy == rows["zeroed"].accuracy != rows["untrained"].accuracy
    assert rows["pruned"].macs < 0.7 * rows["zeroed"].macs
    plan = sc.Plan.from_json((soft.folder / "plan.json").read_text())
    assert plan.residual == "scatter"
    assert set(plan.constants.values()) == {"fold"}
    assert plan.made_by["schedule"] == "soft zeroing"
    small = sc.load(soft.folder / "pruned", added())
    assert small(torch.zeros(2, 1, 8, 8)).shape == (2, 10)


def test_what_changed_is_kept_and_told(soft: Outcome) -> None:
    zeroed = zeroed_in(soft.folder)
    plan = sc.Plan.from_json((soft.folder / "plan.json").read_text())
    channels = {group.name: group.channels for group in plan.groups}
    assert zeroed.channels == channels
    assert last(zeroed) == {name: set(range(channels[name])) - set(kept) for name, kept in plan.keep.items()}
    assert [choice.epoch for choice in zeroed.history] == [0, 1, 2, 3]
    assert any(choice.left for choice in zeroed.history)
    facts = json.loads((soft.folder / "results.json").read_text())["phases"]["zero"]
    assert facts["choices"] == 4
    assert facts["entered"] == [sum(map(len, choice.entered.values())) for choice in zeroed.history[1:]]
    assert facts["left"] == [sum(map(len, choice.left.values())) for choice in zeroed.history[1:]]
    text = (soft.folder / "report.html").read_text()
    assert summary(zeroed) in text
    times = sum(bool(choice.left) for choice in zeroed.history)
    assert f"<dt>zero, zeroed filters</dt><dd>chosen 4 times, and others than before {times} time" in text


def test_hard_zeroing_is_told_to_be_stable(tmp_path: Path) -> None:
    outcome = go(values(), tmp_path / "run")
    zeroed = zeroed_in(outcome.folder)
    assert [bool(choice.entered) for choice in zeroed.history] == [True, False, False, False]
    assert "none of them changed" in summary(zeroed)
    rows = {row.name: row for row in outcome.rows}
    assert rows["pruned"].accuracy == rows["zeroed"].accuracy


@pytest.mark.parametrize("step", [1, 10, 17])
def test_interrupted_it_goes_on_to_the_same_history(soft: Outcome, step: int, tmp_path: Path) -> None:
    @contextmanager
    def phase(title: str) -> Iterator[Any]:
        def progress(done: int, total: int, facts: Any) -> None:
            if title == "zeroing" and done == step:
                raise KeyboardInterrupt

        yield progress

    what = values(soft=True)
    with pytest.raises(KeyboardInterrupt):
        go(what, tmp_path / "run", tell=Tell(phase=phase))
    assert not (tmp_path / "run" / "zeroed.json").exists()
    go(what, tmp_path / "run")
    for name in ("zeroed.json", "plan.json", "pruned/model.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (soft.folder / name).read_bytes()


def test_options_of_the_schedule_reach_it(tmp_path: Path) -> None:
    for name, more in (("plain", {}), ("among", {"exclude_zeroed": True})):
        what = values(grow=3, **more)
        what["prune"] |= {"ratios": 0.75}
        go(what, tmp_path / name)
    plain, among = zeroed_in(tmp_path / "plain"), zeroed_in(tmp_path / "among")
    sizes = [[len(choice.entered.get("0", ())) for choice in each.history] for each in (plain, among)]
    assert sizes[0] == sizes[1] == [0, 3, 2, 1]
    assert plain.history[:2] == among.history[:2]
    assert plain.history != among.history


def test_constants_of_no_group_are_told_at_the_start(tmp_path: Path) -> None:
    what = values()
    what["prune"] |= {"constants": {"stem": "fold"}}
    with pytest.raises(BadRequest, match="constants: no group of the network matches 'stem'"):
        go(what, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("old", "new", "why"),
    [
        ('"choices"', '"choises"', "Field required"),
        ('"epoch": 0', '"epoch": "0"', "valid integer"),
        ('"epoch": 0, "entered": {"0"', '"epoch": 0, "entered": {"1"', "choice 0 speaks of a group '1'"),
        ('{"0": 8', '{"0": 1', "choice 0 does not follow from those before it, in group '0'"),
        ("]}\n", "", "EOF"),
    ],
    ids=["key", "number", "group", "channel", "end"],
)
def test_a_damaged_file_is_told(soft: Outcome, old: str, new: str, why: str, tmp_path: Path) -> None:
    text = (soft.folder / "zeroed.json").read_text()
    assert old in text
    (tmp_path / "zeroed.json").write_text(text.replace(old, new))
    with pytest.raises(BadArtifact, match=r"zeroed\.json is damaged: .*" + why):
        open_turnovers(RunFolder(tmp_path, smoke=False))
    assert open_turnovers(RunFolder(tmp_path / "none", smoke=False)) is None
