"""Checkpoints of a training run, whole or not there at all: kill -9 at any moment leaves a good one.

A checkpoint is a folder ``step-000123`` (``step-000123-epoch`` at an epoch's end) of two files, without pickles:
``tensors.safetensors`` and ``state.json``. It is written aside, flushed to the disk and renamed; then the older ones
are deleted. The newest that is there counts.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from secateur.errors import BadArtifact, BadRequest, WrongModel
from secateur.processes import from_main, gathered, is_main, rank, wait_for_all, world
from secateur.recover.randomness import Randomness
from secateur.recover.state import Epoch, Job, State, all_randomness, set_all_randomness, set_tensors_, tensors_of
from secateur.version import __version__

FORMAT = 1
TENSORS_FILE = "tensors.safetensors"
STATE_FILE = "state.json"
NAME = re.compile(r"step-(\d{6,})(-epoch)?")


def write_checkpoint(job: Job) -> None:
    """Write where ``job`` stands to its folder, in place of the last. All processes must call it; the main one writes.

    Raises BadArtifact where that is not possible; the last checkpoint is then still there.
    """
    if job.run.folder is None:
        return
    folder = Path(job.run.folder)
    chances = gathered({"now": all_randomness(job), "begun": job.state.begun})
    if is_main():
        tensors, facts = _pack(job, chances)
        name = f"step-{job.state.step:06d}" + ("" if job.state.batch else "-epoch")
        with _renamed(folder, name) as aside:
            save_file(tensors, aside / TENSORS_FILE)
            (aside / STATE_FILE).write_text(json.dumps(facts), encoding="utf-8")
        _delete(path for path in _checkpoints(folder) if path.name != name)
    wait_for_all()


def resume_(job: Job) -> bool:
    """Put ``job`` where the newest checkpoint in its folder stands; False where there is none.

    Raises WrongModel for one of another network, BadRequest for one of other settings, data or processes, and
    BadArtifact for one of another version or a damaged one; nothing has changed then.
    """
    assert job.run.folder is not None
    folder = Path(job.run.folder)
    if is_main():
        _tidy(folder)
    wait_for_all()
    newest = from_main([path.name for path in _checkpoints(folder)])
    if not newest:
        return False
    path = folder / newest[0]
    tensors, facts = _read(path)
    _check_same(job, path, tensors, facts)
    _unpack_(job, tensors, facts)
    if is_main():
        _delete(_checkpoints(folder)[1:])  # a run that was killed before it did this may have been at its last step
    return True


def _pack(job: Job, chances: list[dict[str, Randomness | None]]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    state = job.state
    tensors: dict[str, Tensor] = {}
    facts: dict[str, Any] = {
        "identity": _identity(job),
        "step": state.step,
        "epoch": state.epoch,
        "batch": state.batch,
        "sums": state.sums,
        "history": [asdict(epoch) for epoch in state.history],
        "best_score": state.best_score,
        "scaler": None if job.accelerator.scaler is None else job.accelerator.scaler.state_dict(),
    }
    tensors |= _named("model", tensors_of(job.model))
    if job.average is not None:
        tensors |= _named("average", tensors_of(job.average))
    if state.best is not None:
        tensors |= _named("best", state.best)
    facts["plain"] = {}
    nested = {"optimizer": job.optimizer.state_dict()["state"]}
    nested["hooks"] = {i: dict(hook.state()) for i, hook in enumerate(job.hooks) if hook.state is not None}
    nested["random"] = dict(enumerate(chances))
    for path, value in _leaves(nested):
        if isinstance(value, Tensor):
            tensors["/".join(path)] = value
        else:
            facts["plain"]["/".join(path)] = value
    # clones: tensors may share a storage, which the format does not allow
    return {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}, facts


def _unpack_(job: Job, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    set_tensors_(job.model, _under("model", tensors))
    if job.average is not None:
        set_tensors_(job.average, _under("average", tensors))
    flat = {**tensors, **facts["plain"]}
    groups = job.optimizer.state_dict()["param_groups"]
    kept = {int(index): values for index, values in _nest(_under("optimizer", flat), 2).items()}
    job.optimizer.load_state_dict({"state": kept, "param_groups": groups})
    if job.accelerator.scaler is not None:
        job.accelerator.scaler.load_state_dict(facts["scaler"])
    for index, hook in enumerate(job.hooks):
        if hook.restore is not None and hook.state is not None:
            hook.restore(_under(f"hooks/{index}", flat))
    best = {name: tensor.to(job.device) for name, tensor in _under("best", tensors).items()}
    mine = _nest(_under(f"random/{rank()}", flat), 3)
    for chance in mine.values():
        if chance is not None:
            chance.setdefault("own", {})
    set_all_randomness(job, mine["now"])
    job.state = State(
        step=facts["step"],
        epoch=facts["epoch"],
        batch=facts["batch"],
        sums=facts["sums"],
        history=[Epoch(**epoch) for epoch in facts["history"]],
        best_score=facts["best_score"],
        best=best or None,
        begun=mine["begun"],
    )


def _identity(job: Job) -> dict[str, Any]:
    """What must be the same for a checkpoint to be gone on from, in the order in which differences are named."""
    settings = {f"training.{name}": value for name, value in asdict(job.training).items()}
    settings["training.milestones"] = list(job.training.milestones)
    return {
        "format": FORMAT,
        "secateur": __version__,
        "processes": world(),
        "device": job.device.type,
        "batches in an epoch": job.batches,
        **settings,
        "hooks with a state": [i for i, hook in enumerate(job.hooks) if hook.state is not None],
    }


def _check_same(job: Job, path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    there = facts["identity"]
    do = "\n  do: train into another folder, or go on as it was begun"
    for name, here in _identity(job).items():
        if there.get(name) != here:
            kind = BadArtifact if name in ("format", "secateur") else BadRequest
            raise kind(f"{path} is a checkpoint of another run: {name} was {there.get(name)!r}, and is {here!r}{do}")
    saved = _under("model", tensors)
    for name, tensor in tensors_of(job.model).items():
        if name not in saved:
            raise WrongModel(f"{path} is a checkpoint of another model: it has no tensor {name!r}{do}")
        found = saved[name]
        if (found.shape, found.dtype) != (tensor.shape, tensor.dtype):
            raise WrongModel(
                f"{path} is a checkpoint of another model: tensor {name!r} was {list(found.shape)} {found.dtype}, "
                f"and is {list(tensor.shape)} {tensor.dtype}{do}"
            )
    for name in saved:
        if name not in tensors_of(job.model):
            raise WrongModel(f"{path} is a checkpoint of another model: tensor {name!r} is not in this one{do}")


# ------------------------------------------------------------------------------------------------------- the folder


def _checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in ``folder``, the newest first."""
    found = []
    for path in folder.iterdir() if folder.is_dir() else ():
        if match := NAME.fullmatch(path.name):
            found.append((int(match[1]), bool(match[2]), path))
    return [path for _, _, path in sorted(found, reverse=True)]


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        facts = json.loads((path / STATE_FILE).read_text(encoding="utf-8"))
        return load_file(path / TENSORS_FILE), facts
    except (OSError, ValueError, SafetensorError) as error:
        raise BadArtifact(
            f"the checkpoint {path} is damaged: {error}\n  do: delete it; training then goes on from an older one, or "
            "starts anew"
        ) from error


