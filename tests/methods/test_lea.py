"""Least-error attention against errors and a choice written out one by one."""

from __future__ import annotations

import itertools
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dit_sparse import LeastError, Oracle, Schedule, Site, TokenGrid, sparse_attention
from dit_sparse.kernels import Probes, scattered_rows
from dit_sparse.methods.parameters import block_of, takes_density
from tests.methods.layouts import DEMO, GRIDS, blocks_of, check_text_and_rows, inputs, smooth_inputs, tokens_of
from tests.methods.test_no_wait import NoWaiting

TILE = (1, 2, 3)


def tiles(grid: TokenGrid) -> list[list[int]]:
    """Raster numbers of the tokens of each block: whole tiles, then the tokens of the others, six by six."""
    starts = itertools.product(*(range(0, length, side) for length, side in zip(grid.shape, TILE, strict=True)))
    found = []
    for f, top, left in starts:
        rows, columns = range(top, min(top + 2, grid.height)), range(left, min(left + 3, grid.width))
        found.append([(f * grid.height + y) * grid.width + x for y in rows for x in columns])
    whole = [tile for tile in found if len(tile) == 6]
    others = [token for tile in found if len(tile) < 6 for token in tile]
    return whole + [others[first : first + 6] for first in range(0, len(others), 6)]


def error(q: Tensor, k: Tensor, v: Tensor, queries: list[int], looked_at: list[int], keys: list[int]) -> float:
    """By how much the output of the `queries` changes where the mean of `keys` stands in, from some of them."""
    scale = q.shape[-1] ** -0.5
    middle, spread = k[keys].mean(0), float(q[queries].square().mean(0) @ k[keys].var(0, correction=0)) * scale**2 / 2
    total = 0.0
    for i in looked_at:
        weights = (scale * (k @ q[i])).softmax(0)
        out = weights @ v
        log_sum = (scale * (k @ q[i])).logsumexp(0)
        of_mean = 0.0 if spread > 2 else len(keys) * float((scale * (middle @ q[i]) - log_sum).exp())
        exact = sum((weights[t] * (v[t] - out) for t in keys), torch.zeros_like(out))
        total += float((exact - of_mean * (v[keys].mean(0) - out)).square().sum())
    return total * len(queries) / len(looked_at)


def merged(blocks: list[tuple[list[int], bool]], count: int) -> list[tuple[list[int], bool]]:
    """Query blocks: `count` neighbouring tiles together, text by itself."""
    tiles, text = [tokens for tokens, is_text in blocks if not is_text], [block for block in blocks if block[1]]
    joined = [(list(itertools.chain(*tiles[n : n + count])), False) for n in range(0, len(tiles), count)]
    return text + joined if blocks[0][1] else joined + text


def literal_masks(
    q: Tensor, k: Tensor, v: Tensor, grid: TokenGrid, density: float, rows: int, query_tiles: int
) -> list[Tensor]:
    """`[N, N]` of every head of one sample, `q, k, v` `[H, N, D]`: one budget for all of them."""
    q, k, v = q.double(), k.double(), v.double()
    k_blocks = blocks_of(grid, tiles(grid), 6)
    q_blocks = merged(k_blocks, query_tiles)
    bounds = torch.tensor([0, *itertools.accumulate(len(block) for block, _ in q_blocks)])
    order = [token for block, _ in q_blocks for token in block]
    taken = scattered_rows(bounds[None, None].int(), rows).tolist()
    looked_at = [[order[place] for place in places] for places in taken]
    heads, many, count = range(len(q)), range(len(q_blocks)), range(len(k_blocks))
    errors = [
        [[error(q[h], k[h], v[h], q_blocks[i][0], looked_at[i], keys) for keys, _ in k_blocks] for i in many]
        for h in heads
    ]
    kept = [[[errors[h][i][j] == max(errors[h][i]) for j in count] for i in many] for h in heads]
    areas = [[len(a) * len(b) for b, _ in k_blocks] for a, _ in q_blocks]
    is_sure = {
        (h, i, j): kept[h][i][j] or q_blocks[i][1] or k_blocks[j][1] for h in heads for i in many for j in count
    }  # fmt: skip
    left = density * len(q) * grid.num_tokens**2 - sum(areas[i][j] for (h, i, j), sure in is_sure.items() if sure)
    others = [place for place, sure in is_sure.items() if not sure]
    for h, i, j in sorted(others, key=lambda place: -errors[place[0]][place[1]][place[2]] / areas[place[1]][place[2]]):
        left -= areas[i][j]
        if left < 0:
            break
        kept[h][i][j] = True
    return [tokens_of(q_blocks, k_blocks, kept[h]) for h in heads]


