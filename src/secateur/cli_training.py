"""The commands that train: ``run`` carries out a recipe, ``demo`` ours, ``finetune`` a small one about a saved folder.

All go on from where they were if they are interrupted, however, and given again. Started by ``torchrun``, every
process runs the command; the main one speaks, and so do the others if they fail where the main one does not.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from secateur import cli_output as show
from secateur.errors import BadRequest, SecateurError, nearest

if TYPE_CHECKING:
    from secateur.recipes import Outcome, Recipe
    from secateur.recipes.job import Progress

Folder = Annotated[Path | None, typer.Option("-o", "--output", help="Folder of the run; the same one goes on with it.")]
Smoke = Annotated[bool, typer.Option("--smoke", help="All phases on a few batches and one epoch each.")]
Cpu = Annotated[bool, typer.Option("--cpu", help="Stay on the CPU, even if there is a GPU.")]
Allow = Annotated[
    bool, typer.Option("--allow-import", help="The recipe may name code of its own, package.module:function.")
]

Setting = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Any key of a recipe, as data.size=32; repeatable."),
]

PAPER = "paper"
TOLERANCE = 0.01
"""A drop of accuracy beyond this is shown in red where the recipe does not say."""


def demo(
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder of the run.")] = Path("demo"),
    seed: Annotated[int, typer.Option("--seed", help="Seed of weights and training.")] = 0,
    smoke: Smoke = False,
) -> None:
    """Train a ResNet-20 on handwritten digits, prune it to half its MACs, recover, export, and report."""
    from secateur.recipes import demo_recipe

    with spoken(output) as folder:
        _carry_out(demo_recipe(seed), folder, smoke=smoke, allow_import=False, cpu=True)
    show.say(f"the report: {output / 'report.html'}")


def run(
    recipe: Annotated[
        str | None, typer.Argument(metavar="RECIPE", show_default=False, help="A YAML file, or a name of --list.")
    ] = None,
    output: Folder = None,
    variant: Annotated[
        str | None, typer.Option(show_default=False, help="Of a named recipe: paper (if none is given), tuned ...")
    ] = None,
    weights: Annotated[
        Path | None, typer.Option(metavar="FILE", help="For a named recipe: weights of the dense network.")
    ] = None,
    setting: Setting = None,
    smoke: Smoke = False,
    allow_import: Allow = False,
    cpu: Cpu = False,
    listed: Annotated[bool, typer.Option("--list", help="Show the named recipes, and do no more.")] = False,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON schema of recipes, and do no more.")] = False,
) -> None:
    """Carry out a recipe: train or load, prune, recover, measure, export, report. Given again, it goes on.

    Without -o the folder is runs/NAME of the recipe, with -smoke behind it for a smoke run.
    """
    if schema:
        from secateur.recipes import json_schema

        typer.echo(json_schema(), nl=False)
        return
    if listed:
        _print_named()
        return
    if recipe is None:
        raise BadRequest(
            "which recipe?\n  do: secateur run RECIPE.yaml, or secateur run --schema for what it may say, "
            "or secateur run --list for those with a name"
        )
    with spoken(output or Path("runs") / f"{_name_of(recipe, variant)}{'-smoke' if smoke else ''}") as folder:
        asked = _asked(recipe, variant, weights, setting or ())
        _carry_out(asked, folder, smoke=smoke, allow_import=allow_import, cpu=cpu)


def finetune(
    folder: Annotated[str, typer.Argument(metavar="FOLDER", show_default=False, help="A saved, pruned network.")],
    data: Annotated[str, typer.Option(help="digits, cifar10, folder:PATH, package.module:function ...")],
    output: Annotated[Path, typer.Option("-o", "--output", show_default=False, help="Folder of the run.")],
    epochs: Annotated[int, typer.Option(help="How long.")] = 10,
    lr: Annotated[float, typer.Option(help="The highest learning rate.")] = 0.01,
    batch: Annotated[int, typer.Option(help="Images in a batch, over all processes.")] = 128,
    setting: Setting = None,
    teacher: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Weights of the dense network, to learn from it too."),
    ] = None,
    base: Annotated[
        str | None, typer.Option("--model", metavar="MODEL", help="The dense network of FOLDER, if not recorded.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Seed of order, augmentation and training.")] = 0,
    smoke: Smoke = False,
    allow_import: Allow = False,
    cpu: Cpu = False,
) -> None:
    """Train a saved, pruned network a little more: a recipe of its own, with all that secateur run does."""
    from secateur.recipes import make_recipe
    from secateur.recipes.schema import is_folder

    if not is_folder(folder):
        raise BadRequest(f"{folder!r} is no saved folder\n  do: write a recipe with weights for a network by name")
    values: dict[str, Any] = {
        "model": {"name": folder, "base": base},
        "seed": seed,
        "data": {"name": data, "batch": batch},
        "finetune": {"epochs": epochs, "lr": lr},
    }
    if teacher is not None:
        values["distil"] = {"teacher": {"weights": str(teacher)}}
    for text in setting or ():
        set_value(values, text)
    with spoken(output) as place:
        _carry_out(make_recipe(values, name="finetune"), place, smoke=smoke, allow_import=allow_import, cpu=cpu)


def register(app: typer.Typer) -> None:
    """Make these commands of ``app``."""
    app.command(epilog="[bold]Example:[/]  [cyan]secateur demo[/]")(demo)
    app.command(
        epilog="[bold]Examples:[/]\n\n[cyan]secateur run recipe.yaml --smoke[/]\n\n"
        "[cyan]secateur run li/resnet56-B --variant tuned --weights resnet56.pth --set data.root=~/data[/]\n\n"
        "[cyan]torchrun --nproc-per-node=2 -m secateur run recipe.yaml -o runs/mine[/]"
    )(run)
    app.command(
        epilog="[bold]Example:[/]  [cyan]secateur finetune runs/mine/pruned --data digits --epochs 5 -o runs/more[/]"
    )(finetune)


def _asked(recipe: str, variant: str | None, weights: Path | None, setting: Sequence[str]) -> Recipe:
    """The recipe that the command line means."""
    from secateur.recipes import make_recipe, read_recipe
    from secateur.recipes.named import NETWORKS, named_values
    from secateur.recipes.schema import as_values

    path = Path(recipe)
    if recipe in NETWORKS:
        values = named_values(recipe, variant or PAPER, None if weights is None else str(weights))
    elif path.suffix or path.exists():
        for option, given, instead in (
            ("--variant", variant, "write what you want into the file"),
            ("--weights", weights, f"add --set model.weights={weights} --set train=null"),
        ):
            if given is not None:
                raise BadRequest(f"{option} is for a recipe with a name, and {recipe} is a file\n  do: {instead}")
        read = read_recipe(path)  # on its own first: a mistake in the file is told with its line
        if not setting:
            return read
        values = as_values(read)
    else:
        raise BadRequest(
            f"{recipe!r} is neither a file nor the name of a recipe{nearest(recipe, NETWORKS)}\n"
            "  do: secateur run --list shows all names"
        )
    for text in setting:
        set_value(values, text)
    return make_recipe(values, name=path.name if path.exists() else recipe)


def _name_of(recipe: str, variant: str | None) -> str:
    """What the folder of a run is called: ``li-resnet56-A-tuned``, or the file's name."""
    from secateur.recipes.named import NETWORKS

    if recipe not in NETWORKS:
        return Path(recipe).stem
    return "-".join([*recipe.split("/"), *([variant] if variant not in (None, PAPER) else [])])


