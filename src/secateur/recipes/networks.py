"""The networks of a run: built by name or from a saved folder, read back from what a phase wrote.

Own code (``package.module:function``) is imported only where the caller allows it: a recipe is a file, too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_model, save_model
from torch import Tensor, nn

from secateur import artifact
from secateur.cli_models import LIBRARIES, Source, fresh, open_model, remember_model, with_head
from secateur.errors import BadArtifact, BadRequest
from secateur.plans import Plan
from secateur.recipes.folder import written_aside
from secateur.recipes.schema import RANDOM, Model, Teacher, is_folder
from secateur.surgery import rebuild, record
from secateur.zoo.names import example_inputs
from secateur.zoo.weights import load_weights

LOADS = ("pretrained", "weights", "checkpoint_path")
"""Options that make building a network load weights."""


@dataclass(frozen=True)
class Origin:
    """Where a run's networks come from. ``source``: how the dense one is built, without its weights. ``weights``: the
    file that holds them, if any. ``given``: the saved folder that the run begins with, if any. ``shape``: ``[C, H, W]``
    of an input."""

    source: Source
    weights: Path | None
    given: Path | None
    shape: tuple[int, ...]


def origin_of(model: Model, shape: tuple[int, ...], *, seed: int, allow_import: bool) -> Origin:
    """How to make the recipe's networks. Raises what opening a folder raises, and BadRequest for code of others."""
    _check_import(model.name, allow_import)
    if is_folder(model.name):
        if model.base is not None:
            _check_import(model.base, allow_import)
        asked = Source(model.name, seed=seed, options=model.options, base=model.base, shape=(1, *shape))
        return Origin(open_model(asked).built, None, Path(model.name), shape)
    weights = None if model.weights in (None, RANDOM) else Path(str(model.weights))
    source = Source(model.name, seed=seed, options=model.options, shape=(1, *shape), head=model.head)
    return Origin(source, weights, None, shape)


def dense_network(origin: Origin) -> nn.Module:
    """The dense network, built anew: with the seed's random weights, in eval mode."""
    return fresh(origin.source)


def first_network(origin: Origin, data: Iterable[Any] | None = None) -> nn.Module:
    """The network that the run begins with: the folder's, or the dense one with its weights. A pooled head is fitted on
    ``data`` to what the network with its own head puts out, where there are weights and data. All processes must call
    it."""
    if origin.given is not None:
        return artifact.load(origin.given, dense_network(origin)).eval()
    if origin.weights is None:
        return with_head(own_network(origin), origin.source, check=True)
    return with_head(load_weights(own_network(origin), origin.weights), origin.source, data, check=True)


def own_network(origin: Origin) -> nn.Module:
    """The dense network with the head that it is built with, as its files of weights have it."""
    return fresh(dataclasses.replace(origin.source, head="own"))


def teacher_network(origin: Origin, teacher: Teacher) -> nn.Module:
    """The network to learn from, with its weights, in eval mode. ``check_teacher`` has been called before."""
    weights = Path(teacher.weights)
    if teacher.name is None:
        return load_weights(own_network(origin), weights)
    return fresh(Source(teacher.name, weights, options=teacher.options))


def check_teacher(teacher: Teacher, *, allow_import: bool) -> None:
    """Raises what opening the teacher would raise first: code that may not be imported, no such file."""
    if teacher.name is not None:
        _check_import(teacher.name, allow_import)
    if not Path(teacher.weights).is_file():
        raise BadArtifact(f"distil.teacher: there is no file {teacher.weights}")


def unlearned_network(origin: Origin, plan: Plan, seed: int) -> nn.Module:
    """The pruned architecture with weights that no training has touched: a dense network built anew from ``seed``, cut
    by ``plan``. Its weights are thus distributed as the dense network's own initialisation has them, at the dense
    network's fan, and the layers' norms see to the difference. Options that would load weights are left out; a function
    of the user's own is expected to load none."""
    options = {name: value for name, value in origin.source.options.items() if name not in LOADS}
    dense = fresh(dataclasses.replace(origin.source, seed=seed, options=options))
    return rebuild(dense, plan).eval()


def example_of(origin: Origin, model: nn.Module) -> tuple[Tensor, ...]:
    return example_inputs(origin.source.name, model, shape=origin.shape)


def check_fits(origin: Origin, model: nn.Module, classes: int, data: str, *, teacher: Teacher | None = None) -> None:
    """Raises BadRequest unless ``model`` runs on the data's inputs and scores all their classes. ``teacher``: it is
    that one, and not the run's own network."""
    name = origin.source.name
    if teacher is not None:
        name = f"distil.teacher: {teacher.name or name}"
    try:
        with torch.no_grad():
            scores = model(*example_of(origin, model))
    except Exception as error:
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise BadRequest(
            f"{name} cannot run on the inputs of {data}, {list(origin.shape)}: {why}\n"
            "  do: give the model its options (such as in_channels), or the data their size and channels"
        ) from error
    shape = list(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
    if not isinstance(scores, Tensor) or scores.ndim != 2:
        raise BadRequest(f"{name} returns {shape}, and a recipe trains on class scores [B, K]")
    if scores.shape[1] != classes:
        raise BadRequest(
            f"{name} scores {scores.shape[1]} classes, and {data} has {classes}\n"
            f"  do: give the model its options, such as classes: {classes} (zoo) or num_classes: {classes} (others)"
        )


def write_network(path: Path, model: nn.Module, origin: Origin) -> None:
    """Write a network to ``path``, whole or not at all: a folder as ``secateur.save`` does if it was pruned, else
    ``path.safetensors``."""
    applied = record(model)
    if applied is not None:
        artifact.save(path, model, remember_model(applied.plan, origin.source))
        return
    with written_aside(path.with_name(f"{path.name}.safetensors")) as aside:
        save_model(model, str(aside))


def read_network(path: Path, origin: Origin) -> nn.Module:
    """The network that ``write_network`` wrote, in eval mode. Raises BadArtifact where it is missing or damaged."""
    model = dense_network(origin)
    if path.is_dir():
        return artifact.load(path, model).eval()
    file = path.with_name(f"{path.name}.safetensors")
    try:
        load_model(model, str(file))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise BadArtifact(
            f"{file} is missing, damaged or of another network: {error}\n  do: begin again in another folder"
        ) from error
    return model.eval()


def _check_import(name: str, allow_import: bool) -> None:
    if not is_folder(name) and not name.startswith(LIBRARIES) and not allow_import:
        raise BadRequest(
            f"the recipe names code of its own, {name}, and code is not imported because a file says so\n"
            "  do: if you trust it, add --allow-import (allow_import=True)"
        )
