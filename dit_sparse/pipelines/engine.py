"""What a session leaves to others: how a plan is made and attention computed, on one device or on several ranks."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from dit_sparse.attention import attend
from dit_sparse.kernels import dense_attention
from dit_sparse.types import AttentionPlan, Method, Previous, Site, TokenGrid

__all__ = ["Engine", "OneDevice"]

Key = tuple[Any, ...]


class Engine(Protocol):
    """Plans and computes attention of the heads and queries `[B, H, n, D]` that are here."""

    def num_tokens(self, grid: TokenGrid) -> int:
        """How many of the tokens of `grid` are here; where a call has more, those behind are padding."""
        ...

    def site(self, site: Site) -> Site:
        """`site` with what a method must know of the heads that are here."""
        ...

    def plan(
        self, key: Key, method: Method, q: Tensor, k: Tensor, v: Tensor, site: Site, previous: Previous | None
    ) -> AttentionPlan:
        """A new plan; `key` says what shares it."""
        ...

    def density(self, key: Key, plan: AttentionPlan) -> Tensor:
        """`[B|1, H|1]` share of the pairs that `plan` keeps, on all heads of the model."""
        ...

    def sparse(
        self, backend: str, q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, in_order: bool
    ) -> tuple[Tensor, str, Tensor | None]:
        """Attention under `plan`, the name of the backend that computed it, and what it skipped.

        The last is `[B, H]` pairs on all heads of the model, `None` for a plan that skips nothing.
        """
        ...

    def dense(self, q: Tensor, k: Tensor, v: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
        """Dense attention in a sequence of `tokens`, and its row sums."""
        ...


class OneDevice:
    """Everything is here."""

    def num_tokens(self, grid: TokenGrid) -> int:
        return grid.num_tokens

    def site(self, site: Site) -> Site:
        return site

    def plan(
        self, key: Key, method: Method, q: Tensor, k: Tensor, v: Tensor, site: Site, previous: Previous | None
    ) -> AttentionPlan:
        return method.plan(q, k, v, site, previous)

    def density(self, key: Key, plan: AttentionPlan) -> Tensor:
        return plan.density

    def sparse(
        self, backend: str, q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, in_order: bool
    ) -> tuple[Tensor, str, Tensor | None]:
        return attend(backend, q, k, v, plan, in_order)

    def dense(self, q: Tensor, k: Tensor, v: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
        return dense_attention(q, k, v, return_lse=True)
