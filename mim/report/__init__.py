"""The report of a comparison: tables, figures, one HTML page. Reads files only."""

from __future__ import annotations

from mim.report.page import write_report

__all__ = ["write_report"]
