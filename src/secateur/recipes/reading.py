"""From a file to a recipe, or to an error that says in which line what is wrong, and what was probably meant.

    recipe.yaml line 7: finetune: unknown key 'epoch'; did you mean 'epochs'?

As many mistakes are told at once as can be told apart, the first few of them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from secateur.errors import BadRequest, nearest
from secateur.recipes.faults import faults
from secateur.recipes.schema import Recipe, Where, as_values, known_keys
from secateur.recipes.yaml_nodes import BadYaml, Document, parse_yaml

LARGEST = 2**18
MOST_TOLD = 6

_EXPECTED = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "string": "text",
    "path": "text",
    "tuple": "a list",
    "list": "a list",
    "dict": "a mapping of keys",
    "dataclass": "a mapping of keys",
    "model": "a mapping of keys",
    "none": "null",
}


def read_recipe(path: str | os.PathLike[str]) -> Recipe:
    """The recipe in a YAML file (JSON is YAML too).

    Raises BadRequest if there is no such file, it is no YAML, or it says anything that the schema does not know.
    """
    path = Path(path)
    try:
        if path.is_dir():
            raise BadRequest(f"{path} is a folder, not a recipe\n  do: name a YAML file")
        if path.stat().st_size > LARGEST:
            raise BadRequest(f"{path} is larger than {LARGEST // 2**10} KiB: that is no recipe")
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadRequest(f"{path} is not text ({error.reason} at byte {error.start})") from None
    except OSError as error:
        raise BadRequest(f"the recipe {path} cannot be read: {error.strerror or error}") from None
    return parse_recipe(text, name=path.name)


def parse_recipe(text: str, *, name: str = "recipe") -> Recipe:
    """The recipe in ``text``; ``name`` is what errors call it. Raises BadRequest as ``read_recipe`` does."""
    try:
        document = parse_yaml(text)
    except BadYaml as error:
        raise BadRequest(f"{name}{'' if error.line is None else f' line {error.line}'}: {error}") from None
    return _checked(document, name)


def demo_recipe(seed: int = 0) -> Recipe:
    """The recipe of ``secateur demo``."""
    text = resources.files("secateur.recipes").joinpath("demo.yaml").read_text(encoding="utf-8")
    return parse_recipe(text, name="demo.yaml").model_copy(update={"seed": seed})


def make_recipe(values: Mapping[str, Any], *, name: str = "recipe") -> Recipe:
    """The recipe with these values (those of a YAML file). Raises BadRequest as ``read_recipe`` does."""
    return _checked(Document(dict(values), {}), name)


def write_recipe(recipe: Recipe) -> str:
    """The recipe as YAML with every default written out, so that it means the same in any later version."""
    import yaml

    return yaml.safe_dump(as_values(recipe), sort_keys=False, allow_unicode=True, width=110)


def _checked(document: Document, name: str) -> Recipe:
    if not isinstance(document.value, Mapping):
        raise BadRequest(f"{name}: a recipe is a mapping of keys (model, data, ...), not {_shown(document.value)}")
    try:
        # by way of JSON: there pydantic takes lists for tuples, and still nothing else for what it is not
        recipe = Recipe.model_validate_json(json.dumps(document.value), strict=True)
    except ValidationError as error:
        raise _error(document, name, _told(document, error)) from None
    found = list(faults(recipe))
    if found:
        raise _error(document, name, found)
    return recipe


def _error(document: Document, name: str, found: Iterable[tuple[Where, str]]) -> BadRequest:
    told = []
    for where, text in found:
        line = _line(document, where)
        place = ".".join(map(str, where[:-1] if text.startswith("unknown key") else where))
        told.append((line or 0, f"{name}{f' line {line}' if line else ''}: {place + ': ' if place else ''}{text}"))
    told.sort(key=lambda entry: entry[0])
    lines = list(dict.fromkeys(text for _, text in told))
    more = [f"... and {len(lines) - MOST_TOLD} more"] if len(lines) > MOST_TOLD else []
    return BadRequest("\n".join([*lines[:MOST_TOLD], *more]))


def _line(document: Document, where: Where) -> int | None:
    """The line of the nearest place that the document has."""
    for length in range(len(where), -1, -1):
        if where[:length] in document.lines:
            return document.lines[where[:length]]
    return None


def _told(document: Document, error: ValidationError) -> list[tuple[Where, str]]:
    """pydantic's findings in our words, those of one place joined."""
    expected: dict[Where, list[str]] = {}
    chosen: dict[Where, str] = {}
    found: list[tuple[Where, str]] = []
    for fault in error.errors(include_url=False):
        where, value = _place(document.value, fault["loc"])
        kind = fault["type"]
        if kind in ("extra_forbidden", "unexpected_keyword_argument"):
            above = _at(document.value, where[:-1])
            known = known_keys(where[:-1], kind=above.get("kind"))
            found.append((where, f"unknown key {where[-1]!r}{nearest(str(where[-1]), known)}"))
        elif kind in ("missing", "missing_argument"):
            found.append((where, f"the key {str(fault['loc'][-1])!r} is missing"))
        elif kind in ("literal_error", "union_tag_invalid", "union_tag_not_found"):
            chosen[where] = _choice(fault, value)
        elif kind.removesuffix("_type") in _EXPECTED:
            expected.setdefault(where, []).append(_EXPECTED[kind.removesuffix("_type")])
        else:
            text = fault["msg"].removeprefix("Input ").removeprefix("Value error, ")
            found.append((where, f"{text[:1].lower()}{text[1:]}, not {_shown(value)}"))
    for where, kinds in expected.items():
        wanted = " or ".join(dict.fromkeys(kinds))
        if where not in chosen:
            chosen[where] = f"should be {wanted}, not {_shown(_at(document.value, where))}"
        elif "did you mean" not in chosen[where]:
            chosen[where] += f", nor {wanted}"
    # of a value that may be one of several, what lies deeper says it better
    deeper = {where[:length] for where, _ in (*found, *chosen.items()) for length in range(len(where))}
    return [*found, *((where, text) for where, text in chosen.items() if where not in deeper)]


def _choice(fault: Any, value: Any) -> str:
    context = fault.get("ctx", {})
    if fault["type"] == "union_tag_not_found":
        return f"the key {context['discriminator']} is missing"
    listed = context.get("expected_tags") or context["expected"].replace(" or ", ", ")
    known = [word.strip("'") for word in listed.split(", ")]
    given = context.get("tag", value)
    prefix = "kind: " if "tag" in context else ""
    return f"{prefix}{_shown(given)} is none of {', '.join(known)}{_meant(given, known)}"


def _meant(given: Any, known: list[str]) -> str:
    hint = nearest(given, known) if isinstance(given, str) else ""
    return hint if "mean" in hint else ""


def _place(value: Any, loc: Where) -> tuple[Where, Any]:
    """The place in the document that pydantic means: its names of alternatives are no keys."""
    where: list[str | int] = []
    for part in loc:
        if isinstance(value, Mapping) and part in value:
            value = value[str(part)]
        elif isinstance(value, list) and isinstance(part, int) and part < len(value):
            value = value[part]
        else:
            continue
        where.append(part)
    return tuple(where), value


def _at(value: Any, where: Where) -> Any:
    for part in where:
        value = value[part]
    return value


def _shown(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, list):
        return "a list"
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
