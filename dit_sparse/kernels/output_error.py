"""Error of the output that each key block would leave if its mean stood in for it: what `lea` selects by.

For a query i of block I with softmax weights p_t and output o, and block j with mean key k_j, mean value v_j and weight
a = B_j exp(scale * q_i . k_j - lse_i), which is 0 where the block leaves no remainder,

    error[i, j] = |sum over t in j of p_t (v_t - o) - a (v_j - o)|^2,

to first order the squared change of o. A few queries of each block are looked at, and each of them exactly.
"""

from __future__ import annotations

import math
import weakref
from typing import NamedTuple

import torch
from torch import Tensor

from dit_sparse.kernels.block_layout import BlockLayout
from dit_sparse.kernels.dense import dense_attention
from dit_sparse.kernels.hopper_search import hopper_takes, search_on_hopper
from dit_sparse.kernels.moments import block_moments
from dit_sparse.kernels.remainder import LARGEST_SPREAD, remainder_terms, score_spread
from dit_sparse.kernels.score_tiles import ScoreBackend, use_triton
from dit_sparse.kernels.triton_launch import interpreted, on_device_of, padded, rows_of
from dit_sparse.types import TokenOrder

__all__ = ["Probes", "attend_rows", "output_errors", "scattered_places", "scattered_rows"]

_CHUNK_SCORES = 3 << 17  # with what is made of them they stay in a core's cache
_CHUNK_SCORES_GPU = 1 << 26
_SPAN = 128  # key blocks that one program goes through


class Probes(NamedTuple):
    """The queries that are looked at, with what their attention is.

    Args:
        q, out: `[B, H, R, D]` and `[B, H, R, DV]`, as many of each query block in turn.
        lse: `[B, H, R]`.
    """

    q: Tensor
    out: Tensor
    lse: Tensor

    def squares(self, order: TokenOrder) -> Tensor:
        """`[B, H, M]` squared output summed over the queries of each block, as far as those looked at stand for it."""
        squares = self.out.to(torch.promote_types(self.out.dtype, torch.float32)).square().sum(-1)
        return squares.unflatten(2, (order.num_blocks, -1)).mean(3) * order.block_sizes


class _Means(NamedTuple):
    """`keys` `[B, H, Mk, D]`, `values` `[B, H, Mk, DV]`, and `bias` `[B, H, Mq, Mk]`, log of their sizes or -inf."""

    keys: Tensor
    values: Tensor
    bias: Tensor


@torch.no_grad()
def attend_rows(q: Tensor, k: Tensor, v: Tensor, q_order: TokenOrder, rows: int, scale: float | None = None) -> Probes:
    """Dense attention of `rows` queries of each block; arguments as in `output_errors`, which takes the result."""
    sampled = q.index_select(2, _positions(q_order, rows))
    return Probes(sampled, *dense_attention(sampled, k, v, scale=scale, return_lse=True))


@torch.no_grad()
def output_errors(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_order: TokenOrder,
    kv_order: TokenOrder,
    *,
    rows: int = 8,
    scale: float | None = None,
    backend: ScoreBackend = "auto",
    probes: Probes | None = None,
) -> Tensor:
    """Squared error of the output that leaving each key block to its mean makes, from a few queries a block.

    Dense attention of `rows` queries a block, and once more as much to tell the blocks apart. What the remainder "mean"
    leaves out counts as its whole: a block whose keys spread too far, see `AttentionPlan`.

    Args:
        q, k, v: `[B, H, N, D]`, in the orders' positions.
        q_order, kv_order: orders whose blocks all heads share.
        rows: queries of each block, as `scattered_rows` takes them.
        scale: of the scores; `D ** -0.5` by default.
        backend: "triton" is one fused kernel for NVIDIA GPUs, "torch" runs anywhere; "auto" takes the former for CUDA
            tensors of up to 256 channels in float32, float16 or bfloat16, or on H100 and H200 the kernel for these
            where it takes the call: `hopper_search.hopper_takes`.
        probes: what `attend_rows` gave for the same arguments, if it has been called already.

    Returns:
        `[B, H, Mq, Mk]` float32 (float64 for float64), summed over the queries of the block as far as those looked at
        stand for it.

    Raises:
        ValueError: no rows, shapes that do not fit, or orders whose blocks heads do not share.
        BackendUnavailableError: the backend cannot run here.

    Source: the idea of choosing by error is SVG-EAR's (arXiv 2603.08982), which bounds it from mean queries.
    """
    if k.shape != v.shape[:3] + k.shape[3:] or q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        raise ValueError(f"q, k, v must agree in [B, H, N, D], got {[tuple(x.shape) for x in (q, k, v)]}")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q_layout, k_layout = (BlockLayout.of_head(order, 0, 0) for order in (q_order, kv_order))
    if use_triton(backend, q, k, v):
        probes = attend_rows(q, k, v, q_order, rows, scale) if probes is None else probes
        given = (probes.q.contiguous(), probes.out.contiguous(), probes.lse.contiguous())
        spread = score_spread(block_moments(q, q_layout, centred=False), block_moments(k, k_layout), scale)
        if backend == "auto" and hopper_takes(k, v, kv_order):
            return search_on_hopper(given, k, v, spread, LARGEST_SPREAD, q_order, kv_order, rows, scale)
        return _by_triton(given, k, v, spread, q_order, kv_order, rows, scale)
    nothing = torch.zeros(1, dtype=torch.bool, device=q.device)
    terms = remainder_terms(q, k, v, q_layout, k_layout, nothing, scale, "mean")
    # It comes by the output and row sums on its way.
    sampled = q.index_select(2, _positions(q_order, rows)) if probes is None else probes.q
    errors = _by_chunks(sampled, _Means(terms.keys, terms.values, terms.bias), k, v, k_layout, rows, scale)
    return errors.unflatten(2, (-1, rows)).mean(3) * q_order.block_sizes[..., None]


