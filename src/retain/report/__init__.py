"""What a run learned and what it lost, for a person to read: one HTML file, or tables in the terminal."""

from retain.report.html import render_html, write_report
from retain.report.tables import comparison, losses_table, matrix_table, print_summary

__all__ = ["comparison", "losses_table", "matrix_table", "print_summary", "render_html", "write_report"]
