"""AnchorAttention against loops: anchors, wanted keys, keys sorted by votes, blocks that hold them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dit_sparse import AnchorAttention, Site, TokenGrid, sparse_attention
from tests.methods.literal import GRIDS, Block, best_per_row, fill, random_qkv, raster_blocks

BLOCK, SEGMENT, THETA = 4, 8, 0.8


class Literal:
    """One head, step by step."""

    def __init__(self, q: Tensor, k: Tensor, grid: TokenGrid) -> None:
        self.q_blocks = raster_blocks(grid, BLOCK)
        video = [i for i, block in enumerate(self.q_blocks) if not block.is_text]
        segment_of = {i: n * BLOCK // SEGMENT for n, i in enumerate(video)}
        self.always, self.logits, self.anchors = set(), [], []
        for i, query in enumerate(self.q_blocks):
            mean = q[query.tokens].double().mean(0)
            self.logits.append([float(mean @ key) / q.shape[-1] ** 0.5 for key in k.double()])
            for j in range(len(self.q_blocks)):
                if j == video[0] or segment_of.get(i, -1) == segment_of.get(j, -1):
                    self.always.add((i, j))
            inside = [t for j, key in enumerate(self.q_blocks) if (i, j) in self.always for t in key.tokens]
            self.anchors.append(max(self.logits[i][token] for token in inside))
        self.wanted = [[x >= a - THETA for x in row] for row, a in zip(self.logits, self.anchors, strict=True)]
        votes = [sum(row[token] for row in self.wanted) for token in range(grid.num_tokens)]
        tokens = list(range(grid.video_start, grid.video_start + grid.video_len))
        order = []
        for start in range(0, len(tokens), SEGMENT):
            order += sorted(tokens[start : start + SEGMENT], key=lambda token: (-votes[token], token))
        keys = [Block(order[i : i + BLOCK], False) for i in range(0, len(order), BLOCK)]
        text = [block for block in self.q_blocks if block.is_text]
        self.k_blocks = [*text, *keys] if grid.text_first else [*keys, *text]

    def score(self, i: int, j: int) -> float:
        if (i, j) in self.always:
            return torch.inf
        return max(self.logits[i][token] for token in self.k_blocks[j].tokens) - self.anchors[i]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("density", [0.4, 0.7, None])
def test_equals_the_literal_mask(grid: TokenGrid, density: float | None) -> None:
    q, k, v = random_qkv(grid)
    mask = AnchorAttention(density, THETA, BLOCK, SEGMENT).plan(q, k, v, Site(grid), None).token_mask()
    for b in range(2):
        for h in range(3):
            head = Literal(q[b, h], k[b, h], grid)
            if density is None:
                pairs = [(i, j) for i in range(len(head.q_blocks)) for j in range(len(head.k_blocks))]
                chosen = {(i, j) for i, j in pairs if head.score(i, j) >= -THETA}
                want = fill(chosen, head.q_blocks, head.k_blocks, grid.num_tokens)
                for i, query in enumerate(head.q_blocks):
                    for token, is_wanted in enumerate(head.wanted[i]):
                        assert not is_wanted or want[query.tokens, token].all(), "a key that the paper keeps is lost"
            else:
                want = best_per_row(head.score, head.q_blocks, head.k_blocks, grid.num_tokens, density)
            assert torch.equal(mask[b, h], want)


def test_stripes_of_single_keys_become_blocks() -> None:
    """Every eighth key is wanted by all queries; theta then keeps little more than those."""
    grid = TokenGrid(1, 16, 32)
    k = 0.1 * torch.randn(1, 1, 512, 16, generator=torch.Generator().manual_seed(0))
    k[:, :, ::8, 0] += 8
    q = torch.zeros_like(k)
    q[..., 0] = 4
    weights = (q @ k.transpose(-1, -2) / 4).softmax(-1)
    plan = AnchorAttention(None, theta=2, block=8, segment=64).plan(q, k, k, Site(grid), None)
    assert float((weights * plan.token_mask()).sum() / weights.sum()) > 0.99
    assert float(plan.density) < 0.3


def test_the_kernel_sees_what_the_plan_says() -> None:
    grid = TokenGrid(2, 5, 7, text_len=5, text_first=True)
    q, k, v = random_qkv(grid)
    plan = AnchorAttention(0.5, THETA, BLOCK, SEGMENT).plan(q, k, v, Site(grid), None)
    want = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), attn_mask=plan.token_mask())
    assert torch.allclose(sparse_attention(q, k, v, plan).double(), want, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"density": 0}, "density"), ({"theta": -1}, "theta"), ({"segment": 100}, "multiple"), ({"sink": 0}, "sink")],
)
def test_bad_parameters(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AnchorAttention(**options)  # type: ignore[arg-type]
