"""``secateur sensitivity``, and what it shares with ``plan``: labelled images, and ratios from what was found.

What is found is written after every trial, so that the command goes on from there when it is given again. Started by
``torchrun``, every process tries groups of its own; the main one speaks, and draws the pictures at the end.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer
from torch import nn

from secateur import cli_output as show
from secateur.allocation import matching
from secateur.cli_models import Source, Subject, open_model, parse_options
from secateur.cli_training import is_main, set_value, spoken
from secateur.core import Budget
from secateur.criteria import needs_data, needs_loss
from secateur.errors import BadArtifact, BadRequest
from secateur.graph import Graph
from secateur.processes import world
from secateur.sensitivities import Sensitivity
from secateur.sensitivities import sensitivity as sweep
from secateur.sensitivities.choice import ratios_from
from secateur.sensitivities.sweep import RATIOS

if TYPE_CHECKING:
    from secateur.zoo.data import Data, DataSettings

FILE, NORMS, CURVES = "sensitivity.json", "norms.svg", "accuracy.svg"
CALIBRATION = 16
"""So many batches of training images are looked at by criteria that need data."""

Images = Annotated[str, typer.Option("--data", help="digits, cifar10, folder:PATH, package.module:function ...")]
Residual = Annotated[
    str, typer.Option(help="What meets in residual sums: coupled (pruned together), inner (whole) or projection.")
]
Setting = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="data.KEY=VALUE", help="How the data are read, as data.root=~/data; repeatable."),
]


def sensitivity(
    model: Annotated[str, typer.Argument(metavar="MODEL", show_default=False, help="As for secateur plan.")],
    data: Images,
    output: Annotated[Path, typer.Option("-o", "--output", show_default=False, help="Folder for what is found.")],
    weights: Annotated[
        Path | None, typer.Option("--weights", metavar="FILE", help="Your trained weights: .safetensors, .pth, .pt.")
    ] = None,
    criterion: Annotated[str, typer.Option(help="How channels are ranked; an unknown name lists them all.")] = "l1",
    grid: Annotated[
        str | None, typer.Option("--ratio-grid", metavar="R,R,...", help="Fractions to remove; 0.1 to 0.9 by default.")
    ] = None,
    batches: Annotated[int | None, typer.Option(help="Evaluate on the first so many batches only.")] = None,
    group: Annotated[list[str] | None, typer.Option(metavar="GLOB", help="Only these groups; repeatable.")] = None,
    exclude: Annotated[list[str] | None, typer.Option(metavar="GLOB", help="Not these groups; repeatable.")] = None,
    residual: Residual = "coupled",
    tolerance: Annotated[float, typer.Option(help="A drop of accuracy beyond this is shown in red.")] = 0.01,
    retrain_epochs: Annotated[int, typer.Option(help="Train each small network too, for so long.")] = 0,
    lr: Annotated[float, typer.Option(help="The constant learning rate of that.")] = 0.001,
    setting: Setting = None,
    seed: Annotated[int, typer.Option("--seed", help="Seed of random criteria and of what is drawn of the data.")] = 0,
    option: Annotated[
        list[str] | None, typer.Option("--option", metavar="NAME=VALUE", help="Passed to what builds MODEL.")
    ] = None,
    base: Annotated[str | None, typer.Option("--model", metavar="MODEL", help="The dense network of a folder.")] = None,
    cpu: Annotated[bool, typer.Option("--cpu", help="Stay on the CPU, even if there is a GPU.")] = False,
) -> None:
    """Prune each group alone, at every ratio, and see on held-out images how well the network does then.

    Writes sensitivity.json, norms.svg and accuracy.svg. Given again, it goes on.
    """
    from secateur.recover.accelerated import join_processes

    ratios = parse_grid(grid)
    with spoken(output) as folder:
        join_processes(cpu=cpu)
        images = open_images(data, setting or (), seed)
        subject = opened(Source(model, weights, None, seed, parse_options(option or ()), base), images)
        with _told(show.bar("measuring", passing=True)) as progress:
            found = sweep(
                _placed(subject, cpu=cpu),
                subject.inputs,
                _validation(images, batches).whole(),
                ratios=ratios,
                groups=tuple(group or ()),
                exclude=tuple(exclude or ()),
                residual=residual,  # type: ignore[arg-type]
                retrain=_retraining(images, retrain_epochs, lr, seed, cpu=cpu),
                path=folder / FILE,
                note=_note(data, setting or (), batches, (retrain_epochs, lr)),
                progress=progress,
                seed=seed,
                **evidence(criterion, images if needs_data(criterion) else None, CALIBRATION),
            )
        if is_main():
            draw(folder, found)
            _tell(found, subject, _validation(images, batches).samples, folder, tolerance)


def register(app: typer.Typer) -> None:
    """Make this a command of ``app``."""
    app.command(
        epilog="[bold]Examples:[/]\n\n"
        "[cyan]secateur sensitivity zoo:resnet56 --weights r56.pth --data cifar10 -o found[/]\n\n"
        "[cyan]secateur plan zoo:resnet56 --weights r56.pth --sensitivity found --keep 0.5 -o plan.json[/]\n\n"
        "[cyan]torchrun --nproc-per-node=2 -m secateur sensitivity zoo:resnet20 --data digits -o found ...[/]"
    )(sensitivity)


# What plan shares ------------------------------------------------------------------------------------------------


def open_images(name: str, settings: Sequence[str], seed: int) -> Data:
    """The data set of that name, read as ``--set data.KEY=VALUE`` says. Code that was named here may be imported: a
    person typed it. Raises BadRequest for keys and values that mean nothing, and what opening the set raises."""
    from secateur.recipes.job import derived_seed
    from secateur.zoo.data import open_data

    read = _data_settings(name, settings)
    with show.working(f"opening {name}"):
        return open_data(read, seed=derived_seed(seed, "data"), allow_import=True)


def _data_settings(name: str, settings: Sequence[str]) -> DataSettings:
    from secateur.recipes import make_recipe
    from secateur.recipes.schema import RANDOM

    values: dict[str, Any] = {"model": {"name": "zoo:resnet20", "weights": RANDOM}, "data": {"name": name}}
    for text in settings:
        if not text.startswith("data."):
            raise BadRequest(f"--set {text!r} is not about the data\n  do: write data.KEY=VALUE, as in data.size=32")
        set_value(values, text)
    return make_recipe(values, name="--set" if settings else "--data").data


def opened(source: Source, images: Data) -> Subject:
    """The network that ``source`` names, with inputs of the images' shape. Raises BadRequest unless it scores their
    classes, and where ``source`` says a shape of its own."""
    from secateur.recipes.networks import Origin, check_fits

    if source.shape is not None:
        raise BadRequest("--input says how large inputs are, and so do the images\n  do: say --set data.size=N instead")
    with show.working(f"opening {source.name}"):
        subject = open_model(replace(source, shape=(1, *images.shape)))
        check_fits(Origin(subject.built, None, None, images.shape), subject.model, len(images.classes), images.name)
    return subject


def evidence(criterion: str, images: Data | None, batches: int) -> dict[str, Any]:
    """The criterion and what it is to be shown, as options of ``plan`` and ``sensitivity``: training images, and
    cross-entropy for a criterion that looks at gradients."""
    found: dict[str, Any] = {"criterion": criterion}
    if images is not None:
        found["data"] = images.calibration.first(batches)
    if needs_loss(criterion):
        found["loss"] = nn.functional.cross_entropy
    return found


def read_sensitivity(path: Path) -> Sensitivity:
    """What ``secateur sensitivity`` wrote: its folder, or the file in it. Raises BadArtifact where there is none."""
    file = path / FILE if path.is_dir() else path
    try:
        return Sensitivity.from_json(file.read_text(encoding="utf-8"))
    except UnicodeDecodeError:
        raise BadArtifact(f"{file} is not text, and no sensitivity") from None
    except OSError as error:
        raise BadArtifact(
            f"the sensitivity {file} cannot be read: {error.strerror}\n"
            "  do: make one with secateur sensitivity MODEL --data NAME -o FOLDER"
        ) from error
    except BadArtifact as error:
        raise BadArtifact(f"{file}: {error}") from None


def parse_grid(text: str | None) -> tuple[float, ...]:
    """``0.1,0.5`` as a tuple. Raises BadRequest for anything but numbers; their range is checked by the sweep."""
    if text is None:
        return RATIOS
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise BadRequest(
            f"--ratio-grid {text!r} is not understood\n  do: write fractions to remove, as in --ratio-grid 0.1,0.3,0.5"
        ) from None


def how_much(
    graph: Graph,
    ratios: Any,
    budget: Budget | None,
    *,
    found: Path | None,
    tolerance: float | None,
    per: str | None,
    exclude: Sequence[str],
) -> dict[str, Any]:
    """How much goes, as options of ``plan``: by ratios and budget as they were asked for, with a sensitivity that says
    which groups give way; or, with a tolerance, by the ratios that follow from one.

    Raises BadRequest for what contradicts, BadArtifact for a bad file, WrongModel for one of another network.
    """
    if found is None:
        if tolerance is not None or per is not None:
            option = "--tolerance" if per is None else "--per"
            raise BadRequest(f"{option} is about what secateur sensitivity found\n  do: name that with --sensitivity")
        return {"ratios": ratios, "budget": budget}
    curves = read_sensitivity(found)
    if tolerance is None:
        if per is not None:
            raise BadRequest("--per says how a tolerance is applied, and there is none\n  do: give --tolerance too")
        return {"ratios": ratios, "budget": budget, "sensitivity": curves}
    if budget is not None or ratios is not None:
        raise BadRequest(
            "--tolerance says how much of every group goes, and so do --keep, --at-most and --ratio\n"
            "  do: leave it out to meet a budget with the least predicted loss, or leave them out"
        )
    curves.check(graph.model)
    names = [curve.group for curve in curves.curves]
    skip = [name for pattern in exclude for name in matching(pattern, names)]
    return {"ratios": ratios_from(curves, tolerance=tolerance, per=per or "group", skip=skip)}  # type: ignore[arg-type]


# The sweep -------------------------------------------------------------------------------------------------------


def draw(folder: Path, found: Sensitivity) -> None:
    """The paper's figures 2a and 2b as files of their own, each whole or not there."""
    from secateur.recipes.folder import write_whole
    from secateur.report import importance_figure, sensitivity_figure, standalone

    write_whole(folder / NORMS, standalone(importance_figure(found)).encode())
    write_whole(folder / CURVES, standalone(sensitivity_figure(found)).encode())


