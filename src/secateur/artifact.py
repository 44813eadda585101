"""Keeping a pruned network: a folder of plain files, from which it is rebuilt without a pickle.

    model.safetensors   every parameter and buffer of the pruned network; tied ones once
    plan.json           which channels of the dense network stayed, and how the rest was changed
    measure.json        what it costs and how well it does, if that was measured
    environment.json    versions it was saved with; for people, never read

The folder holds no code and no class names that are acted on: whoever loads it brings the dense network. It is written
aside and renamed into place, so that a folder is whole or not there.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import secrets
import shutil
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from secateur.core import Measurement
from secateur.errors import BadArtifact, BadPlan, BadRequest, WrongModel
from secateur.graph import unwrap
from secateur.plan_checks import plain
from secateur.plans import Plan, added_tensors, check_model, check_pruned, named_tensors, transient
from secateur.surgery import rebuild, record
from secateur.version import __version__

WEIGHTS_FILE = "model.safetensors"
PLAN_FILE = "plan.json"
MEASURE_FILE = "measure.json"
ENVIRONMENT_FILE = "environment.json"
FILES = frozenset({WEIGHTS_FILE, PLAN_FILE, MEASURE_FILE, ENVIRONMENT_FILE})
LARGEST_JSON = 64 * 2**20


def save(
    folder: str | os.PathLike[str], small: nn.Module, plan: Plan, *, measurement: Measurement | None = None
) -> Path:
    """Write ``small``, the network that ``apply`` made by ``plan``, into ``folder``; returns its path.

    After several rounds of pruning ``plan`` may be that of the last one or the whole: ``small`` knows all rounds, and
    the folder will load from the original dense network. ``plan.made_by`` is written as given. An existing folder is
    replaced if it is empty or a saved network and nothing else.

    Raises ``WrongModel`` if ``small`` has not the shapes that the plan leaves, and ``BadArtifact`` if the folder holds
    anything else or cannot be written; then nothing half-written is left, and an earlier artefact stays as it was.
    """
    target = Path(folder).expanduser().resolve()
    small = unwrap(small)
    plan = _whole_plan(small, plan)
    tensors = _tensors(small, plan)
    texts = {PLAN_FILE: plan.to_json(), ENVIRONMENT_FILE: _json(_environment(small))}
    if measurement is not None:
        texts[MEASURE_FILE] = _json(_measurement(measurement))
    _check_replaceable(target)
    with _aside(target) as aside:
        save_file(tensors, str(aside / WEIGHTS_FILE), metadata={"format": "pt"})
        for name, text in texts.items():
            (aside / name).write_text(text, encoding="utf-8")
        for path in (*aside.iterdir(), aside):
            _flush(path)
    return target


def load(folder: str | os.PathLike[str], model: nn.Module | str, *, allow_import: bool = False) -> nn.Module:
    """The network saved in ``folder``, as a new module; ``model`` is untouched.

    ``model``: a freshly built dense network, of any weights, or its name (``"timm:resnet18"``, ``"zoo:resnet20"``,
    ``"torchvision:resnet50"``; ``"package.module:function"`` only with ``allow_import=True``). Train or eval mode,
    device, ``requires_grad`` and hooks are those of ``model``, dtypes those that were saved.

    Raises ``WrongModel``, naming the first tensor that differs, if the folder was pruned from another network;
    ``BadArtifact`` if a file is missing, truncated or does not fit the others; ``BadPlan`` for a damaged plan.
    """
    path = _existing(folder)
    plan = read_plan(path)
    weights = path / WEIGHTS_FILE
    if not weights.is_file():
        raise BadArtifact(f"{path} holds no {WEIGHTS_FILE}: it is no saved network, or a part of one")
    if isinstance(model, str):
        from secateur.zoo.names import build

        model = build(model, allow_import=allow_import)
    check_model(plan, model)
    small = rebuild(model, plan)
    _fill(small, plan, weights)
    return small


def read_plan(folder: str | os.PathLike[str]) -> Plan:
    """The plan in a saved folder. Raises ``BadArtifact`` if it is not there, ``BadPlan`` if it is damaged."""
    path = _existing(folder) / PLAN_FILE
    try:
        return Plan.from_json(_read(path))
    except BadPlan as error:
        raise BadPlan(f"{path}: {error}") from error


def read_measurement(folder: str | os.PathLike[str]) -> Measurement | None:
    """What was measured when the folder was saved, if anything. Raises ``BadArtifact`` if it is damaged."""
    path = _existing(folder) / MEASURE_FILE
    if not path.exists():
        return None
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(Measurement).validate_json(_read(path), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the whole"
        raise BadArtifact(f"{path}: {where}: {first['msg'].lower()}") from None


def _whole_plan(small: nn.Module, plan: Plan) -> Plan:
    """The plan from the original dense network to ``small``, with what ``plan`` says about its making."""
    shapes = {name: tuple(tensor.shape) for name, tensor in named_tensors(small).items()}
    check_pruned(plan, shapes, who=("the pruned network of the plan", "the network to be saved"))
    applied = record(small)
    if applied is None:
        return plan
    check_pruned(applied.plan, shapes, who=("the network that apply made", "the network to be saved"))
    return replace(applied.plan, made_by={**applied.plan.made_by, **plan.made_by})


def _tensors(small: nn.Module, plan: Plan) -> dict[str, torch.Tensor]:
    """Contiguous copies on the CPU of all that ``state_dict`` would hold, tied tensors once."""
    for name, value in small.state_dict().items():
        if name.rpartition(".")[2] == "_extra_state":
            raise BadArtifact(
                f"{name!r} ({type(value).__name__}) is no tensor but extra state of a module, which only a pickle "
                "could hold, and secateur writes none\n  do: drop get_extra_state from the module, or keep it elsewhere"
            )
    applied, known = record(small), plan.model.keys() | added_tensors(plan)
    for name, tensor in _lasting(small).items():
        # the tables of a network that was returned as a graph are computed again
        if name not in known and (isinstance(tensor, nn.Parameter) or applied is None or applied.tier != "graph"):
            raise WrongModel(
                f"tensor {name!r} {list(tensor.shape)} of the network to be saved is unknown to the plan's network\n"
                "  do: save what was added after pruning on its own: it could not be rebuilt from the dense network"
            )
    # clones: two tensors may be views of one storage, which the format does not allow
    return {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in _lasting(small).items()
        if name in known
    }


def _lasting(model: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors of ``model`` that ``state_dict`` holds, under their canonical names."""
    skipped = transient(model)
    return {name: tensor for name, tensor in named_tensors(model).items() if name not in skipped}


