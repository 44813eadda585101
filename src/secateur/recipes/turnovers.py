"""Which filters were zero while a recipe's network trained: ``zeroed.json`` in the run's folder.

    {"channels": {group: how many it has}, "choices": [{"epoch": 0, "entered": {group: [...]}, "left": {group: [...]}}]}

A choice is told by what it changed about the one before it: hard zeroing's file is short however long it trained.
"""

from __future__ import annotations

import json

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from secateur.core import Turnover
from secateur.errors import BadArtifact
from secateur.recipes.folder import RunFolder, write_whole
from secateur.recipes.job import Facts
from secateur.report import Zeroed

FILE = "zeroed.json"
Channels = dict[str, list[int]]


class _Choice(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    epoch: int = Field(ge=0)
    entered: Channels
    left: Channels


class _Choices(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    channels: dict[str, int]
    choices: list[_Choice]


def keep_turnovers(folder: RunFolder, zeroed: Zeroed) -> None:
    """Write the file. Only the main process may."""
    lines = [
        json.dumps({"epoch": choice.epoch, "entered": dict(choice.entered), "left": dict(choice.left)})
        for choice in zeroed.history
    ]
    choices = ",\n".join(lines)
    text = f'{{"channels": {json.dumps(dict(zeroed.channels))},\n"choices": [\n{choices}\n]}}\n'
    write_whole(folder.path / FILE, text.encode())


def open_turnovers(folder: RunFolder) -> Zeroed | None:
    """What was written; None where nothing was. Raises BadArtifact where it is damaged."""
    path = folder.path / FILE
    try:
        found = TypeAdapter(_Choices).validate_json(path.read_bytes())
        history = tuple(Turnover(c.epoch, _tuples(c.entered), _tuples(c.left)) for c in found.choices)
        zeroed = Zeroed(found.channels, history)
        _check(zeroed)
    except FileNotFoundError:
        return None
    except (ValidationError, ValueError, OSError) as error:
        why = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
        raise BadArtifact(f"{path} is damaged: {why}\n  do: begin again in another folder") from error
    return zeroed


def turnover_facts(zeroed: Zeroed) -> Facts:
    """For the run's results: how many choices there were, and how many filters changed in each after the first."""
    later = zeroed.history[1:]
    return {
        "choices": len(zeroed.history),
        "entered": [sum(map(len, choice.entered.values())) for choice in later],
        "left": [sum(map(len, choice.left.values())) for choice in later],
    }


def _tuples(channels: Channels) -> dict[str, tuple[int, ...]]:
    return {name: tuple(own) for name, own in channels.items()}


def _check(zeroed: Zeroed) -> None:
    """Raises ``ValueError`` unless what enters was not there, what leaves was, and all are channels of the groups."""
    zero: dict[str, set[int]] = {name: set() for name in zeroed.channels}
    for number, choice in enumerate(zeroed.history):
        for name in (*choice.entered, *choice.left):
            if name not in zero:
                raise ValueError(f"choice {number} speaks of a group {name!r}, and there is none")
        for name, own in zero.items():
            came, went = set(choice.entered.get(name, ())), set(choice.left.get(name, ()))
            if came & own or not went <= own or not came <= set(range(zeroed.channels[name])):
                raise ValueError(f"choice {number} does not follow from those before it, in group {name!r}")
            zero[name] = (own | came) - went
