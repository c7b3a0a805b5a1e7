"""Profile the floors of SVOO: how many keys hold most of the attention of each layer of the demo model, or another.

    python scripts/profile_floors.py --out floors.json
    dit-sparse generate prompts.txt --method svoo --floors 0.1,0.07,...

The model runs dense over the prompts. At every `--every`-th step the attention of 64 queries is computed in each layer;
a query's share is the least share of the keys that holds `--hold` of it. A layer's floor is the mean over queries,
heads, steps and prompts, within `--least` and `--most`. The floors are printed as the option takes them.

Source: SVOO (arXiv 2603.18636), offline layer-wise profiling. Differs from the paper: 64 queries instead of all, and
one floor a layer instead of one a head and step.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from bench_cpu import environment
from rich.console import Console
from torch import Tensor

from dit_sparse import Site, load_pipeline
from dit_sparse.demo import demo_defaults, demo_model_path
from dit_sparse.generate.prompts import read_prompts
from dit_sparse.masks import probe_rows, sampled_weights
from dit_sparse.pipelines import observe

PROMPTS = Path(__file__).parent / "fidelity_prompts.txt"


def needed_share(weights: Tensor, hold: float) -> Tensor:
    """Least share of the keys that holds `hold` of each row of `weights` `[..., N]`, `[...]`."""
    sums = weights.double().sort(dim=-1, descending=True).values.cumsum(-1)
    return ((sums < hold * sums[..., -1:]).sum(-1) + 1) / weights.shape[-1]


def profile(model: str, prompts: list[str], steps: int, every: int, hold: float) -> dict[int, float]:
    """Mean share by layer."""
    found: defaultdict[int, list[float]] = defaultdict(list)

    def look(site: Site, q: Tensor, k: Tensor, lse: Tensor) -> None:
        if site.step % every == 0:
            weights = sampled_weights(q, k, probe_rows(site.grid, 64, q.device))
            found[site.layer].append(float(needed_share(weights, hold).mean()))

    on_gpu = torch.cuda.is_available()
    dtype = torch.bfloat16 if on_gpu else torch.float32
    pipe: Any = load_pipeline(model, dtype=dtype, device="cuda" if on_gpu else "cpu")
    pipe.set_progress_bar_config(disable=True)
    options: dict[str, Any] = dict(demo_defaults) if Path(model) == demo_model_path() else {}
    with torch.no_grad(), observe(pipe, look):
        for prompt in prompts:
            generator = torch.Generator().manual_seed(0)
            pipe(prompt, output_type="latent", generator=generator, **(options | {"num_inference_steps": steps}))
    return {layer: sum(shares) / len(shares) for layer, shares in sorted(found.items())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(demo_model_path()), help="folder or hub id; the demo model by default")
    parser.add_argument("--prompts", type=Path, default=PROMPTS)
    parser.add_argument("--limit", type=int, default=2, help="prompts taken")
    parser.add_argument("--steps", type=int, default=demo_defaults["num_inference_steps"])
    parser.add_argument("--every", type=int, default=4, help="steps between those that are looked at")
    parser.add_argument("--hold", type=float, default=0.95, help="share of a query's attention")
    parser.add_argument("--least", type=float, default=0.05)
    parser.add_argument("--most", type=float, default=0.1)
    parser.add_argument("--out", type=Path, help="write shares, floors and the environment to this JSON file")
    options = parser.parse_args()
    prompts = read_prompts(options.prompts)[: options.limit]
    shares = profile(options.model, prompts, options.steps, options.every, options.hold)
    floors = [round(min(options.most, max(options.least, share)), 4) for share in shares.values()]
    Console(width=200).print(f"--floors {','.join(map(str, floors))}")
    if options.out is not None:
        settings = {name: str(value) for name, value in vars(options).items()}
        report = {"environment": environment(), "settings": settings, "shares": shares, "floors": floors}
        options.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
