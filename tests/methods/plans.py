"""Plan files for tests: whole ones, and ones forged with a right checksum."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from dit_sparse.block_mask import pack_bits
from dit_sparse.methods.plan_file import PlanFile, write_plans
from dit_sparse.methods.plan_header import ModelPlans, PlanHeader
from dit_sparse.types import TokenGrid

GRID = TokenGrid(2, 3, 5, 4, True)
AXES = [["FHW", "WHF"], ["HFW", "FHW"]]


def random_masks(header: PlanHeader, plans: ModelPlans, seed: int = 0) -> list[Tensor]:
    """For each layer `[S, H, M, M]` bool, no row empty."""
    generator = torch.Generator().manual_seed(seed)
    blocks = header.num_blocks
    shape = len(plans.starts), plans.heads, blocks, blocks
    diagonal = torch.eye(blocks, dtype=torch.bool)
    return [(torch.rand(shape, generator=generator) < 0.5) | diagonal for _ in range(plans.layers)]


def write(path: Path, starts: tuple[float, ...] = (0.0, 0.25), **changes: Any) -> list[Tensor]:
    """A plan file of two layers with two heads; returns its masks."""
    plans = ModelPlans(2, 2, starts)
    header = PlanHeader(
        **{
            "grid": GRID,
            "block": 8,
            "models": {"transformer": plans},
            "density": 0.5,
            "model": "tiny",
            "prompts": ("a red ball",),
            "steps": 4,
            "metrics": {"sigma": 0.9},
            "made_by": "0.1.0",
            **changes,
        }
    )
    masks = random_masks(header, plans)
    metrics = [torch.rand(2, len(header.orders), 2) for _ in range(2)] if header.metrics else None
    every = dict.fromkeys(header.models)
    write_plans(
        path,
        header,
        dict.fromkeys(every, AXES),
        {name: [pack_bits(mask) for mask in masks] for name in every},
        None if metrics is None else dict.fromkeys(every, metrics),
    )
    return masks


def forge(
    source: Path,
    target: Path,
    change_header: Callable[[dict[str, Any]], None] = lambda header: None,
    change_tensors: Callable[[dict[str, Tensor]], None] = lambda tensors: None,
    text: str | None = None,
) -> PlanFile:
    """Write a changed copy of a plan file whose checksums are all right, as somebody who means harm would; open it."""
    with safe_open(source, framework="pt") as file:
        names = file.keys()
        tensors = {name: file.get_tensor(name).clone() for name in names}
        metadata = file.metadata()
    header = json.loads(metadata["header"])
    change_tensors(tensors)
    for name, model in header["models"].items():
        for layer, row in enumerate(model["checks"]):
            parts = [tensors.get(f"{name}.{layer}.{part}") for part in ("axes", "metrics", "blocks")]
            flat = [*parts[:2], *(parts[2] if parts[2] is not None and parts[2].ndim else [])]
            row[:] = [0 if part is None else zlib.crc32(part.contiguous().numpy().tobytes()) for part in flat]
    change_header(header)
    text = json.dumps(header) if text is None else text
    save_file(tensors, target, metadata={**metadata, "header": text, "crc32": f"{zlib.crc32(text.encode()):08x}"})
    file = PlanFile.open(target)
    file.verify()
    return file
