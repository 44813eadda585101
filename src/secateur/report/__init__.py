"""Telling what was done: one HTML file with tables and plots that opens anywhere, and needs nothing beside it."""

from secateur.report.canvas import standalone
from secateur.report.comparisons import Comparison, compared
from secateur.report.content import (
    Curve,
    Filters,
    LayerRow,
    Report,
    Row,
    Whole,
    Zeroed,
    environment,
    filter_norms,
    layer_rows,
)
from secateur.report.filters import first_filters
from secateur.report.page import render, write_report
from secateur.report.records import parse_report, report_json
from secateur.report.sensitivities import importance_figure, sensitivity_figure
from secateur.report.turnovers import turnover_figure

__all__ = [
    "Comparison",
    "Curve",
    "Filters",
    "LayerRow",
    "Report",
    "Row",
    "Whole",
    "Zeroed",
    "compared",
    "environment",
    "filter_norms",
    "first_filters",
    "importance_figure",
    "layer_rows",
    "parse_report",
    "render",
    "report_json",
    "sensitivity_figure",
    "standalone",
    "turnover_figure",
    "write_report",
]
