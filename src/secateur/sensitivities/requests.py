"""What a sweep is asked for, checked before anything is measured, and what ``evaluate`` answers."""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import pairwise
from numbers import Real
from pathlib import Path
from typing import Any

import torch

from secateur.core import Criterion, Evaluate
from secateur.criteria import check_given, label, needs_width
from secateur.errors import BadPlan, BadRequest, nearest
from secateur.measurement import accuracy
from secateur.plan_checks import plain
from secateur.residuals import RULES
from secateur.statistics import check_repeatable


def checked_ratios(ratios: object) -> tuple[float, ...]:
    if isinstance(ratios, (str, bytes)) or not isinstance(ratios, Iterable):
        raise BadRequest(f"ratios: a list of fractions is needed, such as (0.1, 0.5, 0.9), not {ratios!r}")
    values = tuple(ratios)
    if not values:
        raise BadRequest("ratios is empty\n  do: give the fractions to remove, such as (0.1, 0.5, 0.9)")
    for value in values:
        if isinstance(value, bool) or not isinstance(value, Real) or not 0 < _as_float(value) < 1:
            raise BadRequest(
                f"ratios: {value!r} is not a ratio between 0 and 1\n"
                "  a ratio is the fraction removed: 0.1 keeps nine tenths, 0.9 keeps a tenth"
            )
    if any(a >= b for a, b in pairwise(values)):
        raise BadRequest(f"ratios: {list(values)} do not rise\n  do: sort them, each once")
    return tuple(map(float, values))


def checked_names(what: str, value: object) -> tuple[str, ...]:
    """One name or glob, or several of them. Raises ``BadRequest`` for anything else."""
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, Iterable):
        raise BadRequest(
            f"{what}={value!r} is neither a group's name or a glob over group names, nor a list of them\n"
            f"  do: leave {what} out, or write {what}=['layer1.*']"
        )
    names = tuple(value)
    for name in names:
        if not isinstance(name, str):
            raise BadRequest(f"{what}: {name!r} is not a group's name or a glob over group names")
    return names


def checked_path(path: object) -> Path | None:
    """Raises ``BadRequest`` for what names no file."""
    if path is None:
        return None
    try:
        return Path(path).expanduser()  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError) as error:
        raise BadRequest(
            f"path={path!r} does not name a file: {error}\n  do: give a name such as 'curves.json'"
        ) from None


def checked_note(note: object) -> dict[str, Any]:
    """A copy as JSON has it. Raises ``BadRequest`` for what JSON cannot hold."""
    try:
        return plain("note", note)
    except BadPlan as error:
        raise BadRequest(
            f"{error}\n  do: give a mapping of names to numbers, texts, lists and mappings, such as {{'images': 'val'}}"
        ) from None


def check_request(
    criterion: str | Criterion, data: object, residual: str, max_bytes: object, seed: object, **functions: object
) -> None:
    """Raises ``BadRequest`` for what no sweep can be made of. ``functions``: arguments that are functions or None."""
    if needs_width(criterion):
        raise BadRequest(
            f"criterion {label(criterion)!r} chooses other channels for every width, and an analysis ranks them once\n"
            "  do: analyse with one that does not, such as 'fpgm'; a plan may take the analysis with any criterion"
        )
    if residual == "scatter":
        raise BadRequest(
            "residual='scatter' is nothing that an analysis tries out: its networks are cut as they are coupled\n"
            "  do: analyse with residual='inner', whose groups a plan with 'scatter' has, too"
        )
    if residual not in RULES:
        raise BadRequest(f"residual={residual!r} is not known{nearest(str(residual), RULES)}")
    if isinstance(max_bytes, bool) or not isinstance(max_bytes, int) or max_bytes < 0:
        raise BadRequest(f"max_bytes={max_bytes!r} is not a number of bytes, 0 or more")
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise BadRequest(f"seed={repr(seed)[:40]} is not a whole number, 0 or more and below 2**63")
    for name, function in functions.items():
        if function is not None and not callable(function):
            raise BadRequest(f"{name}={function!r} cannot be called\n  do: give a function, or leave {name} out")
    check_given(criterion, data, functions.get("loss"))


def as_function(evaluate: Evaluate | Iterable[Any] | None) -> Evaluate:
    if evaluate is None:
        raise BadRequest(
            "nothing says how well a network does\n"
            "  do: give evaluate, a function from a network to a number, or batches (inputs, targets)"
        )
    if callable(evaluate):
        return evaluate
    check_repeatable(evaluate, "a sensitivity analysis")
    batches: Iterable[Any] = evaluate
    return lambda network: accuracy(network, batches)


def checked_score(value: object, where: str) -> float:
    """``value``, if it is a finite number."""
    if isinstance(value, torch.Tensor):
        what, do = f"a tensor of shape {list(value.shape)}", "return a plain number, such as float(value)"
    elif isinstance(value, bool) or not isinstance(value, Real):
        what, do = repr(value)[:60], "return a number that is higher for a better network, such as its accuracy"
    elif not math.isfinite(number := _as_float(value)):
        what, do = f"{number}", "return a finite number; a network that computes NaN can be given the worst score"
    else:
        return number
    raise BadRequest(f"evaluate returned {what} for {where}, not a number\n  do: {do}")


def _as_float(value: Real) -> float:
    """``value``, infinite if it is too large for a float."""
    try:
        return float(value)
    except OverflowError:
        return math.copysign(math.inf, 1 if abs(value) == value else -1)
