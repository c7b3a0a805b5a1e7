"""Pooled scores against loops over blocks."""

import math

import pytest
import torch

from dit_sparse.kernels.moments import block_moments
from dit_sparse.masks import pooled_scores, product_spread, sampled_peaks, self_similarity, sub_block_scores
from dit_sparse.reorder import axis_orders_per_head, tile_order
from dit_sparse.types import TokenGrid, TokenOrder


def scores_by_loops(q, k, q_offsets, k_offsets, scale):
    """`q`, `k` `[N, D]`, offsets as lists."""
    rows = []
    for i in range(len(q_offsets) - 1):
        weights = []
        for j in range(len(k_offsets) - 1):
            size = k_offsets[j + 1] - k_offsets[j]
            q_mean = q[q_offsets[i] : q_offsets[i + 1]].double().mean(0)
            k_mean = k[k_offsets[j] : k_offsets[j + 1]].double().mean(0)
            weights.append(size * math.exp(scale * float(q_mean @ k_mean)) if size else 0.0)
        rows.append([weight / sum(weights) for weight in weights])
    return torch.tensor(rows)


@pytest.mark.parametrize("scale", [None, 0.7])
def test_scores_are_the_softmax_over_blocks_weighted_by_size(scale):
    torch.manual_seed(0)
    order = tile_order(TokenGrid(3, 5, 5, text_len=7), (2, 2, 4))
    q, k = torch.randn(2, 2, 3, order.num_tokens, 8)
    got = pooled_scores(q, k, order, order, scale)
    assert got.dtype == torch.float32
    bounds = order.offsets[0, 0].tolist()
    for b in range(2):
        for h in range(3):
            want = scores_by_loops(q[b, h], k[b, h], bounds, bounds, scale or 8**-0.5)
            torch.testing.assert_close(got[b, h].double(), want.double(), rtol=1e-5, atol=1e-6)


def test_queries_and_keys_may_have_orders_of_their_own():
    torch.manual_seed(0)
    grid = TokenGrid(2, 3, 4)
    q_order = axis_orders_per_head(grid, ["FHW", "WHF"], 5)
    kv_order = TokenOrder.from_index(q_order.index, torch.tensor([[[0, 3, 24], [0, 20, 24]]]))
    q, k = torch.randn(2, 1, 2, 24, 8)
    got = pooled_scores(q, k, q_order, kv_order)
    assert got.shape == (1, 2, 5, 2)
    for h in range(2):
        bounds = kv_order.offsets[0, h].tolist()
        want = scores_by_loops(q[0, h], k[0, h], q_order.offsets[0, 0].tolist(), bounds, 8**-0.5)
        torch.testing.assert_close(got[0, h].double(), want.double(), rtol=1e-5, atol=1e-6)


def test_an_empty_key_block_gets_nothing():
    order = TokenOrder.from_index(torch.arange(6), torch.tensor([0, 2, 2, 6]))
    q_order = TokenOrder.from_index(torch.arange(6), torch.tensor([0, 6]))
    got = pooled_scores(torch.randn(1, 1, 6, 4), torch.randn(1, 1, 6, 4), q_order, order)
    assert got[0, 0, 0, 1] == 0
    torch.testing.assert_close(got.sum(-1), torch.ones(1, 1, 1))


def test_low_precision_inputs_give_float32():
    order = tile_order(TokenGrid(2, 4, 4), (1, 2, 2))
    q = torch.randn(1, 1, 32, 8, dtype=torch.bfloat16)
    assert pooled_scores(q, q, order, order).dtype == torch.float32


def test_self_similarity_is_the_mean_cosine_of_every_two_tokens() -> None:
    order = TokenOrder.from_index(torch.arange(10), torch.tensor([0, 3, 3, 4, 10]))
    x = torch.randn(2, 2, 10, 5)
    got = self_similarity(x, order)
    for b in range(2):
        for h in range(2):
            for m, (start, end) in enumerate([(0, 3), (3, 3), (3, 4), (4, 10)]):
                block = x[b, h, start:end]
                cosines = [float(torch.cosine_similarity(i, j, dim=0)) for i in block for j in block]
                assert float(got[b, h, m]) == pytest.approx(sum(cosines) / max(1, len(cosines)), abs=1e-5)