@contextmanager
def _renamed(folder: Path, name: str) -> Iterator[Path]:
    """A new folder that gets its name when the block ended well and all of it is on the disk."""
    aside = folder / f".{name}.partial"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        yield aside
        for path in (*aside.iterdir(), aside):
            _flush(path)
        aside.rename(folder / name)
        _flush(folder)
    except BaseException as error:
        shutil.rmtree(aside, ignore_errors=True)
        if isinstance(error, (OSError, SafetensorError)):
            reason = getattr(error, "strerror", None) or error
            raise BadArtifact(
                f"no checkpoint can be written to {folder}: {reason}\n"
                "  do: free some space or choose another folder; the last checkpoint, if any, is still there"
            ) from error
        raise


def _delete(paths: Iterable[Path]) -> None:
    """Out of sight first, so that what is half deleted is never taken for a checkpoint."""
    for path in paths:
        hidden = path.with_name(f".{path.name}.old")
        shutil.rmtree(hidden, ignore_errors=True)
        path.rename(hidden)
        shutil.rmtree(hidden, ignore_errors=True)


def _tidy(folder: Path) -> None:
    """Remove what a run that was killed left behind."""
    if folder.exists() and not folder.is_dir():
        raise BadArtifact(f"{folder} is a file: checkpoints need a folder\n  do: choose another")
    for path in folder.glob(".step-*"):
        if NAME.fullmatch(path.stem.removeprefix(".")) and path.suffix in (".partial", ".old"):
            shutil.rmtree(path, ignore_errors=True)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# ---------------------------------------------------------------------------------------------- nests and flat names


def _named(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}/{name}": tensor for name, tensor in tensors.items()}


def _under(prefix: str, tensors: Mapping[str, Any]) -> dict[str, Any]:
    start = f"{prefix}/"
    return {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}


def _leaves(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from _leaves(inner, (*path, str(key)))
    elif not isinstance(value, Mapping):
        yield path, value


def _nest(flat: Mapping[str, Any], depth: int) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for name, value in flat.items():
        *above, last = name.split("/", depth - 1)
        place = nested
        for key in above:
            place = place.setdefault(key, {})
        place[last] = value
    return nested
