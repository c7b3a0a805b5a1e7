"""PAROAttention on the demo model: do the chosen orders gather attention, and what do static masks cost in fidelity?

Calibrated on some prompts, judged on another. `orders`: at equal density, the share of attention mass that the heaviest
blocks under an order hold (recall), per layer and head, the mean over steps and guidance branches. `fidelity`: PSNR and
SSIM of whole videos against dense with masks from a plan file, under the chosen orders and under raster, with a budget
a head and with one threshold.

python scripts/bench_paro.py --out paro.json
python scripts/bench_paro.py --memory-tokens 32768 --out memory.json

With `--memory-tokens` only the memory is measured that a calibration takes at that length: one layer of random q and k,
through both passes to the plan file, in a process of its own.
"""

from __future__ import annotations

import argparse
import multiprocessing
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dit_sparse import Paro, Schedule, Site, TokenGrid, load_pipeline, sparsify, statistics, unsparsify
from dit_sparse.bench.report import environment, write_report
from dit_sparse.calibrate import Calibration
from dit_sparse.calibrate.observers import MassSums, OrderSearch
from dit_sparse.calibrate.run import write_calibration
from dit_sparse.calibrate.store import MassStore
from dit_sparse.demo import demo_defaults, demo_model_path
from dit_sparse.eval.fidelity import compare as compare_clips
from dit_sparse.kernels import dense_attention
from dit_sparse.masks import best_orders, heaviest_blocks
from dit_sparse.methods.paro import mass_under
from dit_sparse.pipelines import observe
from dit_sparse.reorder import AXIS_ORDERS, axis_order

PROMPTS = (
    "A big red ball moving left on a gray background.",
    "A small blue square moving up on a black background.",
)
UNSEEN = "A large red cross moving left on a navy background."
DENSITIES = (0.5, 0.25, 0.125)
METRICS = {
    "default": Paro(),
    "the paper's sigma and epsilon": Paro(sigma=0.9, epsilon=1e-3),
}
ALPHAS = (1.0, 0.5, 0.0)
HEADS, DIM, AREA = 4, 64, 64 * 64


class RecallWatch:
    """Recall of every layer, head and order at each of the `DENSITIES`."""

    def __init__(self, block: int) -> None:
        self.block = block
        self.calls: dict[int, list[torch.Tensor]] = defaultdict(list)

    def __call__(self, site: Any, q: torch.Tensor, k: torch.Tensor, lse: torch.Tensor) -> None:
        by_order = []
        for axes in AXIS_ORDERS:
            order = axis_order(site.grid, axes, self.block)
            mass = mass_under(order, q, k, lse)
            total = mass.sum((-1, -2))
            kept = [heaviest_blocks(mass, density, order.offsets, site.grid) for density in DENSITIES]
            by_order.append(torch.stack([((mass * mask).sum((-1, -2)) / total)[0] for mask in kept], -1))
        self.calls[site.layer].append(torch.stack(by_order, 1))

    def recall(self) -> torch.Tensor:
        """`[L, H, 6, densities]` means over the calls."""
        return torch.stack([torch.stack(self.calls[layer]).mean(0) for layer in sorted(self.calls)])


def every(stride: int, *observers: Any) -> Any:
    """An observer that shows every `stride`-th step to each of `observers`."""

    def watch(site: Any, q: torch.Tensor, k: torch.Tensor, lse: torch.Tensor) -> None:
        if site.step % stride == 0:
            for observer in observers:
                observer(site, q, k, lse)

    return watch


def compare_orders(recall: torch.Tensor, chosen: torch.Tensor) -> dict[str, Any]:
    """How the orders `chosen` `[L, H]` do against raster and against the best, from `recall` `[L, H, 6]`."""
    own = recall.gather(-1, chosen[..., None])[..., 0]
    raster, best = recall[..., 0], recall.amax(-1)
    return {
        "beats_raster": float((own > raster).double().mean()),
        "is_raster": float((chosen == 0).double().mean()),
        "loses_to_raster": float((own < raster).double().mean()),
        "is_best_of_six": float((own == best).double().mean()),
        "raster_is_best_of_six": float((raster == best).double().mean()),
        "recall": float(own.mean()),
        "recall_raster": float(raster.mean()),
        "recall_best_of_six": float(best.mean()),
    }


def bench_orders(pipe: Any, arguments: dict[str, Any], stride: int) -> tuple[dict[str, Any], OrderSearch]:
    """The report on orders, and the search with the default metrics."""
    searches = {name: OrderSearch(method) for name, method in METRICS.items()}
    with observe(pipe, every(stride, *searches.values())):
        for prompt in PROMPTS:
            pipe(prompt, generator=torch.Generator().manual_seed(0), **arguments, output_type="latent")
    watch = RecallWatch(64)
    with observe(pipe, every(stride, watch)):
        pipe(UNSEEN, generator=torch.Generator().manual_seed(1), **arguments, output_type="latent")
    recall = watch.recall()
    report: dict[str, Any] = {"heads": recall.shape[0] * recall.shape[1], "results": [], "chosen": {}}
    for name, search in searches.items():
        metrics = torch.stack(search.metrics()["transformer"])
        for alpha in ALPHAS:
            if alpha == 0 and name != "default":
                continue  # without M_sparse its constants do not matter
            chosen = best_orders(metrics, alpha)
            report["chosen"][f"{name}, alpha {alpha:g}"] = [[AXIS_ORDERS[n] for n in row] for row in chosen.tolist()]
            for place, density in enumerate(DENSITIES):
                row = {"metrics": name, "alpha": alpha, "density": density}
                row |= compare_orders(recall[..., place], chosen)
                report["results"].append(row)
                print({key: round(x, 3) if isinstance(x, float) else x for key, x in row.items()}, flush=True)
    return report, searches["default"]


