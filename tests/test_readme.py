"""The README's Python and command lines run as they stand."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from secateur.cli import app
from secateur.recipes import parse_recipe
from secateur.zoo.torchvision_shim import import_torchvision

ROOT = Path(__file__).parents[1]
OWN_TESTS = {
    ROOT / "docs" / name for name in ("how-much-can-i-prune.md", "thinet.md", "fpgm.md", "int8.md", "engines.md")
}
"""The pages that train or measure: a test_docs_... of their own runs each."""
DOCUMENTS = sorted(set((ROOT / "docs").glob("*.md")) - OWN_TESTS)


def blocks(language: str) -> list[str]:
    """The fenced blocks of one language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```$", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)


@pytest.mark.filterwarnings("ignore:the network takes:secateur.SecateurWarning")  # on a busy machine
def test_python_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    first, second, third = blocks("python")
    assert len([line for line in first.splitlines() if line.strip()]) <= 12
    names: dict[str, Any] = {}
    exec(compile(first, "README.md", "exec"), names)
    before, after = (int(text) for text in capsys.readouterr().out.split(" -> "))
    assert 0.49 * before <= after <= 0.5 * before
    assert names["again"] is not names["small"]
    assert (tmp_path / "resnet20-half" / "model.safetensors").is_file()
    exec(compile(second, "README.md", "exec"), names)
    assert len(names["found"].curves) == 12
    assert names["plan"].made_by["sensitivity"]["criterion"] == "l1"
    exec(compile(third, "README.md", "exec"), names)
    told = names["plan"].made_by["latency"]
    assert told["predicted_ms"] <= 0.7 * told["dense_ms"]
    assert (tmp_path / "fast.int8.onnx").is_file()


@pytest.mark.filterwarnings("ignore:torchvision .* does not fit:UserWarning", "ignore::Warning:pytorch_lightning")
@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning", "ignore:.*num_workers:UserWarning")
@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: p.stem)
def test_documents_run(document: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Python of a document runs from its top to its end, as one session."""
    monkeypatch.chdir(tmp_path)
    text = document.read_text()
    if "pytorch_lightning" in text:  # which imports torchvision where it is installed, and dies of mismatched wheels
        import_torchvision()
    session: dict[str, object] = {"__name__": "document"}
    for source in re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        exec(compile(source, document.name, "exec"), session)


def test_recipes_can_be_read() -> None:
    (text,) = blocks("yaml")
    recipe = parse_recipe(text)
    assert recipe.model.name == "zoo:resnet56"


@pytest.mark.filterwarnings("ignore:the network takes:secateur.SecateurWarning")  # on a busy machine
def test_command_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (block,) = blocks("bash")
    lines = [shlex.split(line, comments=True) for line in block.splitlines() if line.strip()]
    verbs = ("plan", "apply", "measure", "export", "engines", "plan", "compare")
    assert [line[:2] for line in lines] == [["secateur", verb] for verb in verbs]
    for _, *arguments in lines:  # the script itself is tried as a process of its own in test_cli
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, result.output
    assert (tmp_path / "small.onnx").stat().st_size > 10_000
    assert (tmp_path / "page.html").is_file()


def test_make_targets_named_in_documents_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for document in ("README.md", "CONTRIBUTING.md"):
        assert set(re.findall(r"^ *make ([a-z-]+)", (ROOT / document).read_text(), re.MULTILINE)) <= targets
    assert {"install", "test", "test-all", "check", "demo", "bench", "coverage-all"} <= targets


def test_constraints_pin_torch_and_everything_else() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert "torch==2.13.0" in lines
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]+==[0-9][0-9A-Za-z.]*", line) for line in lines)