def test_peaks_are_the_largest_weights_among_the_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    order = TokenOrder.from_index(torch.arange(19), torch.tensor([0, 8, 8, 10, 19]))
    samples = [[1, 4, 6], [], [8, 9], [11, 14, 17]]
    q, k = torch.randn(2, 2, 2, 19, 4)
    want = torch.zeros(2, 2, 4, 4)
    keys = [key for part in samples for key in part]
    for b in range(2):
        for h in range(2):
            for i in range(4):
                for query in samples[i]:
                    weights = (k[b, h, keys] @ q[b, h, query] / 2).softmax(0)
                    for key, weight in zip(keys, weights.tolist(), strict=True):
                        j = next(j for j in range(4) if key in samples[j])
                        want[b, h, i, j] = max(float(want[b, h, i, j]), weight)
    assert torch.allclose(sampled_peaks(q, k, order, order, 3), want, atol=1e-6)
    monkeypatch.setattr("dit_sparse.masks.score._CHUNK_SCORES", 1)
    assert torch.allclose(sampled_peaks(q, k, order, order, 3), want, atol=1e-6)


def test_what_cannot_be_sampled_is_refused() -> None:
    order = TokenOrder.from_index(torch.arange(4), torch.tensor([0, 2, 4]))
    heads = TokenOrder.from_index(torch.arange(4).expand(1, 2, 4), torch.tensor([0, 2, 4]).expand(1, 2, 3))
    x = torch.randn(1, 2, 4, 4)
    with pytest.raises(ValueError, match="samples must be at least 1, got 0"):
        sampled_peaks(x, x, order, order, 0)
    with pytest.raises(ValueError, match=r"offsets must be \[1, 1, M\+1\] to sample tokens"):
        sampled_peaks(x, x, heads, order, 2)


def test_sub_block_scores_of_heads_with_blocks_of_their_own():
    """With tiles as large as the blocks they are the pooled scores; empty blocks get nothing and lose nothing."""
    torch.manual_seed(0)
    order = TokenOrder.from_index(torch.arange(24).expand(1, 2, -1), torch.tensor([[[0, 3, 3, 24], [0, 9, 20, 24]]]))
    q, k = torch.randn(2, 2, 2, 24, 8)
    torch.testing.assert_close(
        sub_block_scores(q, k, order, order, 24).masked_fill(order.block_sizes[..., None] == 0, 0.0),
        pooled_scores(q, k, order, order).masked_fill(order.block_sizes[..., None] == 0, 0.0),
    )
    fine = sub_block_scores(q, k, order, order, 1)
    # Tiles of one token: the attention itself.
    exact = (q @ k.transpose(-1, -2) / 8**0.5).softmax(-1)
    torch.testing.assert_close(fine[:, 0, 2, 0], exact[:, 0, 3:, :3].sum(-1).mean(-1))
    torch.testing.assert_close(fine[:, 1, 0, 2], exact[:, 1, :9, 20:].sum(-1).mean(-1))
    assert (fine[:, 0, :, 1] == 0).all()
    with pytest.raises(ValueError, match="tokens must be at least 1, got 0"):
        sub_block_scores(q, k, order, order, 0)


def test_products_beyond_the_blocks_do_not_count(monkeypatch):
    """A GPU pads them to a multiple of 8."""
    order = tile_order(TokenGrid(1, 6, 8), (1, 4, 4))
    k, v = torch.randn(2, 1, 2, 48, 8, generator=torch.Generator().manual_seed(0))
    want = product_spread(k, v, order)

    def padded(*args, **options):
        found = block_moments(*args, **options)
        return found._replace(products=torch.nn.functional.pad(found.products, (0, 0, 0, 0, 0, 4)))

    monkeypatch.setattr("dit_sparse.masks.score.block_moments", padded)
    assert torch.equal(product_spread(k, v, order), want)
