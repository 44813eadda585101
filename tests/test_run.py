"""Whole runs of small recipes: what they leave, in which order, and what they refuse."""

from __future__ import annotations

import json
import os
import resource
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import secateur as sc
from secateur.cli import app
from secateur.errors import BadArtifact, BadRequest, SecateurError
from secateur.recipes import Outcome, Tell, make_recipe, parse_recipe, run_recipe
from secateur.recipes.folder import RunFolder, append_line, locked, write_whole
from secateur.recipes.metrics import keep_metrics, read_metrics
from secateur.recipes.runner import resolved
from tiny_runs import recipe, small, write

FULL = recipe(
    compensate={"batches": 2, "readers": "least-squares"},
    distil={"temperature": 2.0},
    scratch="epochs",
    measure={"latency": True},
    export={"onnx": True, "report": True},
)


def go(values: dict[str, Any], folder: Path, **options: Any) -> Outcome:
    return run_recipe(make_recipe(values), folder, allow_import=True, cpu=True, **options)


def command(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output + repr(result.exception)
    return result.output


@pytest.fixture(autouse=True)
def _wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TERM", "dumb")


@pytest.fixture(scope="module")
def told() -> list[str]:
    return []


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, told: list[str]) -> Outcome:
    """A run of all phases."""
    return go(FULL, tmp_path_factory.mktemp("run") / "run", tell=Tell(say=told.append))


def test_a_run_leaves_all_that_it_promises(done: Outcome) -> None:
    found = {path.name for path in done.folder.iterdir()}
    assert found == {
        *("recipe.yaml", "environment.json", "run.json", "lock", "log.txt", "metrics.jsonl", "tensorboard", "phases"),
        *("dense.safetensors", "plan.json", "pruned", "model.onnx", "results.json", "report.html", "report.json"),
    }
    assert not list(done.folder.rglob("*.checkpoint"))
    assert parse_recipe((done.folder / "recipe.yaml").read_text()) == make_recipe(FULL)
    noted = json.loads((done.folder / "environment.json").read_text())
    assert noted["seeds"]["recipe"] == 0
    assert noted["sessions"][0]["torch"] == torch.__version__
    assert "pruning" in (done.folder / "log.txt").read_text()
    assert (done.folder / "report.html").read_text().count("<svg") == 10  # each for wide and for narrow screens


def test_rows(done: Outcome) -> None:
    assert [row.name for row in done.rows] == ["dense", "pruned", "compensated", "fine-tuned", "from scratch"]
    dense, pruned, *others = done.rows
    assert 0.4 * dense.macs < pruned.macs <= 0.5 * dense.macs
    assert all(row.macs == pruned.macs for row in others)
    assert all(row.latencies_ms and row.size and row.accuracy is not None and row.memory for row in done.rows)
    assert dense.accuracy > 0.3  # type: ignore[operator]
    assert done.rows[3].accuracy > pruned.accuracy  # type: ignore[operator]
    assert all(list(row.latencies_ms) == ["torch"] for row in done.rows)
    assert done.threads == 1
    assert done.test_images == 359
    assert not done.again


def test_metrics_are_lines_of_every_phase(done: Outcome) -> None:
    lines = [json.loads(line) for line in (done.folder / "metrics.jsonl").read_text().splitlines()]
    phases = list(dict.fromkeys(line["phase"] for line in lines))
    assert phases == ["dense", "prune", "compensate", "finetune", "scratch", "measure"]
    epochs = [line["epoch"] for line in lines if line["phase"] == "dense" and line["kind"] == "epoch"]
    assert epochs == [1, 2]
    assert [line["what"] for line in lines if line.get("kind") == "compensation"] == [
        "none",
        "least-squares",
        "batch norm",
    ]
    assert {path.name for path in (done.folder / "tensorboard").iterdir()} == {"dense", "finetune", "scratch"}


def test_the_saved_network_opens_everywhere(done: Outcome) -> None:
    model = sc.load(done.folder / "pruned", small())
    assert sc.count(model, torch.zeros(1, 1, 8, 8)).macs == done.rows[3].macs
    text = command(
        "measure", done.folder / "pruned", "--model", "tiny_runs:small", "--input", "1,1,8,8", "--no-latency"
    )
    assert "all layers" in text
    weights = load_file(done.folder / "dense.safetensors")
    dense = small()
    dense.load_state_dict(weights)
    assert sc.Plan.from_json((done.folder / "plan.json").read_text()).model.keys() == weights.keys()
    again = sc.apply(dense.eval(), sc.Plan.from_json((done.folder / "plan.json").read_text()))
    assert {n: p.shape for n, p in again.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}


