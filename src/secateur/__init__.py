"""secateur: make convolutional networks smaller and faster, exactly.

    plan = secateur.plan(model, example_inputs, criterion="l1", budget=secateur.Budget(keep=0.5))
    small = secateur.apply(model, plan)

``plan`` decides, as plain data; ``masked`` and ``apply`` carry a plan out, and ``apply`` proves that both agree.
"""

from secateur.artifact import load, save
from secateur.core import Budget, Criterion, Edit, Group, GroupView, Measurement, Slice
from secateur.counting import Count, count, layer_table
from secateur.criteria import CRITERIA
from secateur.errors import (
    BadArtifact,
    BadData,
    BadPlan,
    BadRequest,
    CannotCapture,
    CannotPrune,
    LawBroken,
    MissingData,
    MissingExtra,
    SecateurError,
    SecateurWarning,
    Unreachable,
    WrongModel,
    WrongOutput,
)
from secateur.graph import Graph, trace
from secateur.groups import find_groups
from secateur.heads import pool_head
from secateur.latencies import Latencies, measure_latencies
from secateur.masks import masked
from secateur.measurement import measure
from secateur.onnx_file import export_onnx
from secateur.optimisers import rebind
from secateur.pipeline import plan
from secateur.plans import Plan, compose
from secateur.quantisation import quantise_onnx
from secateur.sensitivities import GroupCurve, Sensitivity, ratios_from, sensitivity
from secateur.surgery import Applied, apply, record
from secateur.version import __version__

__all__ = [
    "CRITERIA",
    "Applied",
    "BadArtifact",
    "BadData",
    "BadPlan",
    "BadRequest",
    "Budget",
    "CannotCapture",
    "CannotPrune",
    "Count",
    "Criterion",
    "Edit",
    "Graph",
    "Group",
    "GroupCurve",
    "GroupView",
    "Latencies",
    "LawBroken",
    "Measurement",
    "MissingData",
    "MissingExtra",
    "Plan",
    "SecateurError",
    "SecateurWarning",
    "Sensitivity",
    "Slice",
    "Unreachable",
    "WrongModel",
    "WrongOutput",
    "__version__",
    "apply",
    "compose",
    "count",
    "export_onnx",
    "find_groups",
    "layer_table",
    "load",
    "masked",
    "measure",
    "measure_latencies",
    "plan",
    "pool_head",
    "quantise_onnx",
    "ratios_from",
    "rebind",
    "record",
    "save",
    "sensitivity",
    "trace",
]
