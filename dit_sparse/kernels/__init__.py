"""Attention kernels: backends that compute an `AttentionPlan`, dense attention, and block scores."""

from dit_sparse.kernels.backend import (
    BACKENDS,
    Backend,
    BackendUnavailableError,
    get_backend,
    register,
    select,
)
from dit_sparse.kernels.block_mass import block_mass, pooled_blocks, sample_rows
from dit_sparse.kernels.dense import Fa3Backend, SdpaBackend, XformersBackend, dense_attention
from dit_sparse.kernels.flash_attention_4 import FlashAttention4Backend
from dit_sparse.kernels.flashinfer import FlashInferBackend
from dit_sparse.kernels.flex import FlexBackend
from dit_sparse.kernels.gather import GatherBackend
from dit_sparse.kernels.hopper_backend import HopperBackend
from dit_sparse.kernels.reference import ReferenceBackend
from dit_sparse.kernels.triton_backend import TritonBackend

__all__ = [
    "BACKENDS",
    "Backend",
    "BackendUnavailableError",
    "block_mass",
    "dense_attention",
    "get_backend",
    "pooled_blocks",
    "register",
    "sample_rows",
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
