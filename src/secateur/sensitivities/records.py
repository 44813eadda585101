"""The file that a sweep goes on from: whole or not there at all, whoever kills it when.

The file is the sensitivity itself, with the cells that are still missing as ``null``. Where several processes work on
one sweep, each writes what it finds to a file of its own beside it, ``NAME.process-3``; the main one puts them together
when they begin and when they have ended, so that any number of processes may go on with what any number have begun.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from math import isclose, isnan, nan
from pathlib import Path

from secateur.errors import BadArtifact, SecateurError, WrongModel
from secateur.files import written_aside
from secateur.plans import compare_shapes
from secateur.processes import from_main, is_main, rank, wait_for_all, world
from secateur.sensitivities.curve_schema import decode, encode
from secateur.sensitivities.curves import Sensitivity

Cell = tuple[str, str, int]
"""Group, ``"scores"`` or ``"retrained"``, and the number of the ratio; ``("", "dense", 0)``."""
DENSE: Cell = ("", "dense", 0)
ROOM = 1e-6
"""How far scores of the dense network may lie apart, relatively: processes may sum up differently."""
ANEW = "  do: choose another file, or delete this one to start anew"
_DIGESTS = {
    "weights": "is of the same network with other weights",
    "kept": "was made with other channels kept: the criterion, or what it was shown, has changed",
}


def cells_of(found: Sensitivity) -> dict[Cell, float]:
    """Every cell, NaN where it has not been evaluated."""
    cells = {DENSE: found.dense}
    for curve in found.curves:
        cells |= {(curve.group, "scores", i): score for i, score in enumerate(curve.scores)}
        cells |= {(curve.group, "retrained", i): score for i, score in enumerate(curve.retrained)}
    return cells


def filled(draft: Sensitivity, cells: Mapping[Cell, float]) -> Sensitivity:
    """``draft`` with these cells; those that are not there are NaN."""

    def row(group: str, kind: str, count: int) -> tuple[float, ...]:
        return tuple(cells.get((group, kind, i), nan) for i in range(count))

    curves = tuple(
        replace(
            curve,
            scores=row(curve.group, "scores", len(curve.scores)),
            retrained=row(curve.group, "retrained", len(curve.retrained)),
        )
        for curve in draft.curves
    )
    return replace(draft, dense=cells.get(DENSE, nan), curves=curves)


def write(path: Path, found: Sensitivity) -> None:
    """Write aside, then rename. Raises ``BadArtifact`` where that is not possible; an earlier file stays as it was."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_aside(path) as aside:
            aside.write_text(encode(found), encoding="utf-8")
    except OSError as error:
        raise BadArtifact(
            f"{path} cannot be written: {error.strerror or error}\n"
            "  do: free some space or choose another file; what was there before is still there"
        ) from error


def own_file(path: Path) -> Path:
    """Where this process writes what it finds: ``path`` itself if it is alone."""
    return path if world() == 1 else path.with_name(f"{path.name}.process-{rank()}")


def earlier(path: Path, draft: Sensitivity) -> dict[Cell, float]:
    """The cells that earlier runs of the same sweep have left in ``path`` and beside it; none where there is nothing.

    Collective. What lay beside it is put into ``path``. Raises ``BadArtifact`` for a file that is none, or is of
    another model, of other weights or other settings, and changes nothing then.
    """
    told: tuple[dict[Cell, float], SecateurError | None] = ({}, None)
    if is_main():
        try:
            told = (_put_together(path, draft), None)
        except SecateurError as error:
            told = ({}, error)
    cells, failed = from_main(told)
    wait_for_all()
    if failed is not None:
        raise failed
    return cells


def finish(path: Path, found: Sensitivity) -> Sensitivity:
    """Write the whole result to ``path`` and delete what lies beside it. Collective; the main process writes."""
    failed: SecateurError | None = None
    if is_main():
        try:
            write(path, found)
            _delete_parts(path)
        except SecateurError as error:
            failed = error
    failed = from_main(failed)
    if failed is not None:
        raise failed
    return found


