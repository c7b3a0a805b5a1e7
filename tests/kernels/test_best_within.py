"""The choice by worth a pair under a budget, against blocks taken one by one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dit_sparse.kernels.best_within import best_within
from tests.kernels.test_block_mass import needs_gpu, needs_interpreter

Case = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def case(seed: int, *, heads: int = 2, q_blocks: int = 3, k_blocks: int = 6, even: bool = False) -> Case:
    draw = torch.Generator().manual_seed(seed)
    mass = torch.rand(2, heads, q_blocks, k_blocks, generator=draw) ** 4
    sizes = [torch.randint(0, 70, (n,), generator=draw, dtype=torch.int32) for n in (q_blocks, k_blocks)]
    if even:  # equal worth is then common
        mass = (mass * 4).round() / 4
        sizes = [torch.full_like(x, 64) for x in sizes]
    mass[:, :, 1] = 0
    text = (
        [torch.arange(n) == n - 1 for n in (q_blocks, k_blocks)]
        if seed % 2
        else [torch.zeros(n) > 0 for n in mass.shape[2:]]
    )
    return mass, text[0], text[1], sizes[0], sizes[1]


def one_by_one(mass: Tensor, budget: float, q_text: Tensor, k_text: Tensor, q_sizes: Tensor, k_sizes: Tensor) -> Tensor:
    kept = torch.zeros_like(mass, dtype=torch.bool)
    for b, heads in enumerate(mass):
        spent, free = 0, []
        for h, rows in enumerate(heads):
            for i, row in enumerate(rows.tolist()):
                for j, value in enumerate(row):
                    area = int(q_sizes[i]) * int(k_sizes[j])
                    if q_text[i] or k_text[j] or j == row.index(max(row)):
                        kept[b, h, i, j] = True
                        spent += area
                    else:
                        free.append((-float(torch.tensor(value) / max(area, 1)), h, i, j, area))
        for _, h, i, j, area in sorted(free):
            spent += area
            if spent > budget:
                break
            kept[b, h, i, j] = True
    return kept


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=needs_interpreter)])
@pytest.mark.parametrize("even", [False, True])
@pytest.mark.parametrize("density", [0.0, 0.2, 0.5, 1.0])
def test_equals_taking_blocks_one_by_one(backend: str, even: bool, density: float) -> None:
    mass, *rest = case(int(density > 0.2), even=even)
    budget = density * mass.shape[1] * float(rest[2].sum()) * float(rest[3].sum())
    found = best_within(mass, budget, *rest, backend=backend)
    assert found.equal(one_by_one(mass, budget, *rest))
    assert density not in (0.2, 0.5) or 0 < found.float().mean() < 1


@needs_interpreter
def test_the_kernel_finds_a_threshold_among_the_smallest_and_largest_floats() -> None:
    mass = torch.tensor([0.0, 1e-45, 1e-38, 3e-38, 1.0, 1.0000001, 3e38, float("inf")]).repeat(1, 1, 2, 1)
    sizes, no_text = torch.ones(8, dtype=torch.int32), torch.zeros(8, dtype=torch.bool)
    for budget in range(2, 17, 3):
        given = (mass, float(budget), no_text[:2], no_text, sizes[:2], sizes)
        assert best_within(*given, backend="triton").equal(best_within(*given, backend="torch")), budget


def test_names_what_the_kernel_does_not_take() -> None:
    mass, *rest = case(0)
    with pytest.raises(ValueError, match="mass must be float32"):
        best_within(mass.double(), 1.0, *rest, backend="triton")
    with pytest.raises(ValueError, match="backend must be"):
        best_within(mass, 1.0, *rest, backend="cuda")  # type: ignore[arg-type]


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("even", [False, True])
def test_on_a_gpu_the_search_equals_the_sort(even: bool) -> None:
    mass, *rest = (x.cuda() for x in case(1, heads=5, q_blocks=300, k_blocks=601, even=even))
    pairs = mass.shape[1] * float(rest[2].sum()) * float(rest[3].sum())
    for density in (0.02, 0.125, 0.6):
        want = best_within(mass, density * pairs, *rest, backend="torch")
        assert best_within(mass, density * pairs, *rest, backend="triton").equal(want)
