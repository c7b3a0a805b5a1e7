"""What is in a plan file, as tables for people and as JSON."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from dit_sparse.block_mask import unpack_bits
from dit_sparse.methods.plan_file import PlanFile
from dit_sparse.reorder import Block, tile_along

HEADS_A_ROW = 8


def describe(file: PlanFile) -> dict[str, Any]:
    """Everything about a plan file that fits on a page, ready for JSON.

    Every mask is read, one at a time.

    Returns:
        The header's fields, and by transformer and layer the `orders` of the heads and their `densities`, one row a
        mask: the exact shares of query-key pairs.

    Raises:
        ValueError: the file is damaged.
    """
    header = file.header
    models = {}
    for name, plans in header.models.items():
        layers = []
        for layer in range(plans.layers):
            file.metrics(name, layer)
            densities = [mask_density(file, kept_blocks(file, name, layer, slot)) for slot in range(len(plans.starts))]
            orders = [order_name(file, axes) for axes in file.axes(name, layer)]
            layers.append({"orders": orders, "densities": [row.tolist() for row in densities]})
        models[name] = {"starts": list(plans.starts), "layers": layers}
    return {
        "file": str(file.path),
        "version": header.version,
        "made_by": header.made_by,
        "model": header.model,
        "grid": str(header.grid),
        "tokens": header.grid.num_tokens,
        "block": block_text(header.block),
        "density": header.density,
        "threshold": header.threshold,
        "steps": header.steps,
        "metrics": dict(header.metrics),
        "prompts": list(header.prompts),
        "models": models,
    }


def block_text(block: Block) -> int | str:
    """Tokens a block, or the sides of a tile such as "2x4x8"."""
    return block if isinstance(block, int) else "x".join(map(str, block))


def kept_blocks(file: PlanFile, model: str, layer: int, slot: int) -> Tensor:
    """One mask of a layer, `[H, M, M]` bool."""
    return unpack_bits(file.bits(model, layer, slot), file.header.num_blocks)


def mask_density(file: PlanFile, kept: Tensor) -> Tensor:
    """`[H]` float64 share of the query-key pairs that `kept` `[H, M, M]` keeps."""
    sizes = file.header.offsets.diff(dim=-1)[0, 0].double()
    rows = (kept * sizes).sum(-1)
    return (rows * sizes).sum(-1) / file.header.grid.num_tokens**2


def order_name(file: PlanFile, axes: str) -> str:
    """The order without the axes of one token: an image has HW and WH. Of tiles, their sides along F, H and W."""
    grid, block = file.header.grid, file.header.block
    if not isinstance(block, int):
        return str(block_text(tile_along(grid, axes, block)))
    return "".join(axis for axis in axes if grid.shape["FHW".index(axis)] > 1) or axes


def summary(description: dict[str, Any]) -> Table:
    """What a plan is for and how it was made."""
    table = Table(box=None, show_header=False, pad_edge=False)
    for name in ("file", "model", "grid", "tokens", "block", "density", "threshold", "steps", "version", "made_by"):
        table.add_row(name, escape(str(description[name])))
    metrics = ", ".join(f"{name} {value:g}" for name, value in description["metrics"].items())
    table.add_row("metrics", escape(metrics or "not in the file"))
    for prompt in description["prompts"]:
        table.add_row("prompt", escape(prompt))
    for name, model in description["models"].items():
        counts = Counter(order for layer in model["layers"] for order in layer["orders"])
        table.add_row(f"orders, {escape(name)}", ", ".join(f"{order} {count}" for order, count in counts.most_common()))
    return table


def layer_table(name: str, model: dict[str, Any]) -> Table:
    """The order of each head and its density, the mean over the masks; one row for every few heads of a layer."""
    table = Table(title=f"{escape(name)}: order and density of each head", box=None, header_style="bold")
    table.add_column("layer", justify="right")
    table.add_column("heads")
    widest = max(len(layer["orders"]) for layer in model["layers"])
    for place in range(min(HEADS_A_ROW, widest)):
        table.add_column(f"+{place}", no_wrap=True)
    for number, layer in enumerate(model["layers"]):
        densities = torch.tensor(layer["densities"]).mean(0).tolist()
        cells = [f"{order} {density:.2f}" for order, density in zip(layer["orders"], densities, strict=True)]
        for first in range(0, len(cells), HEADS_A_ROW):
            row = cells[first : first + HEADS_A_ROW]
            table.add_row("" if first else str(number), f"{first}-{first + len(row) - 1}", *row)
    return table


def slot_table(name: str, model: dict[str, Any]) -> Table:
    """Where in the run each mask begins, and the densities of its heads."""
    table = Table(title=f"{escape(name)}: masks", box=None, header_style="bold")
    for heading in ("mask", "from", "mean", "least", "most"):
        table.add_column(heading, justify="right")
    for slot, start in enumerate(model["starts"]):
        densities = torch.tensor([layer["densities"][slot] for layer in model["layers"]])
        numbers = (float(x) for x in (densities.mean(), densities.min(), densities.max()))
        table.add_row(str(slot), f"{start:.0%}", *(f"{number:.3f}" for number in numbers))
    return table
