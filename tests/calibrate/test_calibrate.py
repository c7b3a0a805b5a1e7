"""Calibration against a literal one that keeps every attention map, and what it costs in memory."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dit_sparse import Paro, Schedule, Site, TokenGrid, sparsify, statistics
from dit_sparse.block_mask import unpack_bits
from dit_sparse.calibrate import Calibration, Listener, calibrate
from dit_sparse.calibrate import store as store_module
from dit_sparse.calibrate.observers import MassSums, OrderSearch
from dit_sparse.calibrate.run import write_calibration
from dit_sparse.calibrate.store import MassStore
from dit_sparse.masks import heaviest_blocks, mass_threshold
from dit_sparse.methods.plan_file import PlanFile
from dit_sparse.pipelines import observe, session_of
from dit_sparse.reorder import AXIS_ORDERS, Block, axis_order, raster_order

BLOCK = 16
ARGUMENTS = {
    "height": 32,
    "width": 48,
    "num_frames": 9,
    "guidance_scale": 3.0,
    "max_sequence_length": 16,
    "num_inference_steps": 4,
}
PROMPTS = ["a red ball", "a blue square"]
METHOD = Paro(density=0.3, block=BLOCK, sample_blocks=99, sigma=0.9, alpha=0.5)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "plan.safetensors"


def attention_maps(pipe: Any) -> tuple[TokenGrid, dict[tuple[int, int], list[Tensor]]]:
    """Every attention map `[2, N, N]` float64 of the calibration's runs, by layer and step."""
    maps, grids = defaultdict(list), set()

    def keep(site: Site, q: Tensor, k: Tensor, lse: Tensor) -> None:
        grids.add(site.grid)
        scores = q[0].double() @ k[0].double().transpose(-1, -2) / math.sqrt(q.shape[-1])
        maps[site.layer, site.step].append(scores.softmax(-1))

    with observe(pipe, keep):
        for prompt in PROMPTS:
            pipe(prompt, generator=torch.Generator().manual_seed(0), output_type="latent", **ARGUMENTS)
    (grid,) = grids
    return grid, maps


def blocked(attention: Tensor, axes: str, grid: TokenGrid, cut: Block = BLOCK) -> Tensor:
    """`[M, M, BLOCK * BLOCK]` weights of one map's blocks under an order."""
    index = axis_order(grid, axes, cut).index[0, 0]
    blocks = grid.num_tokens // BLOCK
    return attention[index][:, index].reshape(blocks, BLOCK, blocks, BLOCK).transpose(1, 2).flatten(2)


def whole_metrics(maps: list[Tensor], head: int, axes: str, grid: TokenGrid) -> list[float]:
    """M_sparse and M_quant, the means over whole maps."""
    blocks = torch.stack([blocked(m[head], axes, grid) for m in maps])
    sparse = (blocks < 1 / grid.num_tokens).double().mean(-1) >= METHOD.sigma
    return [float(sparse.double().mean()), float((blocks.amax(-1) / blocks.mean(-1)).mean())]


def literal_mass(maps: list[Tensor], axes: tuple[str, ...], grid: TokenGrid, cut: Block) -> Tensor:
    """`[1, 2, M, M]` mean mass of each block."""
    heads = [sum(blocked(m[head], name, grid, cut).sum(-1) for m in maps) / len(maps) for head, name in enumerate(axes)]
    return torch.stack(heads)[None].float()  # type: ignore[arg-type]


