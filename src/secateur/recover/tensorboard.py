"""What training logs, as curves for TensorBoard."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from secateur.errors import MissingExtra
from secateur.recover.state import Log


def tensorboard_log(folder: str | os.PathLike[str], *, prefix: str = "") -> Log:
    """A ``log`` for ``Run`` that writes every number of a record to ``folder`` at its step, under ``prefix``.

    Training that goes on from a checkpoint takes back what was written after it. Raises MissingExtra.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise MissingExtra("TensorBoard's files need tensorboard\n  do: pip install 'secateur[train]'") from error
    writers: list[Any] = []

    def log(record: Mapping[str, Any]) -> None:
        step = int(record["step"])
        if record["kind"] == "resumed" or not writers:
            writers[:] = [SummaryWriter(str(folder), purge_step=step + 1 if record["kind"] == "resumed" else None)]
        for name, value in record.items():
            if name not in ("kind", "step") and isinstance(value, (int, float)):
                writers[0].add_scalar(f"{prefix}{record['kind']}/{name}", value, step)
        writers[0].flush()

    return log
