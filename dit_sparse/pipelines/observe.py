"""Watching the self-attention of a dense pipeline."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor

from dit_sparse.kernels import dense_attention
from dit_sparse.methods import Dense
from dit_sparse.pipelines.adapter import context_config
from dit_sparse.pipelines.families import adapter_for
from dit_sparse.pipelines.installed import transformers_of
from dit_sparse.pipelines.session import DenseAttention, Session
from dit_sparse.pipelines.sparsify import install, unsparsify
from dit_sparse.pipelines.upstream import changes, message
from dit_sparse.schedule import Schedule
from dit_sparse.types import Site

Observer = Callable[[Site, Tensor, Tensor, Tensor], None]
"""Is called with the site, `q, k` `[B, H, N, D]` and the natural-log row sums `[B, H, N]` of their attention."""

ValueObserver = Callable[[Site, Tensor, Tensor, Tensor, Tensor], None]
"""As `Observer`, with `v` `[B, H, N, D]` after `k`."""


class _WatchingSession(Session):
    """Runs every call dense and shows it to an observer, without the padding of prompts."""

    def __init__(self, observer: ValueObserver) -> None:
        super().__init__(Schedule(Dense()))
        self._observer = observer

    def attend(self, layer: int, num_layers: int, q: Tensor, k: Tensor, v: Tensor, dense: DenseAttention) -> Tensor:
        if self._forward is None or not self.steps.inside_run:
            return dense()
        out = torch.zeros_like(q)
        for rows, grid in self._forward.layout.groups:
            own_q, own_k, own_v = (x[rows, :, : grid.num_tokens] for x in (q, k, v))
            result, lse = dense_attention(own_q, own_k, own_v, return_lse=True)
            self._observer(self._site(layer, num_layers, grid, len(own_q)), own_q, own_k, own_v, lse)
            out[rows, :, : grid.num_tokens] = result
        return out


def observe(pipe: Any, observer: Observer) -> AbstractContextManager[None]:
    """Show every self-attention call of `pipe`, which runs dense meanwhile, to `observer`; `pipe` is dense after it.

    Raises:
        ValueError: as `sparsify`, an installed diffusers that the family's adapter was not written for, or a pipeline
            that lies on several ranks.
    """
    return observe_values(pipe, lambda site, q, k, v, lse: observer(site, q, k, lse))


@contextmanager
def observe_values(pipe: Any, observer: ValueObserver) -> Iterator[None]:
    """As `observe`, for an observer that looks at the values too."""
    adapter = adapter_for(pipe)
    if any(context_config(transformer) is not None for transformer in transformers_of(pipe).values()):
        raise ValueError("pipeline must be on one rank to be observed, got context parallelism")
    if changed := changes(adapter):
        raise ValueError(message(adapter, changed))
    install(pipe, _WatchingSession(observer))
    try:
        yield
    finally:
        unsparsify(pipe)
