"""The GPU kernels as one operator of torch: what `torch.compile` traces and CUDA graphs capture.

It stands between the backends, which know plans, and the launchers, which know tensors and sizes. Nothing here waits
for the device: the sizes of blocks are read once an order, and partial blocks are packed once a plan.
"""

# The operator's schema is read from its annotations, so they must not be strings.

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor

from dit_sparse.kernels.block_layout import BlockLayout
from dit_sparse.kernels.flash_attention_3 import positive_scale
from dit_sparse.kernels.partial_bits import partial_bits
from dit_sparse.kernels.remainder import RemainderTerms, remainder_terms
from dit_sparse.types import AttentionPlan, BlockGeometry, Remainder

__all__ = ["Call", "block_sparse", "register_launcher"]

# Of a remainder's terms at a time; heads go through in groups.
_TERMS_BYTES = 512 << 20


@dataclass(frozen=True)
class Call:
    """All that a launcher needs; every tensor is as in `BlockMask` and `Backend.forward`.

    Args:
        q, k, v, out: `[B, H, N, D]`, contiguous in the last dimension.
        lse: `[B, H, Nq]` float32, or `None` if it is not wanted.
        q_offsets, k_offsets, counts, indices, partial_counts, partial_indices: the block mask's lists.
        bits: `partial_bits` of the plan; `None` without partial blocks.
        q_blocks, k_blocks: sizes of the blocks.
        scale: factor of the scores, above 0.
        terms: of the remainder, means and slopes in the dtype of `q`; `None` without one.
        skip_threshold: as in `AttentionPlan`; above 0 the kernel skips.
        skipped: `[B, H, Mq]` int32, how many query-key pairs each query block skips; `None` where nothing is.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    lse: Tensor | None
    q_offsets: Tensor
    k_offsets: Tensor
    counts: Tensor
    indices: Tensor
    partial_counts: Tensor
    partial_indices: Tensor
    bits: Tensor | None
    q_blocks: BlockGeometry
    k_blocks: BlockGeometry
    scale: float
    terms: RemainderTerms | None = None
    skip_threshold: float = 0.0
    skipped: Tensor | None = None

    def heads(self, start: int, stop: int) -> "Call":
        """The call of some heads alone."""
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        own = {name: x[:, start:stop] if x.shape[1] > 1 else x for name, x in tensors.items()}
        return replace(self, **own)  # type: ignore[arg-type]


_launchers: dict[str, Callable[[Call], None]] = {}


def register_launcher(kernel: str, launch: Callable[[Call], None]) -> None:
    """Make `launch` the kernel that `block_sparse` calls by the name `kernel`; it fills `out`, `lse` and `skipped`."""
    _launchers[kernel] = launch


def block_sparse(
    kernel: str, q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, scale: float, return_lse: bool
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Attention under `plan` by one of the registered kernels; arguments and results as in `CountingBackend`."""
    mask = plan.block_mask
    bits = partial_bits(plan, q.shape[0], q.shape[1])
    partial = (None, None) if bits is None else (mask.partial_counts, mask.partial_indices)
    q_blocks, k_blocks = list(plan.q_order.geometry), list(plan.kv_order.geometry)
    remainder = "none" if mask.is_full else plan.remainder
    kept = None if remainder == "none" else mask.kept_blocks
    own = None if remainder == "none" else plan.head_remainders
    lists = mask.q_offsets, mask.k_offsets, mask.kv_counts, mask.kv_indices, *partial, bits, kept, own
    # Only a compiler needs the operator, and its dispatch costs time on the host.
    attend = _operator if torch.compiler.is_compiling() else _attend
    options = scale, remainder, plan.skip_threshold, return_lse, kernel
    out, lse, skipped = attend(q, k, v, *lists, q_blocks, k_blocks, *options)
    return out, lse if return_lse else None, skipped


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_offsets: Tensor,
    k_offsets: Tensor,
    counts: Tensor,
    indices: Tensor,
    partial_counts: Tensor | None,
    partial_indices: Tensor | None,
    bits: Tensor | None,
    kept: Tensor | None,
    head_remainders: Tensor | None,
    q_blocks: list[int],
    k_blocks: list[int],
    scale: float,
    remainder: str,
    skip_threshold: float,
    return_lse: bool,
    kernel: str,
) -> tuple[Tensor, Tensor, Tensor]:
    out, lse, skipped = _outputs(q, v, q_offsets, skip_threshold, return_lse)
    if indices.shape[-1] == 0:  # a mask that keeps nothing may have lists without room
        indices = indices.new_zeros(*indices.shape[:-1], 1)
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    q, scale = positive_scale(q, scale)  # the kernels take the maximum before they scale
    # Full lists stand in for partial ones that are not there; kernels do not read them.
    call = Call(
        q=q,
        k=k,
        v=v,
        out=out,
        lse=lse if return_lse else None,
        q_offsets=_packed(q_offsets),
        k_offsets=_packed(k_offsets),
        counts=_packed(counts),
        indices=_packed(indices),
        partial_counts=_packed(counts if partial_counts is None else partial_counts),
        partial_indices=_packed(indices if partial_indices is None else partial_indices),
        bits=bits,
        q_blocks=BlockGeometry(*q_blocks),
        k_blocks=BlockGeometry(*k_blocks),
        scale=scale,
        skip_threshold=skip_threshold,
        skipped=skipped if skip_threshold else None,
    )
    with torch.cuda.device(q.device) if q.is_cuda else contextlib.nullcontext():
        for part in _with_terms(call, kept, cast(Remainder, remainder), head_remainders):
            _launchers[kernel](part)
    return out, lse, skipped


