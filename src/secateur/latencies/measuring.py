"""Measuring what a latency budget needs: stairs, tables of layers, and a few whole networks.

What is known from an earlier call in the same setting is not measured again, and everything is kept as soon as it is
measured: interrupted, the next call goes on.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, replace
from typing import Any, cast

import torch
from torch import nn

from secateur.engines import Exports, Prepared, find_engine, prepare_all
from secateur.engines.protocol import check_threads
from secateur.errors import BadRequest, SecateurWarning, nearest
from secateur.generators import kept_randomness
from secateur.graph import Graph, Inputs, trace
from secateur.groups import Coupling, couple
from secateur.latencies.geometries import Geometry, Placed, placed_layers
from secateur.latencies.grids import grid, point_text
from secateur.latencies.records import Latencies, Whole
from secateur.latencies.signatures import network_digest
from secateur.latencies.staircases import group_steps, stairs, steps_of
from secateur.latencies.store import Setting, Store, open_store
from secateur.latencies.timers import Sized, check_timed, time_layers
from secateur.nests import flatten, unflatten
from secateur.plans import Plan, fingerprint, input_specs
from secateur.residuals import RULES
from secateur.surgery import apply
from secateur.timing import take_turns

Progress = Callable[[int, int, str], None]
WHOLE = ((1.0, 1.0), (0.5, 0.5), (0.25, 0.25), (0.25, 1.0), (1.0, 0.25))
"""The whole networks that are timed: the fraction of all widths in the front half of the network, and in the back.
Where both are always alike, what is slow about weights and about activations looks alike too."""
ROUNDS = 8
REPEATS = 15


def measure_latencies(
    model: nn.Module | Graph,
    example_inputs: Inputs | None = None,
    *,
    engine: str = "onnxruntime",
    threads: int = 1,
    batch: int = 1,
    residual: str = "coupled",
    cache: bool = True,
    progress: Progress | None = None,
) -> Latencies:
    """How long ``model`` takes on this machine as a function of its widths, for ``plan(..., latencies=...)``.

    ``batch`` examples at a time, in ``engine`` on ``threads`` threads. ``residual``: the rule by which it will be
    planned. ``cache``: use and keep what was measured before (``latencies/store.py`` says where). ``progress(done, all,
    what)`` is told of every step. Nothing of the model is changed, and the generators of chance are left alone.

    Raises ``BadRequest`` for an engine whose layers cannot be timed, for an unknown residual rule, and for a batch that
    the network cannot be run on; ``MissingExtra`` for an engine that is not installed, ``BadArtifact`` for a cache that
    is damaged or of another machine, and what running the network in it raises.
    """
    if residual not in RULES:
        raise BadRequest(f"there is no residual rule {residual!r}{nearest(str(residual), RULES)}")
    coupling = couple(trace(model, example_inputs), scatter=residual == "scatter")
    return latencies_of(
        coupling, engine=engine, threads=threads, batch=batch, cache=cache, progress=progress or _silent
    )


def latencies_of(
    coupling: Coupling,
    *,
    engine: str,
    threads: int = 1,
    batch: int = 1,
    cache: bool = True,
    progress: Progress = lambda done, total, what: None,
) -> Latencies:
    """``measure_latencies`` of a network whose groups are known."""
    check_timed(engine)
    check_threads(threads)
    _check_batch(coupling.graph, batch)
    _check_device(coupling.graph, engine)
    begun = time.perf_counter()
    setting = Setting(engine, find_engine(engine).version(), threads, batch)
    network = network_digest(coupling)
    key, memo = _key(network, setting), coupling.graph.memo
    if cache and key in memo:
        return cast(Latencies, memo[key])
    store = open_store(setting, cache=cache)
    layers, _ = placed_layers(coupling)
    scanned = [sized for geometry in _pruned(layers) for sized in stairs(geometry)]
    _time(scanned, store, progress, f"stairs of {engine}")
    steps = steps_of({sized: _known(store, sized) for sized in scanned})
    multiples = group_steps(layers, steps, coupling.groups)
    points = [sized for layer in layers for sized in grid(layer, steps)]
    _time(points, store, progress, f"layers in {engine}")
    if network not in store.networks:
        progress(0, 1, f"whole networks in {engine}")
        store.networks[network] = _time_whole(coupling, store.setting, multiples)
        store.keep()
        progress(1, 1, f"whole networks in {engine}")
    mine = {sized[0].text() for sized in (*scanned, *points)}
    found = Latencies(
        **store.setting.as_values(),
        network=network,
        points={text: dict(own) for text, own in store.layers.items() if text in mine},
        whole=tuple(Whole(**one) for one in store.networks[network]),
        steps=steps,
        seconds=round(time.perf_counter() - begun, 3),
    )
    if cache:
        memo[key] = found
    return found


def _key(network: str, setting: Setting) -> str:
    """What the latencies of a network are called in the memory of its graph."""
    return f"latencies {setting} {network}"


def _check_device(graph: Graph, engine: str) -> None:
    """Layers are timed on the CPU: whole networks must be, too."""
    away = next((t.device for t in graph.tensors.values() if t.device.type != "cpu"), None)
    if away is not None and find_engine(engine).own_weights:
        raise BadRequest(
            f"latencies are measured on the CPU, and in engine {engine!r} this network would run on {away}\n"
            "  do: move it to the CPU, or ask for an engine that exports it, such as 'onnxruntime'"
        )


def _check_batch(graph: Graph, batch: int) -> None:
    if isinstance(batch, bool) or not isinstance(batch, int) or batch < 1:
        raise BadRequest(f"batch must be a whole number of at least 1, not {batch!r}")
    tensors, _ = flatten((graph.args, dict(graph.kwargs)))
    given = len(tensors[0]) if tensors[0].dim() else 1
    if batch != given and not any(graph.captures[0].batched):
        raise BadRequest(
            f"the network runs on its example inputs alone, whose first axis has {given}, not on a batch of {batch}\n"
            f"  do: say batch={given}; or see that its forward has no number of examples written into it"
        )


def _pruned(layers: Iterable[Placed]) -> list[Geometry]:
    """The geometries of layers that groups make narrower."""
    return list(dict.fromkeys(layer.geometry for layer in layers if layer.into[1] or layer.out[1]))


def _time(wanted: Iterable[Sized], store: Store, progress: Progress, what: str) -> None:
    """Time the layers that are not known, one of each geometry at once, as in a network; kept as they come."""
    missing: dict[Geometry, list[Sized]] = {}
    for sized in dict.fromkeys(wanted):
        if point_text(*sized[1:]) not in store.layers.get(sized[0].text(), {}):
            missing.setdefault(sized[0], []).append(sized)
    turns = max(map(len, missing.values()), default=0)
    setting = store.setting
    for turn in range(turns):
        progress(turn, turns, what)
        layers = [own[turn] for own in missing.values() if turn < len(own)]
        with kept_randomness(torch.device("cpu")):
            times = time_layers(
                layers, engine=setting.engine, batch=setting.batch, threads=setting.threads, rounds=ROUNDS
            )
        for sized, ms in zip(layers, times, strict=True):
            store.layers.setdefault(sized[0].text(), {})[point_text(*sized[1:])] = ms
        store.keep()
        progress(turn + 1, turns, what)


def _known(store: Store, sized: Sized) -> float:
    return store.layers[sized[0].text()][point_text(*sized[1:])]


def _time_whole(coupling: Coupling, setting: Setting, multiples: Sequence[int]) -> list[dict[str, Any]]:
    """Whole networks of the widths of ``WHOLE``, the dense one first, each as the values of a ``Whole``."""
    wanted: list[dict[str, int]] = []
    groups = coupling.groups
    steps = [step // math.gcd(step, group.partitions) for step, group in zip(multiples, groups, strict=True)]
    for ends in WHOLE:
        own = {
            group.name: min(group.channels, math.ceil(ends[2 * place >= len(groups)] * group.channels / step) * step)
            for place, (group, step) in enumerate(zip(groups, steps, strict=True))
        }
        wanted += [own] * (own not in wanted)
    times = _timed(coupling, setting, wanted)
    return [asdict(Whole(own, ms)) for own, ms in zip(wanted, times, strict=True)]


def _timed(coupling: Coupling, setting: Setting, wanted: Sequence[Mapping[str, int]]) -> list[float]:
    """Milliseconds of networks of these widths, timed in turns: the least of all rounds, as of layers."""
    models = {str(place): cut(coupling, own) for place, own in enumerate(wanted)}
    inputs = with_batch(coupling.graph, setting.batch)
    options: Any = {"engine": setting.engine, "threads": setting.threads}
    with Exports(free_batch=False) as exports, prepare_all(models, inputs, exports=exports, **options) as runs:
        found = take_turns(runs, repeats=REPEATS, threads=setting.threads)
    return [found[name].least for name in models]


@contextmanager
def one_more(coupling: Coupling, setting: Setting) -> Iterator[Callable[[Latencies, Mapping[str, int]], Latencies]]:
    """A function that adds the time of one more whole network, of some widths, to latencies: what is predicted near it
    will be nearer to the truth.

    The network is timed in turns with the dense one, and told as a part of the dense one's known time, since the
    machine may be busier now than it was then. The dense one is made ready once.
    """
    inputs, store = with_batch(coupling.graph, setting.batch), open_store(setting)
    ready: dict[str, Prepared] = {}
    with ExitStack() as stack:
        exports = stack.enter_context(Exports(free_batch=False))

        def prepared(widths: Mapping[str, int]) -> AbstractContextManager[dict[str, Prepared]]:
            model = {"": cut(coupling, widths)}
            return prepare_all(model, inputs, engine=setting.engine, threads=setting.threads, exports=exports)

        def add(found: Latencies, widths: Mapping[str, int]) -> Latencies:
            dense = found.whole[0]
            if not ready:
                ready["dense"] = stack.enter_context(prepared(dense.widths))[""]
            with prepared(widths) as runs:
                times = take_turns({**ready, "pruned": runs[""]}, repeats=REPEATS, threads=setting.threads)
            one = Whole(dict(widths), dense.ms * times["pruned"].least / times["dense"].least, decided=True)
            if found.network in store.networks:
                store.networks[found.network].append(asdict(one))
                store.keep()
            more = replace(found, whole=(*found.whole, one))
            coupling.graph.memo[_key(found.network, setting)] = more
            return more

        yield add


def cut(coupling: Coupling, widths: Mapping[str, int]) -> nn.Module:
    """The network with the first channels of every group: as fast as with any others. Unchecked."""
    graph = coupling.graph
    plan = Plan(
        groups=coupling.groups,
        keep={name: tuple(range(width)) for name, width in widths.items()},
        model=fingerprint(graph.model),
        inputs=input_specs(graph.args, graph.kwargs),
        residual="scatter" if coupling.scatter else "coupled",
        graph=graph,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SecateurWarning)  # of what is lost: this one is timed, and gone
        return apply(graph, plan, check=False)


def with_batch(graph: Graph, batch: int) -> Any:
    """The example inputs of a graph, repeated or cut to so many examples."""
    tensors, skeleton = flatten((graph.args, dict(graph.kwargs)))
    sized = [
        torch.cat([t] * -(-batch // len(t)))[:batch] if free else t
        for t, free in zip(tensors, graph.captures[0].batched, strict=True)
    ]
    args, kwargs = unflatten(skeleton, sized)
    return args or kwargs


def _silent(done: int, total: int, what: str) -> None:
    pass