@pytest.mark.parametrize(("threshold", "tile"), [("head", None), ("global", None), ("head", (1, 2, 8))])
def test_it_finds_what_whole_attention_maps_give(pipe, path: Path, threshold: Any, tile: Any) -> None:
    method = replace(METHOD, tile=tile)
    file = calibrate(pipe, PROMPTS, path, Calibration(method, threshold), model="tiny", **ARGUMENTS)
    grid, maps = attention_maps(pipe)
    header = file.header
    assert header.block == method.cut
    assert (header.grid, header.prompts, header.steps, header.threshold) == (grid, tuple(PROMPTS), 4, threshold)
    assert header.models["transformer"].starts == (0, 0.25, 0.5)
    slots = [(0,), (1,), (2, 3)]
    offsets = raster_order(grid, BLOCK).offsets
    masses = {
        (layer, slot): literal_mass(
            [m for step in steps for m in maps[layer, step]], file.axes("transformer", layer), grid, method.cut
        )
        for layer in range(2)
        for slot, steps in enumerate(slots)
    }
    bound = mass_threshold(lambda: iter(masses.values()), 0.3, offsets, grid)
    for (layer, slot), mass in masses.items():
        kept = unpack_bits(file.bits("transformer", layer, slot), header.num_blocks)
        if threshold == "head":
            want = heaviest_blocks(mass, 0.3, offsets, grid)[0]
        else:
            want = (mass >= bound)[0] | torch.zeros_like(kept).scatter(-1, mass[0].argmax(-1, keepdim=True), True)
        # float32 against float64: a block at the edge of the budget may fall on either side.
        assert int((kept ^ want).sum()) <= 4
        assert 0.2 < float(kept.double().mean()) < 0.4 if threshold == "head" else kept.any()


def test_orders_are_those_of_the_mean_metrics(pipe, path: Path) -> None:
    file = calibrate(pipe, PROMPTS, path, Calibration(METHOD, shared_from=0), **ARGUMENTS)
    grid, maps = attention_maps(pipe)
    assert file.header.models["transformer"].starts == (0,)
    for layer in range(2):
        every = [m for step in range(4) for m in maps[layer, step]]
        want = torch.tensor([[whole_metrics(every, head, axes, grid) for axes in AXIS_ORDERS] for head in range(2)])
        found = file.metrics("transformer", layer)
        assert found is not None
        torch.testing.assert_close(found, want, rtol=1e-3, atol=1e-3)
        dispersion, incoherence = 1 - want[..., 0], want[..., 1]
        cost = 0.5 * dispersion / dispersion.sum(-1, True) + 0.5 * incoherence / incoherence.sum(-1, True)
        chosen = [AXIS_ORDERS.index(axes) for axes in file.axes("transformer", layer)]
        # Orders that are as good as equal may change places by rounding.
        assert (cost[range(2), chosen] <= cost.amin(-1) * (1 + 1e-3)).all()


def test_the_plan_serves_the_pipeline_step_by_step(pipe, render, path: Path) -> None:
    before = render(pipe)
    calibrate(pipe, PROMPTS[:1], path, Calibration(METHOD), **ARGUMENTS)
    assert session_of(pipe) is None
    assert torch.equal(render(pipe), before)
    render(sparsify(pipe, Schedule(Paro(plan_file=str(path)), warmup=0)), steps=8)
    records = statistics(pipe).records
    assert statistics(pipe).dense_calls == {}
    assert statistics(pipe).sparse_density == pytest.approx(0.3, abs=0.02)
    planned = sorted({(r.step, r.layer) for r in records if r.planning is not None})
    assert planned == [(step, layer) for step in (0, 2, 4) for layer in range(2)]
    assert {r.branch for r in records if r.planning is not None} == {"cond"}  # the other branch reuses
    assert len({float(r.density.sum()) for r in records if r.density is not None}) >= 1
    render(sparsify(pipe, Paro(plan_file=str(path))), steps=10)  # two dense steps first
    assert statistics(pipe).dense_calls == {"warm-up": 8}
    assert min(r.step for r in statistics(pipe).records if r.planning is not None) == 2


def test_a_listener_is_told(pipe, path: Path) -> None:
    told: list[Any] = []

    class Tells(Listener):
        def began(self, what: str, prompt: str) -> None:
            told.append((what, prompt))

        def stepped(self) -> None:
            told.append(1)

    calibrate(pipe, PROMPTS, path, Calibration(METHOD), listener=Tells(), **ARGUMENTS)
    runs = [(what, prompt) for what in ("orders", "masks") for prompt in PROMPTS]
    assert told == [entry for run in runs for entry in (run, 1, 1, 1, 1)]