def bench_fidelity(pipe: Any, arguments: dict[str, Any], search: OrderSearch) -> list[dict[str, Any]]:
    """PSNR and SSIM against dense on the unseen prompt; masks come from the first of the prompts."""
    axes = {"chosen": search.axes()}
    axes["raster"] = {name: [("FHW",) * len(layer) for layer in layers] for name, layers in axes["chosen"].items()}
    starts = Calibration().starts(search.num_steps)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        stores = {name: MassStore(_made(Path(folder) / name), 1) for name in axes}
        sums = [MassSums(stores[name], axes[name], 64, starts, search.grid) for name in axes]
        with observe(pipe, every(1, *sums)):
            pipe(PROMPTS[0], generator=torch.Generator().manual_seed(0), **arguments, output_type="latent")
        dense = render(pipe, arguments)
        plan = Path(folder) / "plan.safetensors"
        cases = [("chosen", "head"), ("chosen", "global"), ("raster", "head")]
        for density in DENSITIES:
            for orders, threshold in cases:
                method = Paro(density=density)
                calibration = Calibration(method, threshold)  # type: ignore[arg-type]
                write_calibration(plan, calibration, search, stores[orders], axes[orders])
                rows.append(judge(pipe, arguments, dense, replace(method, plan_file=str(plan)), orders, threshold))
            rows.append(judge(pipe, arguments, dense, Paro(density=density), "chosen in the run", "head"))
    return rows


def judge(
    pipe: Any, arguments: dict[str, Any], dense: np.ndarray, method: Paro, orders: str, threshold: str
) -> dict[str, Any]:
    sparse = render(sparsify(pipe, Schedule(method, never_slower=False)), arguments)
    fidelity, found = compare_clips(sparse, dense), statistics(pipe)
    unsparsify(pipe)
    row = {"orders": orders, "threshold": threshold, "density": method.density}
    row |= {"sparse_density": found.sparse_density, "psnr": fidelity.psnr, "ssim": fidelity.ssim}
    row["dense_calls"] = found.dense_calls
    print({key: round(x, 3) if isinstance(x, float) else x for key, x in row.items()}, flush=True)
    return row


def render(pipe: Any, arguments: dict[str, Any]) -> np.ndarray:
    """Frames `[T, H, W, 3]` float32 in [0, 1] of the unseen prompt."""
    frames = pipe(UNSEEN, generator=torch.Generator().manual_seed(1), **arguments, output_type="np").frames
    return np.asarray(frames[0], dtype=np.float32)


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def bench_memory(tokens: int) -> dict[str, Any]:
    """What `calibrate_layer` reports, in a process of its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(calibrate_layer, tokens).result()


def calibrate_layer(tokens: int) -> dict[str, Any]:
    """Calibrate one layer on random q and k of `tokens` tokens; memory in bytes.

    `calibration` is the peak of this process above what it held before, torch's buffers and the inputs not counted.
    """
    grid = TokenGrid(tokens // AREA, 64, 64)
    site, generator = Site(grid), torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, HEADS, tokens, DIM, generator=generator) for _ in range(2))
    lse = dense_attention(q, k, k, return_lse=True)[1]
    calibration = Calibration(Paro(density=0.3))
    search, before = OrderSearch(calibration.method), memory("VmRSS")
    search(site, q, k, lse)
    axes = search.axes()
    with tempfile.TemporaryDirectory() as folder, MassStore(Path(folder), 1) as store:
        MassSums(store, axes, calibration.method.block, calibration.starts(1), grid)(site, q, k, lse)
        write_calibration(Path(folder) / "plan.safetensors", calibration, search, store, axes)
    found = {
        "tokens": tokens,
        "grid": str(grid),
        "heads": HEADS,
        "dim": DIM,
        "inputs": q.nbytes + k.nbytes + lse.nbytes,
    }
    found |= {"calibration": memory("VmHWM") - before, "process": memory("VmHWM")}
    return found | {
        "attention_map_a_head": 4 * tokens**2,
        "block_map_a_head": 4 * (tokens // calibration.method.block) ** 2,
    }


def memory(name: str) -> int:
    """Bytes of this process's memory: "VmRSS" now, "VmHWM" at most so far.

    Not `ru_maxrss`, which counts the parent's memory too where the child was started from a large one.
    """
    lines = Path("/proc/self/status").read_text("utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--stride", type=int, default=5, help="orders are compared at every n-th step")
    parser.add_argument(
        "--memory-tokens", type=int, help=f"measure the memory alone, at this multiple of {AREA} tokens"
    )
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    report: dict[str, Any] = {"environment": environment(torch.device("cpu"))}
    if options.memory_tokens is not None:
        if options.memory_tokens < AREA or options.memory_tokens % AREA:
            parser.error(f"--memory-tokens must be a multiple of {AREA} (frames of 64x64), got {options.memory_tokens}")
        report["memory"] = bench_memory(options.memory_tokens)
        print(
            {name: f"{x / 2**20:.0f} MiB" if x > 2**20 else x for name, x in report["memory"].items() if name != "grid"}
        )
        write_report(report, options.out)
        return
    pipe = load_pipeline(demo_model_path())
    pipe.set_progress_bar_config(disable=True)
    call = {**demo_defaults, "num_inference_steps": options.steps}
    report["settings"] = {"steps": options.steps, "stride": options.stride, "prompts": PROMPTS, "unseen": UNSEEN}
    report["orders"], search = bench_orders(pipe, call, options.stride)
    write_report(report, options.out)
    report["fidelity"] = bench_fidelity(pipe, call, search)
    write_report(report, options.out)


if __name__ == "__main__":
    main()
