"""The report of a run."""

from gradpursuit.report.write import write_report

__all__ = ["write_report"]
