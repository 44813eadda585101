"""Quantisation after pruning: ONNX files in int8, calibrated on images.

report = quantise_onnx(small, "small.int8.onnx", example_inputs, loader, batches=8)
"""

from secateur.quantisation.batches import Calibration, read_calibration
from secateur.quantisation.int8 import (
    QuantiseReport,
    Settings,
    check_packages,
    check_target,
    quantise_file,
    quantise_onnx,
    saturates,
)
from secateur.quantisation.networks import FileNetwork, file_accuracy
from secateur.quantisation.thresholds import METHODS, Method

__all__ = [
    "METHODS",
    "Calibration",
    "FileNetwork",
    "Method",
    "QuantiseReport",
    "Settings",
    "check_packages",
    "check_target",
    "file_accuracy",
    "quantise_file",
    "quantise_onnx",
    "read_calibration",
    "saturates",
]
