"""What the command line's MODEL argument means: a network, inputs to run it on, and where it came from.

A saved folder holds weights and a plan, no code: its dense network is rebuilt from the name that the plan was made
with, or from ``--model``. A name that a folder gives may only be one of ``zoo:``, ``torchvision:`` and ``timm:``; code
of others is imported only because someone typed its name.
"""

from __future__ import annotations

import ast
import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from secateur import artifact
from secateur.artifact import WEIGHTS_FILE, load
from secateur.core import Budget
from secateur.engines import find_engine, installed
from secateur.errors import BadArtifact, BadPlan, BadRequest, nearest
from secateur.graph import Inputs
from secateur.heads import pool_head
from secateur.masks import example_from
from secateur.plans import Plan
from secateur.zoo import MODELS
from secateur.zoo.names import build, example_inputs
from secateur.zoo.weights import load_weights

FORMS = "write zoo:NAME, torchvision:NAME, timm:NAME, package.module:function, or a folder that secateur apply saved"
ALL = "all"
LIBRARIES = ("zoo:", "torchvision:", "timm:")
SHAPE_OPTIONS = tuple(
    "classes num_classes in_channels in_chans img_size image_size shortcut head widths inner hidden".split()
)
"""What a saved folder may pass to the function that builds its network: sizes, nothing that loads or downloads."""


@dataclass(frozen=True)
class Source:
    """How to build a network, as typed. ``shape`` is of the whole input, batch included. ``head``: ``pooled`` for what
    ``pool_head`` makes of it."""

    name: str
    weights: Path | None = None
    shape: tuple[int, ...] | None = None
    seed: int = 0
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    base: str | None = None
    head: Literal["own", "pooled"] = "own"


@dataclass(frozen=True)
class Subject:
    """A network to work on. ``inputs`` as ``example_inputs`` are given. ``size``: bytes of its weights on disk, or of
    its tensors. ``built``: how the dense network was built. A saved folder has that network too, as ``dense``; its
    weights are not the trained ones."""

    name: str
    model: nn.Module
    inputs: Inputs
    size: int
    trained: bool
    built: Source
    dense: nn.Module | None = None


def open_model(source: Source) -> Subject:
    """The network that ``source`` names, in eval mode. Raises errors of ours for whatever does not exist or fit."""
    if ":" not in source.name:
        return _open_folder(Path(source.name), source)
    if source.base is not None:
        raise BadRequest(f"--model is for a saved folder, and {source.name!r} is none")
    model = fresh(source)
    inputs = _inputs(source.name, model, source.shape)
    return Subject(source.name, model, inputs, tensor_bytes(model), source.weights is not None, source)


def fresh(source: Source) -> nn.Module:
    """The dense network that ``source`` names, in eval mode: seeded, with its weights where it has any."""
    with torch.random.fork_rng():
        torch.manual_seed(source.seed)
        model = build(source.name, **source.options)
    if source.weights is not None:
        load_weights(model, source.weights)
    return with_head(model.eval(), source)


def with_head(model: nn.Module, source: Source, data: Iterable[Any] | None = None, *, check: bool = False) -> nn.Module:
    """``model``, or what ``pool_head`` makes of it by ``source.seed`` where that is asked for, fitted on ``data``."""
    if source.head == "own":
        return model
    inputs = _inputs(source.name, model, source.shape)
    return pool_head(model, inputs, data=data, seed=source.seed, check=check).eval()


