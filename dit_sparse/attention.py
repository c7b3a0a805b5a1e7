"""`sparse_attention`: the kernel layer's public door, for anyone who has q, k, v and a plan."""

from __future__ import annotations

from typing import Literal, cast, overload

import torch
from torch import Tensor

from dit_sparse.kernels import Backend, CountingBackend, Route, permute, restore, routed_attention, select
from dit_sparse.types import AttentionPlan, Remainder, TokenOrder


@overload
def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: AttentionPlan,
    *,
    scale: float | None = ...,
    backend: str | Backend = ...,
    in_order: bool = ...,
) -> Tensor: ...


@overload
def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: AttentionPlan,
    *,
    scale: float | None = ...,
    backend: str | Backend = ...,
    in_order: bool = ...,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: AttentionPlan,
    *,
    scale: float | None = None,
    backend: str | Backend = "auto",
    in_order: bool = False,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention over the query-key blocks that `plan` keeps.

    Args:
        q, k, v: `[B, H, N, D]` in the sequence's own order, any strides, one floating dtype and device.
        plan: the token orders and the block mask, on the same device.
        scale: factor on q.k; `None` is 1 / sqrt(D).
        backend: a name in `dit_sparse.kernels.BACKENDS`, or "auto" for the fastest one that can compute this call; or
            what `dit_sparse.kernels.select` gave for this very call, which is not checked again.
        in_order: `q, k, v` stand in the plan's orders already, and so shall the results; nothing is moved.
        return_lse: also return the natural-log row sums.

    Returns:
        `out` `[B, H, N, D]` in `q`'s dtype and order of tokens, and with `return_lse` also `lse` `[B, H, N]` float32. A
        query that keeps no key gives zeros and -inf.

    Raises:
        ValueError: tensors or a plan that do not fit each other, or a backend that cannot compute this call.
        BackendUnavailableError: a backend asked for by name that is not there; the message says how to get it.
    """
    out, lse, _ = _attend(q, k, v, plan, scale, backend, in_order, return_lse)
    return out if lse is None else (out, lse)


def skipping_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: AttentionPlan,
    *,
    scale: float | None = None,
    backend: str | Backend = "auto",
    in_order: bool = False,
) -> tuple[Tensor, Tensor]:
    """As `sparse_attention`, and what was skipped.

    Args:
        q, k, v, scale, backend, in_order: as there.
        plan: with a `skip_threshold`.

    Returns:
        `out` `[B, H, N, D]`, and `[B, H, Mq]` int32 or int64 how many of the query-key pairs that `plan` keeps each
        query block has skipped: their scores were computed, but no product with values.

    Raises:
        ValueError, BackendUnavailableError: as there; a plan without a `skip_threshold` too.
    """
    if not plan.skip_threshold:
        raise ValueError("plan must have a skip_threshold above 0, got 0; use sparse_attention")
    out, _, skipped = _attend(q, k, v, plan, scale, backend, in_order, False)
    assert skipped is not None
    return out, skipped


def attend(
    backend: str, q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, in_order: bool
) -> tuple[Tensor, str, Tensor | None]:
    """For those who keep account of what is computed; arguments as in `sparse_attention`.

    Returns:
        Output, the name of the backend that computed it, and `[B, H]` int64 how many pairs were skipped, or `None` for
        a plan that skips nothing.
    """
    chosen = select(backend, q, k, v, plan)
    if not plan.skip_threshold:
        return sparse_attention(q, k, v, plan, backend=chosen, in_order=in_order), chosen.name, None
    out, skipped = skipping_attention(q, k, v, plan, backend=chosen, in_order=in_order)
    return out, chosen.name, skipped.sum(-1)


def attend_routed(
    q: Tensor, k: Tensor, v: Tensor, route: Route, remainder: Remainder, in_order: bool
) -> tuple[Tensor, AttentionPlan]:
    """`routed_attention` of `q, k, v` `[B, H, N, D]`, which stand in the order of `route` or in the sequence's own.

    Raises:
        ValueError: tensors that do not fit each other or the order, or what `routed_attention` refuses.
    """
    _check_tensors(q, k, v, route.order, route.order)
    if in_order:
        return routed_attention(q, k, v, route, remainder)
    q, k, v = permute(route.order, q, k, v)
    out, plan = routed_attention(q, k, v, route, remainder)
    return restore(route.order, out)[0], plan


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: AttentionPlan,
    scale: float | None,
    backend: str | Backend,
    in_order: bool,
    return_lse: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Output, row sums where wanted, and skipped pairs where the plan skips."""
    check_fit(q, k, v, plan)
    chosen = select(backend, q, k, v, plan) if isinstance(backend, str) else backend
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if not in_order:
        q, k, v = _permuted(q, k, v, plan)
    skipped = None
    if plan.skip_threshold:
        counting = cast(CountingBackend, chosen)
        out, lse, skipped = counting.forward_counting(q, k, v, plan, scale=scale, return_lse=return_lse)
    else:
        out, lse = chosen.forward(q, k, v, plan, scale=scale, return_lse=return_lse)
    if return_lse and lse is None:
        raise ValueError(f"return_lse must be False with backend {chosen.name!r}, which has no LSE; got True")
    if not in_order:
        (out,) = restore(plan.q_order, out)
        lse = None if lse is None else plan.q_order.restore(lse)
    return out, lse, skipped


def _permuted(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan) -> tuple[Tensor, ...]:
    if plan.kv_order is plan.q_order:
        return permute(plan.q_order, q, k, v)
    return *permute(plan.q_order, q), *permute(plan.kv_order, k, v)


def check_fit(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan) -> None:
    """Raise ValueError unless tensors and plan are as `sparse_attention` takes them."""
    _check_tensors(q, k, v, plan.q_order, plan.kv_order)
    _check_leading("block_mask.kv_counts", plan.block_mask.kv_counts, q)
    if plan.head_remainders is not None:
        _check_leading("head_remainders", plan.head_remainders, q)


def _check_tensors(q: Tensor, k: Tensor, v: Tensor, q_order: TokenOrder, kv_order: TokenOrder) -> None:
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.ndim != 4:
            raise ValueError(f"{name} must be [B, H, N, D], got {tuple(tensor.shape)}")
        if not tensor.is_floating_point() or tensor.dtype != q.dtype:
            raise ValueError(f"q, k, v must have one floating dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
        if tensor.device != q.device:
            raise ValueError(f"q, k, v must be on one device, got {q.device}, {k.device}, {v.device}")
    if k.shape[:3] != v.shape[:3] or k.shape[:2] != q.shape[:2] or k.shape[-1] != q.shape[-1]:
        raise ValueError(
            f"q, k, v must agree in [B, H, N, D], got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    for name, tokens, order in (("q", q.shape[2], q_order), ("kv", k.shape[2], kv_order)):
        if order.num_tokens != tokens:
            raise ValueError(f"plan's {name}_order is for {order.num_tokens} tokens, got {tokens}")
        _check_leading(f"{name}_order.index", order.index, q)
    plan_device = q_order.index.device
    if torch.device(plan_device) != q.device:
        raise ValueError(f"plan must be on q's device {q.device}, got {plan_device}; use plan.to(q.device)")


def _check_leading(name: str, tensor: Tensor, q: Tensor) -> None:
    for size, want, letter in zip(tensor.shape[:2], q.shape[:2], "BH", strict=True):
        if size not in (1, want):
            raise ValueError(f"plan's {name} must have 1 or {want} in dimension {letter}, got {size}")
