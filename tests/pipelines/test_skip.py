"""Skipping in a run: it is no dense run, its share is known, and densities count it."""

from __future__ import annotations

import pytest
import torch

from dit_sparse import AdaSpa, Schedule, SkipSoftmax, sparsify, statistics
from dit_sparse.attention import skipping_attention
from dit_sparse.pipelines import session_of

SKIP = Schedule(SkipSoftmax(scale_factor=250.0, block=16), warmup=0)


def test_receipts_hold_what_was_skipped_and_the_density_that_is_left(pipe, render, recwarn) -> None:
    render(sparsify(pipe, SKIP))
    run = statistics(pipe)
    assert not run.dense_calls, "a plan of every block that skips is not dense, and the cost model does not decide"
    assert set(run.backends) == {"gather"}
    assert 0 < run.skipped < 1
    assert run.density == run.sparse_density == pytest.approx(1 - run.skipped / 2)
    found = run.receipts()["transformer"]
    assert sum(found["skipped"]) / 2 == pytest.approx(run.skipped, abs=1e-4)
    assert found["density"] == [pytest.approx(1 - share / 2, abs=1e-4) for share in found["skipped"]]
    assert run.to_dict()["skipped"] == run.skipped


def test_what_is_counted_is_what_the_kernel_says(pipe, render, monkeypatch) -> None:
    """The records of a run against calls made anew by the reference."""
    calls = []

    def spy(q, k, v, plan, **options):
        calls.append(skipping_attention(q, k, v, plan, backend="reference", in_order=options["in_order"])[1])
        return skipping_attention(q, k, v, plan, **options)

    monkeypatch.setattr("dit_sparse.attention.skipping_attention", spy)
    render(sparsify(pipe, SKIP))
    tokens = 288
    for record, skipped in zip(statistics(pipe).records, calls, strict=True):
        torch.testing.assert_close(record.skipped, skipped.sum(-1) / tokens**2, check_dtype=False, atol=2e-2, rtol=0)


def test_on_top_of_a_sparse_method(pipe, render) -> None:
    method = AdaSpa(density=0.5, block=16)
    render(sparsify(pipe, Schedule(method, skip_factor=250.0)))
    run = statistics(pipe)
    assert 0 < run.skipped < 0.5
    assert run.sparse_density == pytest.approx(0.5 - run.skipped / 2)
    render(sparsify(pipe, method))
    assert statistics(pipe).skipped is None
    assert "skipped" not in statistics(pipe).receipts()["transformer"]


def test_a_factor_of_zero_is_dense(pipe, render) -> None:
    want = render(pipe)
    assert torch.equal(render(sparsify(pipe, Schedule(SkipSoftmax(scale_factor=0), warmup=0))), want)
    assert set(statistics(pipe).dense_calls) == {"every block kept"}


def test_a_backend_that_skips_no_blocks_is_refused_before_the_run(pipe) -> None:
    with pytest.raises(ValueError, match="backend 'flex' cannot be used: it skips no blocks; use 'reference'"):
        sparsify(pipe, SKIP, backend="flex")
    assert session_of(sparsify(pipe, SKIP, backend="reference")).schedule.skips
