"""``secateur compare`` and ``secateur report``: networks and runs side by side, and what is refused."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from secateur.artifact import read_measurement
from secateur.cli import app
from secateur.cli_models import parse_engines
from secateur.engines import ENGINES, installed
from secateur.errors import BadArtifact, BadRequest
from secateur.recipes import Tell, make_recipe, run_recipe
from secateur.recipes.reports import read_report
from secateur.recipes.results import alike, engines_of, read_rows, timing_text
from secateur.recipes.schema import Measure
from secateur.report import Row
from test_report import check
from tiny_runs import plain, recipe, small

NET = ("--model", "tiny_runs:small", "--input", "1,1,8,8")


@pytest.fixture(autouse=True)
def _wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TERM", "dumb")


def run(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output + repr(result.exception)
    return result.output


def go(folder: Path, **changes: Any) -> Path:
    values = recipe(train={"epochs": 1}, finetune=None, compensate=None, **changes)
    run_recipe(make_recipe(values), folder, allow_import=True, cpu=True)
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``l1``, with a report and latencies in two engines, and ``random``, with neither."""
    folder = tmp_path_factory.mktemp("runs")
    excluded = {"exclude": ["3"], "ratios": 0.5}
    measure = {"engine": ["torch", "channels_last"]}
    go(folder / "l1", prune=excluded, measure=measure, export={"onnx": False, "report": True})
    go(folder / "random", prune={"criterion": "random"})
    return folder


def cells(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if line.startswith("│")]


# A run's record --------------------------------------------------------------------------------------------------


def test_a_run_tells_its_engines_and_what_stayed_whole(runs: Path) -> None:
    found = read_report(runs / "l1")
    assert [row.name for row in found.rows] == ["dense", "pruned"]
    assert all(list(row.latencies_ms) == ["torch", "channels_last"] for row in found.rows)
    assert {(one.groups, one.channels, one.locked): one.why for one in found.whole if not one.locked} == {
        (("3",), 12, False): "the recipe excludes 3"
    }
    assert "it is an output of the network" in [one.why for one in found.whole if one.locked]
    assert found.images == 359
    assert found.timing.startswith("median of 50 runs of one image on 1 thread, all networks in all engines in turns")
    results = json.loads((runs / "l1" / "results.json").read_text())
    assert list(results["engines"]) == ["torch", "channels_last"]
    for engine, timed in results["quartiles_ms"].items():
        for row in found.rows:
            low, high = timed[row.name]
            assert low <= row.latencies_ms[engine] <= high
    kept = read_measurement(runs / "l1" / "pruned")
    assert kept is not None
    assert (kept.engine, kept.latency_ms) == found.outcome.fastest
    assert kept.memory == found.outcome.memory
    assert kept.details["latencies_ms"] == found.outcome.latencies_ms


def test_a_run_without_a_record_is_told_by_its_results(runs: Path) -> None:
    found = read_report(runs / "random")
    assert found.title == "tiny_runs:small on digits"
    assert [row.name for row in found.rows] == ["dense", "pruned"]
    assert found.layers == []
    assert [curve.name for curve in found.curves] == ["dense"]
    assert found.facts == {"left out": "layers, filters and what stayed whole: the run wrote no report.json"}
    assert "in float64" in found.law["largest difference"]


def test_rows_beside_the_outcome_are_not_it(runs: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(runs / "random", tmp_path / "run"))
    results = json.loads((folder / "results.json").read_text())
    pruned = results["rows"][-1]
    others = ("random, recalibrated", "from scratch", "dense, int8", "pruned, int8")
    results["rows"] += [{**pruned, "name": name, "accuracy": 0.0123} for name in others]
    (folder / "results.json").write_text(json.dumps(results))
    assert read_report(folder).outcome == read_report(runs / "random").outcome
    assert "1.23 %" not in run("compare", "tiny_runs:small", folder, *NET, "--no-latency")


def test_results_of_one_engine_are_still_read() -> None:
    old = {"name": "dense", "params": 1, "macs": 2, "accuracy": 0.5, "size": 3, "latency_ms": 4.0}
    bare = {**old, "name": "bare", "latency_ms": None}
    found = {"rows": [old, bare], "engine": "onnxruntime", "threads": 1}
    assert read_rows(found) == [Row("dense", 1, 2, 0.5, 3, {"onnxruntime": 4.0}), Row("bare", 1, 2, 0.5, 3)]
    assert timing_text(found) == ""


