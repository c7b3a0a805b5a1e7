"""Watching a dense pipeline changes nothing of it."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor

from dit_sparse import Paro, Site, sparsify
from dit_sparse.pipelines import observe, session_of


def test_every_call_is_shown_and_stays_dense(pipe, render) -> None:
    before = render(pipe, steps=3)
    seen: Counter[tuple[int, int, str]] = Counter()

    def watch(site: Site, q: Tensor, k: Tensor, lse: Tensor) -> None:
        seen[site.layer, site.step, site.branch] += 1
        want = (q.double() @ k.double().transpose(-1, -2) * q.shape[-1] ** -0.5).logsumexp(-1)
        torch.testing.assert_close(lse.double(), want, rtol=1e-5, atol=1e-5)

    with observe(pipe, watch):
        watched = render(pipe, steps=3)
    assert seen == dict.fromkeys([(n, s, b) for n in range(2) for s in range(3) for b in ("cond", "uncond")], 1)
    torch.testing.assert_close(watched, before, rtol=1e-3, atol=1e-4)
    assert session_of(pipe) is None
    assert torch.equal(render(pipe, steps=3), before)


def test_an_observer_that_fails_leaves_the_pipeline_dense(pipe, render) -> None:
    before = render(pipe, steps=3)

    def fail(*_: object) -> None:
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"), observe(sparsify(pipe, Paro(block=16)), fail):
        render(pipe, steps=3)
    assert session_of(pipe) is None
    assert torch.equal(render(pipe, steps=3), before)
