"""The benchmark of what stands around attention: both ways agree, and one that does not is an error."""

from __future__ import annotations

import bench_around
import pytest
import torch

from dit_sparse.pipelines import wan_block


def test_parts_are_timed_and_must_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_around, "GRID", (2, 4, 8))
    parts = bench_around.measure(1)
    assert [(part.name, part.calls) for part in parts] == [
        ("cross-attention", 320),
        ("feed-forward", 320),
        ("VAE decoder", 1),
    ]
    assert all(part.diffusers_ms > 0 and part.ours_ms > 0 for part in parts)
    assert len(bench_around.table(parts).rows) == 3
    monkeypatch.setattr(wan_block, "merged", lambda text, alike: (text[:, : 513 - alike], None))
    with pytest.raises(RuntimeError, match="cross-attention differs"), torch.no_grad():
        bench_around.measure(1)
