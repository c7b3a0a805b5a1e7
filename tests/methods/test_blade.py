"""Video-BLADE's mask against peaks taken pair by pair."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dit_sparse import Blade, Schedule, Site, TokenGrid, sparse_attention
from dit_sparse.reorder import curve_order
from tests.methods.layouts import DEMO, GRIDS, blocks_of, check_text_and_rows, cut, inputs, smooth_inputs, tokens_of
from tests.methods.test_no_wait import NoWaiting


def sampled(tokens: list[int], samples: int) -> list[int]:
    """At most `samples` of a block's tokens, at equal distances."""
    places = {(2 * i + 1) * len(tokens) // (2 * samples) for i in range(samples)}
    return [tokens[place] for place in sorted(places)]


def literal_blocks(grid: TokenGrid) -> list[tuple[list[int], bool]]:
    """Blocks of 6 tokens along the curve, each with whether it is text."""
    video = [t - grid.video_start for t in curve_order(grid, 6).index[0, 0].tolist()]
    return blocks_of(grid, cut([t for t in video if 0 <= t < grid.video_len], 6), 6)


def literal_mask(q: Tensor, k: Tensor, grid: TokenGrid, p: float, least: int, most: int) -> Tensor:
    """`[N, N]` of one head with blocks of 6 tokens and 3 samples."""
    blocks = literal_blocks(grid)
    chosen_keys = [(j, token) for j, (tokens, _) in enumerate(blocks) for token in sampled(tokens, 3)]
    kept = []
    for queries, _ in blocks:
        peaks = [0.0] * len(blocks)
        for query in sampled(queries, 3):
            logits = [float(q[query].double() @ k[key].double()) / q.shape[-1] ** 0.5 for _, key in chosen_keys]
            weights = torch.tensor(logits, dtype=torch.float64).softmax(0).tolist()
            for (j, _), weight in zip(chosen_keys, weights, strict=True):
                peaks[j] = max(peaks[j], weight)
        peaks = [0.0 if text else peak for peak, (_, text) in zip(peaks, blocks, strict=True)]
        row, reached = set(), 0.0
        for j in sorted(range(len(peaks)), key=lambda j: -peaks[j]):
            if len(row) >= most or (len(row) >= least and reached >= p * sum(peaks)):
                break
            row.add(j)
            reached += peaks[j]
        kept.append([j in row for j in range(len(blocks))])
    return tokens_of(blocks, blocks, kept)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize(("p", "least", "most"), [(0.6, 0.01, 1.0), (0.95, 0.01, 0.3), (0.1, 0.5, 1.0)])
@pytest.mark.parametrize("in_order", [False, True])
def test_equals_the_literal_peaks(grid: TokenGrid, p: float, least: float, most: float, in_order: bool) -> None:
    q, k, v = inputs(grid)
    method = Blade(top_p=p, min_kept=least, max_kept=most, block=6, samples=3)
    order = method.shared_order(grid, q.device)
    given = [order.permute(x) for x in (q, k, v)] if in_order else [q, k, v]
    plan = method.plan(*given, Site(grid, in_order=in_order), None)
    got, blocks = plan.token_mask(), -(-grid.video_len // 6)
    bounds = max(1, int(least * blocks)), max(1, int(most * blocks))
    for b in range(2):
        for h in range(2):
            assert torch.equal(got[b, h], literal_mask(q[b, h], k[b, h], grid, p, *bounds))
    check_text_and_rows(plan, grid)


@pytest.mark.parametrize("density", [0.125, 0.25, 0.5])
def test_the_density_is_met_where_it_is_the_control(density: float) -> None:
    plan = Blade(density=density).plan(*smooth_inputs(DEMO), Site(DEMO), None)
    assert float(plan.density.mean()) == pytest.approx(density, rel=0.1)


def test_the_second_plan_on_a_grid_reads_nothing_back() -> None:
    grid = TokenGrid(3, 4, 6, text_len=3)
    q, k, v = inputs(grid)
    for method in (Blade(block=6, samples=3), Blade(density=0.5, block=6, samples=3)):
        want = method.plan(q, k, v, Site(grid), None)
        with NoWaiting():
            got = method.plan(q, k, v, Site(grid), None)
        assert torch.equal(got.token_mask(), want.token_mask())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"density": 0}, "density"),
        ({"top_p": 2}, "top_p"),
        ({"min_kept": 0.5}, "min_kept must be at most"),
        ({"block": 0}, "block"),
        ({"samples": 0}, "samples"),
    ],
)
def test_bad_parameters(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Blade(**options)  # type: ignore[arg-type]


def test_the_global_branch_is_attention_to_the_means_of_the_other_blocks() -> None:
    grid = TokenGrid(3, 4, 6, text_len=3)
    q, k, v = (0.2 * x for x in inputs(grid))  # small, so that no block's keys lie too far apart for a mean
    method = Blade(min_kept=0.2, max_kept=0.4, block=6, samples=3, global_branch=True)
    assert Schedule(method).planned_remainder == "mean"
    assert Schedule(replace(method, global_branch=False)).planned_remainder == "none"
    plan = method.plan(q, k, v, Site(grid), None)
    got = sparse_attention(q, k, v, plan)
    kept, blocks = plan.token_mask(), literal_blocks(grid)
    for b, h, token in itertools.product(range(q.shape[0]), range(q.shape[1]), range(0, grid.num_tokens, 5)):
        query, weight, total = q[b, h, token].double(), 0.0, torch.zeros(v.shape[-1], dtype=torch.float64)
        for tokens, _ in blocks:
            keys, values = k[b, h, tokens].double(), v[b, h, tokens].double()
            if kept[b, h, token, tokens].all():
                shares = (keys @ query * q.shape[-1] ** -0.5).exp()
            else:
                keys, values = keys.mean(0, True), values.mean(0, True)
                shares = (keys @ query * q.shape[-1] ** -0.5).exp() * len(tokens)
            weight, total = weight + shares.sum(), total + shares @ values
        torch.testing.assert_close(got[b, h, token].double(), total / weight, rtol=1e-5, atol=1e-6)
