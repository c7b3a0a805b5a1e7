"""A picture of a plan file: the order and density of every head, and some of the masks."""

from __future__ import annotations

import os

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from dit_sparse.calibrate.describe import describe, kept_blocks, order_name
from dit_sparse.methods.plan_file import PlanFile
from dit_sparse.partials import replacing
from dit_sparse.reorder import AXIS_ORDERS

MARGIN, LINE, MASK = 16, 20, 160
_INK, _PAPER = (35, 35, 35), (255, 255, 255)
_COLOURS = ((150, 150, 150), (68, 119, 170), (102, 204, 238), (34, 136, 51), (204, 187, 68), (238, 102, 119))
"""One for each of `AXIS_ORDERS`; they differ for most colour-blind people too."""


def draw(file: PlanFile, path: str | os.PathLike[str], layers: int = 4, heads: int = 6) -> None:
    """Write a PNG: a map of layers by heads, coloured by order with the density in it, and beside it some masks.

    Args:
        file: the plan file.
        path: of the PNG, written through a temporary name.
        layers, heads: how many of each get their masks drawn, evenly spread.

    Raises:
        ValueError: the file is damaged.
        OSError: the picture cannot be written.
    """
    header = file.header
    description = describe(file)
    rows: list[Image.Image] = [
        _text(f"{header.grid}, blocks of {description['block']}, density {header.density:g}", 15)
    ]
    for name, model in description["models"].items():
        densities = torch.tensor([layer["densities"] for layer in model["layers"]]).mean(1)
        names = [file.axes(name, layer) for layer in range(len(model["layers"]))]
        rows.append(_text(f"{name}: order (colour) and density (number) by layer (down) and head (across)", 13))
        rows.append(below([_head_map(names, densities), _legend(file)]))
        for slot in dict.fromkeys((0, len(model["starts"]) - 1)):
            rows.append(_text(f"{name}: blocks kept from {model['starts'][slot]:.0%} of the run on, query down", 13))
            rows.append(_masks(file, name, slot, layers, heads))
    save_picture(below(rows), path)


def mask_picture(kept: Tensor, size: int = MASK) -> Image.Image:
    """A block mask `[M, M]` bool as a square, or a map of shares in [0, 1]: the more, the darker."""
    gray = (235 - 190 * kept.double().clamp(0, 1).numpy()).round().astype(np.uint8)
    # A map larger than the square is averaged, so that thin lines stay visible.
    how = Image.Resampling.BOX if max(kept.shape) > size else Image.Resampling.NEAREST
    return Image.fromarray(gray).resize((size, size), how).convert("RGB")


def save_picture(picture: Image.Image, path: str | os.PathLike[str]) -> None:
    """Write `picture` with a margin as a PNG, through a temporary name."""
    framed = Image.new("RGB", (picture.width + 2 * MARGIN, picture.height + 2 * MARGIN), _PAPER)
    framed.paste(picture, (MARGIN, MARGIN))
    with replacing(path) as partial:
        framed.save(partial, format="PNG", optimize=True)


def labelled(picture: Image.Image, text: str) -> Image.Image:
    """`picture` with a line of text above it."""
    return below([_text(text, 12), picture], gap=2)


def beside(pictures: list[Image.Image], gap: int = MARGIN) -> Image.Image:
    """Pictures in a row."""
    size = sum(p.width + gap for p in pictures) - gap, max(p.height for p in pictures)
    joined, x = Image.new("RGB", size, _PAPER), 0
    for picture in pictures:
        joined.paste(picture, (x, 0))
        x += picture.width + gap
    return joined


def below(pictures: list[Image.Image], gap: int = MARGIN // 2) -> Image.Image:
    """Pictures under each other."""
    size = max(p.width for p in pictures), sum(p.height + gap for p in pictures) - gap
    joined, y = Image.new("RGB", size, _PAPER), 0
    for picture in pictures:
        joined.paste(picture, (0, y))
        y += picture.height + gap
    return joined


def _head_map(names: list[tuple[str, ...]], densities: Tensor) -> Image.Image:
    """A cell for each layer and head; cells shrink, and lose their numbers, where there are many."""
    heads = max(map(len, names))
    width = max(6, min(48, 1200 // heads))
    height = max(4, min(24, 960 // len(names)))
    picture = Image.new("RGB", (heads * width, len(names) * height), _PAPER)
    pen = ImageDraw.Draw(picture)
    for layer, own in enumerate(names):
        for head, axes in enumerate(own):
            corner = head * width, layer * height
            pen.rectangle((*corner, corner[0] + width - 2, corner[1] + height - 2), _COLOURS[AXIS_ORDERS.index(axes)])
            if width >= 28 and height >= 14:
                place = corner[0] + width // 2, corner[1] + height // 2
                pen.text(place, f"{densities[layer, head]:.2f}", (0, 0, 0), _font(12), anchor="mm")
    return picture


def _legend(file: PlanFile) -> Image.Image:
    entries = []
    for axes in file.header.orders:
        swatch = Image.new("RGB", (LINE - 6, LINE - 6), _COLOURS[AXIS_ORDERS.index(axes)])
        entries.append(beside([swatch, _text(order_name(file, axes), 12)], gap=4))
    return beside(entries)


def _masks(file: PlanFile, model: str, slot: int, layers: int, heads: int) -> Image.Image:
    plans = file.header.models[model]
    rows = []
    for layer in _spread(plans.layers, layers):
        kept, names = kept_blocks(file, model, layer, slot), file.axes(model, layer)
        rows.append(
            beside(
                [
                    labelled(mask_picture(kept[head]), f"layer {layer}, head {head}, {order_name(file, names[head])}")
                    for head in _spread(plans.heads, heads)
                ]
            )
        )
    return below(rows)


def _spread(count: int, wanted: int) -> list[int]:
    return torch.linspace(0, count - 1, min(count, wanted)).round().int().unique().tolist()


def _text(text: str, size: int) -> Image.Image:
    width = int(_font(size).getlength(text)) + 2
    picture = Image.new("RGB", (width, size + 6), _PAPER)
    ImageDraw.Draw(picture).text((0, 1), text, _INK, _font(size))
    return picture


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
