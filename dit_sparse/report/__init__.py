"""One HTML file of a `generate`, `compare` or `bench` run: `load` it, then `write_page`."""

from dit_sparse.report.load import load
from dit_sparse.report.write import write_page

__all__ = ["load", "write_page"]