def _print_named() -> None:
    from secateur.recipes.named import NETWORKS, VARIANTS
    from secateur.zoo.papers import ROWS

    printed = {row.id: row for row in ROWS}
    table = Table(header_style="dim")
    for heading in ("recipe", "network", "data", "removed", "FLOPs", "params"):
        table.add_column(
            heading, justify="right" if heading in ("removed", "FLOPs", "params") else "left", no_wrap=True
        )
    for name, network in NETWORKS.items():
        row = printed[name]
        removed = [row.ratio] if row.ratio else dict.fromkeys(network.ratios.values())  # FPGM's recipes give widths
        ratios = ", ".join(f"{100 * ratio:g}" for ratio in removed)
        drops = [
            f"−{drop} %" if drop else left
            for drop, left in zip((row.flops_drop, row.params_drop), (row.flops, row.params), strict=True)
        ]
        table.add_row(name, network.model, network.data, f"{ratios} %", *drops)
    show.out().print(table)
    for paper, variants in VARIANTS.items():
        show.say(f"variants of {paper}: {', '.join(variants)}")


def _carry_out(recipe: Recipe, folder: Path, *, smoke: bool, allow_import: bool, cpu: bool) -> None:
    from secateur.recipes import Tell, run_recipe

    tell = Tell(say=lambda text: show.err().print(f"[dim]{show.escape(text)}[/]", soft_wrap=True), phase=_bar)
    outcome = run_recipe(recipe, folder, smoke=smoke, tell=tell, allow_import=allow_import, cpu=cpu)
    if is_main():
        asked = recipe.prune.sensitivity if recipe.prune is not None else None
        _print_outcome(outcome, TOLERANCE if asked is None or asked.tolerance is None else asked.tolerance)


