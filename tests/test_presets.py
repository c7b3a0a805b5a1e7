"""Presets fit their checkpoints, are found by name, run, and stand in the documentation as they are in the code."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dit_sparse import AdaSpa, LeastError, Paro, Schedule, cli, preset, sparsify, statistics
from dit_sparse.cost import Call, predict, read_table
from dit_sparse.cost.table import OWN_TABLE
from dit_sparse.course import plans_per_call, step_densities
from dit_sparse.demo import demo_defaults
from dit_sparse.estimate import SHAPES
from dit_sparse.methods.parameters import block_of, key_block_of
from dit_sparse.pipelines.families import FAMILIES as ADAPTERS
from dit_sparse.presets import PRESETS, find_preset
from tests.pipelines.families import FAMILIES

DOCS = Path(__file__).resolve().parents[1] / "docs"


def _pipe(patch: dict[str, Any], temporal: int, spatial: int) -> Any:
    """What a pipeline tells an adapter of sizes, by the public configuration of its transformer and VAE."""
    transformer = SimpleNamespace(config=SimpleNamespace(**patch))
    scales = {"vae_scale_factor_temporal": temporal, "vae_scale_factor_spatial": spatial, "vae_scale_factor": spatial}
    return SimpleNamespace(transformer=transformer, transformer_2=None, **scales)


WAN, WAN_5B = (_pipe({"patch_size": (1, 2, 2)}, 4, spatial) for spatial in (8, 16))
COGVIDEOX, COGVIDEOX_1_5 = (
    _pipe({"patch_size": 2, "patch_size_t": patch_t, "max_text_seq_length": 226}, 4, 8) for patch_t in (None, 2)
)
# Family, sizes, transformer blocks, and tokens of the video that the preset makes.
CHECKPOINTS = {
    "demo": ("wan", _pipe({"patch_size": (1, 1, 1)}, 4, 4), 8, 6_144),
    "wan2.1-1.3b": ("wan", WAN, 30, 32_760),
    "wan2.1-14b": ("wan", WAN, 40, 75_600),
    "wan2.2-5b": ("wan", WAN_5B, 30, 27_280),
    "wan2.2-a14b": ("wan", WAN, 40, 75_600),
    "cogvideox-2b": ("cogvideox", COGVIDEOX, 30, 17_550),
    "cogvideox-5b": ("cogvideox", COGVIDEOX, 42, 17_550),
    "cogvideox1.5-5b": ("cogvideox", COGVIDEOX_1_5, 42, 44_880),
    "hunyuanvideo": ("hunyuan_video", _pipe({"patch_size": 2, "patch_size_t": 1}, 4, 8), 60, 118_800),
    "flux.1-dev": ("flux", _pipe({}, 1, 8), 57, 4_096),
    "flux.1-schnell": ("flux", _pipe({}, 1, 8), 57, 4_096),
}


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_fits_its_checkpoint(name: str) -> None:
    family, pipe, layers, tokens = CHECKPOINTS[name]
    defaults = PRESETS[name].defaults
    adapter = next(a for a in ADAPTERS.values() if type(a).__module__.endswith(f".{family}"))
    grid = adapter.token_grid(pipe, defaults.height, defaults.width, defaults.frames)
    assert grid.video_len == tokens
    PRESETS[name].schedule.check(grid, layers)
    assert PRESETS[name].schedule.warmup_steps(defaults.steps) < defaults.steps


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_runs(name: str) -> None:
    """On the family's tiny model."""
    family = next(f for f in FAMILIES if f.name == CHECKPOINTS[name][0])
    pipe = sparsify(family.make(), preset(name))
    family.run(pipe)
    schedule, run = PRESETS[name].schedule, statistics(pipe)
    wanted = ({"layer"} if schedule.dense_layers else set()) | ({"warm-up"} if schedule.warmup else set())
    assert set(run.dense_calls) <= wanted | {"every block kept"}
    assert wanted <= set(run.dense_calls)
    assert run.sparse_density < 1 or "every block kept" in run.dense_calls


@pytest.mark.parametrize("name", [name for name, entry in PRESETS.items() if entry.defaults.fps])
def test_a_video_preset_pays_on_every_gpu_of_the_table(name: str) -> None:
    """By the cost model, planning counted, at its own size, or it would run dense by decision; the demo's on a CPU."""
    entry = PRESETS[name]
    method, defaults = entry.schedule.method, entry.defaults
    if name == "demo":
        tokens, heads, dim = 6_144, 3, 64
    else:
        shape = SHAPES[name]
        tokens, heads, dim = shape.tokens(*(defaults.frames, defaults.height, defaults.width)), shape.heads, shape.dim
    density = step_densities(entry.schedule, defaults.steps)[-1]
    plans = plans_per_call(entry.schedule, defaults.steps)
    table = read_table(OWN_TABLE)
    for device in ("cpu",) if name == "demo" else ("H100", "H200", "unknown GPU"):
        for backend in table[device].backends:
            given = {"block": block_of(method), "method": method.name, "plans": plans, "backend": backend}
            call = Call(tokens, heads, dim, density, remainder=entry.schedule.planned_remainder, **given)
            assert predict(call, table[device]) < 1, (device, backend)