def _with_terms(
    call: Call, kept: Tensor | None, remainder: Remainder, head_remainders: Tensor | None
) -> Iterator[Call]:
    """`call` with the terms of its remainder, in groups of heads whose terms fit in `_TERMS_BYTES`."""
    if kept is None:
        yield call
        return
    batch, heads, _, dim = call.q.shape
    q_blocks, k_blocks = kept.shape[-2:]
    slopes = 0 if remainder == "mean" else (q_blocks + k_blocks) * dim * call.v.shape[-1] * call.q.element_size()
    size = max(1, _TERMS_BYTES // max(1, batch * (3 * 4 * q_blocks * k_blocks + slopes)))
    for start in range(0, heads, size):
        part = call.heads(start, start + size)
        q_layout, k_layout = (
            BlockLayout(offsets, blocks, x.shape[2])
            for offsets, blocks, x in ((part.q_offsets, part.q_blocks, part.q), (part.k_offsets, part.k_blocks, part.k))
        )
        own = kept[:, start : start + size] if kept.shape[1] > 1 else kept
        levels = head_remainders
        if levels is not None and levels.shape[1] > 1:
            levels = levels[:, start : start + size]
        given = part.q, part.k, part.v, q_layout, k_layout, own, part.scale, remainder, levels
        yield replace(part, terms=remainder_terms(*given, compact=part.q.element_size() == 2))


_operator = torch.library.custom_op("dit_sparse::block_sparse", mutates_args=())(_attend)


@_operator.register_fake
def _fake(q: Tensor, k: Tensor, v: Tensor, q_offsets: Tensor, *rest: object) -> tuple[Tensor, Tensor, Tensor]:
    skip_threshold, return_lse = cast(tuple[float, bool], rest[-3:-1])
    return _outputs(q, v, q_offsets, skip_threshold, return_lse)


def _packed(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _outputs(
    q: Tensor, v: Tensor, q_offsets: Tensor, skip_threshold: float, return_lse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Output with the strides of `q` where it may have them, and row sums and skipped pairs, empty where not wanted."""
    out = torch.empty_like(q) if v.shape[-1] == q.shape[-1] else q.new_empty(*q.shape[:-1], v.shape[-1])
    if out.stride(-1) != 1:
        out = torch.empty_like(out, memory_format=torch.contiguous_format)
    lse = q.new_empty(q.shape[:-1] if return_lse else (0, 0, 0), dtype=torch.float32)
    counted = (*q.shape[:2], q_offsets.shape[-1] - 1) if skip_threshold else (0, 0, 0)
    return out, lse, q.new_zeros(counted, dtype=torch.int32)
