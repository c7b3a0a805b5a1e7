"""Attention kernels: backends that compute an `AttentionPlan`, dense attention, and block scores."""

from dit_sparse.kernels.antidiagonal import antidiagonal_scores
from dit_sparse.kernels.backend import (
    BACKENDS,
    Backend,
    BackendUnavailableError,
    CountingBackend,
    check_remainder,
    check_skips,
    get_backend,
    refusal,
    register,
    select,
)
from dit_sparse.kernels.block_mass import block_mass, sample_rows, sampled_block_mass
from dit_sparse.kernels.dense import Fa3Backend, SdpaBackend, XformersBackend, dense_attention
from dit_sparse.kernels.flash_attention_4 import FlashAttention4Backend
from dit_sparse.kernels.flashinfer import FlashInferBackend
from dit_sparse.kernels.flex import FlexBackend
from dit_sparse.kernels.gather import GatherBackend
from dit_sparse.kernels.hopper_backend import HopperBackend
from dit_sparse.kernels.keep_best import keep_best
from dit_sparse.kernels.modulate import add_gated, gelu_tanh_, layer_norm
from dit_sparse.kernels.norm_rope import norm_rope
from dit_sparse.kernels.output_error import Probes, attend_rows, output_errors, scattered_places, scattered_rows
from dit_sparse.kernels.permute import permute, restore
from dit_sparse.kernels.pooled import pooled_blocks
from dit_sparse.kernels.reference import ReferenceBackend
from dit_sparse.kernels.remainder_error import remainder_errors
from dit_sparse.kernels.routing import Route, deviations, routed_plan
from dit_sparse.kernels.triton_backend import TritonBackend
from dit_sparse.kernels.triton_routing import check_routed_call, check_routing, routed_attention

__all__ = [
    "BACKENDS",
    "Backend",
    "BackendUnavailableError",
    "CountingBackend",
    "Probes",
    "Route",
    "add_gated",
    "antidiagonal_scores",
    "attend_rows",
    "block_mass",
    "check_remainder",
    "check_routed_call",
    "check_routing",
    "check_skips",
    "dense_attention",
    "deviations",
    "gelu_tanh_",
    "get_backend",
    "keep_best",
    "layer_norm",
    "norm_rope",
    "output_errors",
    "permute",
    "pooled_blocks",
    "refusal",
    "register",
    "remainder_errors",
    "restore",
    "routed_attention",
    "routed_plan",
    "sample_rows",
    "sampled_block_mass",
    "scattered_places",
    "scattered_rows",
    "select",
]

for _backend in (
    ReferenceBackend(),
    SdpaBackend(),
    GatherBackend(),
    HopperBackend(),
    TritonBackend(),
    FlexBackend(),
    XformersBackend(),
    Fa3Backend(),
    FlashAttention4Backend(),
    FlashInferBackend(),
):
    register(_backend)
