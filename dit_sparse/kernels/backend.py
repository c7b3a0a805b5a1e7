"""What a kernel backend is, and how one is chosen.

Every backend computes the same function of `(q, k, v, plan)`; they differ in speed and in what they accept. An
explicitly requested backend either runs or raises: nothing here falls back to another one.
"""

from __future__ import annotations

import difflib
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from dit_sparse.types import AttentionPlan, Remainder

__all__ = [
    "BACKENDS",
    "Backend",
    "BackendUnavailableError",
    "CountingBackend",
    "check_remainder",
    "check_skips",
    "get_backend",
    "refusal",
    "register",
    "select",
]


class BackendUnavailableError(RuntimeError):
    """A backend was asked for by name that this machine or this installation cannot run."""


@runtime_checkable
class Backend(Protocol):
    """One way to compute attention under a plan.

    Attributes:
        name: what users ask for it by.

    One that computes remainders names them in an attribute `remainders`; without it "none" is the only one. One that
    skips blocks is a `CountingBackend`.
    """

    name: str

    def unavailable(self, device: torch.device) -> str | None:
        """What is missing to run on `device`, and how to get it; `None` when nothing is."""
        ...

    def refuses(self, q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan) -> str | None:
        """Why this call cannot be computed; `None` when it can. Arguments as in `forward`."""
        ...

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, *, scale: float, return_lse: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Attention under `plan`.

        Args:
            q: `[B, H, Nq, D]` in the plan's query order.
            k, v: `[B, H, Nk, D]` in the plan's key order.
            plan: the blocks kept.
            scale: factor of the scores.
            return_lse: whether the row sums are wanted.

        Returns:
            Output `[B, H, Nq, D]` in the query order and the dtype of `q`, and the natural-log row sums `[B, H, Nq]`
            in float32 (float64 for float64 inputs), or `None`. A row that keeps nothing gives zeros and -inf.
        """
        ...


@runtime_checkable
class CountingBackend(Backend, Protocol):
    """A backend that computes plans with a `skip_threshold`, and counts what it skips."""

    def forward_counting(
        self, q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, *, scale: float, return_lse: bool
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """As `forward`, for a plan with a `skip_threshold`.

        Returns:
            Output and row sums, and `[B, H, Mq]` int32 or int64 how many query-key pairs each query block skips.
        """
        ...


BACKENDS: dict[str, Backend] = {}


def register(backend: Backend) -> None:
    """Make `backend` selectable by its name.

    Raises:
        ValueError: the name is "auto" or taken.
    """
    if backend.name == "auto" or backend.name in BACKENDS:
        raise ValueError(f"backend name must be new and not 'auto', got {backend.name!r}")
    BACKENDS[backend.name] = backend


def get_backend(name: str) -> Backend:
    """The backend called `name`.

    Raises:
        ValueError: there is none; the message names the nearest.
    """
    if isinstance(name, str) and name in BACKENDS:
        return BACKENDS[name]
    near = difflib.get_close_matches(str(name), ("auto", *BACKENDS), n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"backend must be 'auto' or one of {', '.join(BACKENDS)}, got {name!r}{hint}")


def select(name: str, q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan) -> Backend:
    """The backend for a call: `name`, or for "auto" the default of the device and the plan.

    On CUDA "auto" is the first that runs there and can compute the call: of "fa3", "hopper" and "sdpa" for a plan known
    to be dense, "triton" for one that skips blocks, and of "hopper", "triton" and "flex" for others. On a CPU it is
    "sdpa" or "gather". Arguments as in `Backend.forward`.

    Raises:
        ValueError: unknown name, or a call that the backend cannot compute.
        BackendUnavailableError: the backend cannot run on this machine.
    """
    backend = get_backend(_default_name(q, k, v, plan) if name == "auto" else name)
    missing = _missing(backend.name, q.device)
    if missing is not None:
        raise BackendUnavailableError(f"backend {backend.name!r} is not available on {q.device}: {missing}")
    reason = refusal(backend, q, k, v, plan)
    if reason is not None:
        raise ValueError(f"backend {backend.name!r} cannot compute this call: {reason}")
    return backend


def refusal(backend: Backend, q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan) -> str | None:
    """Why `backend` cannot compute this call, remainder and skipping included; `None` when it can."""
    lacks = None if plan.block_mask.is_full else _lacks(backend, plan.remainder)
    if plan.skip_threshold:
        lacks = lacks or _cannot_skip(backend)
    return lacks or backend.refuses(q, k, v, plan)


def check_remainder(name: str, remainder: Remainder) -> None:
    """Whether the backend called `name` computes `remainder`; for callers who want to know before a run.

    Raises:
        ValueError: it does not, or there is no such backend.
    """
    lacks = None if name == "auto" else _lacks(get_backend(name), remainder)
    if lacks is not None:
        raise ValueError(f"backend {name!r} cannot be used: {lacks}")


def check_skips(name: str) -> None:
    """Whether the backend called `name` skips blocks; for callers who want to know before a run.

    Raises:
        ValueError: it does not, or there is no such backend.
    """
    lacks = None if name == "auto" else _cannot_skip(get_backend(name))
    if lacks is not None:
        raise ValueError(f"backend {name!r} cannot be used: {lacks}")


def _cannot_skip(backend: Backend) -> str | None:
    if hasattr(backend, "forward_counting"):
        return None
    able = [name for name, other in BACKENDS.items() if hasattr(other, "forward_counting")]
    return f"it skips no blocks; use {' or '.join(map(repr, able))}, or no skip threshold"


def _lacks(backend: Backend, remainder: Remainder) -> str | None:
    if remainder in getattr(backend, "remainders", ("none",)):
        return None
    able = [name for name, other in BACKENDS.items() if remainder in getattr(other, "remainders", ())]
    return f"it has no remainder {remainder!r}; use {' or '.join(map(repr, able))}, or remainder 'none'"


@torch.compiler.assume_constant_result
def _missing(name: str, device: torch.device) -> str | None:
    """What the backend lacks on `device`; torch's compiler asks once and need not trace how it is found out."""
    return BACKENDS[name].unavailable(device)


def _default_name(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan) -> str:
    full = plan.is_dense
    if q.device.type != "cuda":
        return "sdpa" if full else "gather"
    if plan.skip_threshold:
        return "triton"
    for name in ("fa3", "hopper") if full else ("hopper", "triton"):
        backend = BACKENDS[name]
        if _missing(name, q.device) is None and refusal(backend, q, k, v, plan) is None:
            return name
    return "sdpa" if full else "flex"