def _fill(small: nn.Module, plan: Plan, path: Path) -> None:
    """Set every tensor of ``small`` to the one of its name in the file, which must hold these and no others."""
    known = plan.model.keys() | added_tensors(plan)
    targets = {name: tensor for name, tensor in _lasting(small).items() if name in known}
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            _compare(path, {name: tuple(tensor.shape) for name, tensor in targets.items()}, found)
            for name, target in targets.items():
                saved = file.get_tensor(name)
                value = torch.empty_like(target, dtype=saved.dtype, requires_grad=False)
                target.data = value.copy_(saved)
    except (OSError, SafetensorError) as error:
        raise BadArtifact(
            f"{path} is truncated or no safetensors file: {error}\n  do: save the network again"
        ) from error


def _compare(path: Path, wanted: dict[str, tuple[int, ...]], found: dict[str, tuple[int, ...]]) -> None:
    for name, shape in wanted.items():
        if name not in found:
            raise BadArtifact(f"{path}: tensor {name!r} {list(shape)} is missing: plan and weights are not of one save")
        if found[name] != shape:
            raise BadArtifact(
                f"{path}: tensor {name!r} is {list(found[name])} but the plan leaves {list(shape)}: plan and "
                "weights are not of one save"
            )
    for name, shape in found.items():
        if name not in wanted:
            raise BadArtifact(f"{path}: tensor {name!r} {list(shape)} is none of the pruned network's")


