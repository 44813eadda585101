"""Sensitivity: how much of each group can go, found by trying, and the ratios that follow from it."""

from secateur.sensitivities.choice import ratios_from
from secateur.sensitivities.curves import GroupCurve, Sensitivity
from secateur.sensitivities.sweep import sensitivity

__all__ = ["GroupCurve", "Sensitivity", "ratios_from", "sensitivity"]
