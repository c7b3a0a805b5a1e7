"""Permutation: the kernel against torch's gather, strides and dtypes kept, there and back the identity."""

from __future__ import annotations

import pytest
import torch

from dit_sparse import TokenOrder
from dit_sparse.kernels import permute, restore
from dit_sparse.kernels.permute import gather_by_triton
from tests.kernels.test_block_mass import needs_interpreter


def random_order(batch: int, heads: int, tokens: int, device: str = "cpu") -> TokenOrder:
    index = torch.stack([torch.stack([torch.randperm(tokens) for _ in range(heads)]) for _ in range(batch)])
    return TokenOrder.from_index(index.to(device), torch.tensor([0, tokens], device=device))


def by_loop(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    rows = [[x[b, h][index[b % len(index), h % index.shape[1]]] for h in range(x.shape[1])] for b in range(len(x))]
    return torch.stack([torch.stack(heads) for heads in rows])


def tensors(count: int, tokens_first: bool, dtype: torch.dtype, device: str = "cpu") -> list[torch.Tensor]:
    shape = (2, 37, 3, 20) if tokens_first else (2, 3, 37, 20)
    made = [torch.randn(shape, device=device).to(dtype) for _ in range(count)]
    return [x.transpose(1, 2) for x in made] if tokens_first else made


@pytest.mark.parametrize("lead", [(1, 1), (1, 3), (2, 1), (2, 3)], ids=str)
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("tokens_first", [False, True])
@needs_interpreter
def test_the_kernel_gathers_tokens(lead, count, tokens_first) -> None:
    torch.manual_seed(0)
    order = random_order(*lead, 37)
    given = tensors(count, tokens_first, torch.float32)
    found = gather_by_triton(order.index, *given)
    assert len(found) == count
    for x, got in zip(given, found, strict=True):
        assert torch.equal(got, by_loop(x, order.index))
        assert got.stride() == x.stride()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@needs_interpreter
def test_every_dtype_is_copied_bit_for_bit(dtype) -> None:
    order = random_order(1, 3, 37)
    (x,) = tensors(1, False, dtype)
    assert torch.equal(gather_by_triton(order.index, x)[0], by_loop(x, order.index))


@needs_interpreter
def test_channels_that_are_not_side_by_side_and_no_tokens_at_all() -> None:
    order = random_order(1, 1, 37)
    x = torch.randn(2, 3, 20, 37).transpose(2, 3)
    assert torch.equal(gather_by_triton(order.index, x)[0], by_loop(x, order.index))
    assert gather_by_triton(order.index[..., :0], x[:, :, :0])[0].shape == (2, 3, 0, 20)


@pytest.mark.parametrize("lead", [(1, 1), (2, 3)], ids=str)
def test_there_and_back_is_the_identity(lead) -> None:
    order = random_order(*lead, 37)
    given = tensors(3, True, torch.float32)
    moved = permute(order, *given)
    for x, there, back in zip(given, moved, restore(order, *moved), strict=True):
        assert torch.equal(there, by_loop(x, order.index))
        assert torch.equal(back, x)


def test_nothing_is_copied_where_nothing_moves() -> None:
    order = TokenOrder.from_index(torch.arange(37), torch.tensor([0, 37]), is_identity=True)
    given = tensors(2, False, torch.float32)
    assert all(x is y for x, y in zip(given, permute(order, *given), strict=True))
    assert all(x is y for x, y in zip(given, restore(order, *given), strict=True))


def test_gradients_pass_through() -> None:
    order = random_order(1, 1, 5)
    x = torch.randn(1, 1, 5, 2, requires_grad=True)
    (moved,) = permute(order, x)
    (moved[:, :, 0]).sum().backward()
    assert x.grad[0, 0].sum(-1).nonzero().flatten().tolist() == [int(order.index[0, 0, 0])]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("lead", [(1, 1), (1, 24)], ids=str)
def test_on_a_gpu_the_kernel_runs_and_is_exact(lead) -> None:
    order = random_order(*lead, 5003, "cuda")
    given = [torch.randn(2, 5003, 24, 128, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for _ in range(3)]
    moved = permute(order, *given)
    for x, there, back in zip(given, moved, restore(order, *moved), strict=True):
        assert torch.equal(there, order.permute(x))
        assert torch.equal(back, x)
