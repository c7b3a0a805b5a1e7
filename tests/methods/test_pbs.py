"""PBS-Attn against loops: keys sorted by the attention of sampled queries, blocks by means or antidiagonals."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dit_sparse import PbsAttention, Site, TokenGrid, sparse_attention
from dit_sparse.masks import probe_rows
from tests.methods.literal import GRIDS, Block, best_per_row, fill, random_qkv, raster_blocks, weights_of

ROWS = 5


def sorted_blocks(q: Tensor, k: Tensor, grid: TokenGrid, block: int, segment: int) -> list[Block]:
    """The key blocks of one head: the video's tokens sorted in segments, text where it was."""
    rows = probe_rows(grid, ROWS, q.device).tolist()
    mean = weights_of(q, k)[rows].mean(0).float().tolist()
    video = list(range(grid.video_start, grid.video_start + grid.video_len))
    order = []
    for start in range(0, len(video), segment):
        order += sorted(video[start : start + segment], key=lambda token: (-mean[token], token))
    blocks = [Block(order[i : i + block], False) for i in range(0, len(order), block)]
    text = [b for b in raster_blocks(grid, block) if b.is_text]
    return [*text, *blocks] if grid.text_first else [*blocks, *text]


def shares(q: Tensor, k: Tensor, q_blocks: list[Block], k_blocks: list[Block]) -> list[list[float]]:
    """Softmax over key blocks of mean query times mean key, each block counting for its tokens."""
    rows = []
    for query in q_blocks:
        mean = q[query.tokens].double().mean(0)
        row = [
            float(torch.exp(mean @ k[key.tokens].double().mean(0) / q.shape[-1] ** 0.5)) * len(key.tokens)
            for key in k_blocks
        ]
        rows.append([value / sum(row) for value in row])
    return rows


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("density", [0.3, 0.6, None])
@pytest.mark.parametrize("segment", [8, 16])
def test_equals_the_literal_mask(grid: TokenGrid, density: float | None, segment: int) -> None:
    q, k, v = random_qkv(grid)
    plan = PbsAttention(density, 0.6, 4, segment, ROWS).plan(q, k, v, Site(grid), None)
    mask, q_blocks = plan.token_mask(), raster_blocks(grid, 4)
    for b in range(2):
        for h in range(3):
            k_blocks = sorted_blocks(q[b, h], k[b, h], grid, 4, segment)
            scores = shares(q[b, h], k[b, h], q_blocks, k_blocks)
            if density is None:
                chosen = set()
                for i, row in enumerate(scores):
                    total = 0.0
                    for j in sorted(range(len(row)), key=lambda j, row=row: -row[j]):
                        if total >= 0.6:
                            break
                        chosen.add((i, j))
                        total += row[j]
                want = fill(chosen, q_blocks, k_blocks, grid.num_tokens)
            else:
                score = lambda i, j, s=scores: s[i][j]  # noqa: E731
                want = best_per_row(score, q_blocks, k_blocks, grid.num_tokens, density)
            assert torch.equal(mask[b, h], want)


def test_few_important_keys_take_few_blocks() -> None:
    """One token of every block is wanted by all; sorted, those tokens fill an eighth of the blocks."""
    grid = TokenGrid(1, 16, 32)
    k = 0.1 * torch.randn(1, 1, 512, 16, generator=torch.Generator().manual_seed(0))
    k[:, :, ::8, 0] += 8
    q = torch.zeros_like(k)
    q[..., 0] = 4
    weights = (q @ k.transpose(-1, -2) / 4).softmax(-1)
    recalls = []
    for segment in (8, 64, 512):
        plan = PbsAttention(0.125, block=8, segment=segment).plan(q, k, k, Site(grid), None)
        recalls.append(float((weights * plan.token_mask()).sum() / weights.sum()))
    assert recalls[0] < 0.2
    assert recalls[1] > 0.95
    assert recalls[2] > 0.95


def test_antidiagonals_score_the_sorted_keys() -> None:
    grid = TokenGrid(2, 4, 8)
    q, k, v = random_qkv(grid)
    plans = [PbsAttention(0.4, 0.9, 8, 16, ROWS, flag).plan(q, k, v, Site(grid), None) for flag in (False, True)]
    assert torch.equal(plans[0].kv_order.index, plans[1].kv_order.index)
    assert not torch.equal(*(plan.block_mask.kept_blocks for plan in plans))


def test_the_kernel_sees_what_the_plan_says() -> None:
    """Keys and queries in unlike orders, text first, a ragged tail."""
    grid = TokenGrid(2, 5, 7, text_len=5, text_first=True)
    q, k, v = random_qkv(grid)
    plan = PbsAttention(0.4, 0.9, 8, 16, ROWS).plan(q, k, v, Site(grid), None)
    want = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), attn_mask=plan.token_mask())
    assert torch.allclose(sparse_attention(q, k, v, plan).double(), want, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"density": 0}, "density"), ({"segment": 100}, "multiple of block 64"), ({"rows": 0}, "rows")],
)
def test_bad_parameters(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PbsAttention(**options)  # type: ignore[arg-type]