def test_what_was_left_out_is_told() -> None:
    quartiles = {"torch": {"dense": [0.9, 1.1], "pruned": [0.49, 0.51]}}
    found = {"threads": 2, "repeats": 9, "quartiles_ms": quartiles, "left_out": {"openvino": "it cannot run this"}}
    assert timing_text(found) == (
        "median of 9 runs of one image on 2 threads, all networks in all engines in turns; the quartiles lie within "
        "10.0 % of the middle between them. Networks of the same shapes are timed as one. openvino is left out: it "
        "cannot run this."
    )


def test_networks_of_the_same_shapes_are_alike() -> None:
    models = {"one": small(), "two": small(), "wide": small(width=9), "bare": plain(), "again": small(width=9)}
    models["strided"] = small()
    models["strided"][3].stride = (1, 1)
    assert {name: alike(model, models) for name, model in models.items()} == {
        "one": "one", "two": "one", "wide": "wide", "bare": "bare", "again": "wide", "strided": "strided",
    }  # fmt: skip


def test_an_engine_that_fails_is_left_out_and_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **options: Any) -> Any:
        raise BadArtifact("it cannot run this\n  do: nothing")

    engine = replace(ENGINES["channels_last"], prepare=broken)
    monkeypatch.setitem(ENGINES, "channels_last", engine)
    told: list[str] = []
    values = recipe(train={"epochs": 1}, prune=None, finetune=None, compensate=None)
    asked = make_recipe({**values, "measure": {"engine": ["channels_last", "torch"]}})
    done = run_recipe(asked, tmp_path / "run", allow_import=True, cpu=True, tell=Tell(say=told.append))
    assert [list(row.latencies_ms) for row in done.rows] == [["torch"]]
    assert "measuring: channels_last is left out: it cannot run this" in told
    asked = make_recipe({**values, "measure": {"engine": "channels_last"}})
    with pytest.raises(BadArtifact, match="it cannot run this"):
        run_recipe(asked, tmp_path / "other", allow_import=True, cpu=True)


def test_what_all_engines_are() -> None:
    assert engines_of(Measure(engine="all")) == installed()
    assert engines_of(Measure(engine="openvino")) == ["openvino"]
    assert engines_of(Measure(engine=["inductor", "torch"])) == ["inductor", "torch"]
    assert engines_of(Measure(engine="all", latency=False)) == []
    assert parse_engines(["torch, onnxruntime", "torch"]) == ["torch", "onnxruntime"]
    assert parse_engines(["torch", "all"]) == installed()
    assert parse_engines([]) == ["torch"]
    with pytest.raises(BadRequest, match="unknown engine 'both'"):
        parse_engines(["both"])


# report ----------------------------------------------------------------------------------------------------------


def test_the_page_is_made_anew(runs: Path, tmp_path: Path) -> None:
    before = (runs / "l1" / "report.html").read_text()
    check(before)
    assert f"written to {tmp_path / 'new.html'}" in run("report", runs / "l1", "-o", tmp_path / "new.html")
    assert (tmp_path / "new.html").read_text() == before
    shutil.copytree(runs / "random", tmp_path / "random")
    run("report", tmp_path / "random")
    assert "the run wrote no report.json" in (tmp_path / "random" / "report.html").read_text()