def _validation(images: Data, batches: int | None) -> Any:
    """The batches of held-out images to evaluate on."""
    if not len(images.validation):
        raise BadRequest(
            f"of {images.name} no images are held out to choose ratios on\n  do: say --set data.validation=0.1"
        )
    return images.validation if batches is None else images.validation.first(batches)


def _note(name: str, settings: Sequence[str], batches: int | None, retraining: tuple[int, float]) -> dict[str, Any]:
    """What the curves depend on besides what the sweep sees itself."""
    from secateur.recipes.trials import noted

    epochs, lr = retraining
    more = {"retraining": {"epochs": epochs, "lr": lr}} if epochs else {}
    return noted(_data_settings(name, settings), batches, **more)


def _placed(subject: Subject, *, cpu: bool) -> nn.Module:
    """The network on the device where it is to run."""
    return subject.model.to("cpu" if cpu or not torch.cuda.is_available() else "cuda")


def _retraining(images: Data, epochs: int, lr: float, seed: int, *, cpu: bool) -> Callable[[nn.Module], None] | None:
    """Trains a network in place at a constant rate, as the paper does; None for no epochs."""
    from secateur.recover import Run, Training, fit_

    if epochs == 0:
        return None
    if world() > 1:
        raise BadRequest(
            "--retrain-epochs trains one small network after the other, and cannot be shared by processes\n"
            "  do: leave torchrun out, or leave it out"
        )
    training = Training(epochs=epochs, lr=lr, schedule="constant", seed=seed)

    def retrain(network: nn.Module) -> None:
        fit_(network, images.train, training, run=Run(cpu=cpu))

    return retrain


@contextlib.contextmanager
def _told(bar: AbstractContextManager[Callable[[int, int, str], None]]) -> Iterator[Any]:
    """The bar in the main process, and silence in the others."""
    if not is_main():
        yield None
        return
    with bar as update:
        yield update


def _tell(found: Sensitivity, subject: Subject, images: int, folder: Path, tolerance: float) -> None:
    show.out().print(show.sensitivity_table(found, tolerance))
    if any(curve.retrained for curve in found.curves):
        show.out().print(show.sensitivity_table(found, tolerance, retrained=True))
    groups = show.number(len(found.curves), "group")
    show.say(f"{100 * found.dense:.2f} % of {images:,} held-out images right when dense; {groups}, each pruned alone")
    show.say(f"written to {folder}: {FILE}, {NORMS}, {CURVES}")
    show.say(f"next: secateur plan ... --sensitivity {folder} --keep 0.5, or --tolerance {tolerance:g}")
    if not subject.trained:
        show.err().print("[yellow]note:[/] the weights are random: --weights FILE tries those of your trained network")
