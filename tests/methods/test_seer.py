"""SeerAttention's gate against loops, its weights file, and its training."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from train_gate import Sample, divergence, sample, train_gate

from dit_sparse import SeerAttention, Site, TokenGrid
from dit_sparse.methods.gate_file import Gate, GateFile, write_gates
from dit_sparse.methods.seer import gate_logits
from dit_sparse.reorder import raster_order
from tests.methods.literal import GRIDS, Block, best_per_row, fill, random_qkv, raster_blocks, weights_of

BLOCK, SIZE = 8, 6


def random_gate(heads: int = 3, dim: int = 16, seed: int = 0) -> Gate:
    generator = torch.Generator().manual_seed(seed)
    return Gate(*(torch.randn(heads, n * dim, SIZE, generator=generator) / 4 for n in (1, 3)))


@pytest.fixture
def weights(tmp_path: Path) -> str:
    path = str(tmp_path / "gates.safetensors")
    write_gates(path, {("transformer", 0): random_gate(), ("transformer", 1): random_gate(seed=1)}, BLOCK)
    return path


def literal_scores(q: Tensor, k: Tensor, gate: Gate, head: int, blocks: list[Block]) -> list[list[float]]:
    rows = []
    for query in blocks:
        left = q[query.tokens].mean(0) @ gate.q[head]
        row = []
        for key in blocks:
            own = k[key.tokens]
            pooled = torch.cat([own.mean(0), own.max(0).values, own.min(0).values])
            row.append(float(left @ (pooled @ gate.k[head])) / SIZE**0.5)
        total = sum(torch.tensor(row).exp().tolist())
        rows.append([float(torch.tensor(x).exp()) / total for x in row])
    return rows


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("density", [0.3, 0.6, None])
@pytest.mark.parametrize("layer", [0, 1])
def test_equals_the_literal_mask(grid: TokenGrid, density: float | None, layer: int, weights: str) -> None:
    q, k, v = random_qkv(grid)
    method = SeerAttention(weights, density, threshold=0.15)
    mask = method.plan(q, k, v, Site(grid, layer, 2), None).token_mask()
    blocks, gate = raster_blocks(grid, BLOCK), random_gate(seed=layer)
    for b in range(2):
        for h in range(3):
            scores = literal_scores(q[b, h], k[b, h], gate, h, blocks)
            if density is None:
                chosen = {
                    (i, j) for i, row in enumerate(scores) for j, x in enumerate(row) if x >= 0.15 or x == max(row)
                }
                want = fill(chosen, blocks, blocks, grid.num_tokens)
            else:
                want = best_per_row(lambda i, j, s=scores: s[i][j], blocks, blocks, grid.num_tokens, density)
            assert torch.equal(mask[b, h], want)


def test_a_target_is_the_largest_weight_of_a_block() -> None:
    grid = TokenGrid(2, 4, 5)
    q, k, _ = random_qkv(grid, batch=1, heads=1)
    lse = (q @ k.transpose(-1, -2) / 4).logsumexp(-1)
    got = sample(q, k, lse, raster_order(grid, BLOCK)).target[0, 0]
    weights, blocks = weights_of(q[0, 0], k[0, 0]), raster_blocks(grid, BLOCK)
    largest = torch.tensor([[float(weights[i.tokens][:, j.tokens].max()) for j in blocks] for i in blocks])
    assert torch.allclose(got, largest / largest.sum(-1, keepdim=True), atol=1e-5)


@pytest.mark.parametrize("size", [8, 16, 24])
def test_training_finds_what_pooling_cannot(size: int) -> None:
    """Attention goes to the blocks with one large key, which a mean hides and a maximum shows."""
    grid, samples = TokenGrid(1, 16, 16), []
    for seed in range(6):
        generator = torch.Generator().manual_seed(seed)
        q = 0.1 * torch.randn(1, 2, 256, 16, generator=generator)
        k = torch.randn(1, 2, 256, 16, generator=generator)
        q[..., 0] += 3
        spiky = torch.randperm(16, generator=generator)[:4] * 16
        k[:, :, spiky, 0] += 8
        k[:, :, spiky + 1, 0] -= 8
        lse = (q @ k.transpose(-1, -2) / 4).logsumexp(-1)
        samples.append(sample(q, k, lse, raster_order(grid, 16)))
    gate = train_gate(samples[:-1], size, rounds=100, rate=1e-2)
    last = samples[-1]
    learned = divergence(last.target, gate_logits(last.q, last.k, gate).softmax(-1))
    assert learned < 0.5 * divergence(last.target, last.pooled)


@pytest.mark.parametrize("size", [16, 32])
def test_training_begins_as_the_product_of_means(size: int) -> None:
    q, k = torch.randn(2, 1, 2, 4, 16, generator=torch.Generator().manual_seed(0))
    one = Sample(q, torch.cat([k, k + 1, k - 1], -1), torch.full((1, 2, 4, 4), 0.25), torch.full((1, 2, 4, 4), 0.25))
    gate = train_gate([one], size, rounds=0)
    assert torch.allclose(gate_logits(one.q, one.k, gate), q @ k.transpose(-1, -2) / 4, atol=1e-5)


def test_a_file_is_read_once_and_again_when_it_changes(weights: str) -> None:
    first = GateFile.open(weights)
    assert GateFile.open(weights) is first
    assert first.block == BLOCK
    assert torch.equal(first.gates["transformer", 1].k, random_gate(seed=1).k)
    write_gates(weights, {("transformer", 0): random_gate(seed=5)}, 4)
    os.utime(weights, ns=(1, 1))
    assert GateFile.open(weights).block == 4


def test_weights_that_cannot_be_written_leave_the_old_ones(weights: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(tensors: Any, path: Any, metadata: Any) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dit_sparse.methods.gate_file.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        write_gates(weights, {("transformer", 0): random_gate(seed=5)}, 4)
    assert GateFile.open(weights).block == BLOCK
    assert list(Path(weights).parent.iterdir()) == [Path(weights)]


def test_weights_that_do_not_fit_are_refused(weights: str, tmp_path: Path) -> None:
    grid = TokenGrid(2, 4, 4)
    q = torch.randn(1, 3, 32, 16)
    with pytest.raises(ValueError, match=r"weights must be a file of gates, got none: scripts/train_gate\.py"):
        SeerAttention().check(grid)
    with pytest.raises(ValueError, match="got 'nowhere': No such file"):
        SeerAttention("nowhere").check(grid)
    with pytest.raises(ValueError, match="have no gate for transformer layer 2; they have transformer 0"):
        SeerAttention(weights).plan(q, q, q, Site(grid, 2, 3), None)
    with pytest.raises(ValueError, match="are for 3 heads of 16 channels, got 2 of 16"):
        SeerAttention(weights).plan(*[q[:, :2]] * 3, Site(grid), None)
    (tmp_path / "text").write_text("no weights")
    with pytest.raises(ValueError, match="cannot be read"):
        SeerAttention(str(tmp_path / "text")).check(grid)
    save_file({"x": q}, tmp_path / "other")
    with pytest.raises(ValueError, match="must be of format 'dit-sparse gate 1', got None"):
        SeerAttention(str(tmp_path / "other")).check(grid)
    write_gates(tmp_path / "halved", {("transformer", 0): Gate(random_gate().q, random_gate().k[:, :9])}, 8)
    with pytest.raises(ValueError, match=r"must have \(3, 48, 6\) beside transformer.0.q"):
        SeerAttention(str(tmp_path / "halved")).check(grid)


@pytest.mark.parametrize(("options", "message"), [({"density": 0}, "density"), ({"threshold": 2}, "threshold")])
def test_bad_parameters(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SeerAttention(**options)  # type: ignore[arg-type]
