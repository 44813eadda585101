"""YAML as plain values that remember their lines.

The YAML here is that of the JSON schema (YAML 1.2's core): ``1e-3`` is a number, ``no`` and ``on`` are text, ``010`` is
ten, and nothing is a date. Anchors, aliases and ``<<`` merges work. Tags that make objects, keys given twice, and
aliases that unfold to more than a recipe could mean, or to themselves, are refused.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from secateur.errors import BadRequest, MissingExtra

Where = tuple[str | int, ...]
MOST_NODES = 20_000
DEEPEST = 50

_NULL = re.compile(r"~|null|Null|NULL|")
_BOOL = re.compile(r"true|True|TRUE|false|False|FALSE")
_INT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_PREFIX = "tag:yaml.org,2002:"


@dataclass(frozen=True)
class Document:
    """``value``: mappings, lists and scalars. ``lines``: the line, from 1, of every place in it (of a mapping's value,
    the line of its key)."""

    value: Any
    lines: Mapping[Where, int]


class BadYaml(BadRequest):
    """Text that is no YAML of ours: ``line`` from 1, or None, and what is wrong."""

    def __init__(self, line: int | None, text: str) -> None:
        super().__init__(text)
        self.line = line


def parse_yaml(text: str) -> Document:
    """The one document in ``text``. Raises BadYaml, with the line, for what is no YAML or refused."""
    try:
        import yaml
    except ImportError as error:
        raise MissingExtra("reading a recipe needs PyYAML\n  do: pip install 'secateur[train]'") from error
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.reader.ReaderError as error:
        raise BadYaml(
            text[: error.position].count("\n") + 1, f"a character that no YAML holds ({error.reason})"
        ) from None
    except yaml.MarkedYAMLError as error:
        raise BadYaml(*_explained(error, text)) from None
    except RecursionError:
        raise BadYaml(None, "nested deeper than any recipe") from None
    if root is None:
        raise BadYaml(None, "there is nothing in it")
    reader = _Reader(yaml)
    return Document(reader.value_of(root, ()), reader.lines)


class _Reader:
    """One walk over the nodes of a document."""

    def __init__(self, yaml: Any) -> None:
        self.yaml = yaml
        self.lines: dict[Where, int] = {}
        self.seen = 0
        self.open: list[Any] = []

    def value_of(self, node: Any, where: Where) -> Any:
        line = node.start_mark.line + 1
        self.lines.setdefault(where, line)
        self.seen += 1
        if self.seen > MOST_NODES:
            raise BadYaml(line, f"unfolds to more than {MOST_NODES:,} values: no recipe is that long")
        if any(node is outer for outer in self.open):
            raise BadYaml(line, "an alias stands for what it stands in")
        if len(self.open) > DEEPEST:
            raise BadYaml(line, "nested deeper than any recipe")
        if isinstance(node, self.yaml.ScalarNode):
            return _scalar(node, line)
        if not node.tag.startswith(_PREFIX) or node.tag.removeprefix(_PREFIX) not in ("map", "seq"):
            raise BadYaml(line, f"the tag {_shown(node.tag)} is not understood: a recipe is plain values")
        self.open.append(node)
        if isinstance(node, self.yaml.SequenceNode):
            value: Any = [self.value_of(item, (*where, place)) for place, item in enumerate(node.value)]
        else:
            value = self.mapping_of(node, where)
        self.open.pop()
        return value

    def mapping_of(self, node: Any, where: Where) -> dict[str, Any]:
        found: dict[str, Any] = {}
        own: dict[str, int] = {}
        merged: list[Any] = []
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, self.yaml.ScalarNode):
                raise BadYaml(line, "a key must be a word, not a list or mapping")
            key = key_node.value
            if key == "<<" and key_node.style is None:
                merged += value_node.value if isinstance(value_node, self.yaml.SequenceNode) else [value_node]
                continue
            if key in own:
                raise BadYaml(line, f"{_path((*where, key))} is given twice, here and in line {own[key]}")
            own[key] = line
            self.lines[(*where, key)] = line
            found[key] = self.value_of(value_node, (*where, key))
        for other in merged:
            if not isinstance(other, self.yaml.MappingNode):
                raise BadYaml(other.start_mark.line + 1, "<< merges mappings only")
            before = dict(self.lines)
            for key, value in self.value_of(other, where).items():
                found.setdefault(key, value)
            self.lines |= before
        return found


def _scalar(node: Any, line: int) -> Any:
    text, tag = node.value, node.tag
    plain = node.style is None
    if not tag.startswith(_PREFIX) or tag.removeprefix(_PREFIX) not in _SCALARS:
        raise BadYaml(line, f"the tag {_shown(tag)} is not understood: a recipe is plain values")
    if not plain:
        return text
    if _NULL.fullmatch(text):
        return None
    if _BOOL.fullmatch(text):
        return text.lower() == "true"
    if _INT.fullmatch(text):
        if len(text) > 30:
            raise BadYaml(line, f"the number {text[:12]}... is longer than any that a recipe means")
        return int(text, 0) if text[:2] in ("0x", "0o") else int(text)
    if _FLOAT.fullmatch(text):
        number = math.nan if text[-1].lower() in "nf" else float(text)  # .nan and .inf
        if not math.isfinite(number):
            raise BadYaml(line, f"{text} is no number that a recipe can mean")
        return number
    return text


_SCALARS = ("null", "bool", "int", "float", "str", "timestamp", "value", "merge")


def _shown(tag: str) -> str:
    return f"!!{tag.removeprefix(_PREFIX)}" if tag.startswith(_PREFIX) else tag


def _path(where: Where) -> str:
    return ".".join(map(str, where))


def _explained(error: Any, text: str) -> tuple[int | None, str]:
    """The line and the reason of PyYAML's error, in words for who wrote the recipe."""
    mark = error.problem_mark or error.context_mark
    line = mark.line + 1 if mark else None
    lines = text.splitlines()
    shown = lines[mark.line] if mark and mark.line < len(lines) else ""
    problem = error.problem or error.context or "it is not understood"
    if "\t" in shown[: len(shown) - len(shown.lstrip())] or "'\\t'" in problem:
        return line, "a tab, where YAML takes only spaces"
    if "expected a single document" in (error.context or "") or "another document" in problem:
        return line, "a second document begins here (---): a recipe is one"
    return line, f"this is no YAML: {problem}"