def scattered_rows(offsets: Tensor, rows: int) -> Tensor:
    """Positions of `rows` queries of each block, one in each of as many stretches, each at a place of its own in it.

    Tokens of a 3-D tile at equal distances would all be of one column; these are of every row and, where the tile's
    width is `rows`, of every column. A block of fewer tokens has some of them several times.

    Args:
        offsets: `[1, 1, M+1]` int32 block bounds.
        rows: at least 1.

    Returns:
        `[M, rows]` int64; of an empty block any position.

    Raises:
        ValueError: no rows, or bounds that heads do not share.
    """
    if offsets.shape[:2] != (1, 1):
        raise ValueError(f"offsets must be [1, 1, M+1] to sample rows, got {tuple(offsets.shape)}: share them")
    if rows < 1:
        raise ValueError(f"rows must be at least 1, got {rows}: 8 is usual")
    within = scattered_places(offsets.diff(dim=-1)[0, 0], rows)
    return (offsets[0, 0, :-1, None].long() + within).clamp(max=offsets[0, 0, -1] - 1)


def scattered_places(sizes: Tensor, rows: int) -> Tensor:
    """`[..., rows]` int64 places in blocks of `sizes` `[...]` tokens, as `scattered_rows` takes them."""
    # A step near the golden section that has no divisor in common visits every place once, neighbours far apart.
    step = next(s for s in range(max(1, round(0.618 * rows)), 2 * rows + 1) if math.gcd(s, rows) == 1)
    number = torch.arange(rows, device=sizes.device)
    return sizes[..., None].long() * (number * rows + number * step % rows) // (rows * rows)


_known: weakref.WeakKeyDictionary[TokenOrder, dict[int, Tensor]] = weakref.WeakKeyDictionary()


def _positions(order: TokenOrder, rows: int) -> Tensor:
    """`[M * rows]` int64 of `scattered_rows`, which last as long as the order."""
    known = _known.setdefault(order, {})
    if rows not in known:
        # Tensors made in inference mode could not be used where gradients are recorded.
        with torch.inference_mode(False):
            known[rows] = scattered_rows(order.offsets, rows).flatten()
    return known[rows]