def _put_together(path: Path, draft: Sensitivity) -> dict[Cell, float]:
    cells: dict[Cell, float] = {}
    parts = list(_parts(path))
    for file in (*([path] if path.exists() else []), *parts):
        found = _read(file)
        _check_same(file, draft, found)
        if DENSE in cells and not isnan(found.dense):
            check_dense(file, found.dense, cells[DENSE])
        cells |= {cell: score for cell, score in cells_of(found).items() if not isnan(score)}
    if parts:
        write(path, filled(draft, cells))
        _delete_parts(path)
    return cells


def _parts(path: Path) -> Iterator[Path]:
    pattern = re.compile(re.escape(path.name) + r"\.process-\d+")
    if path.parent.is_dir():
        yield from sorted(file for file in path.parent.iterdir() if pattern.fullmatch(file.name))


def _delete_parts(path: Path) -> None:
    for file in _parts(path):
        file.unlink(missing_ok=True)


def _read(path: Path) -> Sensitivity:
    try:
        return decode(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError:
        raise BadArtifact(f"{path}: it is not text, and no sensitivity\n  do: choose another file") from None
    except OSError as error:
        raise BadArtifact(f"{path} cannot be read: {error.strerror or error}") from error
    except BadArtifact as error:
        raise BadArtifact(f"{path}: {error}\n  do: choose another file, or delete this one to start anew") from None


def check_dense(path: Path | None, known: float, found: float) -> None:
    """Raises ``BadArtifact`` if the dense network no longer scores what is on record."""
    if not isclose(known, found, rel_tol=ROOM, abs_tol=ROOM * ROOM):
        raise BadArtifact(
            f"{path} was made with an evaluate that gives the dense network {known!r}, and now it gets {found!r}\n"
            f"  its data, or how it computes a score, have changed; curves of both would not fit together\n{ANEW}"
        )


def _check_same(path: Path, draft: Sensitivity, found: Sensitivity) -> None:
    """Raises ``BadArtifact`` unless ``found`` is a part of the sweep that ``draft`` begins."""
    try:
        compare_shapes(found.model, draft.model, ("its network", "this model"))
    except WrongModel as error:
        raise BadArtifact(f"{path} is the sensitivity of another model: {error}\n{ANEW}") from None
    difference = _difference(_settings(draft), _settings(found))
    if difference is not None:
        raise BadArtifact(f"{path} {_DIGESTS.get(difference[0], difference[1])}\n{ANEW}")
    for mine, other in zip(draft.curves, found.curves, strict=True):
        if mine.keep != other.keep or len(mine.retrained) != len(other.retrained):
            raise BadArtifact(f"{path} was made with other widths of group {mine.group!r}\n{ANEW}")


def _difference(ours: Mapping[str, object], theirs: Mapping[str, object], where: str = "") -> tuple[str, str] | None:
    """The name of the first setting that differs, and what to say of it; None if they are the same."""
    for name in dict.fromkeys((*ours, *theirs)):
        here, there = ours.get(name), theirs.get(name)
        if here == there and (name in ours) == (name in theirs):
            continue
        full = f"{where}{name}"
        if isinstance(here, Mapping) and isinstance(there, Mapping):
            return _difference(here, there, f"{full}.")
        was = f"with {full}={there!r}" if name in theirs else f"without {full}"
        now = f"it is {here!r}" if name in ours else "there is none"
        return full, f"was made {was}, and now {now}"
    return None


def _settings(found: Sensitivity) -> dict[str, object]:
    """What must be the same for two runs to be parts of one sweep, digests last: a name says more. The version of the
    library need not be."""
    settings: dict[str, object] = {"criterion": found.criterion, "ratios": list(found.ratios), **found.made_by}
    settings.pop("secateur", None)
    settings["groups"] = [curve.group for curve in found.curves]
    return settings | {name: settings.pop(name) for name in _DIGESTS if name in settings}
