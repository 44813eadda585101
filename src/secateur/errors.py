"""Every error that secateur raises on purpose.

    SecateurError
    ├── CannotCapture      the model or its example inputs could not be turned into a graph
    ├── CannotPrune        the request touches something locked, unknown or not understood
    │   └── LawBroken      the pruned network differs from the masked dense one: nothing is returned
    ├── BadRequest         an argument is out of range, misspelt or contradictory
    │   └── Unreachable    a budget that no choice of channels can meet; says what can be reached
    ├── BadPlan            a plan is malformed, hand-edited or hostile
    ├── WrongModel         a plan or file belongs to another network; names the first tensor that differs
    ├── WrongOutput        an engine computes something else than torch: nothing is timed
    ├── BadArtifact        a saved folder is missing, truncated or cannot be written
    ├── BadData            images or labels are damaged; names the file
    │   └── MissingData    a data set is not there; says where it was looked for and how to get it
    └── MissingExtra       an optional package is needed; says how to install it

``SecateurWarning`` is for what is lost without being wrong.

Each message says what happened, where, why, and what to do about it.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class SecateurError(Exception):
    """The root of all errors of this library: catch this one to catch them all."""


class SecateurWarning(UserWarning):
    """Something of the user's could not be carried over; the text says what."""


class CannotCapture(SecateurError):
    """The model could not be traced to a graph."""


class CannotPrune(SecateurError):
    """What was asked for is locked or not understood."""


class LawBroken(CannotPrune):
    """``apply(model, plan)`` and ``masked(model, plan)`` disagree; no network is handed out."""


class BadRequest(SecateurError, ValueError):
    """An argument is out of range, misspelt or contradicts another."""


class Unreachable(BadRequest):
    """A budget that no choice of channels can meet."""


class BadPlan(SecateurError, ValueError):
    """A plan that is malformed, hand-edited or hostile."""


class WrongModel(SecateurError):
    """A plan or a file of weights that belongs to another network."""


class WrongOutput(SecateurError):
    """An engine's outputs are not torch's; nothing that it runs is timed."""


class BadArtifact(SecateurError):
    """A saved folder that is missing, damaged or cannot be written."""


class BadData(SecateurError):
    """Images or labels that are damaged or contradict each other."""


class MissingData(BadData):
    """A data set that is not there, or only a part of it."""


class MissingExtra(SecateurError, ImportError):
    """An optional dependency is not installed."""


def nearest(name: str, known: Iterable[str]) -> str:
    """``"; did you mean 'x'?"`` for the closest known name, else the start of the list of known ones."""
    names = list(known)
    close = get_close_matches(name, names, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {close[0]!r}?"
    if not names:
        return "; there are none"
    shown = ", ".join(repr(n) for n in names[:8])
    return f"; known: {shown}" + (f" and {len(names) - 8} more" if len(names) > 8 else "")
