"""Benchmarks of the GPU kernels: correctness first, then times in turns, as ratios to the fastest dense attention."""

from dit_sparse.bench.report import print_table, run_sections, write_report
from dit_sparse.bench.shapes import SHAPES

__all__ = ["SHAPES", "print_table", "run_sections", "write_report"]
