"""Named recipes on the command line, cut short, on files of CIFAR that hold made images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from made_data import cifar_files, write_files
from secateur.cli import app


def command(*arguments: object, code: int = 0) -> str:
    """What the command prints; it must end with that status."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200", "TERM": "dumb"})
    assert result.exit_code == code, result.output + repr(result.exception)
    return result.output


def smoke(tmp_path: Path, *line: str) -> tuple[list[dict[str, Any]], dict[str, Any], Path]:
    """The named recipe cut short, without what only takes time: its rows, its phases' facts and its folder."""
    quick = ["measure.latency=false", "export={onnx: false, report: false}", "data.batch=4", f"data.root={tmp_path}"]
    folder = tmp_path / "run"
    command("run", *line, "--smoke", "--cpu", *(part for text in quick for part in ("--set", text)), "-o", folder)
    rows = json.loads((folder / "results.json").read_text())["rows"]
    return rows, {e["phase"]: e["facts"] for e in json.loads((folder / "run.json").read_text())["done"]}, folder


def made_cifar(root: Path) -> None:
    """The files of CIFAR-10 with four images of each class in each."""
    folder, files, _ = cifar_files(classes=10, version="binary", each=4)
    write_files(root / folder, files)
