"""The report of a comparison: tables, figures, one HTML page. Reads files only."""

from __future__ import annotations

from mim.report.collect import read_comparison
from mim.report.page import summary_line, write_report
from mim.report.serve import report_server

__all__ = ["read_comparison", "report_server", "summary_line", "write_report"]