def read_plan(path: Path) -> Plan:
    """The plan in a file, or in a saved folder. Raises BadArtifact where there is none, BadPlan for a bad one."""
    if path.is_dir():
        return artifact.read_plan(path)
    try:
        return Plan.from_json(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise BadPlan(f"{path} is not text: no plan was ever written so") from error
    except OSError as error:
        raise BadArtifact(
            f"the plan {path} cannot be read: {error.strerror}\n  do: make one with secateur plan MODEL -o {path}"
        ) from error


def remember_model(plan: Plan, source: Source) -> Plan:
    """``plan`` with the name and options its network was built by, so that a saved folder can be opened again."""
    made_by = {**plan.made_by, "model": source.name, "options": dict(source.options)}
    if source.head != "own":
        made_by["head"] = source.head
    return dataclasses.replace(plan, made_by=made_by)


def tensor_bytes(model: nn.Module) -> int:
    """Bytes of all tensors of the state dict, shared ones once."""
    return sum({id(t): t.numel() * t.element_size() for t in model.state_dict(keep_vars=True).values()}.values())


def parse_shape(text: str | None) -> tuple[int, ...] | None:
    """``1,3,224,224`` as a tuple. Raises BadRequest for anything but two or more positive integers."""
    if text is None:
        return None
    if not re.fullmatch(r"\s*[1-9]\d*\s*([,x]\s*[1-9]\d*\s*)+", text):
        raise BadRequest(f"--input {text!r} is no shape\n  do: write it with the batch, as in --input 1,3,224,224")
    return tuple(int(number) for number in re.split("[,x]", text))


def parse_ratios(given: Sequence[str]) -> float | dict[str, float] | None:
    """``["0.5"]`` as 0.5; ``["layer1.*=0.3", "conv1=48"]`` as a mapping: with a point a ratio, without one a width."""
    ratios: dict[str, float] = {}
    for text in given:
        pattern, equals, value = text.rpartition("=")
        try:
            number: float = float(value) if "." in value or "e" in value.lower() or value == "0" else int(value)
        except ValueError as error:
            raise BadRequest(
                f"--ratio {text!r} is not understood\n"
                "  do: write a number for all groups (0.5), or GLOB=RATIO or GLOB=WIDTH for some ('layer1.*=0.3')"
            ) from error
        if not equals:
            if len(given) > 1:
                raise BadRequest(f"--ratio {text!r} is for all groups, and others are given\n  do: write '*={value}'")
            return float(number)
        ratios[pattern] = number
    return ratios or None


def parse_budget(
    keep: float | None, at_most: float | None, of: str | None, *, latency: float | None, run: Mapping[str, Any]
) -> tuple[Budget | None, Budget]:
    """The budget that was asked for, if any, and the one to take where nothing says how much goes: half of the cost.

    ``latency``: the fraction of it to keep, which stands for a budget of its own. ``run``: engine, batch and threads.
    """
    if latency is not None:
        others = {"--keep": keep, "--at-most": at_most, "--of": None if of == "latency" else of}
        for name, value in others.items():
            if value is not None:
                raise BadRequest(
                    f"--latency {latency:g} is a budget, and {name} {value} says another one\n"
                    "  do: give --latency, or --keep or --at-most with --of latency"
                )
        keep, of = latency, "latency"
    kind: Any = of or "macs"
    asked = Budget(keep=keep, at_most=at_most, of=kind, **run)
    return (None if keep is None and at_most is None else asked), dataclasses.replace(asked, keep=0.5, at_most=None)


def parse_constants(given: Sequence[str]) -> str | dict[str, str]:
    """``["fold"]`` as it is, ``["layer1.*=drop", "*=fold"]`` as a mapping; nothing as ``"drop"``."""
    found = {pattern: value for pattern, _, value in (text.rpartition("=") for text in given)}
    if "" in found and len(given) > 1:
        raise BadRequest(
            f"--constants {found['']!r} is for all groups, and others are given\n"
            f"  do: write '*={found['']}', as the last one"
        )
    return found.get("", found) or "drop"


def parse_engines(given: Sequence[str]) -> list[str]:
    """``["torch,openvino", "inductor"]`` as three names; ``all`` is every engine that is installed, and nothing torch.

    Raises BadRequest for an unknown engine, MissingExtra for one that is not installed.
    """
    names = [name.strip() for text in given for name in text.split(",") if name.strip()]
    if ALL in names:
        return installed()
    for name in names:
        find_engine(name)
    return list(dict.fromkeys(names)) or ["torch"]


def parse_options(given: Sequence[str]) -> dict[str, Any]:
    """``["classes=100", "shortcut=projection"]`` as keywords; values are Python literals where they can be read so."""
    options: dict[str, Any] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or not name.isidentifier():
            raise BadRequest(f"--option {text!r} is not understood\n  do: write NAME=VALUE, as in num_classes=10")
        try:
            options[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            options[name] = value
    return options


def _open_folder(folder: Path, source: Source) -> Subject:
    if not folder.is_dir():
        close = nearest(f"zoo:{folder}", [f"zoo:{name}" for name in MODELS])
        hint = close if "mean" in close else ""
        raise BadArtifact(f"{str(folder)!r} is neither a saved folder nor a model's name{hint}\n  do: {FORMS}")
    if source.weights is not None:
        raise BadRequest(f"--weights is for a network by name: {folder} has its own weights")
    plan = read_plan(folder)
    named = plan.made_by.get("model")
    if source.base is None and not isinstance(named, str):
        raise BadRequest(f"{folder} does not say which network it was pruned from\n  do: name it with --model")
    if source.base is None and not str(named).startswith(LIBRARIES):
        raise BadRequest(
            f"{folder} was pruned from {named}, and code is not imported because a file says so\n"
            f"  do: if you trust it, say --model {named}"
        )
    options = plan.made_by.get("options")
    if not source.options and source.base in (None, named) and isinstance(options, Mapping):
        for name in options:
            if name not in SHAPE_OPTIONS:
                raise BadRequest(
                    f"{folder} was built with {name}={options[name]!r}, which is not taken from a file\n"
                    f"  do: if you trust it, say --model {named} --option '{name}={options[name]}'"
                )
        source = dataclasses.replace(source, options=dict(options))
    base = source.base or str(named)
    source = dataclasses.replace(source, name=base, base=None)
    if plan.made_by.get("head") == "pooled":
        shapes = [] if source.shape else [given["shape"] for given in plan.inputs.get("args", ()) if "shape" in given]
        source = dataclasses.replace(source, head="pooled", shape=tuple(shapes[0]) if shapes else source.shape)
    dense = fresh(source)
    small = load(folder, dense)
    inputs = _inputs(base, dense, source.shape) if source.shape or not plan.inputs else example_from(plan)
    size = (folder / WEIGHTS_FILE).stat().st_size
    return Subject(str(folder), small.eval(), inputs, size, trained=True, built=source, dense=dense)


def _inputs(name: str, model: nn.Module, shape: tuple[int, ...] | None) -> Inputs:
    if shape is None:
        return example_inputs(name, model)
    return example_inputs(name, model, shape=shape[1:], batch=shape[0])
