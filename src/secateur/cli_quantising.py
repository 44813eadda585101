"""``secateur quantise``: a network in int8, beside itself in float32 and, for a pruned one, beside the dense one."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from torch import nn

from secateur import cli_output as show
from secateur import cli_sensitivity
from secateur.cli_models import Source, Subject, parse_options
from secateur.counting import count
from secateur.engines import FILE_ENGINES, Exports, find_engine, installed, prepare_all
from secateur.errors import BadRequest
from secateur.measurement import accuracy
from secateur.quantisation import (
    Calibration,
    QuantiseReport,
    Settings,
    check_target,
    file_accuracy,
    quantise_file,
    read_calibration,
)
from secateur.report.content import Row
from secateur.timing import time_in_engines
from secateur.zoo.weights import load_weights

if TYPE_CHECKING:
    from secateur.zoo.data import Data, Loader


def quantise(
    model: Annotated[str, typer.Argument(metavar="MODEL", show_default=False, help="As for secateur plan.")],
    data: cli_sensitivity.Images,
    output: Annotated[Path, typer.Option("-o", "--output", show_default=False, help="The ONNX file to write.")],
    weights: Annotated[
        Path | None, typer.Option("--weights", metavar="FILE", help="Your trained weights: .safetensors, .pth, .pt.")
    ] = None,
    dense: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Of a saved folder: the dense network's, for its accuracy.")
    ] = None,
    batches: Annotated[int, typer.Option(help="Calibrate on so many batches of training images.")] = 8,
    method: Annotated[str, typer.Option(help="Ranges of activations: minmax, percentile or entropy.")] = "minmax",
    exclude: Annotated[
        list[str] | None, typer.Option(metavar="GLOB", help="Modules that stay in float; repeatable.")
    ] = None,
    per_channel: Annotated[
        bool, typer.Option("--per-channel/--per-tensor", help="A scale for each channel of a weight, or one for all.")
    ] = True,
    seven: Annotated[
        bool | None, typer.Option("--seven-bits/--eight-bits", help="Of weights; if not said, as this processor needs.")
    ] = None,
    test_batches: Annotated[
        int | None, typer.Option(help="Accuracy on the first so many batches only; 0: none.", min=0)
    ] = None,
    latency: Annotated[bool, typer.Option("--latency/--no-latency", help="Time one image in every engine.")] = True,
    engine: Annotated[
        list[str] | None, typer.Option(help="onnxruntime, openvino ...; repeatable; those installed, if not said.")
    ] = None,
    threads: Annotated[int, typer.Option(help="Threads while timing.")] = 1,
    setting: cli_sensitivity.Setting = None,
    seed: Annotated[int, typer.Option("--seed", help="Seed of a network without weights, and of the data.")] = 0,
    option: Annotated[
        list[str] | None, typer.Option("--option", metavar="NAME=VALUE", help="Passed to what builds MODEL.")
    ] = None,
    base: Annotated[str | None, typer.Option("--model", metavar="MODEL", help="The dense network of a folder.")] = None,
) -> None:
    """Write a network in int8 as ONNX, calibrated on training images, and show what that costs and brings."""
    engines = _engines(engine or ()) if latency else []
    images = cli_sensitivity.open_images(data, setting or (), seed)
    subject = cli_sensitivity.opened(Source(model, weights, None, seed, parse_options(option or ()), base), images)
    networks = _networks(subject, dense)
    settings = Settings(method, per_channel, tuple(exclude or ()), seven)  # type: ignore[arg-type]
    with tempfile.TemporaryDirectory(prefix="secateur-") as folder, Exports() as exports:
        check_target(method, output)
        calibration = read_calibration(images.calibration, subject.inputs, batches)
        written = _write(networks, subject, calibration, settings, (output, Path(folder), exports))
        known = [name for name in networks if name != "dense" or dense is not None]
        right = _accuracies(subject, networks, written, known, _tested(images, test_batches))
        times = _times(subject, networks, written, engines, threads, exports)
        rows = _rows(subject, networks, written, right, times)
    show.print_networks(rows, title="Networks", threads=threads)
    _tell(output, list(written.values())[-1], subject)


def register(app: typer.Typer) -> None:
    """Make this a command of ``app``."""
    app.command(
        epilog="[bold]Examples:[/]\n\n"
        "[cyan]secateur quantise small --data cifar10 -o small.int8.onnx[/]\n\n"
        "[cyan]secateur quantise small --dense r56.pth --data cifar10 --exclude fc -o small.int8.onnx[/]\n\n"
        "[cyan]secateur quantise zoo:resnet56 --weights r56.pth --data cifar10 --method entropy -o r56.onnx[/]"
    )(quantise)


def int8_name(name: str) -> str:
    """What the row of a network in int8 is called."""
    return f"{name}, int8"


def _engines(asked: Sequence[str]) -> list[str]:
    names = [part.strip() for text in asked for part in text.split(",") if part.strip()]
    for name in names:
        find_engine(name)
    return list(dict.fromkeys(names)) or [name for name in FILE_ENGINES if name in installed()]


def _networks(subject: Subject, dense: Path | None) -> dict[str, nn.Module]:
    """By name, the one that was asked for last."""
    if subject.dense is None:
        if dense is not None:
            raise BadRequest(f"--dense is for a saved folder, and {subject.name!r} is none\n  do: say --weights")
        return {subject.name: subject.model}
    if dense is not None:
        load_weights(subject.dense, dense)
    return {"dense": subject.dense.eval(), "pruned": subject.model}


def _write(
    networks: Mapping[str, nn.Module],
    subject: Subject,
    calibration: Calibration,
    settings: Settings,
    places: tuple[Path, Path, Exports],
) -> dict[str, QuantiseReport]:
    """Every network in int8, the last one where it was asked for; those in float32 are compared with torch first."""
    output, folder, exports = places
    written = {}
    for number, (name, network) in enumerate(networks.items(), 1):
        path = output if number == len(networks) else folder / f"{number}.onnx"
        with show.working(f"quantising {name}"):
            with prepare_all({name: network}, subject.inputs, engine="onnxruntime", exports=exports):
                source = exports.path(network, subject.inputs)
            written[name] = quantise_file(source, path, calibration, settings)
    return written


def _tested(images: Data, batches: int | None) -> Loader | None:
    if batches == 0 or not len(images.test):
        return None
    return images.test if batches is None else images.test.first(batches)


def _accuracies(
    subject: Subject,
    networks: Mapping[str, nn.Module],
    written: Mapping[str, QuantiseReport],
    known: Sequence[str],
    data: Loader | None,
) -> dict[str, float]:
    """By row, of the networks whose weights are trained ones."""
    found: dict[str, float] = {}
    if data is None:
        return found
    with show.bar("evaluating", total=2 * len(known)) as update:
        for name in known:
            update(len(found), 2 * len(known), name)
            found[name] = accuracy(networks[name], data)
            update(len(found), 2 * len(known), int8_name(name))
            found[int8_name(name)] = file_accuracy(written[name].path, subject.inputs, data)
        update(len(found), 2 * len(known), "")
    return found


def _times(
    subject: Subject,
    networks: Mapping[str, nn.Module],
    written: Mapping[str, QuantiseReport],
    engines: Sequence[str],
    threads: int,
    exports: Exports,
) -> dict[str, dict[str, float]]:
    """``{row: {engine: milliseconds}}``, all taken in turns."""
    if not engines:
        return {}
    with show.bar("timing") as update:
        found = time_in_engines(
            networks,
            subject.inputs,
            engines=engines,
            threads=threads,
            exports=exports,
            files={int8_name(name): report.path for name, report in written.items()},
            progress=lambda done, total: update(done, total, ""),
        )
    times: dict[str, dict[str, float]] = {}
    for engine, own in found.items():
        for name, timing in own.items():
            times.setdefault(name, {})[engine] = timing.ms
    return times


def _rows(
    subject: Subject,
    networks: Mapping[str, nn.Module],
    written: Mapping[str, QuantiseReport],
    right: Mapping[str, float],
    times: Mapping[str, Mapping[str, float]],
) -> list[Row]:
    """Those in float32 first, then those in int8; sizes are of ONNX files."""
    counts = {name: count(network, subject.inputs) for name, network in networks.items()}
    sizes = {name: report.float_bytes for name, report in written.items()}
    sizes |= {int8_name(name): report.bytes for name, report in written.items()}
    return [
        Row(
            shown,
            params=int(counts[name].params),
            macs=int(counts[name].macs),
            accuracy=right.get(shown),
            size=sizes[shown],
            latencies_ms=dict(times.get(shown, {})),
        )
        for shown, name in [*((name, name) for name in networks), *((int8_name(name), name) for name in networks)]
    ]


def _tell(output: Path, report: QuantiseReport, subject: Subject) -> None:
    layers = show.number(len(report.layers), "layer")
    show.say(f"{output}: {show.short_bytes(report.bytes)}, opset {report.opset}, {layers} in int8")
    alike = "" if report.agreement is None else f"{100 * report.agreement:.2f} % of them classified as in float32, "
    images = show.number(report.images, "training image")
    show.say(f"calibrated on {images}: {alike}outputs differ by {100 * report.difference:.2g} %")
    if report.float_layers:
        show.say(f"in float32: {', '.join(report.float_layers)}")
    if report.reduce_range:
        show.say("weights have seven bits: with eight, sums saturate on processors without VNNI")
    if not subject.trained:
        show.err().print("[yellow]note:[/] the weights are random: --weights FILE quantises your trained network")
