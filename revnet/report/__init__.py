"""What `revnet-profile` reports: a table in the terminal, and for a sweep tables, plots and a page in its directory."""

from revnet.report.table import end_sweep, headline, print_cell
from revnet.report.write import write_report

__all__ = ["headline", "print_cell", "end_sweep", "write_report"]
