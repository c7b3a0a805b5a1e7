"""AdaSpa against a literal loop: block masses from the full attention map, top blocks a row, head budgets."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dit_sparse import AdaSpa, Site, TokenGrid
from dit_sparse.methods.adaspa import head_densities
from dit_sparse.types import Previous


def literal_mask(q: Tensor, k: Tensor, grid: TokenGrid, block: int, density: float) -> Tensor:
    """`[H, N, N]`: token by token, block by block, as the paper's algorithm reads; one batch, equal heads."""
    heads, tokens = q.shape[1], q.shape[2]
    regions = [
        (grid.video_start, grid.video_start + grid.video_len),
        (grid.text_start, grid.text_start + grid.text_len),
    ]
    blocks = []
    for number, (start, end) in enumerate(regions):
        for first in range(start, end, block):
            blocks.append((list(range(first, min(first + block, end))), number == 1))
    blocks.sort(key=lambda entry: entry[0][0])
    mask = torch.zeros(heads, tokens, tokens, dtype=torch.bool)
    for head in range(heads):
        weights = (q[0, head].double() @ k[0, head].double().T / math.sqrt(q.shape[-1])).softmax(-1)
        rows = []
        for query, _ in blocks:
            rows.append([float(weights[query][:, key].sum()) if not text else -1.0 for key, text in blocks])
        best_gap, best_count = None, 0
        video = [i for i, (_, text) in enumerate(blocks) if not text]
        choices = {}
        for count in range(1, len(video) + 1):
            chosen = torch.zeros(tokens, tokens, dtype=torch.bool)
            for (query, query_is_text), row in zip(blocks, rows, strict=True):
                kept = sorted(video, key=lambda i: -row[i])[:count]
                for i, (key, key_is_text) in enumerate(blocks):
                    if i in kept or key_is_text or query_is_text:
                        for token in query:
                            chosen[token, key] = True
            gap = abs(chosen.double().mean().item() - density)
            choices[count] = chosen
            if best_gap is None or gap < best_gap - 1e-12:
                best_gap, best_count = gap, count
        mask[head] = choices[best_count]
    return mask


@pytest.mark.parametrize(
    "grid",
    [TokenGrid(2, 4, 5), TokenGrid(2, 4, 4, text_len=5, text_first=True), TokenGrid(2, 4, 5, text_len=3)],
    ids=str,
)
@pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
def test_equals_the_literal_search(grid: TokenGrid, density: float) -> None:
    torch.manual_seed(0)
    q, k = 2 * torch.randn(2, 1, 2, grid.num_tokens, 16)
    plan = AdaSpa(density=density, block=8, head_adaptive=False, row_stride=1).plan(q, k, k, Site(grid), None)
    assert torch.equal(plan.token_mask()[0], literal_mask(q, k, grid, 8, density))


@pytest.mark.parametrize("text_first", [False, True])
@pytest.mark.parametrize("in_order", [False, True])
def test_tiles_are_the_blocks_of_their_order(text_first: bool, in_order: bool) -> None:
    """Whole tiles one after another are what blocks of a raster are to a video of one row."""
    grid = TokenGrid(2, 4, 6, text_len=9, text_first=text_first)
    row = TokenGrid(1, 1, grid.video_len, grid.text_len, text_first)
    torch.manual_seed(0)
    q, k = 2 * torch.randn(2, 1, 2, grid.num_tokens, 16)
    lse = torch.randn(1, 2, grid.num_tokens) + (q @ k.transpose(-1, -2) / 4).logsumexp(-1)
    method = AdaSpa(tile=(2, 2, 3), row_stride=1, recall=0.5)
    order = method.shared_order(grid, q.device)
    assert order is not None
    moved, moved_lse = [order.permute(x) for x in (q, k)], order.permute(lse)
    given, given_lse = (moved, moved_lse) if in_order else ([q, k], lse)
    plan = method.plan(*given, given[1], Site(grid, in_order=in_order), Previous(None, given_lse, 0))
    want = AdaSpa(block=12, row_stride=1, recall=0.5).plan(*moved, moved[1], Site(row), Previous(None, moved_lse, 0))
    assert plan.q_order is order
    assert torch.equal(plan.block_mask.kept_blocks, want.block_mask.kept_blocks)


def test_sampled_rows_choose_nearly_the_same_blocks() -> None:
    """Queries that change slowly along the sequence, as in a video: every fourth row speaks for its block."""
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 2, 1024, 16, generator=generator)
    q = torch.nn.functional.avg_pool1d(q.transpose(2, 3).flatten(0, 2)[None], 65, 1, 32)[0].view(1, 2, 16, 1024)
    q = 24 * q.transpose(2, 3)
    site = Site(TokenGrid(4, 16, 16))
    every, some = (AdaSpa(block=64, row_stride=n).plan(q, k, k, site, None).block_mask.kept_blocks for n in (1, 4))
    assert (every & some).sum() >= 0.9 * every.sum()
    assert not torch.equal(every, some)


