"""Importing torchvision where its compiled part was built for another torch.

Such a torchvision cannot load its operators, and then fails altogether with "operator torchvision::nms does not
exist", because it describes two operators that are not there; timm falls with it. All that classification networks
need is Python, so the two are declared (never implemented: calling them still fails, with torchvision's own message)
and the import is tried once more. Any other failure is left as it is.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from importlib.metadata import version
from types import ModuleType

import torch

MISSING = "operator torchvision::nms does not exist"
SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_declared: list[torch.library.Library] = []  # a declaration lives as long as its Library object


class TorchvisionMismatch(UserWarning):
    """torch and torchvision were not built for each other; only torchvision's Python part can be used."""


def import_torchvision() -> ModuleType:
    """``import torchvision``, mended if its compiled operators do not fit this torch; warns once if so.

    Raises whatever the import raises for any other reason, ``ImportError`` if it is not installed.
    """
    try:
        return importlib.import_module("torchvision")
    except RuntimeError as error:
        if MISSING not in str(error) or _declared:
            raise
    library = torch.library.Library("torchvision", "DEF")
    for schema in SCHEMAS:
        library.define(schema)
    _declared.append(library)
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
    torchvision = importlib.import_module("torchvision")
    warnings.warn(
        f"torchvision {version('torchvision')} does not fit torch {torch.__version__}: its compiled operators (nms, "
        "roi_align, image decoding) are missing, its networks work. For all of it install a matching pair from one "
        "and the same package index: pip install --upgrade --force-reinstall torch torchvision",
        TorchvisionMismatch,
        stacklevel=2,
    )
    return torchvision
