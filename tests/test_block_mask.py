"""Block masks: every form of one mask says the same as the bool matrix."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_mask

from dit_sparse.block_mask import BlockMask, pack_words
from dit_sparse.types import TokenOrder


def by_modulus(batch, head, q_token, k_token):
    """A predicate with no structure that a block could share; it depends on all four arguments."""
    return (q_token * 5 + k_token * 3 + head + 2 * batch) % 7 < 4


@st.composite
def orders(draw, batch, heads, tokens):
    """An order for every batch and head, or shared ones; blocks are uneven and may be empty."""
    b, h, blocks = draw(st.sampled_from([1, batch])), draw(st.sampled_from([1, heads])), draw(st.integers(1, 6))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    index = torch.stack([torch.randperm(tokens, generator=generator) for _ in range(b * h)]).reshape(b, h, tokens)
    inner = torch.randint(tokens + 1, (b, h, blocks - 1), generator=generator).sort(-1).values
    return TokenOrder.from_index(
        index, torch.cat([torch.zeros(b, h, 1), inner, torch.full((b, h, 1), tokens)], dim=-1).int()
    )


@st.composite
def masks(draw):
    """A mask with its two orders, the kept blocks and the partial ones (or None)."""
    batch, heads = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    q_order, kv_order = (draw(orders(batch, heads, draw(st.integers(1, 30)))) for _ in range(2))
    b, h = draw(st.sampled_from([1, batch])), draw(st.sampled_from([1, heads]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    shape = (b, h, q_order.num_blocks, kv_order.num_blocks)
    kept = torch.rand(shape, generator=generator) < draw(st.sampled_from([0.0, 0.3, 0.7, 1.0]))
    partial = torch.rand(shape, generator=generator) < 0.5 if draw(st.booleans()) else None
    predicate = None if partial is None else by_modulus
    mask = BlockMask.from_bool(kept, q_order.offsets, kv_order.offsets, partial=partial, predicate=predicate)
    if draw(st.booleans()):
        mask = replace(mask)  # which knows the lists alone, not the block map that they were made of
    return mask, q_order, kv_order, kept, partial


def mask_by_loops(q_order, kv_order, kept, partial):
    """`[B, H, Nq, Nk]` bool in the orders' positions, pair by pair."""
    tensors = (q_order.index, q_order.offsets, kv_order.index, kv_order.offsets, kept)
    b, h = (max(t.shape[axis] for t in tensors) for axis in (0, 1))
    out = torch.zeros(b, h, q_order.num_tokens, kv_order.num_tokens, dtype=torch.bool)

    def at(tensor, batch, head):
        return tensor[batch % tensor.shape[0], head % tensor.shape[1]]

    for batch, head in product(range(b), range(h)):
        q_bounds, k_bounds = at(q_order.offsets, batch, head).tolist(), at(kv_order.offsets, batch, head).tolist()
        for i, j in product(range(q_order.num_blocks), range(kv_order.num_blocks)):
            if not at(kept, batch, head)[i, j]:
                continue
            for q, k in product(range(q_bounds[i], q_bounds[i + 1]), range(k_bounds[j], k_bounds[j + 1])):
                refined = partial is not None and at(partial, batch, head)[i, j]
                q_token, k_token = at(q_order.index, batch, head)[q], at(kv_order.index, batch, head)[k]
                out[batch, head, q, k] = not refined or by_modulus(batch, head, q_token, k_token)
    return out


@settings(deadline=None)
@given(masks())
def test_to_bool_is_the_mask_pair_by_pair(case):
    mask, q_order, kv_order, kept, partial = case
    got = mask.to_bool(q_order.index, kv_order.index)
    want = mask_by_loops(q_order, kv_order, kept, partial)
    assert torch.equal(got.expand(want.shape), want)