def test_bad_settings_are_refused(pipe, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="threshold must be head or global"):
        Calibration(threshold="layer")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="shared_from must be from 0 to 1"):
        Calibration(shared_from=1.5)
    with pytest.raises(ValueError, match="no plan_file"):
        Calibration(Paro(plan_file="x"))
    for prompts in ([], "a red ball"):
        with pytest.raises(ValueError, match="prompts must be a list"):
            calibrate(pipe, prompts, path, **ARGUMENTS)
    with pytest.raises(ValueError, match="folder of path or scratch must exist"):
        calibrate(pipe, PROMPTS, path.parent / "no" / "plan", **ARGUMENTS)
    usage = store_module.shutil.disk_usage
    monkeypatch.setattr(store_module.shutil, "disk_usage", lambda folder: usage(folder)._replace(free=1000))
    with pytest.raises(ValueError, match=r"calibration needs 0\.0 GB beside the plan file, got 0\.0 GB free"):
        calibrate(pipe, PROMPTS, path, Calibration(METHOD), **ARGUMENTS)
    assert list(path.parent.iterdir()) == []
    assert session_of(pipe) is None


def test_starts_are_one_a_step_and_then_one_for_the_rest() -> None:
    assert Calibration(shared_from=0.5).starts(4) == (0, 0.25, 0.5)
    assert Calibration(shared_from=0).starts(4) == (0,)
    assert Calibration(shared_from=1).starts(4) == (0, 0.25, 0.5, 0.75)
    assert Calibration().starts(1) == (0,)


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation made."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


def test_nothing_is_ever_tokens_by_tokens(tmp_path: Path) -> None:
    """8,192 tokens: one head's attention map has 67 million weights, and the largest tensor a small part of that."""
    grid = TokenGrid(8, 32, 32)
    n, heads = grid.num_tokens, 2
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, heads, n, 8)
    lse = torch.full((1, heads, n), math.log(n))
    method = Paro(density=0.3, sample_blocks=2)
    with Largest() as largest, MassStore(tmp_path, 1) as store:
        search = OrderSearch(method)
        search(Site(grid), q, k, lse)
        MassSums(store, search.axes(), method.block, (0.0,), grid)(Site(grid), q, k, lse)
        mass = store.mean(("transformer", 0, 0))
        heaviest_blocks(mass, 0.3, raster_order(grid, 64).offsets, grid)
        mass_threshold(lambda: iter([mass]), 0.3, raster_order(grid, 64).offsets, grid)
    assert mass.shape == (1, heads, 128, 128)
    assert largest.elements <= n * n / 32


def test_a_plan_for_two_transformers(tmp_path: Path, path: Path) -> None:
    """The second one runs in the last steps only, as Wan 2.2's does: its one mask serves it from the start."""
    grid = TokenGrid(2, 4, 8)
    search = OrderSearch(Paro(density=0.5, block=8))
    calls = [Site(grid, 0, 1, step, 4, model="transformer" if step < 2 else "transformer_2") for step in range(4)]
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 2, 64, 8)
    lse = (q @ k.mT / 8**0.5).logsumexp(-1)
    starts = Calibration().starts(4)
    with MassStore(tmp_path, 4) as store:
        for site in calls:
            search(site, q, k, lse)
        sums = MassSums(store, search.axes(), 8, starts, grid)
        for site in calls:
            sums(site, q, k, lse)
        write_calibration(path, Calibration(search.method), search, store, search.axes())
    file = PlanFile.open(path)
    file.verify()
    assert {name: plans.starts for name, plans in file.header.models.items()} == {
        "transformer": (0, 0.25),
        "transformer_2": (0,),
    }
    method = Paro(plan_file=str(path))
    assert method.refresh == (0.25,)
    for site in calls:
        assert float(method.plan(q, k, k, site, None).density.mean()) == pytest.approx(0.5, abs=0.02)
