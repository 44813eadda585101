"""Filling a model with weights from a file, whatever the training script wrapped them in.

Reads ``.safetensors``, and torch's pickles only as tensors (``weights_only=True``): a file that holds code is refused.
Names are freed of what wrappers put in front of them (``module.`` of DDP, ``_orig_mod.`` of compile, ``model.`` of
trainers, ``ema.`` of averaging) until they fit; then every tensor must be there, with its shape, and no other.
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from secateur.errors import BadArtifact, BadRequest, MissingExtra, WrongModel

M = TypeVar("M", bound=nn.Module)

PICKLES = (".pth", ".pt", ".ckpt", ".bin", ".tar")
EMA_CONTAINERS = (
    *("state_dict_ema", "model_ema", "ema_state_dict", "model_state_dict_ema"),
    *("model_ema_state_dict", "ema_model", "params_ema", "ema"),
)
CONTAINERS = ("state_dict", "model_state_dict", "model", "module", "net", "network", "weights", "params")
EMA_PREFIXES = ("model_ema.", "ema_model.", "ema.")
PREFIXES = ("module.", "_orig_mod.", "model.", *EMA_PREFIXES)


def load_weights(model: M, path: str | os.PathLike[str], *, ema: bool = False) -> M:
    """Copies the tensors in ``path`` into ``model``, in place, and returns it.

    ``ema``: take the averaged weights (exponential moving average) where a checkpoint holds both kinds; left at
    ``False`` they are taken only if the file has no others. Tensors are cast to the model's dtypes and moved to its
    device. ``num_batches_tracked``, which old files lack and no inference reads, may be missing, and so may one of two
    tied names.

    Raises ``BadArtifact`` if the file is missing, damaged, of an unknown kind, holds code or no weights; ``BadRequest``
    if averaged weights are asked for and not there; ``WrongModel``, naming the first tensor that is missing,
    unexpected or of another shape. The model is then as it was.
    """
    path = Path(path)
    tensors = _weights_in(_read(path), path, ema=ema)
    inner = _unwrapped(model)
    own = {name: value for name, value in inner.state_dict(keep_vars=True).items() if isinstance(value, Tensor)}
    tensors = _fitted(tensors, own, ema=ema)
    _check(tensors, own, where=f"{path.name} does not fit this {type(inner).__name__}")
    inner.load_state_dict(tensors, strict=False)
    return model


def _read(path: Path) -> object:
    """What the file holds: nested mappings, lists, scalars, tensors on the CPU."""
    if path.is_dir():
        raise BadArtifact(f"{path} is a folder, not a file of weights\n  do: open a saved folder with secateur.load")
    if not path.is_file():
        raise BadArtifact(f"there is no file {path}")
    if path.suffix == ".safetensors":
        try:
            from safetensors.torch import load_file
        except ImportError as error:
            raise MissingExtra(f"safetensors is needed to read {path}\n  do: pip install safetensors") from error
        try:
            return load_file(path)
        except Exception as error:
            raise BadArtifact(f"{path} is not a readable safetensors file: {error}") from error
    if path.suffix not in PICKLES:
        raise BadArtifact(f"{path}: unknown kind of file {path.suffix!r}; known: .safetensors, {', '.join(PICKLES)}")
    try:
        # training scripts keep their arguments beside the weights; a Namespace only holds attributes
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise BadArtifact(_why_unreadable(path, error)) from error


def _why_unreadable(path: Path, error: Exception) -> str:
    """torch's own text suggests to switch the safety off; ours does not."""
    code = re.search(r"(?:GLOBAL|blocked function|class) (\S+)", str(error))
    if "eights only" in str(error) and code:
        return (
            f"{path} holds more than weights: its pickle calls {code[1].rstrip('.,')!r}, and no code is run\n"
            "  do: where it was made, save the weights alone: torch.save(model.state_dict(), path)"
        )
    if "TorchScript" in str(error):
        return f"{path} is a TorchScript program\n  do: save its weights alone: torch.save(model.state_dict(), path)"
    why = re.split(r"\n|\. ", str(error))[0][:200]
    return f"{path} is damaged, or torch.save did not write it ({type(error).__name__}{why and ': '}{why})"