def test_several_runs_are_one_page(runs: Path, tmp_path: Path) -> None:
    run("report", runs / "l1", runs / "random", "-o", tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    check(text)
    assert text.count('<details class="run"') == 2
    assert text.count(f"<summary>{runs / 'l1'}</summary>") == 1
    assert "<h2>Accuracy against cost</h2>" in text


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (("l1", "random"), "where should the page of several runs be written?\n  do: say -o page.html"),
        (("l1", "l1", "-o", "page.html"), "is there twice\n  do: name each run once"),
        (("nowhere",), "nowhere is no folder\n  do: name the folder of a run of secateur run, demo or finetune"),
        ((".",), " has no run in it\n  do: name the folder of a run"),
        (("l1", "half", "-o", "page.html"), "half is not finished: of its phases these are done: dense, prune\n"),
    ],
)
def test_refusals_write_nothing(
    names: tuple[str, ...], told: str, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("l1", "random"):
        shutil.copytree(runs / name, tmp_path / name)
    shutil.copytree(runs / "random", tmp_path / "half")
    state = json.loads((tmp_path / "half" / "run.json").read_text())
    del state["finished"]
    (tmp_path / "half" / "run.json").write_text(json.dumps({**state, "done": state["done"][:2]}))
    (tmp_path / "l1" / "report.html").unlink()
    monkeypatch.chdir(tmp_path)
    text = run("report", *names, code=2)
    assert text.startswith("error: ")
    assert told in text
    assert not list(tmp_path.rglob("*.html"))


def test_an_unfinished_run_says_how_to_go_on(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "random", tmp_path / "half")
    (tmp_path / "half" / "run.json").write_text('{"done": []}')
    noted = {"sessions": [{"command": "secateur run mine.yaml -o half"}]}
    (tmp_path / "half" / "environment.json").write_text(json.dumps(noted))
    with pytest.raises(BadArtifact) as error:
        read_report(tmp_path / "half")
    assert str(error.value) == (
        f"the run in {tmp_path / 'half'} is not finished: of its phases these are done: none\n"
        "  do: go on with it, by the same command as before: secateur run mine.yaml -o half"
    )
    (tmp_path / "half" / "environment.json").unlink()
    with pytest.raises(BadArtifact, match=f"secateur run {tmp_path}/half/recipe.yaml -o {tmp_path}/half"):
        read_report(tmp_path / "half")


def test_a_damaged_record_is_told(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "l1", tmp_path / "l1")
    (tmp_path / "l1" / "report.json").write_text("{}")
    with pytest.raises(
        BadArtifact, match=r"report\.json: this is no record of a report: format: Field required\n  do: "
    ):
        read_report(tmp_path / "l1")


# compare ---------------------------------------------------------------------------------------------------------


def test_three_networks_side_by_side(runs: Path, tmp_path: Path) -> None:
    names = "tiny_runs:small", runs / "l1", runs / "random" / "pruned"
    asked = ("--engine", "torch,channels_last", "-o", tmp_path / "page.html")
    text = run("compare", *names, *NET, *asked)
    first, second = text.split("Latency, ms, 1 thread")
    rows = cells(first)
    assert [row[0] for row in rows] == [str(name) for name in names]
    known = {row.name: row for row in read_report(runs / "l1").rows}
    assert rows[1][1] == f"{100 * (known['pruned'].accuracy or 0):.2f} %"
    assert rows[0][1] == "–"
    assert [row[3].split()[0] for row in rows[:2]] == [f"{known[name].macs:,}" for name in ("dense", "pruned")]
    times = cells(second)
    assert [len(row) for row in times] == [4, 4, 4]
    assert times[0][-1] == "1.00 ×"
    page = (tmp_path / "page.html").read_text()
    check(page)
    assert "Widths side by side" in page
    assert re.search(r"median of 30 runs of inputs \[1, 1, 8, 8\] on 1 thread, all in turns", page)


def test_the_same_network_twice_is_told_apart() -> None:
    rows = cells(run("compare", "tiny_runs:small", "tiny_runs:small", "--input", "1,1,8,8", "--no-latency"))
    assert [row[0] for row in rows] == ["tiny_runs:small #1", "tiny_runs:small #2"]


def test_what_cannot_be_compared(runs: Path, tmp_path: Path) -> None:
    assert "one network cannot be compared\n  do: name two or more" in run("compare", "tiny_runs:small", code=2)
    assert "say --model tiny_runs:small" in run("compare", "zoo:resnet20", runs / "l1", code=2)
    shutil.copytree(runs / "random", tmp_path / "bare")
    shutil.rmtree(tmp_path / "bare" / "pruned")
    text = run("compare", "tiny_runs:small", tmp_path / "bare", *NET, code=2)
    assert "bare pruned nothing: it holds no network to compare\n  do: see secateur report" in text