def _print_outcome(outcome: Outcome, tolerance: float) -> None:
    if outcome.again:
        show.say(f"the run in {outcome.folder} was finished before; these are its results")
    if outcome.sensitivity is not None:
        show.out().print(show.sensitivity_table(outcome.sensitivity, tolerance))
    show.print_networks(outcome.rows, threads=outcome.threads)
    show.say(f"accuracy on {outcome.test_images} test images; all of it in {outcome.folder}/")


@contextmanager
def _bar(title: str) -> Iterator[Progress]:
    with show.bar(title, passing=True) as update:

        def progress(done: int, total: int, facts: Mapping[str, float]) -> None:
            update(done, total, training_note(facts))

        yield progress


def training_note(facts: Mapping[str, float]) -> str:
    """What stands beside a bar: ``loss 0.123  acc 96.1 %  val 95.0 %  3,200 images/s``."""
    told = []
    if "loss" in facts:
        told.append(f"loss {facts['loss']:.3f}")
    for key, name in (("accuracy", "acc"), ("score", "val")):
        if key in facts:
            told.append(f"{name} {100 * facts[key]:.1f} %")
    if "images_per_s" in facts:
        told.append(f"{facts['images_per_s']:,.0f} images/s")
    return "  ".join(told)


def set_value(values: dict[str, Any], text: str) -> None:
    """``finetune.schedule=one-cycle`` as a value of the recipe, read as YAML reads it."""
    from secateur.recipes.yaml_nodes import parse_yaml

    path, equals, value = text.partition("=")
    *sections, key = path.split(".")
    if not equals or not all([*sections, key]):
        raise BadRequest(f"--set {text!r} is not understood\n  do: write SECTION.KEY=VALUE, as in finetune.clip=1.0")
    place = values
    for section in sections:
        if place.get(section) is None:
            place[section] = {}
        place = place[section]
        if not isinstance(place, dict):
            raise BadRequest(f"--set {text!r}: {section!r} is no section")
    place[key] = parse_yaml(value).value if value else None


@contextmanager
def spoken(folder: Path) -> Iterator[Path]:
    """The folder of a run; Ctrl-C ends with status 130 and how to go on. Other processes than the main one keep quiet,
    but for errors that are theirs alone."""
    try:
        yield folder
    except KeyboardInterrupt:
        if is_main():
            show.err().print(f"interrupted: the same command goes on from here, in {folder}/", soft_wrap=True)
        raise typer.Exit(130) from None
    except SecateurError:
        if not is_main():
            time.sleep(5)  # the launcher ends this process meanwhile if the main one has failed too, and told why
        raise


def is_main() -> bool:
    return os.environ.get("RANK", "0") == "0"
