"""Where diffusers' pipelines and the toolkit meet; the only package beside `demo` that imports diffusers."""

from dit_sparse.pipelines.loading import ModelError, load_pipeline
from dit_sparse.pipelines.observe import Observer, observe
from dit_sparse.pipelines.sparse_pipelines import SparseWanPipeline
from dit_sparse.pipelines.sparsify import check, save_plan, session_of, sparsify, statistics, token_grid, unsparsify
from dit_sparse.pipelines.statistics import RunStatistics

__all__ = [
    "ModelError",
    "Observer",
    "RunStatistics",
    "SparseWanPipeline",
    "check",
    "load_pipeline",
    "observe",
    "save_plan",
    "session_of",
    "sparsify",
    "statistics",
    "token_grid",
    "unsparsify",
]