def _weights_in(found: object, path: Path, *, ema: bool) -> dict[str, Tensor]:
    """The flat ``{name: tensor}`` inside the containers that training scripts write."""
    first, second = (EMA_CONTAINERS, CONTAINERS) if ema else (CONTAINERS, EMA_CONTAINERS)
    averaged = False
    for _ in range(4):  # containers nest two or three deep, never endlessly
        if not isinstance(found, Mapping):
            break
        tensors = {name: value for name, value in found.items() if isinstance(name, str) and isinstance(value, Tensor)}
        inside = next((key for key in (*first, *second) if isinstance(found.get(key), Mapping)), None)
        if inside is None and tensors:
            if ema and not averaged and not any(name.startswith(EMA_PREFIXES) for name in tensors):
                raise BadRequest(f"{path} holds no averaged weights\n  do: leave ema=False to take those it has")
            return tensors
        if inside is None:
            break
        averaged = averaged or inside in EMA_CONTAINERS
        found = found[inside]
    held = f"keys {', '.join(map(repr, list(found)[:6]))}" if isinstance(found, Mapping) else type(found).__name__
    raise BadArtifact(
        f"{path} holds no weights that could be found ({held})\n"
        "  do: save them as {name: tensor}, or under 'state_dict' or 'model'"
    )


def _fitted(tensors: dict[str, Tensor], own: Mapping[str, Tensor], *, ema: bool) -> dict[str, Tensor]:
    """``tensors`` under the model's names, as near as peeling prefixes gets."""
    if own.keys() == tensors.keys():
        return tensors
    averaged = {name: value for name, value in tensors.items() if name.startswith(EMA_PREFIXES)}
    if averaged and not any(name.startswith(EMA_PREFIXES) for name in own):
        others = {name: value for name, value in tensors.items() if name not in averaged}
        tensors = averaged if ema or not others else others
    tensors = {name.replace("_orig_mod.", ""): value for name, value in tensors.items()}
    if "n_averaged" not in own:  # the counter of torch.optim.swa_utils.AveragedModel
        tensors.pop("n_averaged", None)
    while own.keys() != tensors.keys():
        peeled = next((found for prefix in PREFIXES if (found := _peeled(tensors, own, prefix))), None)
        if peeled is None:
            break
        tensors = peeled
    return tensors


def _peeled(tensors: dict[str, Tensor], own: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor] | None:
    """``tensors`` without ``prefix``, if all share it and the model does not, or if the names fit better that way."""
    peeled = {name.removeprefix(prefix): value for name, value in tensors.items()}
    if not any(name.startswith(prefix) for name in tensors) or len(peeled) < len(tensors):
        return None
    better = len(own.keys() & peeled.keys()) > len(own.keys() & tensors.keys())
    shared = all(name.startswith(prefix) for name in tensors) and not any(name.startswith(prefix) for name in own)
    return peeled if better or shared else None


def _check(tensors: Mapping[str, Tensor], own: Mapping[str, Tensor], *, where: str) -> None:
    """``WrongModel`` unless every tensor of the model is there, fits, and there are no others."""
    there = {id(value) for name, value in own.items() if name in tensors}  # tied weights need one of their names
    missing = [
        name
        for name, value in own.items()
        if name not in tensors and id(value) not in there and not name.endswith("num_batches_tracked")
    ]
    unexpected = [name for name in tensors if name not in own]
    said = []
    if missing:
        said.append(f"{missing[0]!r} is missing in the file{_more(missing)}")
    if unexpected:
        said.append(f"{unexpected[0]!r} of the file is not in the model{_more(unexpected)}")
    if said:
        raise WrongModel(f"{where}: {'; '.join(said)}\n  do: build the model that the weights were trained in")
    for name, value in tensors.items():
        if value.shape != own[name].shape:
            raise WrongModel(
                f"{where}: {name!r} is {list(value.shape)} in the file and {list(own[name].shape)} in the model\n"
                "  do: build the model with the widths, input channels and classes it was trained with"
            )
        if value.is_floating_point() != own[name].is_floating_point():
            raise WrongModel(f"{where}: {name!r} is {value.dtype} in the file and {own[name].dtype} in the model")


def _more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def _unwrapped(model: nn.Module) -> nn.Module:
    """The module inside torch.compile's and data parallel wrappers."""
    while True:
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model
