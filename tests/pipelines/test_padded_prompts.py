"""HunyuanVideo's padded prompts: padding is never attended, in batches of unlike lengths neither."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from dit_sparse import AdaSpa, Dense, Neighborhood, Schedule, TokenGrid, sparsify, statistics, unsparsify
from dit_sparse.attention import sparse_attention
from dit_sparse.pipelines import session_of
from dit_sparse.pipelines.layout import Group, Layout
from dit_sparse.pipelines.session import Session
from tests.pipelines.families import FAMILIES, KINDS, METHODS

HUNYUAN = next(family for family in FAMILIES if family.name == "hunyuan_video")
SHORT, LONG = "a red ball", "a big blue square moving left on black"
LATENTS = torch.randn(2, 4, 3, 8, 12, generator=torch.Generator().manual_seed(5))


@pytest.fixture
def pipe() -> Any:
    return HUNYUAN.make()


@pytest.mark.parametrize("method", KINDS, ids=lambda m: m.name)
def test_more_padding_changes_nothing(pipe, method) -> None:
    sparsify(pipe, method)
    want = HUNYUAN.run(pipe, max_sequence_length=4)
    for length in (5, 64):
        got = HUNYUAN.run(pipe, max_sequence_length=length)
        assert (got - want).abs().max() <= 1e-4 * want.abs().max()


@pytest.mark.parametrize("method", [Dense(), *KINDS], ids=lambda m: m.name)
def test_a_batch_of_unlike_lengths_equals_its_prompts_alone(pipe, method) -> None:
    sparsify(pipe, method)
    together = HUNYUAN.run(pipe, [SHORT, LONG], latents=LATENTS)
    density = statistics(pipe).sparse_density
    alone = [HUNYUAN.run(pipe, prompt, latents=LATENTS[i : i + 1]) for i, prompt in enumerate((SHORT, LONG))]
    assert (together - torch.cat(alone)).abs().max() <= 1e-4 * together.abs().max()
    if method != Dense():
        assert 0.3 < density < 0.7


def test_prompts_of_unlike_lengths_have_plans_of_their_own(pipe) -> None:
    HUNYUAN.run(sparsify(pipe, AdaSpa(density=0.5, block=16)), [LONG, SHORT, LONG])
    grids = {key[0] for key in session_of(pipe).previous}
    assert grids == {TokenGrid(3, 8, 12, 4), TokenGrid(3, 8, 12, 9)}
    sizes = {key[0].text_len: p.plan.block_mask.kv_counts.shape[0] for key, p in session_of(pipe).previous.items()}
    assert sizes == {4: 1, 9: 2}


@pytest.mark.parametrize("prompts", [[SHORT], [SHORT, LONG]], ids=["one length", "two lengths"])
def test_sparse_calls_equal_masked_attention_over_the_padded_sequence(pipe, prompts, monkeypatch) -> None:
    """An oracle that knows nothing of trimming: float64 attention of all tokens under plan and key padding."""
    method = Schedule(AdaSpa(density=0.5, block=16))
    plans: list[Any] = []
    attend, sparse = Session.attend, sparse_attention
    largest = []

    def spy(*tensors: Any, **options: Any) -> Any:
        plans.append(tensors[3])
        return sparse(*tensors, **options)

    def checks(self, layer, num_layers, q, k, v, dense):
        plans.clear()
        out = attend(self, layer, num_layers, q, k, v, dense)
        layout = self._forward.layout
        for (rows, grid), plan in zip(layout.groups, plans, strict=False):
            mask = torch.zeros(q.shape[0], q.shape[1], q.shape[2], k.shape[2], dtype=torch.bool)[rows]
            mask[..., : grid.num_tokens, : grid.num_tokens] = plan.token_mask()
            want = F.scaled_dot_product_attention(*(x[rows].double() for x in (q, k, v)), attn_mask=mask)
            error = (out[rows].double() - want)[:, :, : grid.num_tokens].abs().max()
            largest.append(float(error / want.nan_to_num().abs().max()))
        return out

    monkeypatch.setattr("dit_sparse.attention.sparse_attention", spy)
    monkeypatch.setattr(Session, "attend", checks)
    HUNYUAN.run(sparsify(pipe, method), prompts)
    assert len(largest) == 3 * 2 * len(prompts)
    assert max(largest) <= 1e-5


def test_without_padding_nothing_is_trimmed(pipe) -> None:
    want = HUNYUAN.run(pipe, max_sequence_length=4)
    assert torch.equal(HUNYUAN.run(sparsify(pipe, Dense()), max_sequence_length=4), want)


def test_dense_attention_of_the_real_tokens_alone() -> None:
    """What dense steps on a GPU run instead of a masked kernel."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 3, 2, 20, 8)
    session = Session(Schedule(AdaSpa()))
    session.begin_forward(Layout(TokenGrid(1, 3, 4, 8), (8, 3, 3)), "transformer", None)
    mask = torch.arange(20) < torch.tensor([20, 15, 15])[:, None]
    want = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None])
    got = session.attend_densely(q, k, v)
    assert torch.allclose(got[0], want[0], atol=1e-6)
    assert torch.allclose(got[1:, :, :15], want[1:, :, :15], atol=1e-6)
    assert not got[1:, :, 15:].any()


def test_a_layout_groups_samples_by_length() -> None:
    grid = TokenGrid(1, 2, 2, 6)
    assert Layout(grid).groups == [Group(slice(None), grid)]
    assert not Layout(grid).is_padded
    assert not Layout(grid, (6, 6)).is_padded
    assert Layout(grid, (2, 2)).groups == [Group(slice(None), TokenGrid(1, 2, 2, 2))]
    mixed = Layout(grid, (6, 0, 6))
    assert mixed.is_padded
    assert mixed.groups == [Group([1], TokenGrid(1, 2, 2, 0)), Group([0, 2], grid)]


def test_layouts_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="padded text must come last"):
        Layout(TokenGrid(1, 2, 2, 6, text_first=True), (3,))
    with pytest.raises(ValueError, match="text_lens must be from 0 to 6, got"):
        Layout(TokenGrid(1, 2, 2, 6), (3, 7))


def test_an_attention_mask_that_is_no_padding_is_refused(pipe) -> None:
    sparsify(pipe, Neighborhood())
    attn = pipe.transformer.transformer_blocks[0].attn
    hidden, text = torch.randn(1, 12, 32), torch.randn(1, 4, 32)
    with pytest.raises(ValueError, match=r"attention_mask must be key padding \(1, 1, 1, 16\), got \(1, 1, 16, 16\)"):
        attn(hidden, encoder_hidden_states=text, attention_mask=torch.ones(1, 1, 16, 16, dtype=torch.bool))
    unsparsify(pipe)


def test_many_lengths_do_not_pile_up(pipe) -> None:
    sparsify(pipe, METHODS[0])
    for count in range(1, 13):
        HUNYUAN.run(pipe, " ".join(["ball"] * count), steps=2)
    assert len(session_of(pipe).previous) <= 9
