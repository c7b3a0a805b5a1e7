"""The benchmark's parts on a CPU, at small sizes and with the CPU's kernels."""

from __future__ import annotations

import io
import itertools
import json
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from rich.console import Console

from dit_sparse.bench import report as reports
from dit_sparse.bench import sections, shapes, timing
from dit_sparse.bench.sections import Row
from dit_sparse.bench.shapes import Shape, inputs, random_plan
from dit_sparse.kernels import BACKENDS
from dit_sparse.types import AttentionPlan, BlockMask, TokenOrder

CPU = torch.device("cpu")
TINY = Shape(2, 16, 300)


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    for known in (shapes.SHAPES, sections.SHAPES, reports.SHAPES):
        monkeypatch.setitem(known, "tiny", TINY)


@pytest.mark.parametrize(("names", "rounds"), [("a", 4), ("abcd", 4), ("abcdef", 12), ("abc", 6), ("abcde", 10)])
def test_times_are_taken_in_turns_of_unlike_order(names: str, rounds: int) -> None:
    seen: list[tuple[str, int]] = []
    calls = {name: lambda i, name=name: seen.append((name, i)) for name in names}
    times = timing.in_turns(calls, rounds, repeat=False)
    assert set(times) == set(names)
    assert all(time >= 0 for time in times.values())
    count = len(names)
    orders = ["".join(name for name, _ in seen[start : start + count]) for start in range(0, len(seen), count)]
    assert orders[0] == names  # every kernel once, untimed
    assert len(orders) == rounds + 1
    for place in range(count):
        assert Counter(order[place] for order in orders[1:]) == dict.fromkeys(names, rounds // count)
    pairs = Counter(pair for order in orders[1:] for pair in pairwise(order))
    assert pairs == dict.fromkeys(itertools.permutations(names, 2), rounds // count)


@pytest.mark.parametrize("density", [1.0, 0.5, 0.1])
def test_a_random_plan_keeps_equally_many_blocks_a_row(density: float) -> None:
    counts = random_plan(TINY, 32, density, CPU).block_mask.kv_counts
    assert (counts == max(1, round(density * 10))).all()


def test_the_check_passes_what_is_right_and_nothing_else() -> None:
    q, k, v = inputs(TINY, CPU, torch.float32)[0]
    plan = random_plan(TINY, 32, 0.5, CPU)
    mask = plan.block_mask.to_bool(plan.q_order.index, plan.kv_order.index)
    right = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    assert timing.check(right, q, k, v, plan) < 1e-5
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    assert timing.check(dense, q, k, v, None) < 1e-5
    for wrong in (dense, right * 1.001, right * float("nan")):
        with pytest.raises(RuntimeError, match="relative error"):
            timing.check(wrong, q, k, v, plan)


@pytest.mark.parametrize("remainder", ["mean", "value", "mass"])
def test_the_check_knows_remainders(remainder) -> None:
    q, k, v = inputs(TINY, CPU, torch.float32)[0]
    plan = random_plan(TINY, 32, 0.5, CPU).with_remainder(remainder)
    right, without = (
        BACKENDS["gather"].forward(q, k, v, p, scale=0.25, return_lse=False)[0]
        for p in (plan, plan.with_remainder("none"))
    )
    assert timing.check(right, q, k, v, plan) < 1e-5
    for wrong in (without, right * 1.001):
        with pytest.raises(RuntimeError, match="relative error"):
            timing.check(wrong, q, k, v, plan)


def test_remainders_are_rows_of_their_own() -> None:
    rows = list(sections.kernel_rows("tiny", 32, (0.5,), ("gather",), 2, CPU, ("none", "value")))
    assert [(row.kernel, row.remainder) for row in rows] == [("cpu", ""), ("gather", "none"), ("gather", "value")]


def test_ratios_are_to_the_fastest_dense_kernel() -> None:
    rows = list(sections.kernel_rows("tiny", 32, (0.5, 0.1), ("gather", "reference"), 2, CPU))
    assert [(row.kernel, round(row.density, 1)) for row in rows] == [
        ("cpu", 1.0), ("gather", 0.5), ("reference", 0.5), ("gather", 0.1), ("reference", 0.1),
    ]  # fmt: skip
    fastest = rows[0].time_ms
    for row in rows:
        assert row.ideal_ratio == pytest.approx(row.time_ms / (row.density * fastest))
        assert row.tflops == pytest.approx(row.density * TINY.flops / row.time_ms / 1e9)
        assert row.error is not None


def test_the_neighborhood_is_all_full_blocks_at_every_scale_and_cut_at_stride_1() -> None:
    rows = {row.kernel: row for row in sections.neighborhood_rows(("gather",), 1, CPU, scale=8)}
    assert set(rows) == {"cpu", "gather", "gather, permuted", "gather, stride 1"}
    assert rows["gather"].density == pytest.approx(0.09)
    assert rows["gather, stride 1"].density == pytest.approx(0.09)
    assert rows["gather, stride 1"].error is not None


def test_the_check_of_a_plan_with_cut_blocks_finds_a_wrong_result() -> None:
    order = TokenOrder.from_index(
        torch.randperm(64, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 32, 64])
    )
    cut = torch.ones(1, 2, 2, 2, dtype=torch.bool)
    mask = BlockMask.from_bool(
        cut, order.offsets, order.offsets, partial=cut, predicate=lambda b, h, i, j: (i + j + h) % 3 > 0
    )
    plan = AttentionPlan(order, order, mask)
    q, k, v = torch.randn(3, 1, 2, 64, 16, generator=torch.Generator().manual_seed(1))
    out = BACKENDS["reference"].forward(q, k, v, plan, scale=0.25, return_lse=False)[0]
    assert timing.check(out, q, k, v, plan) < 1e-6
    with pytest.raises(RuntimeError, match="head 1"):
        timing.check(torch.cat([out[:, :1], out[:, :1]], 1), q, k, v, plan)


def test_movements_are_compared_with_the_attention_they_serve() -> None:
    rows = {row.kernel: row for row in sections.movement_rows("tiny", 1, CPU)}
    assert rows["attention at 0.25"].ideal_ratio == 1.0
    assert {"permute q, k, v", "restore the output", "norm and rotary of q"} <= set(rows)
    for row in rows.values():
        assert row.ideal_ratio == pytest.approx(row.time_ms / rows["attention at 0.25"].time_ms)


def test_a_permutation_that_moves_nothing_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sections, "permute", lambda order, *tensors: tensors)
    with pytest.raises(RuntimeError, match="permute"):
        list(sections.movement_rows("tiny", 1, CPU))