def test_the_control_trains_as_long_as_all_before(done: Outcome) -> None:
    state = json.loads((done.folder / "run.json").read_text())
    facts = {entry["phase"]: entry["facts"] for entry in state["done"]}
    assert facts["scratch"]["epochs"] == facts["dense"]["epochs"] + facts["finetune"]["epochs"] == 4
    scratch = load_file(done.folder / "phases" / "scratch" / "model.safetensors")
    tuned = load_file(done.folder / "pruned" / "model.safetensors")
    assert {n: t.shape for n, t in scratch.items()} == {n: t.shape for n, t in tuned.items()}


def test_a_finished_run_only_tells(done: Outcome, told: list[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in done.folder.rglob("*")}
    again = go(FULL, done.folder)
    assert again.again
    assert again.rows == done.rows
    assert {path: path.stat().st_mtime_ns for path in done.folder.rglob("*")} == before
    assert any(line.startswith("distilling: ") for line in told)


def test_the_command(done: Outcome, tmp_path: Path) -> None:
    path = write(tmp_path / "r.yaml", FULL)
    text = command("run", path, "-o", done.folder, "--allow-import", "--cpu")
    assert f"the run in {done.folder} was finished before; these are its results" in text
    assert "from scratch" in text
    assert json.loads(command("run", "--schema"))["title"] == "Recipe"
    assert "which recipe?" in command("run", code=2)


def test_compute_is_counted_in_macs(tmp_path: Path) -> None:
    values = recipe(
        compensate=None, scratch="compute", train={"epochs": 2, "lr": 0.1}, finetune={"epochs": 1, "lr": 0.1}
    )
    outcome = go(values, tmp_path / "run")
    dense, small_one = outcome.rows[0].macs, outcome.rows[1].macs
    state = json.loads((tmp_path / "run" / "run.json").read_text())
    epochs = next(entry["facts"]["epochs"] for entry in state["done"] if entry["phase"] == "scratch")
    assert epochs == round((2 * dense + small_one) / small_one)


def test_smoke_runs_everything_cut_short_and_apart(tmp_path: Path) -> None:
    steps = {"kind": "iterative", "steps": 5, "training": {"epochs": 3, "lr": 0.1}}
    values = recipe(train={"epochs": 50, "lr": 0.1}, prune={"schedule": steps}, scratch="compute")
    go(values, tmp_path / "run", smoke=True)
    state = json.loads((tmp_path / "run" / "run.json").read_text())
    assert all(entry["facts"].get("epochs", 1) == 1 for entry in state["done"])
    assert [entry["phase"] for entry in state["done"] if "prune" in entry["phase"]] == ["prune-1", "prune-2"]
    assert {line["step"] for line in read_metrics(RunFolder(tmp_path / "run", True)) if "step" in line} == {2}
    with pytest.raises(BadArtifact, match="holds a smoke run, and this is a run in full"):
        go(values, tmp_path / "run")


def test_finetune_a_saved_folder(done: Outcome, tmp_path: Path) -> None:
    line: list[object] = ["finetune", done.folder / "pruned", "--data", "digits", "--epochs", 2, "--lr", 0.05]
    line += ["--set", "data.size=8", "--set", "measure.latency=false", "--set", "export={onnx: false, report: false}"]
    line += ["--teacher", done.folder / "dense.safetensors", "-o", tmp_path / "more", "--cpu"]
    text = command(*line, code=2)
    assert "say --model tiny_runs:small" in text
    assert not (tmp_path / "more").exists()
    text = command(*line, "--model", "tiny_runs:small", "--allow-import")
    assert "as given" in text
    assert "fine-tuned" in text
    before = load_file(done.folder / "pruned" / "model.safetensors")
    after = load_file(tmp_path / "more" / "pruned" / "model.safetensors")
    assert {n: t.shape for n, t in before.items()} == {n: t.shape for n, t in after.items()}
    assert not torch.equal(before["0.weight"], after["0.weight"])
    assert load_file(done.folder / "pruned" / "model.safetensors").keys() == before.keys()


# Refusals: nothing is written where something is wrong ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"name": "zoo:resnet21"}}, "the zoo has no 'resnet21'; did you mean 'resnet"),
        ({"data": {"name": "cifar10", "root": "nowhere"}}, "nowhere"),
        ({"data": {"name": "tiny_runs:nothing"}}, "nothing"),
        ({"model": {"name": "zoo:resnet20"}}, "cannot run on the inputs of digits, [1, 8, 8]"),
        ({"model": {"name": "tiny_runs:small", "options": {"classes": 7}}}, "scores 7 classes, and digits has 10"),
        ({"model": {"name": "tiny_runs:flat"}}, "a recipe trains on class scores [B, K]"),
        ({"model": {"name": "tiny_runs:small", "weights": "no.pth"}}, "no.pth"),
        ({"prune": {"budget": {"keep": 1e-6}}}, "reach"),
        ({"prune": {"ratios": {"nothing*": 0.5}}}, "nothing*"),
        ({"distil": {"teacher": {"weights": "no.pth"}}}, "distil.teacher: there is no file"),
        ({"model": {"name": "some/folder"}, "train": None}, "some/folder"),
        ({"train": None, "finetune": None, "model": {"name": "tiny_runs:small", "weights": "random"},
          "scratch": "epochs"}, "scratch: nothing in the recipe trains"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_told_before_anything_is_written(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(SecateurError) as caught:
        go(recipe(**changes), tmp_path / "run")
    assert message in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_weights_of_another_network(tmp_path: Path) -> None:
    save_file(small(width=4).state_dict(), tmp_path / "w.safetensors")
    values = recipe(model={"name": "tiny_runs:small", "weights": str(tmp_path / "w.safetensors")}, train=None)
    with pytest.raises(sc.WrongModel, match=r"'0\.bias' is \[4\] in the file"):
        go(values, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_teacher_that_cannot_teach_is_told_at_the_start(tmp_path: Path) -> None:
    save_file(small().state_dict(), tmp_path / "right.safetensors")
    save_file(small(classes=7).state_dict(), tmp_path / "seven.safetensors")
    save_file(small(width=4).state_dict(), tmp_path / "thin.safetensors")
    right, seven, thin = (str(tmp_path / f"{name}.safetensors") for name in ("right", "seven", "thin"))
    named = {"name": "tiny_runs:small", "options": {"classes": 7}, "weights": seven}
    narrow = {"name": "tiny_runs:small", "options": {"width": 4}, "weights": thin}
    for distil, message in (
        ({"teacher": {"weights": thin}}, r"'0\.bias' is \[4\] in the file"),
        ({"teacher": {**named, "weights": right}}, r"right\.safetensors does not fit"),
        ({"teacher": named}, r"distil\.teacher: tiny_runs:small scores 7 classes, and digits has 10"),
        ({"teacher": {"name": "tiny_runs:flat", "weights": right}}, r"right\.safetensors does not fit"),
        ({"teacher": narrow, "features": 1.0}, r"distil\.features: the teacher's feature maps are not those"),
    ):
        with pytest.raises(SecateurError, match=message):
            go(recipe(distil=distil), tmp_path / "run")
        assert not (tmp_path / "run").exists()


def test_maps_that_cannot_be_compared_are_told_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match="a captured graph without modules"):
        go(recipe(model={"name": "tiny_runs:shuffled"}, prune={"ratios": 0.5}, distil={"features": 1.0}),
           tmp_path / "run")  # fmt: skip
    assert not (tmp_path / "run").exists()


def test_resolved_paths_do_not_depend_on_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def data_of(**data: Any) -> tuple[str, Any]:
        found = resolved(make_recipe(recipe(data=data))).data
        return found.name, found.root

    here = str(tmp_path.resolve())
    assert data_of(name="cifar10", root="sets") == ("cifar10", f"{here}/sets")
    assert data_of(name="folder:own/images") == (f"folder:{here}/own/images", None)
    assert data_of(name="folder:images", root="sets") == (f"folder:{here}/sets/images", f"{here}/sets")
    assert data_of(name=f"folder:{here}/a", root="sets") == (f"folder:{here}/a", f"{here}/sets")
    assert data_of(name="tiny_runs:data") == ("tiny_runs:data", None)
    assert data_of(name="digits") == ("digits", None)
    again = resolved(make_recipe(recipe(data={"name": "folder:images", "root": "sets"})))
    monkeypatch.chdir("/")
    assert resolved(again) == again


def test_own_code_must_be_allowed(tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match="add --allow-import"):
        run_recipe(make_recipe(recipe()), tmp_path / "run", cpu=True)
    assert not (tmp_path / "run").exists()


def test_a_folder_with_other_things_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(BadArtifact, match=r"holds other things \(notes.txt\)"):
        go(recipe(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    with pytest.raises(BadArtifact, match="is a file"):
        go(recipe(), tmp_path / "notes.txt")


def test_a_folder_of_another_recipe_or_version(done: Outcome) -> None:
    before = (done.folder / "run.json").read_text()
    changed = {**FULL, "finetune": {"epochs": 3, "lr": 0.05}}
    with pytest.raises(BadArtifact, match=r"another recipe: finetune\.epochs was 2, and is 3 now"):
        go(changed, done.folder)
    for old, new, message in (
        (f'"secateur": "{sc.__version__}"', '"secateur": "0.0.7"', "was begun by secateur 0.0.7, and this is"),
        ("{", "", "run.json is damaged"),
    ):
        try:
            (done.folder / "run.json").write_text(before.replace(old, new, 1))
            with pytest.raises(BadArtifact, match=message):
                go(FULL, done.folder)
        finally:
            (done.folder / "run.json").write_text(before)


def test_a_run_that_died_before_its_first_word(tmp_path: Path) -> None:
    """The folder holds a lock, and a file half-written aside: it is as good as empty."""
    folder = RunFolder(tmp_path / "run", False)
    folder.path.mkdir()
    (folder.path / "lock").write_text("123\n")
    (folder.path / ".run.json.0123abcd.part").write_text("{")
    with locked(folder, make_recipe(recipe())):
        assert sorted(path.name for path in folder.path.iterdir()) == ["lock"]
        assert (folder.path / "lock").read_text() == f"{os.getpid()}\n"


def test_a_lock_does_not_outlive_the_run_in_its_children(tmp_path: Path) -> None:
    """A data loader's worker, forked while the run holds the lock, must not keep it when the run is killed."""
    folder, values = RunFolder(tmp_path / "run", False), make_recipe(recipe())
    begun, ends = os.pipe(), os.pipe()
    with locked(folder, values), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside threads
        child = os.fork()
        if child == 0:
            os.write(begun[1], b"!")
            os.close(ends[1])
            os.read(ends[0], 1)  # stays until the parent lets it go
            os._exit(0)
        os.read(begun[0], 1)
    with locked(folder, values):
        pass
    for end in (*begun, *ends):
        os.close(end)
    assert os.waitpid(child, 0)[1] == 0


def test_metrics_after_a_checkpoint_are_dropped(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, False)
    for phase, step in (("dense", 50), ("dense", 100), ("finetune", 50), ("finetune", 100)):
        append_line(folder.path / "metrics.jsonl", json.dumps({"phase": phase, "step": step}))
    append_line(folder.path / "metrics.jsonl", '{"phase": "fine')
    keep_metrics(folder, {"dense": {}}, "finetune", 60)
    assert [(line["phase"], line["step"]) for line in read_metrics(folder)] == [
        ("dense", 50),
        ("dense", 100),
        ("finetune", 50),
    ]


def test_a_full_disk_is_told_and_gone_on_from(tmp_path: Path, done: Outcome) -> None:
    """That no file may grow above 3 kB stands for a full disk: checkpoints do not fit."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, before[1]))
    try:
        with pytest.raises(BadArtifact, match="File too large"):
            go(FULL, tmp_path / "run")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "error: no checkpoint can be written" in (tmp_path / "run" / "log.txt").read_text()
    assert not [path for path in tmp_path.rglob(".*") if path.is_file()]


def test_files_are_there_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "a" / "b.json"
    with pytest.raises(BadArtifact, match=r"b\.json cannot be written: No such file"):
        write_whole(target, b"x")
    write_whole(tmp_path / "c.json", b"first")
    write_whole(tmp_path / "c.json", b"second")
    assert [path.name for path in tmp_path.iterdir()] == ["c.json"]
    assert (tmp_path / "c.json").read_bytes() == b"second"


def test_the_resolved_recipe_is_plain_yaml(done: Outcome) -> None:
    values = yaml.safe_load((done.folder / "recipe.yaml").read_text())
    assert values["train"]["epochs"] == 2
    assert values["checkpoint_every"] == 2
