"""What a run measures on its way: a JSON value a line in ``metrics.jsonl``, and the same for TensorBoard.

Every record has its ``phase`` and most a ``step`` of it. A phase that goes on from a checkpoint says again what came
after it: those lines are dropped first, so that an interrupted run's file reads like that of one that never was.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

from secateur.recipes.folder import METRICS, RunFolder, append_line, write_whole

Record = Callable[[str, Mapping[str, Any]], None]
"""Keeps one record of a phase."""


def read_metrics(folder: RunFolder) -> list[dict[str, Any]]:
    """The records of a run; a line that a killed run left half-written at the end is passed over."""
    try:
        text = (folder.path / METRICS).read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return []
    found = []
    for line in text.splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            found.append(record)
    return found


def keep_metrics(folder: RunFolder, done: Mapping[str, Any], phase: str = "", step: int = 0) -> None:
    """Drop all records but those of phases that are done, and of ``phase`` up to ``step``."""

    def stays(record: Mapping[str, Any]) -> bool:
        if record.get("phase") in done:
            return True
        return record.get("phase") == phase and isinstance(record.get("step"), int) and record["step"] <= step

    path = folder.path / METRICS
    if path.exists():
        kept = [json.dumps(record) for record in read_metrics(folder) if stays(record)]
        write_whole(path, "".join(f"{line}\n" for line in kept).encode())


def recorder(folder: RunFolder) -> tuple[Record, Callable[[], None]]:
    """A function that keeps a record, and one that closes what it has open."""
    boards = _Boards(folder)

    def record(phase: str, values: Mapping[str, Any]) -> None:
        plain = {"phase": phase, **{name: _plain(value) for name, value in values.items()}}
        append_line(folder.path / METRICS, json.dumps(plain))
        boards.add(phase, plain)

    return record, boards.close


def _plain(value: Any) -> Any:
    """JSON has no infinity and no NaN."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


class _Boards:
    """TensorBoard's files, a folder for each phase; nothing where TensorBoard is not installed."""

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder
        self.writers: dict[str, Any] = {}

    def add(self, phase: str, values: Mapping[str, Any]) -> None:
        step = values.get("step")
        if not isinstance(step, int):
            return
        writer = self.writers[phase] if phase in self.writers else self.open(phase, step)
        numbers = {name: value for name, value in values.items() if type(value) in (int, float) and name != "step"}
        for name, value in numbers.items() if writer is not None else ():
            writer.add_scalar(name, value, step)

    def open(self, phase: str, step: int) -> Any:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            writer: Any = None
        else:
            # purge_step: of an earlier, interrupted attempt, what lies beyond it is forgotten
            path = self.folder.path / "tensorboard" / phase
            writer = SummaryWriter(str(path), purge_step=step, flush_secs=10)
        self.writers[phase] = writer
        return writer

    def close(self) -> None:
        for writer in self.writers.values():
            if writer is not None:
                writer.close()
        self.writers.clear()
