"""The shape of the code itself: imports only go down, importing is cheap, files and functions stay small."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import secateur

PACKAGE = Path(secateur.__file__).parent
ROWS = [
    {"errors", "core", "version", "nests", "nodes", "processes", "generators", "files", "machines"},
    {"capture", "graph", "labels", "propagation", "rules"},
    {"groups"},
    {"interpreter"},
    {
        "views",
        "layer_weights",
        "statistics",
        "taps",
        "patches",
        "consumers",
        "grams",
        "correlations",
        "contributions",
        "products",
    }
    | {"calibration", "residuals", "criteria"},
    {"scores"},
    {"costs", "operations", "liveness", "counting", "tradeoffs", "budgets", "allocation", "selection", "sequential"},
    {"plans", "plan_checks", "plan_schema"},
    {"masks"},
    {"rewrites", "attributes", "slicing", "proofs", "graph_network", "surgery", "optimisers"}
    | {"wiring", "folding", "homes"},
    {"recover", "onnx_file"},
    {"engines"},
    {"measurement", "timing", "memory", "last_map", "heads", "quantisation"},
    {"latencies"},
    {"sensitivities"},
    {"artifact"},
    {"report"},
    {"pipeline"},
    {"schedules"},
    {"__init__"},
    {"zoo", "recipes", "cli", "cli_models", "cli_output", "cli_training", "cli_sensitivity", "__main__"}
    | {"cli_latencies", "cli_measuring", "cli_quantising", "cli_reporting"},
]
RANK = {name: rank for rank, row in enumerate(ROWS) for name in row}
HEAVY = """accelerate hypothesis jinja2 matplotlib onnx onnxruntime onnxscript openvino pandas pydantic rich scipy
sklearn tensorboard timm torchvision typer yaml"""
FILES = sorted(PACKAGE.rglob("*.py"))


def part(path: Path) -> str:
    """The part of the package a file belongs to: its name, or that of its folder."""
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def imported_parts(source: str, package: str) -> Iterator[str]:
    """Parts of secateur that ``source`` imports anywhere, imports for type checking aside."""

    def statements(node: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield node
        for child in ast.iter_child_nodes(node):
            yield from statements(child)

    for node in statements(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            names = [f"{module}.{alias.name}" for alias in node.names]
        else:
            names = [alias.name for alias in node.names]
        for name in names:
            head, _, rest = name.partition(".")
            if head == "secateur":
                first = rest.partition(".")[0]
                yield first if first in RANK else "__init__"


def test_every_part_has_a_row() -> None:
    assert {part(path) for path in FILES} <= RANK.keys()


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_only_go_down(path: Path) -> None:
    package = ".".join(["secateur", *path.relative_to(PACKAGE).parts[:-1]])
    found = {name for name in imported_parts(path.read_text(), package) if RANK[name] > RANK[part(path)]}
    if part(path) == "artifact":
        found -= {"zoo"}  # load(folder, "timm:resnet18") builds by name, and imports the zoo when it is asked to
    assert not found, f"{path.name} imports {found}, which lie above it"


def test_the_import_rule_sees_every_form() -> None:
    source = "from . import plans\nfrom .zoo.names import build\nimport secateur.cli\n"
    source += "from secateur import plan, masks\ndef f():\n  from ..core import G\n"
    assert list(imported_parts(source, "secateur")) == ["plans", "zoo", "cli", "__init__", "masks"]
    assert list(imported_parts("from ..core import G", "secateur.rules")) == ["core"]


def test_only_main_imports_the_command_line() -> None:
    users = {part(path) for path in FILES if "cli" in imported_parts(path.read_text(), "secateur")}
    assert users == {"__main__"}


def test_import_is_lean() -> None:
    code = "import sys, torch; plain = set(sys.modules); import secateur; print(*set(sys.modules) - plain)"
    path = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=path)
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert "secateur" in loaded
    assert not loaded & set(HEAVY.split())


def test_public_names() -> None:
    public = {
        name
        for name, value in vars(secateur).items()
        if not name.startswith("_") and not isinstance(value, type(sys)) and name not in ("annotations",)
    }
    assert set(secateur.__all__) - {"__version__"} == public
    assert len(set(secateur.__all__)) == len(secateur.__all__)


def test_files_and_functions_are_small() -> None:
    long_files = {path.name: n for path in FILES if (n := len(path.read_text().splitlines())) > 400}
    assert not long_files
    long_functions = {
        f"{path.name}:{node.name}": node.end_lineno - node.lineno
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        and node.end_lineno is not None
        and node.end_lineno - node.lineno > 60
    }
    assert not long_functions
