"""Ctrl-C that ends cleanly: the first asks, the second insists."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType


@dataclass
class Interruption:
    """``asked``: somebody wants it to end after this step."""

    asked: bool = False


@contextmanager
def interruptible() -> Iterator[Interruption]:
    """Within the block the first SIGINT or SIGTERM is only noted; the second raises KeyboardInterrupt at once.

    Signals can be handled in the main thread only; in others nothing is changed. Handlers are put back.
    """
    noted = Interruption()
    if threading.current_thread() is not threading.main_thread():
        yield noted
        return

    def note(number: int, frame: FrameType | None) -> None:
        if noted.asked:
            raise KeyboardInterrupt
        noted.asked = True

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        for number in before:
            signal.signal(number, note)
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
