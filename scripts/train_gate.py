"""Train SeerAttention's gates on the demo model, or on another pipeline.

    python scripts/train_gate.py --out gates.safetensors
    dit-sparse generate prompts.txt --method seer --weights gates.safetensors

The model runs dense over the prompts. At every `--every`-th step each layer's pooled queries and keys are kept, with
the largest attention weight of every pair of blocks, the rows of which are made to sum to 1. Each gate then learns
these rows from the pooled tensors, by Kullback-Leibler divergence. The last tenth of the samples is left out of the
training, and the divergence there is printed, beside that of the untrained choice, mean query times mean key.

Source: SeerAttention (arXiv 2410.13276), self-distillation of the gate.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor

from dit_sparse import Site, load_pipeline
from dit_sparse.demo import demo_defaults, demo_model_path
from dit_sparse.generate.prompts import read_prompts
from dit_sparse.masks import peak_logits, pooled_scores
from dit_sparse.methods.gate_file import Gate, write_gates
from dit_sparse.methods.seer import gate_inputs, gate_logits
from dit_sparse.pipelines import observe
from dit_sparse.reorder import raster_once
from dit_sparse.types import TokenOrder

PROMPTS = Path(__file__).parent / "fidelity_prompts.txt"


@dataclass(frozen=True)
class Sample:
    """One attention call: what the gate sees, what it shall say, and what pooling alone says.

    Args:
        q, k: `[B, H, M, D]` and `[B, H, M, 3 D]`, as `gate_inputs` gives them.
        target, pooled: `[B, H, M, M]`, rows that sum to 1.
    """

    q: Tensor
    k: Tensor
    target: Tensor
    pooled: Tensor


@torch.no_grad()
def sample(q: Tensor, k: Tensor, lse: Tensor, order: TokenOrder, row_stride: int = 1) -> Sample:
    """The sample of `q, k` `[B, H, N, D]` with row sums `lse` `[B, H, N]`."""
    scale = q.shape[-1] ** -0.5
    # One more channel takes the row sum off every logit, which makes it the log of a weight.
    with_lse = torch.cat([q.float() * scale, -lse.float()[..., None]], -1)
    with_one = torch.cat([k.float(), torch.ones_like(k[..., :1], dtype=torch.float32)], -1)
    target = peak_logits(with_lse, with_one, order, order, stride=row_stride, scale=1.0).softmax(-1)
    return Sample(*gate_inputs(q, k, order), target, pooled_scores(q, k, order, order))


class Collector:
    """Observes a dense run, and keeps the samples of every `every`-th step by transformer and layer."""

    def __init__(self, block: int, every: int, row_stride: int) -> None:
        self.block, self.every, self.row_stride = block, every, row_stride
        self.samples: dict[tuple[str, int], list[Sample]] = {}

    def __call__(self, site: Site, q: Tensor, k: Tensor, lse: Tensor) -> None:
        if site.step % self.every == self.every // 2:
            order = raster_once(site.grid, self.block, q.device)
            self.samples.setdefault((site.model, site.layer), []).append(sample(q, k, lse, order, self.row_stride))


def divergence(target: Tensor, scores: Tensor) -> Tensor:
    """Mean over rows of KL(target || scores)."""
    return F.kl_div(scores.clamp_min(1e-12).log(), target, reduction="none").sum(-1).mean()


def train_gate(samples: Sequence[Sample], size: int, rounds: int, rate: float = 3e-3, seed: int = 0) -> Gate:
    """A gate with projections to `size` channels, trained on one layer's samples, one of them a step.

    It begins as mean query times mean key, seen through a random projection.
    """
    generator = torch.Generator().manual_seed(seed)
    heads, dim = samples[0].q.shape[1], samples[0].q.shape[-1]
    start = torch.linalg.qr(torch.randn(heads, dim, max(size, dim), generator=generator).mT)[0].mT[..., :size]
    # The projections' product keeps min(size, dim) of dim channels and is divided by the root of size, not of dim.
    start = start.contiguous() * ((size / dim) ** 0.5 * dim / min(size, dim)) ** 0.5
    q_weight = start.clone().to(samples[0].q.device).requires_grad_()
    k_weight = torch.cat([start, torch.zeros(heads, 2 * dim, size)], 1).to(q_weight.device).requires_grad_()
    optimizer = torch.optim.Adam([q_weight, k_weight], rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, rounds)
    with torch.enable_grad():
        for step in range(rounds):
            one = samples[step % len(samples)]
            logits = gate_logits(one.q, one.k, Gate(q_weight, k_weight))
            loss = F.kl_div(logits.log_softmax(-1), one.target, reduction="none").sum(-1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return Gate(q_weight.detach(), k_weight.detach())


def train(
    collected: dict[tuple[str, int], list[Sample]], size: int, rounds: int, console: Console
) -> dict[tuple[str, int], Gate]:
    """A gate for each layer; prints the divergence on the samples that were held out."""
    gates = {}
    for (model, layer), samples in sorted(collected.items()):
        held = max(1, len(samples) // 10) if len(samples) > 1 else 0
        gate = train_gate(samples[: len(samples) - held], size, rounds)
        gates[model, layer] = gate
        for one in samples[len(samples) - held :][:1]:
            learned = divergence(one.target, gate_logits(one.q, one.k, gate).softmax(-1))
            pooled = divergence(one.target, one.pooled)
            console.print(f"{model} {layer}: divergence {learned:.3f} held out, mean q . mean k {pooled:.3f}")
    return gates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(demo_model_path()), help="folder or hub id; by default the demo model")
    parser.add_argument("--prompts", type=Path, default=PROMPTS, help="text file, one prompt a line")
    parser.add_argument("--limit", type=int, default=4, help="prompts that are read")
    parser.add_argument("--steps", type=int, default=20, help="denoising steps")
    parser.add_argument("--every", type=int, default=4, help="samples are taken at every n-th step")
    parser.add_argument("--row-stride", type=int, default=4, help="targets are taken from every n-th query")
    parser.add_argument("--block", type=int, default=64, help="tokens a block")
    parser.add_argument("--size", type=int, default=64, help="channels of a gate")
    parser.add_argument("--rounds", type=int, default=600, help="training steps a layer")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, required=True, help="the weights file")
    options = parser.parse_args()
    console = Console(width=120)
    pipe: Any = load_pipeline(options.model).to(options.device)
    arguments = dict(demo_defaults) if options.model == str(demo_model_path()) else {}
    arguments |= {"num_inference_steps": options.steps, "output_type": "latent"}
    collector = Collector(options.block, options.every, options.row_stride)
    with torch.no_grad(), observe(pipe, collector):
        for number, prompt in enumerate(read_prompts(str(options.prompts))[: options.limit]):
            pipe(prompt, generator=torch.Generator().manual_seed(number), **arguments)
    gates = train(collector.samples, options.size, options.rounds, console)
    write_gates(options.out, {key: Gate(gate.q.cpu(), gate.k.cpu()) for key, gate in gates.items()}, options.block)
    console.print(f"{len(gates)} gates for blocks of {options.block} written to {options.out}")


if __name__ == "__main__":
    main()
