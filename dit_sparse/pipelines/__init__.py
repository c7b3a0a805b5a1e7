"""Where diffusers' pipelines and the toolkit meet; the only package beside `demo` that imports diffusers."""

from typing import TYPE_CHECKING, Any

from dit_sparse.pipelines.context_parallel import parallelize
from dit_sparse.pipelines.loading import ModelError, load_pipeline
from dit_sparse.pipelines.observe import Observer, ValueObserver, observe, observe_values
from dit_sparse.pipelines.sparsify import check, save_plan, session_of, sparsify, statistics, token_grid, unsparsify
from dit_sparse.pipelines.statistics import RunStatistics
from dit_sparse.pipelines.strict import NotSparseError
from dit_sparse.pipelines.trace import Trace, record_trace
from dit_sparse.pipelines.velocity import velocity_ramp

if TYPE_CHECKING:
    from dit_sparse.pipelines.sparse_pipelines import (
        SparseCogVideoXImageToVideoPipeline,
        SparseCogVideoXPipeline,
        SparseFluxPipeline,
        SparseHunyuanVideoImageToVideoPipeline,
        SparseHunyuanVideoPipeline,
        SparseWanImageToVideoPipeline,
        SparseWanPipeline,
    )

__all__ = [
    "ModelError",
    "NotSparseError",
    "Observer",
    "RunStatistics",
    "SparseCogVideoXImageToVideoPipeline",
    "SparseCogVideoXPipeline",
    "SparseFluxPipeline",
    "SparseHunyuanVideoImageToVideoPipeline",
    "SparseHunyuanVideoPipeline",
    "SparseWanImageToVideoPipeline",
    "SparseWanPipeline",
    "Trace",
    "ValueObserver",
    "check",
    "load_pipeline",
    "observe",
    "observe_values",
    "parallelize",
    "record_trace",
    "save_plan",
    "session_of",
    "sparsify",
    "statistics",
    "token_grid",
    "unsparsify",
    "velocity_ramp",
]


def __getattr__(name: str) -> Any:
    # Their diffusers classes bring the text and image encoders of all families along, which `sparsify` does not need.
    if not (name.startswith("Sparse") and name in __all__):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from dit_sparse.pipelines import sparse_pipelines

    return getattr(sparse_pipelines, name)
