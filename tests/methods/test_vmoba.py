"""VMoBA against chunks and gates taken one by one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dit_sparse import Site, TokenGrid, VMoBA
from tests.methods.layouts import DEMO, GRIDS, blocks_of, check_text_and_rows, inputs, smooth_inputs, tokens_of
from tests.methods.test_no_wait import NoWaiting

SMALL = {"frames": 2, "place": (2, 3), "tile": (2, 2, 2), "block": 4}
LAYERED = [*GRIDS, TokenGrid(5, 3, 4, text_len=3)]


def chunks(grid: TokenGrid, layer: int) -> list[list[int]]:
    """Raster numbers of each chunk: frames by twos, places of 2x3, cubes of 2."""
    f, h, w = [(2, grid.height, grid.width), (grid.frames, 2, 3), (2, 2, 2)][layer % 3]
    found: dict[tuple[int, int, int], list[int]] = {}
    for t in range(grid.frames):
        for y in range(grid.height):
            for x in range(grid.width):
                found.setdefault((t // f, y // h, x // w), []).append((t * grid.height + y) * grid.width + x)
    return [found[key] for key in sorted(found)]


def equal_parts(tokens: list[int], most: int) -> list[list[int]]:
    count = -(-len(tokens) // most)
    return [tokens[len(tokens) * p // count : len(tokens) * (p + 1) // count] for p in range(count)]


def literal_mask(q: Tensor, k: Tensor, grid: TokenGrid, layer: int, threshold: float) -> Tensor:
    """`[N, N]` of one head: gate by gate from the largest, until own chunks and they hold the share."""
    groups = chunks(grid, layer)
    parts = [(part, number) for number, group in enumerate(groups) for part in equal_parts(group, 4)]
    q, k = (x[grid.video_start : grid.video_start + grid.video_len].double() for x in (q, k))
    gates = [[float(q[part].mean(0) @ k[group].mean(0)) for group in groups] for part, _ in parts]
    least, most = min(map(min, gates)), max(map(max, gates))
    gates = [[(gate - least) / (most - least) for gate in row] for row in gates]
    total = sum(len(part) * gate for (part, _), row in zip(parts, gates, strict=True) for gate in row)
    chosen = {(i, own) for i, (_, own) in enumerate(parts)}
    held = sum(len(parts[i][0]) * gates[i][j] for i, j in chosen)
    for _, i, j in sorted((-gates[i][j], i, j) for i in range(len(parts)) for j in range(len(groups))):
        if held >= threshold * total:
            break
        if (i, j) not in chosen:
            chosen.add((i, j))
            held += len(parts[i][0]) * gates[i][j]
    blocks = blocks_of(grid, [part for part, _ in parts], 4)
    first = len(blocks) - len(parts) if grid.text_first else 0
    kept = [[False] * len(blocks) for _ in blocks]
    for i in range(len(parts)):
        for j, (_, number) in enumerate(parts):
            kept[first + i][first + j] = (i, number) in chosen
    return tokens_of(blocks, blocks, kept)


@pytest.mark.parametrize("grid", LAYERED, ids=str)
@pytest.mark.parametrize("layer", [0, 1, 5])
@pytest.mark.parametrize("threshold", [0.25, 0.7])
def test_equals_the_literal_gates(grid: TokenGrid, layer: int, threshold: float) -> None:
    q, k, v = inputs(grid)
    plan = VMoBA(threshold=threshold, **SMALL).plan(q, k, v, Site(grid, layer, 6), None)
    got = plan.token_mask()
    for b in range(2):
        for h in range(2):
            assert torch.equal(got[b, h], literal_mask(q[b, h], k[b, h], grid, layer, threshold))
    check_text_and_rows(plan, grid)


@pytest.mark.parametrize("density", [0.125, 0.25, 0.5])
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_the_density_is_met_where_it_is_the_control(density: float, layer: int) -> None:
    plan = VMoBA(density=density).plan(*smooth_inputs(DEMO), Site(DEMO, layer, 3), None)
    assert float(plan.density.mean()) == pytest.approx(density, rel=0.1)


def test_by_density_a_querys_own_chunk_comes_first_and_then_the_largest_gates() -> None:
    grid = TokenGrid(6, 4, 4)
    q, k, v = inputs(grid, batch=1, heads=1)
    mask = VMoBA(density=0.5, **SMALL).plan(q, k, v, Site(grid, 0, 3), None).token_mask()[0, 0]
    for group in chunks(grid, 0):
        assert mask[group][:, group].all()
    one = [mask[i, j] for i in range(0, 96, 4) for j in range(0, 96, 32)]
    middle = q[0, 0].view(24, 4, -1).mean(1) @ k[0, 0].view(3, 32, -1).mean(1).T
    others = [
        (float(middle[i, j]), bool(kept))
        for kept, (i, j) in zip(one, [(i, j) for i in range(24) for j in range(3)], strict=True)
        if i // 8 != j
    ]
    assert min(gate for gate, kept in others if kept) > max(gate for gate, kept in others if not kept)


def test_the_second_plan_on_a_grid_reads_nothing_back() -> None:
    grid = TokenGrid(3, 4, 6, text_len=3)
    q, k, v = inputs(grid)
    for method in (VMoBA(**SMALL), VMoBA(density=0.5, **SMALL)):
        want = method.plan(q, k, v, Site(grid), None)
        with NoWaiting():
            got = method.plan(q, k, v, Site(grid), None)
        assert torch.equal(got.token_mask(), want.token_mask())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"density": 0}, "density"),
        ({"threshold": 0}, "threshold"),
        ({"frames": 0}, "frames"),
        ({"place": (0, 4)}, "place"),
        ({"place": 4}, "place must be two sizes"),
        ({"tile": (1, 2)}, "tile"),
    ],
)
def test_bad_parameters(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VMoBA(**options)  # type: ignore[arg-type]
