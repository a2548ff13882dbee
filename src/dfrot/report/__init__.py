"""Result records and inspections as figures, tables and one HTML page."""

from dfrot.report.page import report

__all__ = ["report"]