@pytest.mark.parametrize("name", [name for name, entry in PRESETS.items() if entry.schedule.method.name == "lea"])
def test_blocks_are_those_that_the_fast_kernels_take(name: str) -> None:
    """At the preset's own size, text in blocks of its own: queries in blocks of 128, keys of 64, few of them ragged."""
    adapter = next(a for a in ADAPTERS.values() if type(a).__module__.endswith(f".{CHECKPOINTS[name][0]}"))
    defaults, method = PRESETS[name].defaults, PRESETS[name].schedule.method
    grid = adapter.token_grid(CHECKPOINTS[name][1], defaults.height, defaults.width, defaults.frames)
    orders = method.query_order(grid, torch.device("cpu")), method.shared_order(grid, torch.device("cpu"))
    for order, size in zip(orders, (block_of(method), key_block_of(method)), strict=True):
        assert order.geometry.largest == size
        assert order.num_blocks - math.ceil(grid.num_tokens / size) <= 4


def test_found_by_repository_or_by_a_folder_of_its_name() -> None:
    for name, entry in PRESETS.items():
        for model in entry.models:
            assert find_preset(model) is entry
            assert (find_preset(f"/models/{model.rpartition('/')[2].lower()}/") is entry) == ("/" in model)
            assert preset(model) == preset(name.upper()) == entry.schedule
    for model in ("demo/", "./demo", "Wan-AI/Wan2.1-T2V-14B-Diffusers-lora", "some/Wan2.1", "", "14b"):
        assert find_preset(model) is None
    assert len({model for entry in PRESETS.values() for model in entry.models}) == 16


def test_the_demo_model_has_the_defaults_of_its_package() -> None:
    sizes = PRESETS["demo"].defaults
    names = ("height", "width", "num_frames", "num_inference_steps", "guidance_scale")
    assert dict(zip(names, sizes[:5], strict=True)) == dict(demo_defaults)


def test_an_unknown_preset_is_told_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"unknown preset 'wan2.1-15b'; did you mean 'wan2.1-14b'\? known: cogvideox"):
        preset("wan2.1-15b")
    with pytest.raises(ValueError, match=r"must be a str such as 'wan2.1-14b', got None"):
        preset(None)  # type: ignore[arg-type]


def test_a_preset_survives_its_config() -> None:
    for entry in PRESETS.values():
        assert Schedule.from_config(json.loads(json.dumps(entry.schedule.to_config()))) == entry.schedule


def test_the_documentation_has_the_presets_as_they_are() -> None:
    rows = [entry.row() for entry in PRESETS.values()]
    header = ["| " + " | ".join(rows[0]) + " |", "|" + "---|" * len(rows[0])]
    table = "\n".join(header + ["| " + " | ".join(row.values()) + " |" for row in rows])
    assert table in (DOCS / "presets.md").read_text("utf-8"), f"docs/presets.md must hold\n{table}"


def test_the_figures_behind_the_presets_are_those_of_the_report() -> None:
    """Of settings with a dense fifth in docs/frontier.json, in the words of docs/presets.md."""
    report, page = json.loads((DOCS / "frontier.json").read_text("utf-8")), (DOCS / "presets.md").read_text("utf-8")
    rows = {}
    for row in report["rows"]:
        schedule = Schedule.from_config(row["config"])
        if schedule.warmup == 0.2 and schedule.remainder == "method" and "speedup" in row:
            rows.setdefault(schedule.method, (schedule, row))
    for method in (LeastError(0.25), LeastError(0.16), AdaSpa(0.5), AdaSpa(0.25), Paro(0.5)):
        schedule, row = rows[method]
        density, name = step_densities(schedule, 50)[-1], {"adaspa": "AdaSpa", "paro": "PAROAttention"}.get(method.name)
        shares = [f"{share:.3f}".strip("0") for share in (method.density, density)]
        psnr = f"{row['psnr']['median']:.1f} ({row['psnr']['min']:.1f})"
        line = f"| {name or '`lea`'} at {shares[0]} | {shares[1]} | {psnr} | {row['speedup']:.2f}x |"
        assert line in page


def test_presets_are_listed(capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["presets", "--json"])
    assert stopped.value.code == 0
    assert json.loads(capsys.readouterr().out) == [entry.row() for entry in PRESETS.values()]
    with pytest.raises(SystemExit):
        cli.main(["presets"])
    out = capsys.readouterr().out
    assert all(name in out for name in PRESETS)
    assert "2502.21079" in out
