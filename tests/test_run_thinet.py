"""ThiNet in a run: layer by layer with its own trainings, images of each class, pooled heads, criteria side by side."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import secateur as sc
from made_data import write_folder
from secateur.cli import app
from secateur.cli_models import Source, open_model
from secateur.errors import BadRequest
from secateur.recipes import Tell, make_recipe, run_recipe
from secateur.recipes.pruning import training_after
from secateur.recipes.schema import LayerByLayer
from secateur.recover.settings import Training
from secateur.zoo import imagenet_vgg16
from tiny_runs import recipe

TRAINING = {"epochs": 1, "lr": 0.01}
LAYERED = {
    "criterion": "thinet_sampled",
    "per_class": 4,
    "ratios": 0.5,
    "schedule": {"kind": "layer-by-layer", "training": TRAINING, "longer": {"0": {**TRAINING, "epochs": 2}}},
}
SCALED = {"readers": "scale", "batchnorm": False, "batches": 1}


def go(values: dict[str, Any], folder: Path, **options: Any) -> dict[str, dict[str, Any]]:
    """The facts of all phases, in order."""
    run_recipe(make_recipe(values), folder, allow_import=True, cpu=True, **options)
    return {entry["phase"]: entry["facts"] for entry in json.loads((folder / "run.json").read_text())["done"]}


def kept(folder: Path) -> dict[str, bytes]:
    files = [*folder.rglob("*.safetensors"), *folder.rglob("*plan.json")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def layered(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("layered") / "run"
    return folder, go(recipe(prune=LAYERED, compensate=SCALED), folder)


def test_layer_by_layer_with_trainings_of_their_own(layered: tuple[Path, dict[str, dict[str, Any]]]) -> None:
    folder, facts = layered
    assert list(facts) == "dense widths prune-1 compensate-1 train-1 prune-2 compensate-2 finetune measure save".split()
    assert facts["widths"]["widths"] == {"0": 4, "3": 6}
    assert facts["train-1"]["epochs"] == 2
    assert [step["step"] for step in facts["compensate-1"]["steps"]] == ["none", "scale"]
    assert json.loads((folder / "plan.json").read_text())["made_by"]["criterion"] == "thinet_sampled"


def test_interrupted_before_any_phase_it_goes_on_to_the_same_weights(
    layered: tuple[Path, dict[str, dict[str, Any]]], tmp_path: Path
) -> None:
    for title in ("compensating 1/2", "pruning 2/2"):

        @contextmanager
        def phase(now: str, title: str = title) -> Iterator[Any]:
            if now == title:
                raise KeyboardInterrupt
            yield lambda done, total, facts: None

        try:
            go(recipe(prune=LAYERED, compensate=SCALED), tmp_path / "run", tell=Tell(phase=phase))
        except KeyboardInterrupt:
            assert not (tmp_path / "run" / "results.json").exists()
    go(recipe(prune=LAYERED, compensate=SCALED), tmp_path / "run")
    assert kept(tmp_path / "run") == kept(layered[0])


def test_groups_that_go_together_are_not_trained_between(tmp_path: Path) -> None:
    schedule = {"kind": "layer-by-layer", "training": TRAINING, "together": ["?"]}
    facts = go(recipe(prune={**LAYERED, "criterion": "l1", "schedule": schedule}), tmp_path / "run")
    assert list(facts)[1:7] == "widths prune-1 compensate-1 prune-2 compensate-2 finetune".split()


def test_which_training_follows_which_group() -> None:
    one, two, three = (Training(epochs=epochs) for epochs in (1, 2, 3))
    schedule = LayerByLayer(
        kind="layer-by-layer", training=one, together=["a.*"], longer={"b.conv?": two, "b.*": three, "c": three}
    )
    names = ("a.conv1", "b.conv1", "b.bn", "c", "d", "c.conv1")
    assert [training_after(schedule, name) for name in names] == [None, two, three, three, one, one]


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ({"together": ["conv*"]}, r"prune.schedule.together: no group is called 'conv\*'; known: '0', '3'"),
        ({"longer": {"1": TRAINING}}, r"prune.schedule.longer: no group is called '1'"),
        ({"together": ["0"], "longer": {"*": TRAINING}}, r"after '0' nothing is trained \(together\), and longer says"),
    ],
)
def test_groups_that_are_not_there_are_told_at_the_start(
    schedule: dict[str, Any], message: str, tmp_path: Path
) -> None:
    values = recipe(prune={**LAYERED, "schedule": {"kind": "layer-by-layer", **schedule}})
    with pytest.raises(BadRequest, match=message):
        go(values, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_more_images_of_each_class_than_there_are(tmp_path: Path) -> None:
    with pytest.raises(
        BadRequest, match=r"per_class=4000: of class 0 there are only \d+ images among these 512\n  do:"
    ):
        go(recipe(prune={**LAYERED, "per_class": 4000}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_criteria_side_by_side(tmp_path: Path) -> None:
    facts = go(recipe(prune={"criterion": "l1", "beside": ["thinet", "l1"], "ratios": 0.5}), tmp_path / "run")
    assert list(facts)[1:5] == ["prune", "compensate", "beside-thinet", "beside-l1"]
    assert [step["step"] for step in facts["beside-thinet"]["steps"]] == ["none", "batch norm"]
    rows = {row["name"]: row for row in json.loads((tmp_path / "run" / "results.json").read_text())["rows"]}
    shown = ["dense", "pruned", "compensated", "thinet, recalibrated", "l1, recalibrated", "fine-tuned"]
    assert list(rows) == shown
    assert len({rows[name]["macs"] for name in shown[1:]}) == 1
    plans = [
        sc.Plan.from_json((tmp_path / "run" / "phases" / name / "plan.json").read_text())
        for name in ("beside-thinet", "beside-l1", "prune")
    ]
    assert [found.made_by["criterion"] for found in plans] == ["thinet", "l1", "l1"]
    assert plans[0].keep != plans[1].keep == plans[2].keep


# Pooled heads ----------------------------------------------------------------------------------------------------


def vgg(classes: int = 10, **options: Any) -> torch.nn.Module:
    return imagenet_vgg16(widths=(4,) * 13, hidden=(16, 12), classes=classes, in_channels=1)


def test_a_pooled_head_is_trained_pruned_saved_and_opened_again(tmp_path: Path) -> None:
    model = {"name": "zoo:vgg16", "head": "pooled"}
    model["options"] = {"widths": [8] * 13, "hidden": [16, 12], "classes": 10, "in_channels": 1}  # type: ignore[assignment]
    values = recipe(model=model, data={"name": "digits", "batch": 64, "size": 32, "limit": 128}, prune=LAYERED)
    values |= {"prune": {"ratios": {"features.0": 0.5, "features.28": 0.25}}, "compensate": None, "finetune": None}
    facts = go(values, tmp_path / "run", smoke=True)
    assert facts["dense"]["params"] == sum(p.numel() for p in pooled_vgg(8).parameters())
    small = sc.load(tmp_path / "run" / "pruned", pooled_vgg(8))
    assert small.classifier[0].in_features == 6  # type: ignore[index, union-attr]
    found = open_model(Source(str(tmp_path / "run" / "pruned")))
    assert [t.shape for t in found.model.parameters()] == [t.shape for t in small.parameters()]
    assert found.dense is not None
    assert found.dense.state_dict().keys() == pooled_vgg(8).state_dict().keys()


def pooled_vgg(width: int) -> torch.nn.Module:
    return imagenet_vgg16(widths=(width,) * 13, classes=10, in_channels=1, head="gap")


def test_the_head_of_a_trained_network_is_fitted(tmp_path: Path) -> None:
    torch.manual_seed(0)
    torch.save(vgg().state_dict(), tmp_path / "w.pth")
    values = recipe(
        model={"name": f"{__name__}:vgg", "weights": str(tmp_path / "w.pth"), "head": "pooled"},
        data={"name": "digits", "batch": 64, "size": 32, "limit": 128},
        train=None,
        prune=None,
        compensate=None,
        finetune=None,
    )
    go(values, tmp_path / "run")
    dense = imagenet_vgg16(widths=(4,) * 13, classes=10, in_channels=1, head="gap").eval()
    from safetensors.torch import load_file

    from secateur.zoo.data import DataSettings, open_data

    dense.load_state_dict(load_file(tmp_path / "run" / "dense.safetensors"))
    own = vgg().eval()
    own.load_state_dict(torch.load(tmp_path / "w.pth"))
    images = next(iter(open_data(DataSettings("digits", batch=64, size=32, limit=128)).calibration))[0]
    with torch.no_grad():
        assert (dense(images) - own(images)).square().mean() < 0.1 * own(images).square().mean()


def test_a_saved_folder_has_its_own_head() -> None:
    with pytest.raises(BadRequest, match=r"model.head: a saved folder has the head that it was saved with"):
        make_recipe(recipe(model={"name": "saved", "head": "pooled"}, train=None))


# The named recipes -----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("name", "width"), [("thinet/conv", 4), ("thinet/tiny", 2)])
@pytest.mark.filterwarnings("ignore::secateur.zoo.torchvision_shim.TorchvisionMismatch")
@pytest.mark.filterwarnings("ignore::secateur.SecateurWarning")  # few images and channels, on purpose
def test_smoke_on_folders_as_imagenets(name: str, width: int, tmp_path: Path) -> None:
    write_folder(tmp_path / "images")
    settings = [
        f"data.root={tmp_path / 'images'}", "data.workers=0", "data.batch=4", "data.size=32", "measure.latency=false",
        "export={onnx: false, report: false}",
        "model.options={classes: 2, widths: [8,8,8,8,8,8,8,8,8,8,8,8,8], hidden: [9, 9]}",
    ]  # fmt: skip
    line = [part for text in settings for part in ("--set", text)]
    folder = tmp_path / "run"
    result = CliRunner().invoke(app, ["run", name, "--smoke", "--cpu", *line, "-o", str(folder)])
    assert result.exit_code == 0, result.output
    facts = {entry["phase"]: entry["facts"] for entry in json.loads((folder / "run.json").read_text())["done"]}
    cuts = "widths prune-1 compensate-1 train-1 prune-2 compensate-2".split()
    assert list(facts) == ["dense", *cuts, "finetune", "measure", "save"]
    found = sc.Plan.from_json((folder / "plan.json").read_text())
    assert len(found.keep["features.0"]) == width
    assert found.made_by["criterion"] == "thinet_sampled"
