"""The demo: its recipe, and the whole of it cut short."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from secateur.artifact import load
from secateur.cli import app
from secateur.engines import installed
from secateur.recipes import demo_recipe
from secateur.recipes.schema import Measure
from secateur.zoo.names import build


def test_recipe_is_whole_and_takes_the_seed() -> None:
    recipe = demo_recipe(seed=3)
    assert recipe.seed == 3
    assert recipe.prune is not None
    assert recipe.prune.budget is not None
    assert recipe.prune.budget.keep == 0.5
    assert demo_recipe() == demo_recipe(0) != recipe


@pytest.mark.parametrize("engine", ["torch", pytest.param("all", marks=pytest.mark.slow)])
def test_whole_demo_cut_short(engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert demo_recipe().measure.engine == "all"  # of which one takes half a minute to compile a network
    recipe = demo_recipe().model_copy(update={"measure": Measure(engine=engine)})
    monkeypatch.setattr("secateur.recipes.demo_recipe", lambda seed: recipe)
    monkeypatch.setenv("COLUMNS", "80")
    folder = tmp_path / "out"
    result = CliRunner().invoke(app, ["demo", "--smoke", "-o", str(folder)])
    assert result.exit_code == 0, result.output
    assert "…" not in result.stdout
    assert "test images" in result.stdout
    assert "Each group alone, not retrained" in result.stdout
    assert "layer2.0.conv1" in result.stdout
    rows = {row["name"]: row for row in json.loads((folder / "results.json").read_text())["rows"]}
    compared = [f"{criterion}, recalibrated" for criterion in ("l1", "thinet", "fpgm")]
    assert list(rows) == ["dense", "pruned", "compensated", *compared, "fine-tuned"]
    assert all(rows[name]["macs"] == rows["pruned"]["macs"] for name in compared)
    assert 0.495 * rows["dense"]["macs"] <= rows["pruned"]["macs"] <= 0.5 * rows["dense"]["macs"]
    assert all(row["size"] and row["memory"] and row["accuracy"] is not None for row in rows.values())
    engines = installed() if engine == "all" else [engine]
    assert all(list(row["latencies_ms"]) == engines for row in rows.values())
    assert "Latency, ms, 1 thread" in result.stdout
    assert rows["fine-tuned"]["size"] < rows["dense"]["size"]
    report = (folder / "report.html").read_text()
    assert report.count("<h2>Sensitivity</h2>") == 1
    assert "<b>locked:</b> it is an output of the network" in report
    assert report.count("<svg") >= 5
    assert "layer3.2.conv2" in report
    for criterion in ("thinet", "fpgm"):
        assert f"{criterion}, recalibrated" in report
        assert f"beside-{criterion}, after batch norm" in report
    assert "in float64, at random weights too" in report
    assert (folder / "model.onnx").stat().st_size > 10_000
    small = load(folder / "pruned", build("zoo:resnet20"))
    assert sum(p.numel() for p in small.parameters()) == rows["fine-tuned"]["params"]

    again = CliRunner().invoke(app, ["demo", "--smoke", "-o", str(folder)])
    assert again.exit_code == 0
    assert "was finished before" in again.stdout
