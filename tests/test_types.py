"""The carrying types: grids, orders and plans."""

import weakref
from dataclasses import replace
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_sparse.block_mask import BlockMask
from dit_sparse.types import AttentionPlan, TokenGrid, TokenOrder


def orders(batch, heads, tokens, blocks=None, seed=0):
    """An order with random permutations, one per batch and head, and random offsets where `blocks` are asked for."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.stack([torch.randperm(tokens, generator=generator) for _ in range(batch * heads)])
    offsets = torch.tensor([0, tokens])
    if blocks is not None:
        inner = torch.randint(tokens + 1, (batch, heads, blocks - 1), generator=generator).sort(-1).values
        offsets = torch.cat([torch.zeros(batch, heads, 1), inner, torch.full((batch, heads, 1), tokens)], -1)
    return TokenOrder.from_index(index.reshape(batch, heads, tokens), offsets)


class TestTokenGrid:
    def test_text_last(self):
        grid = TokenGrid(2, 3, 4, text_len=5)
        assert (grid.shape, grid.video_len, grid.num_tokens) == ((2, 3, 4), 24, 29)
        assert (grid.video_start, grid.text_start) == (0, 24)
        assert str(grid) == "2x3x4 + 5 text last"

    def test_text_first(self):
        grid = TokenGrid(2, 3, 4, text_len=5, text_first=True)
        assert (grid.video_start, grid.text_start) == (5, 0)
        assert str(grid) == "2x3x4 + 5 text first"

    def test_without_text(self):
        assert str(TokenGrid(2, 3, 4)) == "2x3x4"
        assert TokenGrid(2, 3, 4, text_first=True).video_start == 0

    def test_grids_compare_and_hash_by_value(self):
        assert {TokenGrid(1, 2, 3): 1}[TokenGrid(1, 2, 3)] == 1

    @pytest.mark.parametrize("name", ["frames", "height", "width"])
    def test_sizes_below_one_are_refused(self, name):
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
            TokenGrid(**{"frames": 1, "height": 1, "width": 1, name: 0})

    def test_a_negative_text_length_is_refused(self):
        with pytest.raises(ValueError, match="text_len must be 0 or more, got -1"):
            TokenGrid(1, 1, 1, text_len=-1)


class TestTokenOrder:
    @settings(deadline=None)
    @given(
        st.integers(1, 3),
        st.integers(1, 3),
        st.integers(1, 40),
        st.sampled_from([(), (1,), (5,), (2, 3)]),
        st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.bool]),
        st.sampled_from([(True, True), (True, False), (False, True), (False, False)]),
    )
    def test_permute_and_restore_are_exact_inverses(self, batch, heads, tokens, trailing, dtype, shared):
        x = (torch.randn(batch, heads, tokens, *trailing) * 100).to(dtype)
        order = orders(1 if shared[0] else batch, 1 if shared[1] else heads, tokens)
        moved = order.permute(x)
        assert moved.shape == x.shape
        assert torch.equal(order.restore(moved), x)
        assert torch.equal(order.permute(order.restore(x)), x)

    def test_permute_takes_each_heads_own_order(self):
        order = orders(2, 3, 7)
        x = torch.randn(2, 3, 7, 4)
        moved = order.permute(x)
        for b, h, i in product(range(2), range(3), range(7)):
            assert torch.equal(moved[b, h, i], x[b, h, order.index[b, h, i]])

    def test_strided_inputs_are_permuted_as_contiguous_ones(self):
        order = orders(1, 3, 7)
        x = torch.randn(2, 7, 3, 4).transpose(1, 2)
        assert torch.equal(order.permute(x), order.permute(x.contiguous()))

    def test_an_identity_moves_nothing(self):
        order = TokenOrder.from_index(torch.arange(6), torch.tensor([0, 4, 6]), is_identity=True)
        x = torch.randn(1, 2, 6, 3)
        assert order.permute(x) is x
        assert order.restore(x) is x

    def test_from_index_fills_in_the_rest(self):
        order = TokenOrder.from_index(torch.tensor([2, 0, 1], dtype=torch.int32), torch.tensor([0, 1, 3]))
        assert order.index.dtype == order.inverse.dtype == torch.int64
        assert order.offsets.dtype == torch.int32
        assert order.inverse[0, 0].tolist() == [1, 2, 0]
        assert order.block_sizes[0, 0].tolist() == [1, 2]
        assert (order.num_tokens, order.num_blocks) == (3, 2)

    def test_to_moves_every_tensor(self):
        order = TokenOrder.from_index(torch.arange(6), torch.tensor([0, 4, 6]), is_identity=True).to("meta")
        assert {order.index.device.type, order.inverse.device.type, order.offsets.device.type} == {"meta"}
        assert order.is_identity

    def test_blocks_of_a_part_are_counted_without_the_empty_ones(self):
        offsets = torch.tensor([[[0, 4, 4, 6, 8], [0, 1, 2, 6, 8]]])
        order = TokenOrder.from_index(torch.arange(8).expand(1, 2, 8), offsets)
        for part, want in {(0, 4): 3, (4, 6): 1, (6, 8): 1, (5, 7): 2, (0, 8): 4}.items():
            assert order.count_blocks(*part) == want

    def test_shapes_and_dtypes_that_do_not_fit_are_refused(self):
        index, offsets = torch.arange(6).reshape(1, 1, 6), torch.tensor([[[0, 6]]], dtype=torch.int32)
        with pytest.raises(ValueError, match=r"index must be int64 \[B\|1, H\|1, N\], got torch.int64 \(6,\)"):
            TokenOrder(index[0, 0], index[0, 0], offsets)
        with pytest.raises(ValueError, match=r"index must be int64 .*got torch.int32"):
            TokenOrder(index.int(), index.int(), offsets)
        with pytest.raises(ValueError, match="inverse must have index's shape"):
            TokenOrder(index, index[..., :5], offsets)
        with pytest.raises(ValueError, match=r"offsets must be int32 .*got torch.int64"):
            TokenOrder(index, index, offsets.long())
        with pytest.raises(ValueError, match="offsets must be int32"):
            TokenOrder(index, index, offsets[0])

    def test_positions_beyond_int32_stay_exact(self):
        order = TokenOrder(*(torch.empty(1, 1, 2**33, dtype=torch.int64, device="meta") for _ in range(2)), _OFFSETS)
        assert order.num_tokens == 2**33
        assert order.permute(torch.empty(1, 40, 2**33, 128, device="meta")).shape == (1, 40, 2**33, 128)


_OFFSETS = torch.zeros(1, 1, 3, dtype=torch.int32)


class TestAttentionPlan:
    @pytest.mark.parametrize("bounds", [[0, 4, 7], [0, 4, 9], [1, 4, 8], [0, 6, 4, 8]])
    def test_offsets_that_do_not_cut_the_tokens_are_refused(self, bounds):
        order = TokenOrder.from_index(torch.arange(8), torch.tensor(bounds))
        kept = torch.ones(1, 1, order.num_blocks, order.num_blocks, dtype=torch.bool)
        with pytest.raises(ValueError, match="offsets must rise from 0 to the 8 tokens"):
            AttentionPlan.from_kept(order, kept)

    @pytest.mark.parametrize("partial", [False, True])
    def test_a_plan_at_rest_comes_back_equal_with_its_density_counted(self, partial):
        order = orders(1, 3, 50, blocks=9)
        draw = torch.Generator().manual_seed(3)
        kept = torch.rand(1, 3, 9, 9, generator=draw) < 0.5
        options = {}
        if partial:
            options = {"partial": torch.rand(1, 3, 9, 9, generator=draw) < 0.5, "predicate": lambda b, h, i, j: i > j}
        plan = AttentionPlan.from_kept(order, kept, **options)
        assert plan.unpack() is plan
        packed = plan.pack()
        again = packed.unpack()
        assert packed.block_mask.full_bits.dtype == torch.uint8
        assert torch.equal(again.token_mask(), plan.token_mask())
        assert again.block_mask.kept_pairs is not None
        assert torch.equal(again.density, plan.density)

    def test_a_long_order_of_heads_rests_at_a_quarter_of_its_bytes_and_stays_shared(self, monkeypatch):
        monkeypatch.setattr("dit_sparse.token_order.PACKED_FROM", 50)
        order = orders(2, 3, 50, blocks=9)
        keys = orders(1, 3, 50, blocks=4, seed=1)
        index, inverse, geometry = order.index.clone(), order.inverse.clone(), order.geometry
        plans = [
            AttentionPlan.from_kept(order, torch.ones(1, 1, 9, 9, dtype=torch.bool)),
            AttentionPlan.from_kept(order, torch.ones(1, 1, 9, 4, dtype=torch.bool), kv_order=keys),
        ]
        with torch.inference_mode():
            first, second = (plan.pack() for plan in plans)
        assert first.packed_q_order is first.packed_kv_order is second.packed_q_order is not second.packed_kv_order
        assert first.packed_q_order.index.nbytes == order.index.nbytes // 2
        assert first.q_order is order is second.unpack().q_order
        lasting, gone = order.lasting, weakref.ref(order)
        assert lasting is first.packed_q_order
        del order, plans
        assert gone() is None
        with torch.inference_mode():
            again, other = first.unpack(), second.unpack()
        assert again.q_order is again.kv_order is other.q_order is not other.kv_order
        assert torch.equal(again.q_order.index, index)
        assert torch.equal(again.q_order.inverse, inverse)
        assert again.q_order.__dict__["geometry"] == geometry
        assert again.q_order.lasting is lasting
        assert not again.q_order.index.is_inference()

    def test_orders_that_are_short_or_of_all_heads_rest_as_they_are(self, monkeypatch):
        for order in (orders(1, 3, 50), orders(1, 1, 50)):
            assert order.pack() is order.unpack() is order.lasting is order
            monkeypatch.setattr("dit_sparse.token_order.PACKED_FROM", 1)

    def test_the_masks_blocks_must_be_the_orders(self):
        order = orders(1, 1, 8, blocks=4)
        other = orders(1, 1, 8, blocks=3)
        with pytest.raises(ValueError, match="block_mask must have the orders' 3 x 3 blocks, got 4 x 4"):
            AttentionPlan(other, other, BlockMask.full(order.offsets, order.offsets))

    def test_a_remainder_goes_wherever_the_plan_goes(self):
        order = orders(1, 1, 8, blocks=4)
        plan = AttentionPlan.from_kept(order, torch.eye(4, dtype=torch.bool)[None, None])
        assert plan.remainder == "none"
        assert plan.with_remainder("none") is plan
        value = plan.with_remainder("value")
        for other in (value, value.pack().unpack(), value.to("meta"), replace(value, kv_order=order)):
            assert other.remainder == "value"
        assert value.block_mask is plan.block_mask

    def test_remainders_of_heads_go_wherever_the_plan_goes(self):
        order = orders(1, 1, 8, blocks=4)
        plan = AttentionPlan.from_kept(order, torch.eye(4, dtype=torch.bool)[None, None], remainder="value")
        own = replace(plan, head_remainders=torch.tensor([[2, 0, 1]], dtype=torch.int8))
        assert (own.num_batches, own.num_heads) == (1, 3)
        for other in (own, own.pack().unpack(), own.with_skip(0), own.to("cpu"), own.of_heads((0, 1, 2))):
            assert torch.equal(other.head_remainders, own.head_remainders)
        assert own.of_heads((2, 0)).head_remainders.tolist() == [[1, 2]]
        assert own.with_remainder("value").head_remainders is None
        with pytest.raises(ValueError, match=r"head_remainders must be int8 \[B|1, H|1\], got torch.int64 \(1, 3\)"):
            replace(own, head_remainders=torch.tensor([[2, 0, 1]]))

    def test_an_unknown_remainder_is_refused(self):
        order = orders(1, 1, 8, blocks=4)
        with pytest.raises(ValueError, match="remainder must be one of none, mean, value, mass, got 'means'"):
            AttentionPlan.from_kept(order, torch.eye(4, dtype=torch.bool)[None, None], remainder="means")

    @pytest.mark.parametrize("shared", [False, True])
    def test_token_mask_is_in_the_sequences_own_order(self, shared):
        q_order = orders(1 if shared else 2, 3, 9, blocks=3)
        kv_order = orders(2, 1, 9, blocks=4, seed=1)
        kept = torch.rand(2, 3, 3, 4, generator=torch.Generator().manual_seed(2)) < 0.5
        plan = AttentionPlan(q_order, kv_order, BlockMask.from_bool(kept, q_order.offsets, kv_order.offsets))
        mask = plan.token_mask()
        assert mask.shape == (2, 3, 9, 9)
        for b, h, i, j in product(range(2), range(3), range(9), range(9)):
            q_token, k_token = q_order.index[b % q_order.index.shape[0], h, i], kv_order.index[b, 0, j]
            q_bounds, k_bounds = q_order.offsets[b % q_order.offsets.shape[0], h], kv_order.offsets[b, 0]
            q_block, k_block = int((q_bounds[1:] <= i).sum()), int((k_bounds[1:] <= j).sum())
            assert mask[b, h, q_token, k_token] == kept[b, h, q_block, k_block]

    @pytest.mark.parametrize("with_partial", [False, True])
    def test_density_is_the_mean_of_the_token_mask(self, with_partial):
        order = orders(2, 3, 20, blocks=5)
        generator = torch.Generator().manual_seed(3)
        kept = torch.rand(2, 3, 5, 5, generator=generator) < 0.6
        options = {}
        if with_partial:
            partial = torch.rand(2, 3, 5, 5, generator=generator) < 0.5
            options = {"partial": partial, "predicate": lambda batch, head, q, k: (q * 3 + k + head + batch) % 4 > 0}
        plan = AttentionPlan.from_kept(order, kept, **options)
        torch.testing.assert_close(plan.density, plan.token_mask().double().mean((-1, -2)), rtol=1e-12, atol=0)

    def test_to_keeps_one_order_one(self):
        order = orders(1, 1, 8, blocks=4)
        plan = AttentionPlan.from_kept(order, torch.ones(1, 1, 4, 4, dtype=torch.bool)).to("meta")
        assert plan.q_order is plan.kv_order
        assert plan.block_mask.kv_counts.device.type == "meta"


@pytest.mark.parametrize("index", [[0, 0, 1, 2], [0, 1, 2, 4], [-1, 0, 1, 2]], ids=str)
def test_an_index_that_is_no_permutation_is_refused(index: list[int]) -> None:
    with pytest.raises(ValueError, match="index must hold each token from 0 to 3 once, got"):
        TokenOrder.from_index(torch.tensor(index), torch.tensor([0, 2, 4]))
