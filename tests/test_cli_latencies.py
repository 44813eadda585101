"""``secateur latencies`` and ``secateur plan --latency``: what they write, say and refuse."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

import secateur as sc
from secateur import latencies
from secateur.cli import app
from test_latencies import stair_ms, timers

NET = ["zoo:resnet20", "--input", "1,3,16,16"]


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers take what ``stair_ms`` says; whole networks are timed really, with few rounds."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(
        timers.TIMERS, "torch", lambda layers, batch, threads, rounds: [[stair_ms(layer)] for layer in layers]
    )
    monkeypatch.setattr(latencies.measuring, "REPEATS", 2)


def run(*arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, [*arguments])
    assert result.exit_code == code, result.output
    return " ".join(result.output.split())


def test_measured_here_and_used_there() -> None:
    said = run("latencies", *NET, "--engine", "torch", "-o", "board.json")
    assert "board.json: " in said
    assert " kinds of layers in " in said
    found = sc.Latencies.from_json(Path("board.json").read_text())
    assert (found.engine, found.threads, found.batch) == ("torch", 1, 1)
    said = run("plan", *NET, "--engine", "torch", "--latency", "0.8", "--latencies", "board.json", "-o", "plan.json")
    told = json.loads(Path("plan.json").read_text())["made_by"]["latency"]
    assert f"{told['dense_ms']:.3g} → {told['predicted_ms']:.3g} ms predicted; its layers were timed in" in said
    assert told["predicted_ms"] <= 0.8 * told["dense_ms"]


def test_measured_on_the_way() -> None:
    said = run("plan", *NET, "--engine", "torch", "--latency", "0.8", "-o", "plan.json")
    assert " ms predicted, measured " in said
    assert len(list(Path("cache").iterdir())) == 1


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["--latencies", "board.json"], "--latencies says how a budget of latency is foreseen do: ask for one"),
        (["--latency", "0.5", "--engine", "torch", "--latencies", "none.json"], "none.json cannot be read: "),
        (
            ["--latency", "0.5", "--engine", "torch", "--latencies", "board.json"],
            "board.json: the latencies are no JSON",
        ),
        (["--latency", "0.5", "--engine", "inductor"], "cannot be timed one by one in engine 'inductor'"),
        (["--latency", "0.5"], "a latency is that of an engine"),
    ],
)
def test_refused(arguments: list[str], match: str) -> None:
    Path("board.json").write_text("{")
    assert match in run("plan", *NET, *arguments, "-o", "plan.json", code=2)
    assert not Path("plan.json").exists()


def test_nowhere_to_write() -> None:
    said = run("latencies", *NET, "--engine", "torch", "-o", "none/board.json", code=2)
    assert "board.json cannot be written: No such file or directory do: choose another path" in said
