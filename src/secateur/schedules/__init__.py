"""Schedules: when to cut, and what to do to the weights before, around a training loop that may be yours or ours.

``iterative`` and ``layer_by_layer`` cut and train by turns (their single steps are functions too); ``zeroing`` and
``growing_penalty`` are bundles of hooks for the loop that trains, with a plan at the end; a ``Turnover`` is an entry of
the history that zeroing keeps.
"""

from secateur.core import Turnover
from secateur.schedules.options import Options, Start
from secateur.schedules.penalties import GrowingPenalty, Growth, growing_penalty
from secateur.schedules.places import zero_
from secateur.schedules.rounds import AfterCut, Between, iterative, layer_by_layer
from secateur.schedules.steps import iterative_step, layer_step, layer_widths, starting_point
from secateur.schedules.zeros import Zeroing, zeroing

__all__ = [
    "AfterCut",
    "Between",
    "GrowingPenalty",
    "Growth",
    "Options",
    "Start",
    "Turnover",
    "Zeroing",
    "growing_penalty",
    "iterative",
    "iterative_step",
    "layer_by_layer",
    "layer_step",
    "layer_widths",
    "starting_point",
    "zero_",
    "zeroing",
]
