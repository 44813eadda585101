"""Reading the nodes of a captured graph: names, arguments, shapes, source lines, the modules they were called in."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx


def op_name(node: fx.Node) -> str:
    """``conv2d``, ``add``, ``getitem`` ...: the ATen name without namespace, overload and in-place mark."""
    if node.target is operator.getitem:
        return "getitem"
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return getattr(node.target, "__name__", str(node.target))
    name = str(schema.name).split("::")[-1]
    return name[:-1] if name.endswith("_") and not name.startswith("__") else name


def named_args(node: fx.Node) -> dict[str, Any]:
    """Every argument of an ATen call by its name in the schema, defaults filled in."""
    found: dict[str, Any] = {}
    for i, a in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
        if i < len(node.args):
            found[a.name] = node.args[i]
        else:
            found[a.name] = node.kwargs.get(a.name, a.default_value if a.has_default_value() else None)
    return found


def as_int(size: Any) -> int:
    """A size of the captured example, symbolic or not."""
    return size if isinstance(size, int) else int(size.node.hint)


def shape_of(node: fx.Node) -> tuple[int, ...] | None:
    """The shape that a node's tensor had in the capture; ``None`` if it is no single tensor."""
    value = node.meta.get("val")
    return tuple(as_int(k) for k in value.shape) if isinstance(value, torch.Tensor) else None


def source_line(node: fx.Node) -> str:
    """``net.py:84: x = x.softmax(1)``: the innermost line of the user's own code (not torch's) behind a node."""
    lines = str(node.meta.get("stack_trace") or "").splitlines()
    frames = [(lines[i], lines[i + 1].strip()) for i in range(len(lines) - 1) if lines[i].lstrip().startswith("File ")]
    for head, code in reversed(frames):
        file, _, rest = head.strip().removeprefix('File "').partition('", line ')
        if "/torch/" not in file and "/secateur/capture.py" not in file:
            return f"{file.rsplit('/', 1)[-1]}:{rest.split(',')[0]}: {code}"
    return "unknown source"


def module_stack(node: fx.Node) -> list[tuple[str, str]]:
    """The modules a node was called in, outermost first: ``(path, class name)``."""
    stack = node.meta.get("nn_module_stack") or {}
    return [(path.removeprefix("model").removeprefix("."), str(kind)) for path, kind in stack.values()]