@pytest.mark.parametrize("grid", [*GRIDS, TokenGrid(2, 7, 4, text_len=5)], ids=str)
@pytest.mark.parametrize(("in_order", "query_tiles"), [(False, 1), (True, 2), (False, 3)])
def test_equals_the_literal_choice(grid: TokenGrid, in_order: bool, query_tiles: int) -> None:
    q, k, v = inputs(grid)
    method = LeastError(density=0.45, tile=TILE, rows=3, query_tiles=query_tiles)
    order = method.shared_order(grid, q.device)
    given = [order.permute(x) for x in (q, k, v)] if in_order else [q, k, v]
    plan = method.plan(*given, Site(grid, in_order=in_order), None)
    assert plan.remainder == "value"
    got = plan.token_mask()
    for b in range(2):
        assert torch.equal(got[b], torch.stack(literal_masks(q[b], k[b], v[b], grid, 0.45, 3, query_tiles)))
    check_text_and_rows(plan, grid)


def test_branches_in_one_batch_share_a_plan() -> None:
    grid = TokenGrid(2, 4, 6)
    q, k, v = inputs(grid, batch=4)
    method = LeastError(density=0.4, tile=TILE)
    mask = method.plan(q, k, v, Site(grid, branches=2), None).token_mask()
    assert torch.equal(mask[:2], mask[2:])
    assert not torch.equal(mask[0], mask[1])
    apart = method.plan(q, k, v, Site(grid, branch="cond_uncond"), None).token_mask()
    assert not torch.equal(apart[:2], apart[2:])


def test_branches_of_a_sample_share_a_key_and_layers_do_not() -> None:
    schedule = Schedule(LeastError())
    grid = TokenGrid(2, 4, 6)
    keys = {schedule.key(Site(grid, layer=n, num_layers=2, branch=b)) for n in (0, 1) for b in ("cond", "uncond")}
    assert len(keys) == 2


