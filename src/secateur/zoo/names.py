"""From a name to a model and to inputs it can be traced with.

    zoo:resnet56                 the papers' networks, ``secateur.zoo.MODELS``
    torchvision:resnet50         torchvision.models, without weights
    timm:efficientnet_lite0      timm, without weights
    package.module:function      your own: the function, called, returns the model

Only the last form imports code that is neither ours nor one of the two libraries', and only because someone typed it;
whoever reads a name from a file passes ``allow_import=False``. Nothing is downloaded unless an option asks for it.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import BadRequest, MissingExtra, nearest
from secateur.zoo import MODELS
from secateur.zoo.torchvision_shim import import_torchvision

FORMS = "'zoo:NAME', 'torchvision:NAME', 'timm:NAME' or 'package.module:function'"

INPUT_SIZES: dict[str, tuple[tuple[int, ...], ...]] = {
    "inception_v3": ((3, 299, 299),),
    "quantized_inception_v3": ((3, 299, 299),),
    "r3d_18": ((3, 16, 112, 112),),
    "mc3_18": ((3, 16, 112, 112),),
    "r2plus1d_18": ((3, 16, 112, 112),),
    "s3d": ((3, 16, 224, 224),),
    "mvit_v1_b": ((3, 16, 224, 224),),
    "mvit_v2_s": ((3, 16, 224, 224),),
    "swin3d_t": ((3, 16, 224, 224),),
    "swin3d_s": ((3, 16, 224, 224),),
    "swin3d_b": ((3, 16, 224, 224),),
    "raft_small": ((3, 128, 128), (3, 128, 128)),
    "raft_large": ((3, 128, 128), (3, 128, 128)),
}
"""torchvision's networks that do not take one 3x224x224 image: shapes without the batch, one per input."""


def build(name: str, *, allow_import: bool = True, **options: Any) -> nn.Module:
    """The freshly initialised model that ``name`` means; ``options`` go to the function that builds it.

    >>> build("zoo:resnet20", classes=100).fc.out_features
    100

    ``allow_import=False`` refuses ``package.module:function``.

    Raises ``BadRequest`` for an unknown name (with the nearest known one), an option that the model does not take, or a
    function that does not return a module; ``MissingExtra`` if torchvision or timm is needed and cannot be imported.
    """
    source, colon, rest = name.partition(":")
    if source == "zoo" and colon:
        return _build_ours(rest, options)
    if source == "torchvision" and colon:
        return _build_torchvision(rest, options)
    if source == "timm" and colon:
        return _build_timm(rest, options)
    if not re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*", name):
        hint = nearest(f"zoo:{name}", [f"zoo:{known}" for known in MODELS]) if not colon else ""
        raise BadRequest(f"{name!r} is no model's name: write {FORMS}{hint if 'mean' in hint else ''}")
    if not allow_import:
        raise BadRequest(
            f"{name!r} would import code from {source!r}, which is not allowed here (allow_import=False)\n"
            "  do: build the model yourself and pass it, or allow the import if you trust where the name comes from"
        )
    return _call(imported_function(name), name, options)


def example_inputs(
    name: str, model: nn.Module, *, shape: Sequence[int] | None = None, batch: int = 1
) -> tuple[Tensor, ...]:
    """Inputs to trace ``model`` with, as ``build(name)`` made it: standard normal, seeded, in its dtype and device.

    ``shape``: that of one input without the batch, such as ``(1, 8, 8)``; ``None``: the model's own. That is
    ``model.input_size`` where it has one (the zoo, and yours if you set it), else timm's ``input_size`` of its
    pretrained configuration, else 3x224x224 for torchvision, or what ``INPUT_SIZES`` says. Returns a tuple of tensors
    ``[batch, *shape]``, one per input of the model.

    Raises ``BadRequest`` where no size is known, as for your own models and for torchvision's detectors.
    """
    shapes = (tuple(shape),) if shape is not None else _natural_shapes(name, model)
    if batch < 1 or any(length < 1 for one in shapes for length in one):
        raise BadRequest(f"batch={batch}, shape={shapes[0]}: all lengths must be positive")
    weight = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(batch, *one, generator=generator).to(weight.device, weight.dtype) for one in shapes)