def test_the_given_lse_is_used_instead_of_a_dense_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k = torch.randn(2, 1, 2, 64, 16)
    lse = (q @ k.transpose(-1, -2) / 4).logsumexp(-1)
    method, site = AdaSpa(density=0.5, block=8), Site(TokenGrid(1, 8, 8))
    want = method.plan(q, k, k, site, None)

    def no_dense_pass(*_args: object, **_options: object) -> None:
        raise AssertionError("a dense pass was made although the LSE was there")

    monkeypatch.setattr("dit_sparse.methods.adaspa.dense_attention", no_dense_pass)
    got = method.plan(q, k, k, site, Previous(lse=lse))
    assert torch.equal(got.block_mask.kept_blocks, want.block_mask.kept_blocks)


def test_head_densities_are_the_papers() -> None:
    """Heads 0 and 3 keep more than 0.8 of their mass; so two heads give and the two most diffuse ones take."""
    mass = torch.full((1, 6, 2, 4), 0.25)
    mass[0, 0] = torch.tensor([0.97, 0.01, 0.01, 0.01])
    mass[0, 3] = torch.tensor([0.91, 0.03, 0.03, 0.03])
    mass[0, 1] = torch.tensor([0.5, 0.2, 0.2, 0.1])
    mass[0, 2] = torch.tensor([0.4, 0.2, 0.2, 0.2])
    kept = torch.zeros(1, 6, 2, 4, dtype=torch.bool)
    kept[..., 0] = True
    got = head_densities(mass, kept, 0.25, 0.8)[0]
    sparsity = 0.75
    give, take = 1 - (1 + sparsity) / 2, 1 - (3 * sparsity - 1) / 2
    assert got.tolist() == pytest.approx([give, 0.25, 0.25, give, take, take])
    assert float(got.mean()) == pytest.approx(0.25)


def test_at_most_half_of_the_heads_give() -> None:
    mass = torch.tensor([0.97, 0.01, 0.01, 0.01]).expand(1, 4, 2, 4)
    kept = torch.zeros(1, 4, 2, 4, dtype=torch.bool)
    kept[..., 0] = True
    got = head_densities(mass, kept, 0.25, 0.8)[0]
    assert sorted(got.tolist()) == pytest.approx([0.125, 0.125, 0.375, 0.375])


def test_head_densities_never_exceed_one() -> None:
    mass = torch.tensor([0.97, 0.01, 0.01, 0.01]).expand(1, 4, 2, 4)
    kept = torch.ones(1, 4, 2, 4, dtype=torch.bool)
    assert head_densities(mass, kept, 0.9, 0.8).max() <= 1


@pytest.mark.parametrize("density", [0.1, 0.25, 0.5])
def test_density_is_honoured_on_average_over_heads(density: float) -> None:
    torch.manual_seed(1)
    q, k = 3 * torch.randn(2, 2, 4, 768, 16)
    plan = AdaSpa(density=density, block=16).plan(q, k, k, Site(TokenGrid(3, 16, 16)), None)
    assert float(plan.density.mean()) == pytest.approx(density, rel=0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"density": 0}, "density"),
        ({"recall": 2}, "recall"),
        ({"block": 0}, "block"),
        ({"tile": (1, 0, 1)}, "tile"),
        ({"row_stride": 0}, "row_stride"),
    ],
)
def test_bad_parameters(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AdaSpa(**options)  # type: ignore[arg-type]


def test_without_the_cached_lse_it_makes_its_own(monkeypatch) -> None:
    """A wrong LSE from before must not matter then."""
    q, k, v = (torch.randn(1, 2, 64, 16, generator=torch.Generator().manual_seed(s)) for s in range(3))
    site, wrong = Site(TokenGrid(1, 8, 8)), Previous(None, torch.randn(1, 2, 64) * 9, 0)
    fresh = AdaSpa(block=16, cache_lse=False)
    assert not fresh.uses_lse
    kept = [m.plan(q, k, v, site, p).block_mask.full_blocks for m, p in ((fresh, wrong), (AdaSpa(block=16), None))]
    assert torch.equal(*kept)


@pytest.mark.parametrize("shift", [0.25, 0.5, 1.0])
def test_heads_give_and_get_the_shift(shift) -> None:
    kept = torch.tensor([[1.0, 0.0]]).expand(2, 2, 2).bool()[None]
    mass = torch.stack([torch.tensor([[0.9, 0.1]]).expand(2, 2), torch.tensor([[0.5, 0.5]]).expand(2, 2)])[None]
    want = torch.tensor([[0.4 * (1 - shift), 0.4 * (1 + shift)]], dtype=torch.float64)
    assert torch.allclose(head_densities(mass, kept, 0.4, 0.8, shift), want)