@pytest.mark.parametrize("steps", [1, 2, 4, 20, 50])
@pytest.mark.parametrize("density", [0.0625, 0.25, 0.6, 1.0])
@pytest.mark.parametrize("early", [1, 8, 100])
def test_steps_have_the_density_as_their_mean(steps: int, density: float, early: float) -> None:
    method = LeastError(density, early=early)
    found = method.step_densities(steps)
    assert len(found) == steps
    assert sum(found) / steps == pytest.approx(density)
    assert all(a >= b - 1e-9 for a, b in itertools.pairwise(found))
    assert max(found) <= max(0.95, density)
    searches = {0, *Schedule(method, warmup=0).refresh_steps(steps)}
    changes = {step for step in range(1, steps) if found[step] != found[step - 1]}
    assert changes <= searches
    if steps >= 20 and density == 0.0625:
        assert found[0] == pytest.approx(found[-1] * early) or found[0] == 0.95
        assert sum(value > found[-1] for value in found) == (steps // 5 if early > 1 else 0)


@pytest.mark.parametrize("steps", range(1, 61))
def test_a_run_has_the_density_whatever_its_steps(steps: int) -> None:
    """Plans last until the next search, so a search must stand where the density falls."""
    method = LeastError(0.125)
    searches = {0, *Schedule(method, warmup=0).refresh_steps(steps)}
    spent, planned = 0.0, 0.0
    for step in range(steps):
        planned = method.density_at(Site(DEMO, step=step, num_steps=steps)) if step in searches else planned
        spent += planned
    assert spent / steps == pytest.approx(0.125)


def test_its_query_block_is_what_the_cost_model_is_told() -> None:
    assert block_of(LeastError()) == 128
    assert block_of(LeastError(tile=(1, 4, 4), query_tiles=3)) == 48


def test_the_norm_of_an_output_that_16_bits_cannot_square() -> None:
    order = LeastError().query_order(DEMO, torch.device("cpu"))
    out = torch.full((1, 1, order.num_blocks * 2, 4), 300.0, dtype=torch.float16)
    squares = Probes(out, out, out[..., 0]).squares(order)
    assert squares.sum() == pytest.approx(DEMO.num_tokens * 4 * 300.0**2)


def test_the_density_is_that_of_the_step() -> None:
    given, method = smooth_inputs(DEMO), LeastError(0.2)
    for step in (0, 10, 19):
        plan = method.plan(*given, Site(DEMO, step=step, num_steps=20), None)
        assert float(plan.density.mean()) == pytest.approx(method.step_densities(20)[step], rel=0.02)


def left_over(method: LeastError, q: Tensor, k: Tensor, v: Tensor, site: Site) -> tuple[float, Tensor]:
    """Root of the summed squared errors of the blocks that a plan does not keep, over the output's norm, and the mask.

    Every query is looked at, so that nothing but rounding is between this and what the search sees.
    """
    plan = method.plan(q, k, v, site, None)
    order, kept = plan.q_order, plan.block_mask.kept_blocks
    q, k, v = (order.permute(x).double() for x in (q, k, v))
    bounds = order.offsets[0, 0].tolist()
    blocks = [list(range(a, b)) for a, b in itertools.pairwise(bounds)]
    total = 0.0
    for b, h, i, j in (~kept).nonzero().tolist():
        total += error(q[b, h], k[b, h], v[b, h], blocks[i], blocks[i], blocks[j])
    dense = F.scaled_dot_product_attention(q, k, v)
    return (total / float(dense.square().sum())) ** 0.5, kept


@pytest.mark.parametrize("grid", [TokenGrid(2, 4, 6), TokenGrid(2, 4, 6, text_len=3)], ids=str)
@pytest.mark.parametrize("bound", [0.02, 0.1, 0.2])
def test_what_an_error_leaves_out_is_within_it_and_one_block_more_is_not(grid: TokenGrid, bound: float) -> None:
    q, k, v = inputs(grid, batch=1, scale=0.7)
    method = LeastError(tile=TILE, query_tiles=1, rows=6, error=bound)
    late = Site(grid, step=9, num_steps=10)
    left, kept = left_over(method, q, k, v, late)
    assert left <= bound * (1 + 1e-5)
    assert 0.1 < float(kept.double().mean()) < 1
    # The least error among the blocks kept would not have fitted in.
    order = method.shared_order(grid, q.device)
    given = [order.permute(x).double() for x in (q, k, v)]
    dense = F.scaled_dot_product_attention(*given).square().sum()
    bounds = order.offsets[0, 0].tolist()
    blocks = [list(range(a, b)) for a, b in itertools.pairwise(bounds)]
    text = [grid.text_len > 0 and start >= grid.text_start for start in bounds[:-1]]
    own = torch.tensor(
        [[[error(*(x[0, h] for x in given), i, i, j) for j in blocks] for i in blocks] for h in range(2)]
    )  # fmt: skip
    sure = torch.zeros_like(own, dtype=torch.bool).scatter_(-1, own.argmax(-1, keepdim=True), True)
    sure |= torch.tensor(text) | torch.tensor(text)[:, None]
    least = float(own[kept[0] & ~sure].min())
    assert left**2 + least / float(dense) > bound**2


def test_early_steps_may_err_less() -> None:
    q, k, v = smooth_inputs(DEMO)
    method = LeastError(error=0.1)
    sites = [Site(DEMO, step=step, num_steps=20) for step in (0, 3, 4, 19)]
    assert [method.threshold_at(site) for site in sites] == [0.05, 0.05, 0.1, 0.1]
    early, late = (float(method.plan(q, k, v, site, None).density.mean()) for site in (sites[0], sites[3]))
    assert early > 1.2 * late
    assert not takes_density(method)
    assert LeastError().threshold_at(sites[0]) is None


def test_branches_in_one_batch_share_an_error() -> None:
    grid = TokenGrid(2, 4, 6)
    q, k, v = inputs(grid, batch=4, scale=0.7)
    method = LeastError(error=0.1, tile=TILE, query_tiles=1, rows=6)
    mask = method.plan(q, k, v, Site(grid, branches=2), None).token_mask()
    assert torch.equal(mask[:2], mask[2:])
    # The same branch twice has twice the errors and twice the output.
    twice = method.plan(*(x[:2].repeat(2, 1, 1, 1) for x in (q, k, v)), Site(grid, branches=2), None)
    assert torch.equal(twice.token_mask()[:2], method.plan(*(x[:2] for x in (q, k, v)), Site(grid), None).token_mask())


def test_ranks_with_some_of_the_heads_share_an_error() -> None:
    grid = TokenGrid(2, 4, 6)
    q, k, v = inputs(grid, batch=1, scale=0.7)
    v[:, 1] *= 3  # of unlike size, so that each rank alone would choose otherwise
    method = LeastError(error=0.1, tile=TILE, rows=6)
    ranks = [[x[:, rank : rank + 1] for x in (q, k, v)] for rank in range(2)]
    found = [method.search(*own, Site(grid)) for own in ranks]
    whole = method.plan(q, k, v, Site(grid), None).token_mask()
    for rank, own in enumerate(ranks):
        heads = SimpleNamespace(
            gather=lambda x: torch.cat([f.errors for f in found], 1),
            sum=lambda x: sum(f.output for f in found),
            own=lambda x, rank=rank: x[:, rank : rank + 1],
        )
        got = method.plan(*own, Site(grid, heads=heads), None).token_mask()  # type: ignore[arg-type]
        assert torch.equal(got, whole[:, rank : rank + 1])
    alone = method.plan(*ranks[0], Site(grid), None).token_mask()
    assert not torch.equal(alone, whole[:, :1])


def test_it_errs_less_than_the_blocks_of_largest_mass_with_the_same_remainder() -> None:
    """Tiles of equal tokens lose nothing by their mean, however much attention they get."""
    q, k, v = smooth_inputs(DEMO)
    method = LeastError(0.125)
    order = method.shared_order(DEMO, q.device)
    k, v = (order.permute(x).unflatten(2, (-1, 64)) for x in (k, v))
    middles = [x[:, :, ::2].mean(3, keepdim=True).expand_as(x[:, :, ::2]) for x in (k, v)]
    k, v = (torch.stack([m, x[:, :, 1::2]], 3).flatten(2, 4) for m, x in zip(middles, (k, v), strict=True))
    k, v = order.restore(k), order.restore(v)
    dense = F.scaled_dot_product_attention(q, k, v)
    found = []
    for plan in (m.plan(q, k, v, Site(DEMO), None) for m in (method, Oracle(0.125, tile=(2, 8, 4)))):
        out = sparse_attention(q, k, v, plan.with_remainder("value"))
        found.append(float((out - dense).norm() / dense.norm()))
    assert found[0] < 0.7 * found[1], found


def test_the_second_plan_on_a_grid_reads_nothing_back() -> None:
    grid = TokenGrid(3, 4, 6, text_len=3)
    q, k, v = inputs(grid)
    method = LeastError(density=0.5, tile=TILE)
    want = method.plan(q, k, v, Site(grid), None)
    with NoWaiting():
        got = method.plan(q, k, v, Site(grid), None)
    assert torch.equal(got.token_mask(), want.token_mask())
    with NoWaiting():
        replace(method, error=0.1).plan(q, k, v, Site(grid), None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"density": 0}, "density"),
        ({"tile": (0, 1, 1)}, "tile"),
        ({"rows": 0}, "rows"),
        ({"query_tiles": 0}, "query_tiles"),
        ({"early": 0.5}, "early"),
        ({"early": float("nan")}, "early"),
        ({"early": True}, "early"),
        ({"error": 0}, "error"),
        ({"error": 1.5}, "error"),
        ({"error": float("nan")}, "error"),
    ],
)
def test_bad_parameters(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LeastError(**options)  # type: ignore[arg-type]