def _by_chunks(q: Tensor, means: _Means, k: Tensor, v: Tensor, layout: BlockLayout, rows: int, scale: float) -> Tensor:
    """`[B, H, R, Mk]` of the queries `q` `[B, H, R, D]` in plain torch, a few rows of scores at a time."""
    compute = torch.float64 if k.dtype == torch.float64 else torch.float32
    batch, heads, count, _ = q.shape
    found = torch.empty(batch, heads, count, means.keys.shape[2], dtype=compute, device=k.device)
    limit = _CHUNK_SCORES if k.device.type == "cpu" else _CHUNK_SCORES_GPU
    step = max(1, limit // max(1, k.shape[2] * rows)) * rows
    outside = None
    if not layout.is_even:
        place = torch.arange(layout.blocks.largest, device=k.device)
        outside = (place >= layout.sizes[0, 0, :, None]).flatten()
    for b in range(batch):
        for h in range(heads):
            keys, values = (layout.split(x[b : b + 1, h : h + 1].to(compute))[0, 0] for x in (k, v))
            of_keys, of_values, bias = (x[b, h].to(compute) for x in means)
            apart, keys = values - of_values[:, None], keys.flatten(0, 1).T.contiguous()
            queries = q[b, h].to(compute) * scale
            mean_scores = queries @ of_keys.T + bias.repeat_interleave(rows, 0)
            for start in range(0, count, step):
                part = slice(start, start + step)
                scores = queries[part] @ keys
                if outside is not None:
                    scores.masked_fill_(outside, -math.inf)
                found[b, h, part] = _errors(scores, mean_scores[part], apart, of_values)
    return found


def _errors(scores: Tensor, mean_scores: Tensor, apart: Tensor, means: Tensor) -> Tensor:
    """`[R, Mk]` of a few queries of one head.

    An error is that of the values around their mean and that of the weight of the mean,

        sum of p_t (v_t - o) - a (v_j - o) = sum of p_t (v_t - v_j) + (sum of p_t - a) (v_j - o),

    and everything but `o` may be larger by the sum of a query's weights until the end.

    Args:
        scores: `[R, Mk * L]` with all keys, overwritten; -inf where there is none.
        mean_scores: `[R, Mk]` with the blocks' means, their bias added.
        apart: `[Mk, L, DV]` values less their block's mean.
        means: `[Mk, DV]` of the values.
    """
    largest = scores.amax(-1, keepdim=True)
    weights = scores.sub_(largest).exp_().unflatten(1, apart.shape[:2])
    mass = weights.sum(-1)
    total = mass.sum(-1, keepdim=True)
    change = torch.bmm(weights.transpose(0, 1), apart)  # [Mk, R, DV]
    out = (change.sum(0) + mass @ means) / total
    missing = (mass - (mean_scores - largest).exp_()).T[..., None]
    change.addcmul_(missing, means[:, None]).addcmul_(missing, out, value=-1)
    return change.square_().sum(-1).T / total.square()


def _by_triton(
    probes: tuple[Tensor, Tensor, Tensor],
    k: Tensor,
    v: Tensor,
    spread: Tensor,
    q_order: TokenOrder,
    kv_order: TokenOrder,
    rows: int,
    scale: float,
) -> Tensor:
    """As `search_on_hopper`, by the portable kernel."""
    import triton

    from dit_sparse.kernels.output_error_kernel import output_error_kernel

    (q, out, lse), k, v = probes, rows_of(k), rows_of(v)
    batch, heads, _, dim = q.shape
    q_blocks, blocks, v_dim = q_order.num_blocks, kv_order.num_blocks, v.shape[-1]
    launch = _launch(k.dtype, max(dim, v_dim), kv_order.geometry.largest)
    slots = 1 << (rows - 1).bit_length()
    parts = max(1, slots // launch["BLOCK_M"])
    found = torch.empty(batch, heads, q_blocks * parts, blocks, dtype=torch.float32, device=k.device)
    tiles = triton.cdiv(q_blocks * slots, launch["BLOCK_M"])
    with on_device_of(k):
        output_error_kernel[tiles * triton.cdiv(blocks, _SPAN), heads, batch](
            q, out, lse, k, v, spread, found, q_order.offsets.contiguous(), kv_order.offsets.contiguous(),
            *q.stride()[:3], *out.stride()[:3], *lse.stride()[:2], *k.stride()[:3], *v.stride()[:3],
            *spread.stride()[:3], *found.stride()[:3], q_blocks, blocks, rows, scale, LARGEST_SPREAD,
            SLOTS=slots, D=dim, DV=v_dim, BLOCK_D=padded(dim), BLOCK_DV=padded(v_dim), SPAN=_SPAN,
            SINGLE=kv_order.geometry.largest <= launch["BLOCK_N"], UPCAST=interpreted(), **launch,
        )  # fmt: skip
    return found if parts == 1 else found.unflatten(2, (q_blocks, parts)).sum(3)


def _launch(dtype: torch.dtype, dim: int, largest: int) -> dict[str, int]:
    """Tiles that fit in the shared memory of every GPU."""
    if dtype == torch.float32 or interpreted():
        return {"BLOCK_M": 32, "BLOCK_N": min(32, padded(largest)), "num_warps": 4, "num_stages": 2}
    block_n = min(64 if dim <= 128 else 32, padded(largest))
    return {"BLOCK_M": 64, "BLOCK_N": block_n, "num_warps": 4, "num_stages": 2}
