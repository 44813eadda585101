"""The commands, on small networks: what they print, what they write, and how they refuse."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner

from secateur.cli import app
from secateur.cli_models import parse_budget, parse_options, parse_ratios, parse_shape
from secateur.core import Budget
from secateur.errors import BadRequest
from secateur.plans import Plan

ROOT = Path(__file__).parents[1]


def tiny() -> nn.Module:
    """A network of the user's own, for ``test_cli:tiny``."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 12, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5),
    )  # fmt: skip
    model.input_size = (3, 8, 8)  # type: ignore[assignment]
    return model


def locked() -> nn.Module:
    class Softmax(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 4, 1), nn.Conv2d(4, 2, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.c(self.b(self.a(x)).softmax(1))

    return Softmax()


TINY = f"{__name__}:tiny"


@pytest.fixture(autouse=True)
def _wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TERM", "dumb")


def run(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output + repr(result.exception)
    return result.output


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``plan.json`` for the zoo's ResNet-20, and ``small``, what it gives."""
    folder = tmp_path_factory.mktemp("cli")
    run("plan", "zoo:resnet20", "--keep", 0.5, "-o", folder / "plan.json")
    run("apply", "zoo:resnet20", folder / "plan.json", "-o", folder / "small")
    return folder


def test_help_reads_well() -> None:
    text = run("--help")
    for command in ("demo", "run", "finetune", "inspect", "plan", "apply", "measure", "compare", "export", "report"):
        assert f" {command} " in text
        assert f"secateur {command}" in run(command, "--help")
    assert "--round-to" in run("plan", "--help")


def test_inspect_prints_groups_and_locks() -> None:
    text = run("inspect", TINY)
    assert "2 groups of 20 channels can be pruned" in text
    text = run("inspect", f"{__name__}:locked", "--input", "2,3,5,5")
    assert "softmax" in text
    assert "1 group of 6 channels" in text


def test_inspect_json() -> None:
    groups = json.loads(run("inspect", TINY, "--json"))
    free = {group["name"]: group["channels"] for group in groups if not group["locked"]}
    assert free == {"0": 8, "3": 12}
    tensors = {(t["name"], t["axis"]) for t in next(g for g in groups if g["name"] == "0")["tensors"]}
    assert {("0.weight", 0), ("1.running_var", 0), ("3.weight", 1)} <= tensors


def test_plan_apply_measure_export(pruned: Path, tmp_path: Path) -> None:
    text = run("measure", pruned / "small", "--no-latency")
    assert "layer3.2.conv2" in text
    assert "all layers" in text
    rows = [line.split("│") for line in text[text.index("Networks") :].splitlines() if line.startswith("│")]
    dense, small = (int(row[3].split()[0].replace(",", "")) for row in rows)
    assert dense == 40_551_040
    assert 0.99 * dense / 2 <= small <= dense / 2
    assert "→" in text
    text = run("export", pruned / "small", "-o", tmp_path / "small.onnx")
    assert "largest difference to torch" in text
    assert (tmp_path / "small.onnx").is_file()


def test_plan_remembers_its_network(pruned: Path) -> None:
    plan = Plan.from_json((pruned / "plan.json").read_text())
    assert plan.made_by["model"] == "zoo:resnet20"
    assert plan.made_by["criterion"] == "l1"


def test_pruning_a_pruned_folder_again(pruned: Path, tmp_path: Path) -> None:
    run("plan", pruned / "small", "--keep", 0.5, "-o", tmp_path / "second.json")
    run("apply", pruned / "small", tmp_path / "second.json", "-o", tmp_path / "smaller")
    text = run("compare", pruned / "small", tmp_path / "smaller", "--no-latency")
    first, second = (int(line.split("│")[3].split()[0].replace(",", "")) for line in text.splitlines()[-3:-1])
    assert 0.49 * first <= second <= 0.5 * first


def test_compare_times_both(pruned: Path) -> None:
    text = run("compare", "zoo:resnet20", pruned / "small", "--input", "1,3,16,16")
    assert text.count(" ms ") == 2
    assert "torch, 1 thread" in text
    text = run("compare", TINY, pruned / "small", code=2)
    assert "do: give all of them one shape with --input" in text


def test_weights_decide_the_plan(tmp_path: Path) -> None:
    model = tiny()
    with torch.no_grad():
        model[3].weight.copy_(torch.arange(12.0)[:, None, None, None].expand_as(model[3].weight))
    save_file({f"module.{name}": tensor for name, tensor in model.state_dict().items()}, tmp_path / "w.safetensors")
    text = run("plan", TINY, "--weights", tmp_path / "w.safetensors", "--ratio", "3=0.75", "-o", tmp_path / "p.json")
    plan = Plan.from_json((tmp_path / "p.json").read_text())
    assert plan.keep["3"] == (9, 10, 11)
    assert len(plan.keep["0"]) == 8
    assert "random" not in text
    assert "random" in run("plan", TINY, "--ratio", "3=4", "-o", tmp_path / "p.json")


def test_folder_of_the_users_own_model_needs_its_name(tmp_path: Path) -> None:
    run("plan", TINY, "--exclude", "0", "--ratio", "0.5", "-o", tmp_path / "p.json")
    run("apply", TINY, tmp_path / "p.json", "-o", tmp_path / "small")
    text = run("inspect", tmp_path / "small", code=2)
    assert f"say --model {TINY}" in text
    assert "2 groups of 14 channels" in run("inspect", tmp_path / "small", "--model", TINY)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("inspect", "zoo:resnet21"), "did you mean 'resnet"),
        (("inspect", "resnet20"), "neither a saved folder nor a model's name; did you mean 'zoo:resnet20'"),
        (("inspect", "nowhere/at_all"), "write zoo:NAME"),
        (("inspect", TINY, "--input", "3"), "--input 1,3,224,224"),
        (("inspect", TINY, "--weights", "no.pth"), "no.pth"),
        (("inspect", TINY, "--option", "x"), "write NAME=VALUE"),
        (("plan", TINY, "-o", "p.json", "--criterion", "l3"), "'l"),
        (("plan", TINY, "-o", "p.json", "--ratio", "half"), "GLOB=RATIO"),
        (("plan", TINY, "-o", "p.json", "--ratio", "1.5"), "1.5"),
        (("plan", TINY, "-o", "p.json", "--ratio", "nothing*=0.5"), "nothing*"),
        (("plan", TINY, "-o", "p.json", "--keep", "0.0001"), "reach"),
        (("plan", TINY, "-o", "missing/p.json", "--keep", "0.5"), "cannot be written"),
        (("apply", TINY, "no.json", "-o", "small"), "make one with secateur plan"),
        (("measure", TINY, "--engine", "openvin"), "unknown engine 'openvin'; did you mean 'openvino'?"),
    ],
)
def test_refusals(arguments: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = run(*arguments, code=2)
    assert text.startswith("error: ")
    assert message in text
    assert "Traceback" not in text
    assert list(tmp_path.iterdir()) == []


def test_plan_for_another_network(pruned: Path, tmp_path: Path) -> None:
    text = run("apply", "zoo:resnet32", pruned / "plan.json", "-o", tmp_path / "small", code=2)
    assert "layer1.3.conv1.weight" in text
    assert list(tmp_path.iterdir()) == []


def test_folder_may_not_ask_for_downloads(pruned: Path, tmp_path: Path) -> None:
    plan = json.loads((pruned / "small" / "plan.json").read_text())
    plan["made_by"]["options"] = {"pretrained": True}
    (tmp_path / "small").mkdir()
    for file in (pruned / "small").iterdir():
        (tmp_path / "small" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "small" / "plan.json").write_text(json.dumps(plan))
    assert "not taken from a file" in run("inspect", tmp_path / "small", code=2)


def test_real_process() -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "COLUMNS": "200"}
    command = [sys.executable, "-m", "secateur", "inspect", "zoo:nothing"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: the zoo has no 'nothing'")
    assert "Traceback" not in done.stderr


def test_interruption(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(source: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("secateur.cli.open_model", interrupted)
    assert run("plan", "zoo:resnet20", "-o", tmp_path / "plan.json", code=130) == "interrupted\n"
    assert list(tmp_path.iterdir()) == []


def test_parsing() -> None:
    assert parse_shape("1,3,224,224") == parse_shape("1x3x224x224") == (1, 3, 224, 224)
    assert parse_ratios([]) is None
    assert parse_ratios(["0.5"]) == 0.5
    assert parse_ratios(["a=b.*=0.5", "conv1=48", "x=0"]) == {"a=b.*": 0.5, "conv1": 48, "x": 0.0}
    with pytest.raises(BadRequest, match=r"write '\*=0.5'"):
        parse_ratios(["0.5", "a=0.3"])
    assert parse_options(["classes=10", "shortcut=projection", "pretrained=False"]) == {
        "classes": 10,
        "shortcut": "projection",
        "pretrained": False,
    }
    for bad in ("0,3,2,2", "3", "1,3,a", "1,-3,4,4"):
        with pytest.raises(BadRequest, match="is no shape"):
            parse_shape(bad)


def test_scattered_branches_and_folded_constants(tmp_path: Path) -> None:
    asked = ("plan", "zoo:resnet20", "--residual", "scatter", "--ratio", "0.4", "-o", tmp_path / "plan.json")
    run(*asked, "--constants", "fold")
    made = Plan.from_json((tmp_path / "plan.json").read_text())
    assert (made.residual, set(made.constants.values())) == ("scatter", {"fold"})
    assert "layer1.0.conv2" in made.constants
    run(*asked, "--constants", "layer1.*=drop", "--constants", "*=fold")
    made = Plan.from_json((tmp_path / "plan.json").read_text())
    assert "layer1.0.conv2" not in made.constants
    assert made.constants["layer2.0.conv2"] == "fold"
    assert not Plan.from_json(plan_text(*asked, where=tmp_path / "plan.json")).constants
    for wrong, text in ((("keep",), "there is no 'keep'"), (("fold", "a=drop"), "is for all groups")):
        found = run(*asked, *(word for value in wrong for word in ("--constants", value)), code=2)
        assert text in found


def plan_text(*arguments: object, where: Path) -> str:
    run(*arguments)
    return where.read_text()


# Budgets of memory and latency -----------------------------------------------------------------------------------


def test_plan_meets_a_budget_of_memory(tmp_path: Path) -> None:
    text = run("plan", TINY, "--of", "memory", "--keep", 0.6, "--batch", 2, "-o", tmp_path / "p.json")
    plan = Plan.from_json((tmp_path / "p.json").read_text())
    assert plan.made_by["budget"]["batch"] == 2
    dense, pruned = (plan.made_by["memory"][key] for key in ("dense", "pruned"))
    assert dense == 2 * 4 * 64 * 24  # the second convolution's 12 channels before and behind their ReLU
    assert 0.5 * dense < pruned <= 0.6 * dense
    assert "activations of 2 examples need 12.3 kB → " in text


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--latency", 0.5, "--keep", 0.5), "--latency 0.5 is a budget, and --keep 0.5 says another one"),
        (("--latency", 0.5, "--at-most", 3), "--latency 0.5 is a budget, and --at-most 3.0 says another one"),
        (("--latency", 0.5, "--of", "macs"), "--latency 0.5 is a budget, and --of macs says another one"),
        (("--latency", 0.5), "a latency is that of an engine, and Budget.engine is None"),
        (("--engine", "torch"), "Budget.engine='torch' means nothing to a budget of macs"),
        (("--batch", 0), "Budget.batch=0 is not a whole number, 1 or more"),
        (("--of", "memory", "--threads", 2), "Budget.threads=2 means nothing to a budget of memory"),
        (("--of", "speed"), "a budget of 'speed' is not known; known: macs, params, channels, memory, latency"),
    ],
)
def test_budgets_that_mean_nothing_are_refused(tmp_path: Path, options: tuple[object, ...], told: str) -> None:
    assert told in " ".join(run("plan", TINY, *options, "-o", tmp_path / "p.json", code=2).split())
    assert list(tmp_path.iterdir()) == []


def test_a_latency_is_a_fraction_of_the_latency_in_an_engine() -> None:
    run_ = {"engine": "openvino", "batch": 4, "threads": 2}
    asked, half = parse_budget(None, None, None, latency=0.3, run=run_)
    assert asked == Budget(keep=0.3, of="latency", **run_)  # type: ignore[arg-type]
    assert parse_budget(0.3, None, "latency", latency=None, run=run_)[0] == asked
    asked, half = parse_budget(None, None, "memory", latency=None, run={"batch": 4})
    assert (asked, half) == (None, Budget(keep=0.5, of="memory", batch=4))
