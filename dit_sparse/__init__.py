"""Sparse attention for Hugging Face diffusers' DiT pipelines: one line to switch on, nothing to compile."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from dit_sparse.attention import skipping_attention, sparse_attention
    from dit_sparse.methods import (
        AdaSpa,
        AnchorAttention,
        BigBird,
        Blade,
        Dense,
        DfsAttention,
        Dhsa,
        DraftAttention,
        LeastError,
        LoSA,
        LServe,
        Lvsa,
        MInference,
        Neighborhood,
        Oracle,
        Paro,
        PbsAttention,
        Pisa,
        ProxyAttention,
        RadialAttention,
        Sale,
        SeerAttention,
        SkipSoftmax,
        SlidingTile,
        SolAttention,
        SpargeAttention,
        SparseVideoGen,
        SparseVideoGen2,
        Strided,
        SvgEar,
        Svoo,
        VMoBA,
        XAttention,
    )
    from dit_sparse.pipelines import (
        SparseCogVideoXImageToVideoPipeline,
        SparseCogVideoXPipeline,
        SparseFluxPipeline,
        SparseHunyuanVideoImageToVideoPipeline,
        SparseHunyuanVideoPipeline,
        SparseWanImageToVideoPipeline,
        SparseWanPipeline,
        load_pipeline,
        parallelize,
        save_plan,
        sparsify,
        statistics,
        unsparsify,
        velocity_ramp,
    )
    from dit_sparse.presets import preset
    from dit_sparse.safety import safe_remainder
    from dit_sparse.schedule import Schedule
    from dit_sparse.types import AttentionPlan, BlockMask, Site, TokenGrid, TokenOrder

# Names load on first use: kernels alone need no diffusers, and the command line's help needs no torch.
_HOMES = {
    "attention": ("skipping_attention", "sparse_attention"),
    "methods": (
        "SeerAttention",
        "Sale",
        "Dhsa",
        "LServe",
        "LeastError",
        "AnchorAttention",
        "ProxyAttention",
        "PbsAttention",
        "Strided",
        "BigBird",
        "MInference",
        "Oracle",
        "AdaSpa",
        "Dense",
        "Neighborhood",
        "Paro",
        "SparseVideoGen",
        "SparseVideoGen2",
        "RadialAttention",
        "SkipSoftmax",
        "SlidingTile",
        "XAttention",
        "DraftAttention",
        "SpargeAttention",
        "VMoBA",
        "Blade",
        "SvgEar",
        "Svoo",
        "SolAttention",
        "Pisa",
        "Lvsa",
        "LoSA",
        "DfsAttention",
    ),
    "pipelines": (
        "SparseCogVideoXImageToVideoPipeline",
        "SparseCogVideoXPipeline",
        "SparseFluxPipeline",
        "SparseHunyuanVideoImageToVideoPipeline",
        "SparseHunyuanVideoPipeline",
        "SparseWanImageToVideoPipeline",
        "SparseWanPipeline",
        "load_pipeline",
        "parallelize",
        "save_plan",
        "sparsify",
        "statistics",
        "unsparsify",
        "velocity_ramp",
    ),
    "presets": ("preset",),
    "safety": ("safe_remainder",),
    "schedule": ("Schedule",),
    "types": ("AttentionPlan", "BlockMask", "Site", "TokenGrid", "TokenOrder"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "AdaSpa",
    "AnchorAttention",
    "AttentionPlan",
    "BigBird",
    "Blade",
    "BlockMask",
    "Dense",
    "DfsAttention",
    "Dhsa",
    "DraftAttention",
    "LServe",
    "LeastError",
    "LoSA",
    "Lvsa",
    "MInference",
    "Neighborhood",
    "Oracle",
    "Paro",
    "PbsAttention",
    "Pisa",
    "ProxyAttention",
    "RadialAttention",
    "Sale",
    "Schedule",
    "SeerAttention",
    "Site",
    "SkipSoftmax",
    "SlidingTile",
    "SolAttention",
    "SpargeAttention",
    "SparseCogVideoXImageToVideoPipeline",
    "SparseCogVideoXPipeline",
    "SparseFluxPipeline",
    "SparseHunyuanVideoImageToVideoPipeline",
    "SparseHunyuanVideoPipeline",
    "SparseVideoGen",
    "SparseVideoGen2",
    "SparseWanImageToVideoPipeline",
    "SparseWanPipeline",
    "Strided",
    "SvgEar",
    "Svoo",
    "TokenGrid",
    "TokenOrder",
    "VMoBA",
    "XAttention",
    "__version__",
    "load_pipeline",
    "parallelize",
    "preset",
    "safe_remainder",
    "save_plan",
    "skipping_attention",
    "sparse_attention",
    "sparsify",
    "statistics",
    "unsparsify",
    "velocity_ramp",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'dit_sparse' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"dit_sparse.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