def _existing(folder: str | os.PathLike[str]) -> Path:
    path = Path(folder).expanduser()
    if not path.is_dir():
        what = "is a file, not a folder" if path.exists() else "does not exist"
        raise BadArtifact(f"{path} {what}: a saved network is a folder with {PLAN_FILE} and {WEIGHTS_FILE}")
    return path


def _read(path: Path) -> str:
    try:
        if path.stat().st_size > LARGEST_JSON:
            raise BadArtifact(f"{path} is larger than {LARGEST_JSON // 2**20} MiB: no such file was ever written by us")
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise BadArtifact(f"{path} is damaged: it is not text ({error.reason} at byte {error.start})") from error
    except FileNotFoundError as error:
        raise BadArtifact(f"{path.parent} holds no {path.name}: it is no saved network, or a part of one") from error
    except OSError as error:
        raise BadArtifact(f"{path} cannot be read: {error.strerror or error}") from error


def _check_replaceable(target: Path) -> None:
    """Only what ``save`` wrote is ever replaced."""
    try:
        if not target.exists():
            return
        if not target.is_dir():
            raise BadArtifact(f"{target} is a file\n  do: choose another folder")
        names = {path.name for path in target.iterdir()}
    except OSError as error:
        raise BadArtifact(f"{target} cannot be read: {error.strerror or error}") from error
    foreign = sorted(names - FILES)
    if foreign:
        raise BadArtifact(f"{target} holds other files ({foreign[0]}) and is not replaced\n  do: choose another folder")
    if names and not {PLAN_FILE, WEIGHTS_FILE} <= names:
        raise BadArtifact(f"{target} is not a whole saved network and is not replaced\n  do: choose another folder")


@contextlib.contextmanager
def _aside(target: Path) -> Iterator[Path]:
    """A new folder beside ``target`` that takes its place when the block ends well, and vanishes when it does not."""
    token = secrets.token_hex(4)
    aside, old = (target.with_name(f".{target.name}.{token}.{end}") for end in ("partial", "old"))
    made = [path for path in target.parents if not path.exists()]
    try:
        for path in reversed(made):
            path.mkdir()
        aside.mkdir()
        yield aside
        _swap(aside, target, old)
    except BaseException as error:
        shutil.rmtree(aside, ignore_errors=True)
        with contextlib.suppress(OSError):
            for path in made:
                path.rmdir()
        if isinstance(error, (OSError, SafetensorError)):
            reason = getattr(error, "strerror", None) or error
            raise BadArtifact(
                f"{target} cannot be written: {reason}\n"
                "  do: free some space or choose another folder; nothing half-written was left behind"
            ) from error
        raise


def _swap(aside: Path, target: Path, old: Path) -> None:
    replaced = target.exists()
    if replaced:
        target.rename(old)
    try:
        aside.rename(target)
    except BaseException:
        if replaced:
            old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)
    with contextlib.suppress(OSError):  # it is in place; not every file system can flush a folder
        _flush(target.parent)


def _flush(path: Path) -> None:
    """Make sure that a file or folder is on the disk, and that the disk had room for it."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _environment(small: nn.Module) -> dict[str, Any]:
    first = next(iter(named_tensors(small).values()), torch.empty(0))
    return {
        "secateur": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
        "model": f"{type(small).__module__}.{type(small).__qualname__}",
        "dtype": str(first.dtype).removeprefix("torch."),
        "device": str(first.device),
    }


def _measurement(measurement: Measurement) -> dict[str, Any]:
    try:
        return plain("measurement", {**asdict(replace(measurement, details={})), "details": measurement.details})
    except BadPlan as error:
        raise BadRequest(str(error)) from None


def _json(value: dict[str, Any]) -> str:
    return json.dumps(value, indent=2, allow_nan=False) + "\n"
