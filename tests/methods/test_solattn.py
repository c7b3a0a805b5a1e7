"""Sol-Attn against loops over blocks: means, deviations and neighbours one by one."""

from __future__ import annotations

import gc
import statistics
import weakref

import pytest
import torch
from torch import Tensor

from dit_sparse import Site, SolAttention, TokenGrid
from dit_sparse.reorder import morton_once
from tests.methods.layouts import DEMO, check_text_and_rows, smooth_inputs
from tests.methods.literal import GRIDS, Block, fill, random_qkv


def interleaved(grid: TokenGrid, token: int) -> int:
    """The Morton number of a video token."""
    place = token - grid.video_start
    f, h, w = place // (grid.height * grid.width), place // grid.width % grid.height, place % grid.width
    digits = "".join(a + b + c for a, b, c in zip(f"{f:08b}", f"{h:08b}", f"{w:08b}", strict=True))
    return int(digits, 2)


def morton_blocks(grid: TokenGrid, size: int) -> list[Block]:
    video = sorted(
        range(grid.video_start, grid.video_start + grid.video_len), key=lambda token: interleaved(grid, token)
    )
    text = list(range(grid.text_start, grid.text_start + grid.text_len))
    parts = [(text, True), (video, False)] if grid.text_first else [(video, False), (text, True)]
    return [Block(tokens[i : i + size], is_text) for tokens, is_text in parts for i in range(0, len(tokens), size)]


def deviations(q: Tensor, k: Tensor, blocks: list[Block], i: int) -> list[float]:
    """How far each key block stands out for query block `i`."""
    means = [k[block.tokens].mean(0) for block in blocks]
    scores = [float(q[blocks[i].tokens].mean(0) @ mean) for mean in means]
    video = [score for score, block in zip(scores, blocks, strict=True) if not block.is_text]
    return [(score - statistics.fmean(video)) / (statistics.pstdev(video) or 1) for score in scores]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("tau", [-0.5, 0.4])
def test_equals_the_literal_threshold(grid: TokenGrid, tau: float) -> None:
    tensors = random_qkv(grid)
    plan = SolAttention(tau, block=4).plan(*tensors, Site(grid), None)
    assert plan.remainder == "mean"
    blocks = morton_blocks(grid, 4)
    for b in range(2):
        for h in range(3):
            q, k, _ = (x[b, h].double() for x in tensors)
            apart = [deviations(q, k, blocks, i) for i in range(len(blocks))]
            numbers = range(len(blocks))
            chosen = {(i, j) for i in numbers for j in numbers if apart[i][j] > tau or abs(i - j) <= 1}
            assert torch.equal(plan.token_mask()[b, h], fill(chosen, blocks, blocks, grid.num_tokens))
    check_text_and_rows(plan, grid)


def test_a_density_takes_the_blocks_that_stand_out_most() -> None:
    grid = TokenGrid(2, 4, 8)
    tensors = random_qkv(grid, 1, 1)
    plan = SolAttention(density=0.4, block=4).plan(*tensors, Site(grid), None)
    kept, blocks = plan.block_mask.kept_blocks[0, 0], morton_blocks(grid, 4)
    q, k, _ = (x[0, 0].double() for x in tensors)
    apart = torch.tensor([deviations(q, k, blocks, i) for i in range(16)])
    number = torch.arange(16)
    far = (number[:, None] - number).abs() > 1
    best = torch.zeros(16, 16, dtype=torch.bool).scatter_(1, apart.argmax(1, keepdim=True), True)
    assert kept[~far].all()
    assert kept[best].all()
    assert apart[far & kept & ~best].min() > apart[far & ~kept].max()
    assert float(plan.density) == pytest.approx(0.4, abs=1 / 256)


@pytest.mark.parametrize("density", [0.125, 0.25, 0.5])
def test_the_density_is_met_where_it_is_the_control(density: float) -> None:
    plan = SolAttention(density=density).plan(*smooth_inputs(DEMO), Site(DEMO), None)
    assert float(plan.density.mean()) == pytest.approx(density, rel=0.1)


def test_tokens_may_stand_in_the_shared_order_already() -> None:
    grid = TokenGrid(3, 5, 7, 4)
    q, k, v = random_qkv(grid)
    method = SolAttention(block=8)
    order = method.shared_order(grid, q.device)
    want = method.plan(q, k, v, Site(grid), None)
    got = method.plan(order.permute(q), order.permute(k), v, Site(grid, in_order=True), None)
    assert torch.equal(got.block_mask.kept_blocks, want.block_mask.kept_blocks)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"density": 0}, "density"), ({"block": 0}, "block"), ({"tau": float("nan")}, "tau"), ({"tau": True}, "tau")],
)
def test_bad_parameters(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SolAttention(**options)  # type: ignore[arg-type]


def test_an_order_that_nobody_holds_goes() -> None:
    """Prompts of every length bring a grid, and what is known of it must not pile up."""
    held = []
    for text in range(20):  # more than are remembered
        grid = TokenGrid(1, 2, 4, text)
        q, k, v = torch.randn(3, 1, 1, grid.num_tokens, 8)
        method = SolAttention(block=4)
        method.plan(q, k, v, Site(grid), None)
        held.append(weakref.ref(method.shared_order(grid, q.device)))
    morton_once.cache_clear()  # type: ignore[attr-defined]
    gc.collect()
    assert not any(order() is not None for order in held)
