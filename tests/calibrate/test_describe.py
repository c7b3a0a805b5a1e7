"""What is said and drawn of a plan file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table

from dit_sparse.calibrate import describe, draw, layer_table, slot_table, summary
from dit_sparse.calibrate.draw import mask_picture
from dit_sparse.methods.plan_file import PlanFile
from dit_sparse.reorder import raster_order
from dit_sparse.types import AttentionPlan, TokenGrid
from tests.methods import plans


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "plan.safetensors"


def printed(*tables: Table) -> str:
    console = Console(width=120, record=True, quiet=False, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(*tables)
    return console.export_text()


def test_densities_are_exact_in_tokens(path: Path) -> None:
    masks = plans.write(path)
    description = describe(PlanFile.open(path))
    order = raster_order(plans.GRID, 8)
    layers = description["models"]["transformer"]["layers"]
    for layer, own in enumerate(layers):
        assert own["orders"] == plans.AXES[layer]
        for slot, densities in enumerate(own["densities"]):
            want = AttentionPlan.from_kept(order, masks[layer][slot][None]).density[0]
            assert densities == pytest.approx(want.tolist())
    assert json.loads(json.dumps(description)) == description


def test_tables_name_every_head_and_mask(path: Path) -> None:
    plans.write(path, prompts=("a [bold]red[/bold] ball",))
    description = describe(PlanFile.open(path))
    model = description["models"]["transformer"]
    text = printed(summary(description), slot_table("transformer", model), layer_table("transformer", model))
    assert "a [bold]red[/bold] ball" in text
    assert "2x3x5 + 4 text first" in text
    assert "orders, transformer  FHW 2, WHF 1, HFW 1" in text
    first = torch.tensor(model["layers"][1]["densities"]).mean(0)[0]
    assert f"HFW {first:.2f}" in text
    assert "25%" in text


def test_many_heads_take_several_rows() -> None:
    model = {"starts": [0.0], "layers": [{"orders": ["FHW"] * 19, "densities": [[0.25] * 19]}]}
    text = printed(layer_table("transformer", model))
    assert [line.split()[-1] for line in text.splitlines() if "FHW" in line] == ["0.25"] * 3
    assert text.count("FHW 0.25") == 19
    assert "16-18" in text


def test_an_images_orders_are_named_by_two_axes(path: Path) -> None:
    axes, plans.AXES[:] = list(plans.AXES), [["FHW", "FWH"], ["FWH", "FHW"]]
    try:
        plans.write(path, grid=TokenGrid(1, 5, 7, 3))
    finally:
        plans.AXES[:] = axes
    layers = describe(PlanFile.open(path))["models"]["transformer"]["layers"]
    assert [layer["orders"] for layer in layers] == [["HW", "WH"], ["WH", "HW"]]


def test_the_picture_is_whole_and_alone(path: Path) -> None:
    plans.write(path)
    out = path.with_name("plan.png")
    draw(PlanFile.open(path), out)
    with Image.open(out) as picture:
        assert picture.format == "PNG"
        assert picture.width > 400
        assert picture.height > 800  # a map, and the masks of two layers at two times
        assert len(picture.getcolors(1 << 16) or []) > 5
    assert sorted(p.name for p in path.parent.iterdir()) == ["plan.png", "plan.safetensors"]


def test_a_mask_is_drawn_dark_where_it_keeps() -> None:
    kept = torch.zeros(4, 4, dtype=torch.bool)
    kept[1, 2] = True
    picture = mask_picture(kept, 40)
    assert picture.size == (40, 40)
    assert picture.getpixel((25, 15)) == (45, 45, 45)
    assert picture.getpixel((15, 25)) == (235, 235, 235)