def imported_function(name: str) -> Callable[..., object]:
    """What ``package.module:function`` names, imported; BadRequest where it is not there or cannot be called."""
    module_name, _, function_name = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise BadRequest(
            f"{name!r}: there is no module {error.name!r}\n"
            "  do: run where it can be imported, or put its folder on PYTHONPATH"
        ) from error
    except Exception as error:
        raise BadRequest(f"{name!r}: importing {module_name!r} raised {type(error).__name__}: {error}") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        known = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        what = "has no function" if function is None else "has something that cannot be called by the name"
        raise BadRequest(f"module {module_name!r} {what} {function_name!r}{nearest(function_name, known)}")
    return function


def _build_ours(name: str, options: dict[str, Any]) -> nn.Module:
    if name not in MODELS:
        raise BadRequest(f"the zoo has no {name!r}{nearest(name, MODELS)}")
    parameters = inspect.signature(MODELS[name]).parameters
    for option in options:
        if option not in parameters:
            raise BadRequest(f"zoo:{name} has no option {option!r}{nearest(option, parameters)}")
    return MODELS[name](**options)


def _build_torchvision(name: str, options: dict[str, Any]) -> nn.Module:
    models = _library("torchvision").models
    if name not in models.list_models():
        raise BadRequest(f"torchvision has no model {name!r}{nearest(name, models.list_models())}")
    function = models.get_model_builder(name)
    parameters = inspect.signature(function).parameters
    # a segmentation or detection network fetches weights for its backbone unless told not to
    quiet: dict[str, Any] = {"weights_backbone": None} if "weights_backbone" in parameters else {}
    if name.removeprefix("quantized_") in ("googlenet", "inception_v3"):
        quiet["init_weights"] = True  # its default, which warns that it will change
    return _call(function, f"torchvision:{name}", {**quiet, **options})


def _build_timm(name: str, options: dict[str, Any]) -> nn.Module:
    _library("torchvision")  # timm imports it too, and would fail the same way
    timm = _library("timm")
    known = timm.list_models()
    if name.partition(".")[0] not in known:
        raise BadRequest(f"timm has no model {name!r}{nearest(name, known)}")

    def function(**keywords: Any) -> object:
        return timm.create_model(name, **keywords)

    model = _call(function, f"timm:{name}", options)
    config = getattr(model, "pretrained_cfg", None)
    if isinstance(config, dict) and "input_size" in config:
        # the configuration describes the published weights; the options may have made another network
        channels, height, width = config["input_size"]
        size = options.get("img_size", (height, width))
        height, width = (size, size) if isinstance(size, int) else size
        config["input_size"] = (options.get("in_chans", channels), height, width)
    return model


def _call(function: Callable[..., object], name: str, options: dict[str, Any]) -> nn.Module:
    """The module that ``function(**options)`` returns, or ``BadRequest``."""
    try:
        model = function(**options)
    except Exception as error:
        given = ", ".join(f"{key}={value!r}" for key, value in options.items())
        raise BadRequest(f"building {name}({given}) raised {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise BadRequest(f"{name!r} returned {type(model).__name__}, not a torch.nn.Module")
    return model


def _library(name: str) -> ModuleType:
    """torchvision or timm, or ``MissingExtra``."""
    try:
        return import_torchvision() if name == "torchvision" else importlib.import_module(name)
    except (ImportError, OSError, RuntimeError) as error:
        gone = isinstance(error, ModuleNotFoundError) and error.name == name
        why = "is not installed" if gone else f"cannot be imported ({type(error).__name__}: {error})"
        raise MissingExtra(f"{name} {why}\n  do: pip install 'secateur[zoo]'") from error


def _natural_shapes(name: str, model: nn.Module) -> tuple[tuple[int, ...], ...]:
    own = getattr(model, "input_size", None)
    if not isinstance(own, tuple) and isinstance(getattr(model, "pretrained_cfg", None), dict):
        own = model.pretrained_cfg.get("input_size")  # type: ignore[union-attr, operator]
    if isinstance(own, tuple) and own and all(isinstance(length, int) for length in own):
        return (own,)
    source, _, rest = name.partition(":")
    if source != "torchvision":
        raise BadRequest(f"{name}: the size of its input is not known\n  do: give shape=(channels, height, width)")
    if type(model).__module__.startswith("torchvision.models.detection"):
        raise BadRequest(f"{name} takes a list of images of any size, not tensors; give example inputs yourself")
    size = getattr(model, "image_size", 224)  # vision transformers are built for one size
    return INPUT_SIZES.get(rest, ((3, size, size),))
