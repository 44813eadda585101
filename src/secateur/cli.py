"""The ``secateur`` command: the verbs of the library, on networks by name and on saved folders.

Every command is a few lines: open what was named, call the library, print. An error of ours becomes one red line on
stderr and exit status 2, without a traceback; Ctrl-C ends with status 130 and nothing half-written.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import secateur as sc
from secateur import cli_latencies, cli_measuring, cli_quantising, cli_reporting, cli_sensitivity, cli_training
from secateur import cli_output as show
from secateur.artifact import save
from secateur.cli_measuring import Base, Model, Options, Shape, Weights
from secateur.cli_models import (
    Source,
    Subject,
    open_model,
    parse_budget,
    parse_constants,
    parse_options,
    parse_ratios,
    parse_shape,
    read_plan,
    remember_model,
)
from secateur.errors import BadRequest, SecateurError
from secateur.files import written_aside


class _Group(TyperGroup):
    """Commands whose errors, if they are ours, are told and not traced."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except SecateurError as error:
            show.print_error(error)
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            show.err().print("interrupted")
            raise typer.Exit(130) from None


app = typer.Typer(
    cls=_Group,
    name="secateur",
    no_args_is_help=True,
    rich_markup_mode="rich",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Seed = Annotated[int, typer.Option("--seed", help="Seed of a network without weights, and of random criteria.")]
Ratio = Annotated[
    list[str] | None,
    typer.Option(metavar="RATIO", help="Fraction to remove, or GLOB=RATIO, or GLOB=WIDTH; repeatable."),
]
Constants = Annotated[
    list[str] | None,
    typer.Option(metavar="KIND", help="What zeroed filters leave: drop, fold, or GLOB=drop, GLOB=fold; repeatable."),
]
Found = Annotated[
    Path | None,
    typer.Option(metavar="FOLDER", help="What secateur sensitivity found: a budget is met with the least loss."),
]
Output = Annotated[Path, typer.Option("-o", "--output", show_default=False, help="Where to write.")]


@app.callback()
def secateur() -> None:
    """Prune convolutional networks exactly: smaller, faster, and nothing else changed.

    [bold]MODEL[/] is zoo:resnet56, torchvision:resnet50, timm:efficientnet_lite0, your own package.module:function, or
    a folder saved by [bold]apply[/].

    A first look:  [cyan]secateur inspect zoo:resnet20[/]
    """


@app.command(epilog="[bold]Example:[/]  [cyan]secateur inspect timm:efficientnet_lite0 --json[/]")
def inspect(
    model: Model,
    weights: Weights = None,
    shape: Shape = None,
    seed: Seed = 0,
    option: Options = None,
    base: Base = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show which channels belong together, and what cannot be pruned and why."""
    subject = _open(Source(model, weights, parse_shape(shape), seed, parse_options(option or ()), base))
    groups = sc.find_groups(_traced(subject))
    if as_json:
        typer.echo(json.dumps(show.groups_json(groups), indent=1))
        return
    free, locked = [g for g in groups if not g.locked], [g for g in groups if g.locked]
    show.out().print(show.groups_table(free))
    if locked:
        show.out().print(show.locked_table(locked))
    channels = sum(g.channels for g in free)
    show.say(f"{show.number(len(free), 'group')} of {channels:,} channels can be pruned, {len(locked)} locked.")


@app.command(
    epilog="[bold]Examples:[/]\n\n[cyan]secateur plan zoo:resnet56 --keep 0.5 -o plan.json[/]\n\n"
    "[cyan]secateur plan torchvision:resnet50 --weights r50.pth --at-most 2e9 --round-to 8 -o plan.json[/]\n\n"
    "[cyan]secateur plan zoo:vgg16_cifar --ratio 'features.2*=0.5' --ratio 'features.0=48' -o plan.json[/]\n\n"
    "[cyan]secateur plan zoo:resnet56 --weights r56.pth --sensitivity found --tolerance 0.01 -o plan.json[/]\n\n"
    "[cyan]secateur plan zoo:resnet56 --weights r56.pth --criterion taylor --data cifar10 -o plan.json[/]\n\n"
    "[cyan]secateur plan torchvision:resnet50 --engine onnxruntime --latency 0.5 -o plan.json[/]\n\n"
    "[cyan]secateur plan timm:efficientnet_lite0 --of memory --keep 0.5 -o plan.json[/]"
)
def plan(
    model: Model,
    output: Output,
    weights: Weights = None,
    criterion: Annotated[str, typer.Option(help="How channels are ranked; an unknown name lists them all.")] = "l1",
    keep: Annotated[float | None, typer.Option(help="Fraction of the cost to keep; half, if nothing is said.")] = None,
    at_most: Annotated[float | None, typer.Option(help="The cost allowed, in place of --keep.")] = None,
    of: Annotated[str | None, typer.Option(help="macs (the default), params, channels, memory or latency.")] = None,
    latency: Annotated[float | None, typer.Option(help="Fraction of the latency to keep, in --engine.")] = None,
    engine: Annotated[str | None, typer.Option(help="The engine whose latency counts; secateur engines.")] = None,
    batch: Annotated[int, typer.Option(help="Examples whose memory or latency counts.")] = 1,
    threads: Annotated[int, typer.Option(help="Threads whose latency counts.")] = 1,
    latencies: cli_latencies.Given = None,
    ratio: Ratio = None,
    exclude: Annotated[list[str] | None, typer.Option(metavar="GLOB", help="Leave these groups; repeatable.")] = None,
    allocation: Annotated[str, typer.Option(help="How a budget is shared: global or uniform.")] = "global",
    sensitivity: Found = None,
    tolerance: Annotated[float | None, typer.Option(help="Ratios at which a group alone loses no more.")] = None,
    per: Annotated[str | None, typer.Option(help="With a tolerance, a ratio for each group, or stage.")] = None,
    residual: Annotated[
        str, typer.Option(help="What meets in residual sums: coupled, inner, projection, or scatter (each by itself).")
    ] = "coupled",
    constants: Constants = None,
    greedy: Annotated[bool, typer.Option("--greedy", help="Leave removed inputs out of the filters' norms.")] = False,
    data: Annotated[str | None, typer.Option(help="Training images, for criteria that look at them.")] = None,
    batches: Annotated[int, typer.Option(help="How many batches of them.")] = cli_sensitivity.CALIBRATION,
    setting: cli_sensitivity.Setting = None,
    round_to: Annotated[int, typer.Option(help="Kept widths are multiples of this.")] = 1,
    min_channels: Annotated[int, typer.Option(help="Least width of any group.")] = 1,
    shape: Shape = None,
    seed: Seed = 0,
    option: Options = None,
    base: Base = None,
) -> None:
    """Decide which channels go, and write the decision as JSON."""
    run = {"engine": engine, "batch": batch, "threads": threads}
    budget, half = parse_budget(keep, at_most, of, latency=latency, run=run)
    source = Source(model, weights, parse_shape(shape), seed, parse_options(option or ()), base)
    images = None if data is None else cli_sensitivity.open_images(data, setting or (), seed)
    subject = _open(source) if images is None else cli_sensitivity.opened(source, images)
    graph = _traced(subject)
    asked = cli_sensitivity.how_much(
        graph, parse_ratios(ratio or ()), budget, found=sensitivity, tolerance=tolerance, per=per, exclude=exclude or ()
    )
    if asked["ratios"] is None and asked["budget"] is None:
        asked["budget"] = half
    asked |= {"exclude": tuple(exclude or ()), "allocation": allocation, "residual": residual, "greedy": greedy}
    asked |= {"round_to": round_to, "min_channels": min_channels, "seed": seed}
    asked |= {"constants": parse_constants(constants or ())}
    asked |= {"latencies": cli_latencies.for_plan(graph, asked.get("budget"), latencies, residual=residual)}
    with show.working("deciding"):
        made = sc.plan(graph, **asked, **cli_sensitivity.evidence(criterion, images, batches))
    _write_text(output, remember_model(made, source).to_json())
    _tell_plan(made, subject, output)


@app.command(epilog="[bold]Example:[/]  [cyan]secateur apply zoo:resnet56 plan.json --weights r56.pth -o small[/]")
def apply(
    model: Model,
    plan_file: Annotated[Path, typer.Argument(metavar="PLAN", show_default=False, help="What secateur plan wrote.")],
    output: Output,
    weights: Weights = None,
    seed: Seed = 0,
    option: Options = None,
    base: Base = None,
    check: Annotated[bool, typer.Option(help="Compare with the masked dense network before saving.")] = True,
) -> None:
    """Remove the channels and save the smaller network: weights, plan, environment. The dense one is not touched."""
    decided = read_plan(plan_file)
    source = Source(model, weights, None, seed, parse_options(option or ()), base)
    subject = _open(source)
    with show.working("removing channels" + (" and checking" if check else "")):
        small = sc.apply(subject.model, decided, check=check)
    # of a network pruned before, too, the first, dense one is remembered: that is what a folder is rebuilt from
    save(output, small, remember_model(decided, subject.built))
    before, after = (sum(p.numel() for p in m.parameters()) for m in (subject.model, small))
    show.say(f"parameters {before:,} → {after:,} ({100 * after / before:.1f} %); saved in {output}/")


cli_measuring.register(app)
cli_latencies.register(app)
cli_quantising.register(app)
cli_sensitivity.register(app)
cli_training.register(app)
cli_reporting.register(app)


def _tell_plan(made: sc.Plan, subject: Subject, output: Path) -> None:
    show.out().print(show.plan_table(made))
    kept = sum(len(indices) for indices in made.keep.values())
    total = sum(group.channels for group in made.groups)
    for line in show.cost_lines(made):
        show.say(line)
    show.say(f"keeps {kept:,} of {total:,} channels; written to {output}")
    if not subject.trained:
        show.err().print("[yellow]note:[/] the weights are random: --weights FILE ranks those of your trained network")


def _open(source: Source) -> Subject:
    with show.working(f"opening {source.name}"):
        return open_model(source)


def _traced(subject: Subject) -> sc.Graph:
    with show.working(f"tracing {subject.name}"):
        return sc.trace(subject.model, subject.inputs)


def _write_text(path: Path, text: str) -> None:
    """A plan is there whole or not at all."""
    try:
        with written_aside(path) as aside:
            aside.write_text(text, encoding="utf-8")
    except OSError as error:
        raise BadRequest(f"{path} cannot be written: {error.strerror}\n  do: choose another path with -o") from error


def main() -> None:
    """The console script."""
    app()
