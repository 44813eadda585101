"""Telling what was done: one HTML file with tables and plots that opens anywhere, and needs nothing beside it."""

from secateur.report.content import Curve, LayerRow, Report, Row, environment, filter_norms, layer_rows
from secateur.report.page import render, write_report

__all__ = ["Curve", "LayerRow", "Report", "Row", "environment", "filter_norms", "layer_rows", "render", "write_report"]
