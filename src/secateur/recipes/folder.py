"""The folder of a run: what lies where, who may write, and what of it counts.

    recipe.yaml         the recipe as resolved, every default written out
    environment.json    seeds of every phase, versions, machine, command
    run.json            whose folder this is, and which phases are done
    log.txt             what was told, with the time
    metrics.jsonl       a JSON value a line, of every phase; tensorboard/ has the same where it is installed
    phases/             what one phase hands to the next, and checkpoints inside of one
    dense.safetensors   the dense network's weights
    sensitivity.json    what each group's pruning alone costs, where the recipe asks
    zeroed.json         which filters were zero after every choice, where they are chosen while the network trains
    plan.json           what was pruned
    pruned/             the network that the run ends with, as ``secateur.load`` opens it
    model.onnx, model.int8.onnx, results.json
    report.html         the page, and report.json, which it can be made from again, or with those of other runs

A phase is done when ``run.json`` says so, which is written after all that the phase leaves behind is whole on the disk.
Everything is written aside and renamed. One process at a time owns a folder; the kernel takes the lock back when that
process ends, however it does.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from secateur import files
from secateur.errors import BadArtifact
from secateur.recipes.schema import Recipe, as_values, first_difference
from secateur.version import __version__

LOCK, STATE, RECIPE, ENVIRONMENT = "lock", "run.json", "recipe.yaml", "environment.json"
LOG, METRICS, PHASES = "log.txt", "metrics.jsonl", "phases"
FORMAT = 1
LARGEST_STATE = 16 * 2**20
_LEFT_ASIDE = re.compile(r"\.(?P<target>.+)\.[0-9a-f]{8}\.(partial|old|part)")
_held: set[int] = set()


@dataclass(frozen=True)
class RunFolder:
    """The paths of a run. ``smoke``: everything cut short; such a folder never passes for a real one."""

    path: Path
    smoke: bool

    @property
    def phases(self) -> Path:
        return self.path / PHASES

    def checkpoints(self, phase: str) -> Path:
        return self.phases / f"{phase}.checkpoint"


@contextlib.contextmanager
def locked(folder: RunFolder, recipe: Recipe) -> Iterator[None]:
    """Owns the folder, making it if need be, while the block runs.

    Raises BadArtifact, with the folder as it was, if another process owns it, it holds other things than a run, or the
    run of another recipe or version, or it cannot be written.
    """
    path = folder.path
    own_state(folder, recipe)
    try:
        path.mkdir(parents=True, exist_ok=True)
        handle = os.open(path / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise cannot_write(path, error) from error
    try:
        _take(handle, path)
        _held.add(handle)
        own_state(folder, recipe)  # once more: somebody may have been here before the lock was ours
        _sweep(path)
        _sweep(folder.phases)
        yield
    finally:
        _held.discard(handle)
        os.close(handle)


def _take(handle: int, path: Path) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        who = os.pread(handle, 100, 0).decode("ascii", "replace").strip()
        raise BadArtifact(
            f"another run is writing to {path}{f' (process {who})' if who else ''}\n"
            "  do: wait for it, stop it, or choose another folder with -o"
        ) from None
    except OSError as error:
        raise BadArtifact(
            f"{path} cannot be locked: {error.strerror}\n  do: choose a folder on another disk"
        ) from error
    os.ftruncate(handle, 0)
    os.pwrite(handle, f"{os.getpid()}\n".encode(), 0)


def _let_go() -> None:
    """In a forked child (a data loader's worker): only the run itself holds the lock, not what outlives it."""
    for handle in _held:
        os.close(handle)
    _held.clear()


os.register_at_fork(after_in_child=_let_go)


def own_state(folder: RunFolder, recipe: Recipe) -> dict[str, Any] | None:
    """What ``run.json`` says, if this is a folder of ours and of this recipe; None for one that is not there yet, or
    empty. Raises BadArtifact otherwise; nothing is written."""
    path = folder.path
    state = read_state(folder)
    if state is None:
        try:
            found = sorted(path.iterdir()) if path.exists() else []
        except OSError as error:
            raise BadArtifact(f"{path} cannot be read: {error.strerror}\n  do: choose another with -o") from error
        names = [each.name for each in found if not _ours_before_state(each)]
        if names:
            raise BadArtifact(
                f"{path} holds other things ({names[0]}) and is no run of secateur's: nothing in it was touched\n"
                "  do: choose another folder with -o"
            )
        return None
    if state.get("format") != FORMAT or state.get("secateur") != __version__:
        raise BadArtifact(
            f"{path} was begun by secateur {state.get('secateur')}, and this is {__version__}: going on could give "
            "other weights\n  do: finish it with that version, or choose another folder with -o"
        )
    if state.get("smoke") != folder.smoke:
        kinds = ("a smoke run", "a run in full")
        was, asked = kinds if state.get("smoke") else kinds[::-1]
        raise BadArtifact(f"{path} holds {was}, and this is {asked}\n  do: choose another folder with -o")
    key = first_difference(state.get("recipe"), as_values(recipe))
    if key is not None:
        raise BadArtifact(
            f"{path} holds the run of another recipe: {key} was {_value(state.get('recipe'), key)}, and is "
            f"{_value(as_values(recipe), key)} now\n"
            "  do: choose another folder with -o, or undo the change to go on"
        )
    return state


def _ours_before_state(path: Path) -> bool:
    """Whether a run that was killed before it wrote its first word could have left this."""
    return path.name == LOCK or _LEFT_ASIDE.fullmatch(path.name) is not None


def read_state(folder: RunFolder) -> dict[str, Any] | None:
    """What ``run.json`` says; None where there is none. Raises BadArtifact if it is damaged."""
    path = folder.path / STATE
    if folder.path.exists() and not folder.path.is_dir():
        raise BadArtifact(f"{folder.path} is a file, and a run needs a folder\n  do: choose another with -o")
    try:
        if path.stat().st_size > LARGEST_STATE:
            raise ValueError("it is huge")
        state = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(state, dict) or not isinstance(state.get("done", []), list):
            raise ValueError("it is no such file")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise BadArtifact(f"{path} cannot be read: {error.strerror}\n  do: choose another folder with -o") from error
    except ValueError as error:
        raise BadArtifact(f"{path} is damaged: {error}\n  do: choose another folder with -o") from None
    return state


def begin(folder: RunFolder, recipe: Recipe) -> None:
    """Make the folder this recipe's, before anything else is written into it."""
    write_json(
        folder.path / STATE,
        {
            "format": FORMAT,
            "secateur": __version__,
            "smoke": folder.smoke,
            "recipe": as_values(recipe),
            "done": [],
        },
    )
    try:
        folder.phases.mkdir(exist_ok=True)
    except OSError as error:
        raise cannot_write(folder.phases, error) from error


def done_phases(folder: RunFolder) -> dict[str, Any]:
    """The phases that are done, in order, and the facts that each left."""
    state = read_state(folder)
    return {entry["phase"]: entry["facts"] for entry in state["done"]} if state else {}


def mark_done(folder: RunFolder, phase: str, facts: Mapping[str, Any], seconds: float) -> None:
    """From now on the phase counts; its checkpoints are no longer needed."""
    state = read_state(folder) or {}
    entry = {"phase": phase, "seconds": round(seconds, 3), "facts": dict(facts)}
    write_json(folder.path / STATE, {**state, "done": [*state.get("done", []), entry]})
    shutil.rmtree(folder.checkpoints(phase), ignore_errors=True)


def finish(folder: RunFolder) -> None:
    """All phases are done: the folder only tells from now on."""
    write_json(folder.path / STATE, {**(read_state(folder) or {}), "finished": True})


def add_session(folder: RunFolder, *, seeds: Mapping[str, int], session: Mapping[str, Any]) -> None:
    """Note in environment.json with what, where and how the run was begun or gone on with."""
    path = folder.path / ENVIRONMENT
    try:
        before = json.loads(path.read_text(encoding="utf-8"))["sessions"]
    except (OSError, ValueError, KeyError, TypeError):
        before = []
    write_json(path, {"secateur": __version__, "seeds": dict(seeds), "sessions": [*before, dict(session)]})


def write_json(path: Path, value: Any) -> None:
    write_whole(path, (json.dumps(value, indent=1, allow_nan=False) + "\n").encode())


def write_whole(path: Path, content: bytes) -> None:
    """Written aside, flushed to the disk, then renamed: the file is there whole, or as it was before.

    Raises BadArtifact where it cannot be written.
    """
    with written_aside(path) as aside:
        aside.write_bytes(content)


@contextlib.contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """``files.written_aside`` in the folder of a run. Raises BadArtifact where the file cannot be written."""
    try:
        with files.written_aside(path) as aside:
            yield aside
    except OSError as error:
        raise cannot_write(path, error) from error


def append_line(path: Path, line: str) -> None:
    """Add a line to a text file in one write. Raises BadArtifact where it cannot be written."""
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(line + "\n")
    except OSError as error:
        raise cannot_write(path, error) from error


def cannot_write(path: Path, error: OSError) -> BadArtifact:
    return BadArtifact(
        f"{path} cannot be written: {error.strerror or error}\n"
        "  do: make room or mend the folder, then give the same command again: it goes on from what is whole there"
    )


def log(folder: RunFolder, text: str) -> None:
    """A line of log.txt, with the time."""
    append_line(folder.path / LOG, f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {text}")


def _sweep(path: Path) -> None:
    """Remove what a killed run left half-written aside. Only names that we give are touched."""
    if not path.is_dir():
        return
    for each in path.iterdir():
        if _LEFT_ASIDE.fullmatch(each.name):
            with contextlib.suppress(OSError):
                shutil.rmtree(each) if each.is_dir() else each.unlink()


def _value(values: Any, key: str) -> str:
    for part in key.split("."):
        values = values.get(part) if isinstance(values, Mapping) else None
    text = json.dumps(values)
    return text if len(text) < 60 else f"{text[:57]}..."
