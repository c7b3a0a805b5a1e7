"""Sums, maxima and largest logits of blocks, against loops over tokens."""

from __future__ import annotations

import pytest
import torch

from dit_sparse.masks import block_extremes, block_maxima, block_sums, block_tokens, peak_logits
from dit_sparse.types import TokenOrder
from tests.methods.test_no_wait import NoWaiting


def order_of(*sizes: int) -> TokenOrder:
    bounds = torch.tensor([0, *sizes]).cumsum(0)
    return TokenOrder.from_index(torch.arange(int(bounds[-1])), bounds)


ORDERS = [order_of(4, 4, 4), order_of(4, 4, 1), order_of(3, 5, 2, 5), order_of(4, 0, 4)]


@pytest.mark.parametrize("order", ORDERS, ids=lambda o: str(o.block_sizes[0, 0].tolist()))
def test_sums_and_maxima(order: TokenOrder) -> None:
    x = torch.randn(2, 3, 5, order.num_tokens, generator=torch.Generator().manual_seed(0))
    parts = x.split(order.block_sizes[0, 0].tolist(), -1)
    assert torch.allclose(block_sums(x, order.offsets), torch.stack([part.sum(-1) for part in parts], -1), atol=1e-5)
    want = torch.stack(
        [part.amax(-1) if part.shape[-1] else x.new_full(x.shape[:-1], -torch.inf) for part in parts], -1
    )
    assert torch.equal(block_maxima(x, order), want)


@pytest.mark.parametrize("page", [1, 2, 3, 16])
def test_extremes_of_pages(page: int) -> None:
    order = ORDERS[2]
    x = torch.randn(2, 1, order.num_tokens, 5, generator=torch.Generator().manual_seed(0))
    least, most = block_extremes(x, order, page)
    bounds = order.offsets[0, 0].tolist()
    for block in range(order.num_blocks):
        for run in range(least.shape[3]):
            start = min(bounds[block] + run * page, bounds[block + 1] - 1)
            part = x[:, :, start : min(start + page, bounds[block + 1])]
            assert torch.equal(least[:, :, block, run], part.amin(2))
            assert torch.equal(most[:, :, block, run], part.amax(2))


@pytest.mark.parametrize("stride", [1, 2, 3, 8])
@pytest.mark.parametrize("order", ORDERS[:3], ids=lambda o: str(o.block_sizes[0, 0].tolist()))
def test_tokens_of_a_block_are_its_own(order: TokenOrder, stride: int) -> None:
    tokens = block_tokens(order, stride)
    bounds = order.offsets[0, 0].tolist()
    for number, row in enumerate(tokens.tolist()):
        own = set(range(bounds[number], bounds[number + 1]))
        assert set(row) <= own
        assert stride > 1 or set(row) == own


@pytest.mark.parametrize("referenced", [False, True])
@pytest.mark.parametrize("q_order", ORDERS, ids=lambda o: str(o.block_sizes[0, 0].tolist()))
def test_peaks(q_order: TokenOrder, referenced: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dit_sparse.masks.peak._CHUNK_SCORES", 64)
    kv_order = order_of(2, 7, 3)
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, 2, o.num_tokens, 8, generator=generator) for o in (q_order, kv_order))
    reference = torch.eye(q_order.num_blocks, kv_order.num_blocks, dtype=torch.bool)
    reference[:, 1] = True
    got = peak_logits(q, k, q_order, kv_order, scale=0.5, reference=reference if referenced else None)
    q_bounds, k_bounds = q_order.offsets[0, 0].tolist(), kv_order.offsets[0, 0].tolist()
    for b in range(2):
        for h in range(2):
            for i in range(q_order.num_blocks):
                for j in range(kv_order.num_blocks):
                    want = -torch.inf
                    for token in range(q_bounds[i], q_bounds[i + 1]):
                        logits = 0.5 * (k[b, h] @ q[b, h, token])
                        base = 0.0
                        if referenced:
                            inside = [n for n in range(kv_order.num_blocks) if reference[i, n]]
                            base = max(float(logits[k_bounds[n] : k_bounds[n + 1]].max()) for n in inside)
                        want = max(want, float(logits[k_bounds[j] : k_bounds[j + 1]].max()) - base)
                    assert float(got[b, h, i, j]) == pytest.approx(want, abs=1e-5)


def test_a_stride_reads_fewer_queries() -> None:
    order = order_of(8, 8)
    q, k = torch.randn(2, 1, 1, 16, 8, generator=torch.Generator().manual_seed(0))
    some, every = (peak_logits(q, k, order, order, stride=stride) for stride in (4, 1))
    assert (some <= every).all()
    assert (some < every).any()
    assert torch.allclose(some[0, 0, 0, 0], (q[0, 0, [2, 6]] @ k[0, 0, :8].T).max() / 8**0.5)


def test_nothing_is_read_back() -> None:
    order = order_of(4, 4, 2)
    x = torch.randn(1, 1, 10, 8)
    order.geometry  # noqa: B018
    with NoWaiting():
        peak_logits(x, x, order, order)
        block_sums(x.transpose(-1, -2), order.offsets)


def test_blocks_of_each_head_are_refused() -> None:
    order = TokenOrder.from_index(torch.arange(4), torch.tensor([[[0, 2, 4], [0, 1, 4]]]))
    with pytest.raises(ValueError, match="order must have blocks that all heads share"):
        block_tokens(order)
    with pytest.raises(ValueError, match="stride must be at least 1"):
        block_tokens(order_of(4), 0)