@settings(deadline=None)
@given(masks())
def test_density_is_the_mean_of_to_bool(case):
    mask, q_order, kv_order, kept, partial = case
    want = mask_by_loops(q_order, kv_order, kept, partial).double().mean((-1, -2))
    got = mask.density(q_order.index, kv_order.index)
    assert got.dtype == torch.float64
    torch.testing.assert_close(got.expand(want.shape), want, rtol=1e-12, atol=0)


@settings(deadline=None)
@given(masks())
def test_lists_and_block_maps_give_back_what_was_kept(case):
    mask, _, _, kept, partial = case
    partial = torch.zeros_like(kept) if partial is None else partial
    assert torch.equal(mask.kept_blocks, kept)
    assert torch.equal(mask.full_blocks, kept & ~partial)
    assert mask.partial_blocks is None or torch.equal(mask.partial_blocks, kept & partial)
    for row_kept, count, indices in zip(
        (kept & ~partial).flatten(0, 2), mask.kv_counts.flatten(), mask.kv_indices.flatten(0, 2), strict=True
    ):
        assert indices[:count].tolist() == [j for j, keep in enumerate(row_kept) if keep]


@settings(deadline=None)
@given(masks())
def test_pack_and_unpack_give_the_same_mask(case):
    mask, q_order, kv_order, _, _ = case
    unpacked = mask.pack().unpack()
    assert "full_blocks" in vars(unpacked)  # without a scatter
    assert torch.equal(unpacked.full_blocks, mask.full_blocks)
    assert torch.equal(unpacked.kv_counts, mask.kv_counts)
    assert torch.equal(unpacked.kv_indices, mask.kv_indices)
    assert (unpacked.partial_blocks is None) == (mask.partial_blocks is None)
    assert torch.equal(unpacked.to_bool(q_order.index, kv_order.index), mask.to_bool(q_order.index, kv_order.index))


@settings(deadline=None)
@given(masks())
def test_bsr_rebuilds_the_kept_blocks(case):
    mask = case[0]
    indptr, indices = mask.to_bsr()
    assert indptr.dtype == indices.dtype == torch.int32
    rebuilt = torch.zeros_like(mask.kept_blocks).flatten(0, 2)
    for row in range(rebuilt.shape[0]):
        rebuilt[row, indices[indptr[row] : indptr[row + 1]].long()] = True
    assert torch.equal(rebuilt.view_as(mask.kept_blocks), mask.kept_blocks)
    assert indptr[-1] == indices.numel()


@settings(max_examples=60, deadline=None)
@given(masks(), st.sampled_from([(4, 4), (8, 4), (3, 5), (128, 128)]))
def test_flex_says_the_same_pair_by_pair_and_block_by_block(case, block_size):
    mask, q_order, kv_order, kept, partial = case
    want = mask_by_loops(q_order, kv_order, kept, partial)
    b, h, n_q, n_k = want.shape
    flex = mask.to_flex(q_order.index, kv_order.index, block_size)
    assert torch.equal(create_mask(flex.mask_mod, b, h, n_q, n_k, device="cpu"), want)
    assert torch.equal(mask_of_flex_lists(flex, want, block_size), want)


def mask_of_flex_lists(flex, want, block_size):
    """What a kernel computes that follows flex's lists: full blocks whole, partial ones by the mask."""
    out = torch.zeros_like(want)
    b, h = want.shape[:2]
    for batch, head in product(range(b), range(h)):
        for counts, indices, whole in (
            (flex.full_kv_num_blocks, flex.full_kv_indices, True),
            (flex.kv_num_blocks, flex.kv_indices, False),
        ):
            counts, indices = (t[batch % t.shape[0], head % t.shape[1]] for t in (counts, indices))
            for i in range(counts.shape[0]):
                rows = slice(i * block_size[0], (i + 1) * block_size[0])
                for j in indices[i, : counts[i]].tolist():
                    columns = slice(j * block_size[1], (j + 1) * block_size[1])
                    block = want[batch, head, rows, columns]
                    out[batch, head, rows, columns] = torch.ones_like(block) if whole else block
    return out