def test_the_pieces_of_a_search(monkeypatch: pytest.MonkeyPatch) -> None:
    from dit_sparse.types import TokenGrid

    monkeypatch.setitem(sections.SEARCH_GRIDS, "tiny", TokenGrid(3, 10, 10))
    pieces = (
        ({"block mass, all rows", "selection", "first search", "later search"}, sections.search_rows),
        (
            {f"lea: {part}" for part in ("attention of the rows", "errors", "choice", "search")},
            sections.least_error_rows,
        ),
    )
    for names, search in pieces:
        rows = {row.kernel: row for row in search("tiny", 1, CPU)}
        assert names <= set(rows)
        check_ratios(rows)


def check_ratios(rows: dict[str, Row]) -> None:
    for row in rows.values():
        assert row.ideal_ratio == pytest.approx(row.time_ms / rows["cpu"].time_ms)
        assert row.time_ms > 0


def test_a_failed_part_is_reported_and_the_others_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> Iterator[Row]:
        raise RuntimeError("no such luck")
        yield

    monkeypatch.setattr(reports, "neighborhood_rows", broken)
    path = tmp_path / "report.json"
    report = reports.run_sections(
        shapes=["tiny"], blocks=[32], densities=[0.5], backends=["gather", "hopper"], rounds=1, device="cpu",
        sections=["neighborhood", "kernels"], save=lambda report: reports.write_report(report, path),
    )  # fmt: skip
    assert report["failed"] == {"neighborhood": "RuntimeError: no such luck"}
    assert list(report["seconds"]) == ["neighborhood", "kernels tiny 32"]
    assert "9.0" in report["skipped"]["hopper"]
    assert json.loads(path.read_text()) == report
    text = io.StringIO()
    reports.print_table(report, Console(file=text, width=160))
    for part in ("gather", "no such luck", "skipped hopper", "0.5"):
        assert part in text.getvalue()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shapes": ["wan"]}, "shapes must be among"),
        ({"sections": ["all"]}, "sections must be among"),
        ({"backends": ["tritn"]}, "backends must be among"),
        ({"blocks": [8]}, "blocks must be at least 16"),
        ({"densities": [0.0]}, "densities must be above 0"),
    ],
)
def test_wrong_options_are_named(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        reports.run_sections(device="cpu", **options)
