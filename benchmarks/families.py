"""One network of every architecture family of timm and torchvision: of every module that defines models, the one whose
name promises the least.

Families are read from the libraries that are installed, so that new ones are tried without anyone listing them.
"""

from __future__ import annotations

import re
from types import ModuleType

from secateur.zoo.torchvision_shim import import_torchvision

SMALL = "zepto|atto|femto|pico|nano|xxs|xx_small|xxsmall|ultratiny|xtiny|xs|x_small|xsmall|extratiny|tiny|mini|small"
LARGE = "base|medium|large|huge|giant|gigantic|enormous|xlarge|xxlarge|xl|xxl|so150m|so400m|plus|wide"
INSTEAD = {
    "torchvision.models.regnet": "regnet_x_400mf",
    "efficientnet": "efficientnet_es",
    "levit": "levit_128s",
    "metaformer": "poolformerv2_s12",
    "mobilenetv3": "mobilenetv3_small_050",
    "nfnet": "eca_nfnet_l0",
    "vgg": "vgg11_bn",
    "vision_transformer_sam": "samvit_base_patch16_224",
}
"""Module -> network, where the names mislead."""

SIZES: dict[str, int] = {
    "torchvision:vgg16_bn": 96,
    "torchvision:deeplabv3_resnet50": 112,
    "torchvision:fcn_resnet50": 112,
    "torchvision:vgg11": 96,
    "timm:cspdarknet53": 128,
    "timm:tresnet_m": 128,
    "timm:pnasnet5large": 160,
    "timm:nasnetalarge": 160,
    "timm:inception_resnet_v2": 160,
    "timm:inception_v4": 160,
    "timm:eca_nfnet_l0": 128,
    "timm:convmixer_768_32": 112,
    "timm:vgg11_bn": 96,
    "timm:mobilenetv5_300m": 256,
    "timm:csatv2": 256,
}
"""Image sides, where the network's own would only cost time."""


def smallest_of_each() -> dict[str, bool]:
    """``{network: False}`` in the form that ``build`` takes: pure or not is not known here, so nothing is asked of the
    share of convolutions that shrink; it is reported all the same."""
    models = import_torchvision().models
    import timm  # only now: it imports torchvision too

    found = [f"timm:{INSTEAD.get(m) or _smallest(timm.list_models(module=m))}" for m in timm.list_modules()]
    return dict.fromkeys([*_torchvision_families(models), *found], False)


def _torchvision_families(models: ModuleType) -> list[str]:
    families: dict[str, list[str]] = {}
    for name in models.list_models():
        families.setdefault(models.get_model_builder(name).__module__, []).append(name)
    found = []
    for module, names in families.items():
        # a detector's own forward takes lists of images and returns as many boxes as it finds
        tail = ".backbone" if module.startswith("torchvision.models.detection") else ""
        found.append(f"torchvision:{INSTEAD.get(module) or _smallest(names)}{tail}")
    return sorted(found)


def _smallest(names: list[str]) -> str:
    return min([n for n in names if not n.startswith("test_")] or names, key=_promise)


def _promise(name: str) -> tuple[float, float, int, str]:
    """Smaller comes first: the word for a size, then the first number, then the shorter name."""
    words = SMALL.split("|")
    here = [words.index(w) for w in words if re.search(rf"(^|_|(?<=[a-z0-9])){w}(_|$|\d)", name)]
    letter = {"n": 2.0, "t": 10.0, "s": 12.0, "m": 20.0, "b": 21.0, "l": 22.0, "x": 23.0, "h": 23.0}
    tail = re.search(r"_([ntsmblxh])\d?(_|$)", name)
    rank = float(min(here)) if here else letter[tail[1]] if tail else 15.0
    if re.search(rf"(^|_)({LARGE})(_|$|\d)", name):
        rank += 10
    numbers = [float(n) for n in re.findall(r"\d+", name)]
    return rank, numbers[0] if numbers else 0.0, len(name), name


__all__ = ["SIZES", "smallest_of_each"]