@settings(max_examples=60, deadline=None)
@given(masks(), st.sampled_from([(4, 4), (8, 4), (3, 5), (128, 128)]))
def test_fa4_lists_keep_whole_what_is_kept_whole_and_touch_the_rest(case, block_size):
    mask, q_order, kv_order, kept, partial = case
    want = mask_by_loops(q_order, kv_order, kept, partial)
    whole = mask_by_loops(q_order, kv_order, kept if partial is None else kept & ~partial, None)
    touched = mask_by_loops(q_order, kv_order, kept, None)
    lists = mask.to_fa4(block_size)
    assert lists["block_size"] == block_size
    b, h = want.shape[:2]
    for batch, head, i in product(range(b), range(h), range(-(-want.shape[2] // block_size[0]))):
        full, part = (row_of_lists(lists, kind, batch, head, i) for kind in ("full", "mask"))
        assert full == sorted(full)
        assert part == sorted(part)
        rows = slice(i * block_size[0], (i + 1) * block_size[0])
        for j in range(-(-want.shape[3] // block_size[1])):
            columns = slice(j * block_size[1], (j + 1) * block_size[1])
            is_whole = bool(whole[batch, head, rows, columns].all())
            assert (j in full) == is_whole
            assert (j in part) == (bool(touched[batch, head, rows, columns].any()) and not is_whole)
            if j not in part:
                assert (want[batch, head, rows, columns] == is_whole).all()


def row_of_lists(lists, kind, batch, head, row):
    """The blocks that one row of FlashAttention-4's lists names."""
    counts, indices = (lists[f"{kind}_block_{field}"] for field in ("cnt", "idx"))
    assert counts.dtype == indices.dtype == torch.int32
    counts, indices = (x[batch % x.shape[0], head % x.shape[1]] for x in (counts, indices))
    return indices[row, : counts[row]].tolist()


def test_lists_are_contiguous_whatever_the_strides_of_the_blocks():
    kept = (torch.rand(1, 2, 5, 4) < 0.5).transpose(-1, -2)
    q_offsets, k_offsets = (torch.arange(0, 64 * n + 1, 64, dtype=torch.int32)[None, None] for n in (4, 5))
    mask = BlockMask.from_bool(kept, q_offsets, k_offsets)
    order, kv_order = (TokenOrder.from_index(torch.arange(int(o[0, 0, -1])), o) for o in (q_offsets, k_offsets))
    flex = mask.to_flex(order.index, kv_order.index, (64, 64))
    lists = (mask.kv_counts, mask.kv_indices, flex.kv_num_blocks, flex.kv_indices)
    lists += (flex.full_kv_num_blocks, flex.full_kv_indices)
    assert all(x.is_contiguous() for x in lists)
    assert torch.equal(mask.full_blocks, kept)


def test_full_keeps_everything_and_says_so():
    offsets = torch.tensor([[[0, 3, 10]]], dtype=torch.int32)
    mask = BlockMask.full(offsets, offsets)
    index = torch.arange(10).reshape(1, 1, 10)
    assert mask.is_full
    assert mask.to_bool(index, index).all()
    assert mask.density(index, index) == 1.0
    assert mask.pack().unpack().is_full
    assert (mask.num_q_blocks, mask.num_k_blocks) == (2, 2)


def test_packing_takes_a_bit_a_block():
    offsets = torch.arange(0, 101, dtype=torch.int32).reshape(1, 1, -1)
    packed = BlockMask.full(offsets, offsets).pack()
    assert packed.full_bits.shape == (1, 1, 100, 13)
    assert packed.full_bits.dtype == torch.uint8


def test_block_of_skips_empty_blocks():
    offsets = torch.tensor([[[0, 0, 2, 2, 5, 5], [0, 1, 2, 3, 4, 5]]], dtype=torch.int32)
    assert BlockMask.block_of(offsets)[0].tolist() == [[1, 1, 3, 3, 3], [0, 1, 2, 3, 4]]


def test_counts_of_pairs_beyond_int32_stay_exact():
    tokens = 2**20 + 3
    offsets = torch.tensor([[[0, 2**19, tokens]]], dtype=torch.int32)
    mask = BlockMask.from_bool(torch.tensor([[[[True, False], [True, True]]]]), offsets, offsets)
    index = torch.arange(tokens).reshape(1, 1, tokens)
    small, large = 2**19, tokens - 2**19
    assert mask.density(index, index).item() == (small * small + large * tokens) / tokens**2


def test_to_moves_every_tensor_and_keeps_the_predicate():
    offsets = torch.tensor([[[0, 3, 10]]], dtype=torch.int32)
    kept = torch.ones(1, 1, 2, 2, dtype=torch.bool)
    mask = BlockMask.from_bool(kept, offsets, offsets, partial=kept, predicate=by_modulus)
    assert mask.kept_blocks.all()
    moved = mask.to("meta")
    assert moved.predicate is by_modulus
    assert moved.device.type == moved.q_offsets.device.type == moved.partial_indices.device.type == "meta"


class TestErrors:
    offsets = torch.tensor([[[0, 3, 10]]], dtype=torch.int32)
    counts = torch.zeros(1, 1, 2, dtype=torch.int32)
    indices = torch.zeros(1, 1, 2, 2, dtype=torch.int32)

    def test_dtypes(self):
        with pytest.raises(ValueError, match=r"kv_counts must be int32, got torch.int64"):
            BlockMask(self.counts.long(), self.indices, self.offsets, self.offsets)
        with pytest.raises(ValueError, match=r"k_offsets must be int32, got torch.float32"):
            BlockMask(self.counts, self.indices, self.offsets, self.offsets.float())

    def test_shapes(self):
        with pytest.raises(ValueError, match=r"kv_counts must be \[B\|1, H\|1, 2\], got \(1, 1, 3\)"):
            BlockMask(torch.zeros(1, 1, 3, dtype=torch.int32), self.indices, self.offsets, self.offsets)
        with pytest.raises(ValueError, match=r"kv_indices must be \(1, 1, 2\) \+ \(L,\), got \(1, 1, 1, 2\)"):
            BlockMask(self.counts, self.indices[:, :, :1], self.offsets, self.offsets)

    def test_partial_blocks(self):
        with pytest.raises(ValueError, match="partial_counts and partial_indices must be given together"):
            BlockMask(self.counts, self.indices, self.offsets, self.offsets, partial_counts=self.counts)
        with pytest.raises(ValueError, match="partial blocks need a predicate, got None"):
            BlockMask(self.counts, self.indices, self.offsets, self.offsets, self.counts, self.indices)

    def test_from_bool(self):
        with pytest.raises(ValueError, match=r"kept must be bool \[B\|1, H\|1, Mq, Mk\], got torch.float32"):
            BlockMask.from_bool(torch.ones(1, 1, 2, 2), self.offsets, self.offsets)
        with pytest.raises(ValueError, match=r"kept must be bool .*\(2, 2\)"):
            BlockMask.from_bool(torch.ones(2, 2, dtype=torch.bool), self.offsets, self.offsets)
        with pytest.raises(ValueError, match="kept must have k_offsets' 2 key blocks, got 3"):
            BlockMask.from_bool(torch.ones(1, 1, 2, 3, dtype=torch.bool), self.offsets, self.offsets)


@pytest.mark.parametrize("blocks", [1, 31, 32, 75])
def test_words_hold_a_bit_a_block_lowest_first(blocks: int) -> None:
    kept = torch.rand(2, 3, blocks, generator=torch.Generator().manual_seed(0)) < 0.5
    kept[..., 31 : min(32, blocks)] = True  # the sign of a word
    words = pack_words(kept)
    assert words.dtype == torch.int32
    for row, found in zip(kept.flatten(0, 1).tolist(), words.flatten(0, 1).tolist(), strict=True):
        want = [sum(bit << i for i, bit in enumerate(row[start : start + 32])) for start in range(0, blocks, 32)]
        assert [word % 2**32 for word in found] == want
