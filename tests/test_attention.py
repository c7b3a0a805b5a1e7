"""The public kernel door: orders are undone, and bad arguments are named."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import dit_sparse.attention
from dit_sparse import AttentionPlan, TokenOrder, sparse_attention
from dit_sparse.block_mask import pack_words
from dit_sparse.kernels import Route


def random_plan(
    heads: int, tokens: int, density: float = 0.5, generator: torch.Generator | None = None
) -> AttentionPlan:
    index = torch.stack([torch.randperm(tokens, generator=generator) for _ in range(heads)])[None]
    offsets = torch.tensor([*range(0, tokens, 7), tokens])
    order = TokenOrder.from_index(index, offsets)
    kept = torch.rand(1, heads, order.num_blocks, order.num_blocks, generator=generator) < density
    return AttentionPlan.from_kept(order, kept)


def of_heads(plan: AttentionPlan, heads: int) -> AttentionPlan:
    levels = torch.zeros(1, heads, dtype=torch.int8)
    return replace(plan.with_remainder("mean"), head_remainders=levels)


def oracle(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan) -> tuple[Tensor, Tensor]:
    scores = q.double() @ k.double().transpose(-1, -2) * q.shape[-1] ** -0.5
    scores = scores.masked_fill(~plan.token_mask(), -torch.inf)
    return scores.softmax(-1).nan_to_num(0) @ v.double(), scores.logsumexp(-1)


@pytest.mark.parametrize("backend", ["auto", "reference", "gather"])
@pytest.mark.parametrize("seed", range(3))
def test_equals_dense_attention_under_the_plans_mask(backend: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    plan = random_plan(3, 45, generator=generator)
    q, k, v = torch.randn(3, 2, 3, 45, 20, generator=generator)
    out, lse = sparse_attention(q, k, v, plan, backend=backend, return_lse=True)
    want, want_lse = oracle(q, k, v, plan)
    floor = (F.scaled_dot_product_attention(q, k, v, attn_mask=plan.token_mask()).nan_to_num(0) - want).abs().max()
    assert (out - want).abs().max() <= 2 * floor + 1e-6
    assert torch.allclose(lse.double(), want_lse, atol=1e-5)


def test_a_full_plan_equals_sdpa() -> None:
    from dit_sparse import Dense, Site, TokenGrid

    q, k, v = torch.randn(3, 1, 2, 60, 16)
    plan = Dense().plan(q, k, v, Site(TokenGrid(3, 4, 5)), None)
    assert torch.equal(sparse_attention(q, k, v, plan), F.scaled_dot_product_attention(q, k, v))


def test_scale_is_a_factor_on_the_scores() -> None:
    plan = random_plan(1, 21)
    q, k, v = torch.randn(3, 1, 1, 21, 16)
    scaled = sparse_attention(q, k, v, plan, scale=0.5)
    assert torch.allclose(scaled, sparse_attention(q * 2, k, v, plan, scale=0.25), atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.update(q=a["q"][0]), "q must be"),
        (lambda a: a.update(k=a["k"].half()), "one floating dtype"),
        (lambda a: a.update(q=a["q"].int(), k=a["k"].int(), v=a["v"].int()), "one floating dtype"),
        (lambda a: a.update(v=a["v"][:, :, :5]), "must agree"),
        (lambda a: a.update(q=a["q"][:, :, :5]), "q_order is for 21 tokens, got 5"),
        (lambda a: a.update(plan=random_plan(2, 21)), "must have 1 or 3 in dimension H"),
        (lambda a: a.update(plan=of_heads(a["plan"], 2)), "head_remainders must have 1 or 3 in dimension H, got 2"),
        (lambda a: a.update(backend="gathr"), "gather"),
    ],
)
def test_bad_arguments_are_named(change, message: str) -> None:
    q, k, v = torch.randn(3, 1, 3, 21, 16)
    arguments = {"q": q, "k": k, "v": v, "plan": random_plan(3, 21), "backend": "auto"}
    change(arguments)
    with pytest.raises(ValueError, match=message):
        sparse_attention(**arguments)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ([(1, 3, 5, 16)] * 3, "q_order is for 21 tokens, got 5"),
        ([(1, 3, 21, 16), (1, 1, 21, 16), (1, 3, 21, 16)], "must agree"),
        ([(1, 2, 21, 16)] * 3, "must have 1 or 2 in dimension H, got 3"),
    ],
)
@pytest.mark.parametrize("in_order", [False, True])
def test_tensors_that_do_not_fit_a_route_are_named(shapes, message: str, in_order: bool, monkeypatch) -> None:
    order = random_plan(3, 21).q_order
    forced = torch.ones(1, 1, 3, 3, dtype=torch.bool)
    route = Route(order, forced, pack_words(forced), forced[:, :, 0], 0.5)
    monkeypatch.setattr(dit_sparse.attention, "routed_attention", lambda *_: pytest.fail("the kernel ran"))
    with pytest.raises(ValueError, match=message):
        dit_sparse.attention.attend_routed(*(torch.randn(size) for size in shapes), route, "mean", in_order)


@pytest.mark.parametrize("skip_threshold", [0.0, 1e-3])
def test_the_backend_of_a_call_is_chosen_once(monkeypatch: pytest.MonkeyPatch, skip_threshold: float) -> None:
    chosen: list[str] = []
    select = dit_sparse.attention.select

    def spy(*args):
        found = select(*args)
        chosen.append(found.name)
        return found

    monkeypatch.setattr(dit_sparse.attention, "select", spy)
    plan = random_plan(2, 45).with_skip(skip_threshold)
    q, k, v = torch.randn(3, 1, 2, 45, 16).unbind()
    for backend in ("auto", "reference"):
        out, name, skipped = dit_sparse.attention.attend(backend, q, k, v, plan, False)
        assert chosen == [name]
        assert (skipped is None) == (skip_threshold == 0)
        assert torch.equal(out, sparse_attention(q, k, v, plan, backend=select(backend, q, k, v, plan)))
        chosen.clear()
