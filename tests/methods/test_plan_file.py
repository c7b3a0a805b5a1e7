"""Plan files: written, read slice by slice, and refused by name where anything is wrong with them."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dit_sparse.block_mask import unpack_bits
from dit_sparse.methods import plan_file
from dit_sparse.methods.plan_file import PlanFile
from dit_sparse.methods.plan_header import ModelPlans, PlanHeader, one_line
from dit_sparse.reorder import raster_order
from dit_sparse.types import TokenGrid
from tests.methods.plans import AXES, GRID, forge, write

VERSION_1 = Path(__file__).parent / "data" / "plan_v1.safetensors"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "plan.safetensors"


@pytest.mark.parametrize("metrics", [{"sigma": 0.9, "alpha": 0.5}, {}])
def test_it_comes_back(path: Path, metrics: dict[str, float]) -> None:
    masks = write(path, metrics=metrics)
    file = PlanFile.open(path)
    header = file.header
    assert (header.grid, header.block, header.density, header.model) == (GRID, 8, 0.5, "tiny")
    assert (header.prompts, header.steps, header.metrics, header.changes) == (("a red ball",), 4, metrics, (0.25,))
    for layer in range(2):
        assert file.axes("transformer", layer) == tuple(AXES[layer])
        found = file.metrics("transformer", layer)
        assert (found is None) == (not metrics)
        for slot in range(2):
            bits = file.bits("transformer", layer, slot)
            assert torch.equal(unpack_bits(bits, header.num_blocks), masks[layer][slot])
    file.verify()
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_tiles_come_back(path: Path) -> None:
    masks = write(path, block=(1, 2, 4))
    file = PlanFile.open(path)
    file.verify()
    assert file.header.block == (1, 2, 4)
    assert torch.equal(unpack_bits(file.bits("transformer", 0, 1), file.header.num_blocks), masks[0][1])
    write(path, block=(2, 2, 2))
    metrics = PlanFile.open(path).metrics("transformer", 0)
    assert metrics is not None
    assert metrics.shape == (2, 1, 2)


def test_an_image_has_the_metrics_of_two_orders(path: Path) -> None:
    grid = TokenGrid(1, 5, 7, 3)
    write(path, grid=grid)
    metrics = PlanFile.open(path).metrics("transformer", 0)
    assert metrics is not None
    assert metrics.shape == (2, 2, 2)


def test_only_the_slice_asked_for_is_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(path)
    read = []
    original = plan_file.safe_open

    class Spy:
        def __init__(self, *args, **kwargs) -> None:
            self.file = original(*args, **kwargs)

        def __enter__(self) -> Spy:
            self.file.__enter__()
            return self

        def __exit__(self, *args) -> None:
            self.file.__exit__(*args)

        def __getattr__(self, name: str):
            assert name != "get_tensor", "a whole tensor was read"
            return getattr(self.file, name)

        def get_slice(self, name: str):
            part = self.file.get_slice(name)

            class Slice:
                get_shape, get_dtype = part.get_shape, part.get_dtype

                def __getitem__(self, index):
                    read.append((name, index))
                    return part[index]

            return Slice()

    monkeypatch.setattr(plan_file, "safe_open", Spy)
    file = PlanFile.open(path)
    assert read == []
    file.bits("transformer", 1, 1)
    assert read == [("transformer.1.blocks", 1)]


def test_version_1_is_still_read() -> None:
    file = PlanFile.open(VERSION_1)
    file.verify()
    header = file.header
    assert (header.version, header.grid, header.block) == (1, GRID, 8)
    assert header.models == {"transformer": ModelPlans(2, 2)}
    assert (header.density, header.model, header.prompts, header.changes) == (0.5, "tiny", ("a red ball",), ())
    assert [file.axes("transformer", layer) for layer in range(2)] == [("FHW", "WHF"), ("HFW", "FHW")]
    kept = unpack_bits(file.bits("transformer", 0, 0), 5).int()
    assert kept[0].tolist() == [[1, 0, 1, 1, 1], [0, 1, 0, 1, 0], [1, 1, 1, 1, 1], [0, 0, 0, 1, 1], [0, 0, 1, 0, 1]]


def test_slots_follow_the_shares_of_the_run() -> None:
    plans = ModelPlans(1, 1, (0.0, 0.05, 0.1, 0.5))
    assert [plans.slot(step, 20) for step in (0, 1, 2, 9, 10, 19)] == [0, 1, 2, 2, 3, 3]
    assert [plans.slot(step, 4) for step in range(4)] == [2, 2, 3, 3]  # the first three begin together
    assert [plans.slot(step, 40) for step in (1, 2, 3, 4)] == [0, 1, 1, 2]


@pytest.mark.parametrize("grid", [TokenGrid(2, 3, 5), GRID, TokenGrid(2, 3, 5, 9), TokenGrid(1, 2, 4)], ids=str)
def test_bounds_are_those_of_the_orders(grid: TokenGrid) -> None:
    header = PlanHeader(grid, 8, {}, 0.5)
    order = raster_order(grid, 8)
    assert torch.equal(header.offsets, order.offsets)
    assert header.num_blocks == order.num_blocks


def test_what_people_write_is_made_printable() -> None:
    assert one_line("a\u00a0b\x1b[31m\nc") == "a b [31m c"


def test_other_files_are_refused(tmp_path: Path, path: Path) -> None:
    with pytest.raises(ValueError, match="existing file"):
        PlanFile.open("nowhere.safetensors")
    with pytest.raises(ValueError, match="existing file"):
        PlanFile.open(tmp_path)
    with pytest.raises(ValueError, match="existing file"):
        PlanFile.open("a\0b")
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="cannot be used"):
        PlanFile.open(path)
    demo = Path(plan_file.__file__).parents[1] / "demo/model/vae/diffusion_pytorch_model.safetensors"
    with pytest.raises(ValueError, match="not in the format 'dit-sparse-plan'"):
        PlanFile.open(demo)


def test_a_file_that_changed_is_read_again(path: Path) -> None:
    write(path)
    first = PlanFile.open(path)
    assert PlanFile.open(path) is first
    write(path, density=0.25)
    assert PlanFile.open(path).header.density == 0.25


def set_key(*keys: str | int, value: object) -> Callable[[dict], None]:
    def change(header: dict) -> None:
        for key in keys[:-1]:
            header = header[key]
        header[keys[-1]] = value

    return change


def drop(key: str) -> Callable[[dict], None]:
    return lambda content: content.pop(key)


MODEL = ("models", "transformer")
HOSTILE_HEADERS = {
    "version 3": (set_key("version", value=3), "version 3"),
    "version is text": (set_key("version", value="2"), "version must be a whole number"),
    "no grid": (drop("grid"), "wrong: 'grid'"),
    "something more": (set_key("run", value="rm"), "wrong: 'run'"),
    "grid is a list": (set_key("grid", value=[1]), "grid must be an object"),
    "no frames": (set_key("grid", "frames", value=0), "frames must be a whole number"),
    "frames are true": (set_key("grid", "frames", value=True), "frames must be a whole number"),
    "a huge grid": (set_key("grid", "frames", value=2**31), "fewer than 2[*][*]31 tokens"),
    "a number past all bounds": (set_key("grid", "frames", value=10**30), "got a huge number"),
    "another grid": (set_key("grid", "width", value=50), "must be"),
    "text_first is 1": (set_key("grid", "text_first", value=1), "text_first must be"),
    "negative text": (set_key("grid", "text_len", value=-1), "text_len must be"),
    "block 0": (set_key("block", value=0), "block must be"),
    "half a block": (set_key("block", value=8.5), "block must be"),
    "another block": (set_key("block", value=4), "must be"),
    "another tile": (set_key("block", value=[1, 2, 3]), "must be"),
    "half a tile": (set_key("block", value=[2, 4]), "block must be"),
    "a tile of nothing": (set_key("block", value=[8, 1, 0]), "block must be"),
    "a tile of text": (set_key("block", value="8x1x1"), "block must be"),
    "a tile without end": (set_key("block", value=[1 << 20] * 3), "block must be"),
    "density 2": (set_key("density", value=2), "density must be"),
    "density is infinite": (set_key("density", value=1e999), "not a number of JSON"),
    "density is NaN": (set_key("density", value=float("nan")), "not a number of JSON"),
    "no model": (set_key("models", value={}), "at least one"),
    "another model": (lambda h: h["models"].update(other=h["models"]["transformer"]), "must have 12 tensors"),
    "a path for a model": (lambda h: h["models"].update({"../x": h["models"].pop("transformer")}), "no tensor"),
    "many layers": (set_key(*MODEL, "layers", value=10**6), "checks must be"),
    "fewer layers": (lambda h: h["models"]["transformer"].update(layers=1, checks=[[0] * 4]), "must have 3 tensors"),
    "more heads": (set_key(*MODEL, "heads", value=3), "must be"),
    "no heads": (set_key(*MODEL, "heads", value=0), "heads must be"),
    "starts that fall": (set_key(*MODEL, "starts", value=[0, 0.5, 0.25]), "starts must rise"),
    "starts late": (set_key(*MODEL, "starts", value=[0.5, 0.75]), "starts must rise"),
    "no starts": (set_key(*MODEL, "starts", value=[]), "starts must rise"),
    "more starts": (lambda h: h["models"]["transformer"].update(starts=[0, 0.1, 0.2], checks=[[0] * 5] * 2), "must be"),
    "checks for nothing": (set_key(*MODEL, "checks", value=None), "checks must be a list"),
    "a wrong check": (set_key(*MODEL, "checks", 1, 2, value=5), "checksum of layer 1"),
    "a check past 32 bits": (set_key(*MODEL, "checks", 1, 2, value=2**32), "checks must be"),
    "prompts are text": (set_key("prompts", value="a"), "prompts must be a list"),
    "a prompt that steers the terminal": (set_key("prompts", value=["\x1b]0;x\x07"]), "printable"),
    "a name of two lines": (set_key("model", value="a\nb"), "printable"),
    "a name without end": (set_key("model", value="a" * 10**6), "printable"),
    "half a character": (set_key("model", value="\ud800"), "printable"),
    "metrics of text": (set_key("metrics", value={"sigma": "x"}), "sigma must be a number"),
    "metrics gone": (set_key("metrics", value={}), "must have 4 tensors"),
    "another threshold": (set_key("threshold", value="none"), "threshold must be head or global"),
}


@pytest.mark.parametrize("name", HOSTILE_HEADERS)
def test_a_hostile_header_is_refused(path: Path, tmp_path: Path, name: str) -> None:
    write(path)
    change, message = HOSTILE_HEADERS[name]
    with pytest.raises(ValueError, match=message) as caught:
        forge(path, tmp_path / "forged", change_header=change)
    assert str(caught.value).startswith("plan_file ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text", ["", "[]", "null", "{", "[" * 100_000, '{"version": ' + "9" * 5000 + "}", '{"version": NaN}', "{}"]
)
def test_a_header_that_is_none_is_refused(path: Path, tmp_path: Path, text: str) -> None:
    write(path)
    with pytest.raises(ValueError, match=r"plan_file .* cannot be used"):
        forge(path, tmp_path / "forged", text=text)


def change_tensor(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict], None]:
    return lambda tensors: tensors.update({f"transformer.1.{name}": change(tensors[f"transformer.1.{name}"])})


def put(value: float, *place: int) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor[place] = value
        return tensor

    return change


HOSTILE_TENSORS = {
    "order number 6": (change_tensor("axes", put(6, 0)), "order number 6"),
    "axes of another type": (change_tensor("axes", lambda t: t.to(torch.int8)), "must be"),
    "axes of more heads": (change_tensor("axes", lambda t: t.repeat(2)), "must be"),
    "a block past the last": (change_tensor("blocks", put(0xFF, 0, 0, 0, 0)), "past the last"),
    "a row that keeps none": (change_tensor("blocks", put(0, 1, 0, 2, 0)), "a row of blocks that keeps none"),
    "masks of floats": (change_tensor("blocks", lambda t: t.float()), "must be"),
    "masks in another shape": (change_tensor("blocks", lambda t: t.reshape(-1)), "must be"),
    "a mask of no rows": (change_tensor("blocks", lambda t: t[:, :, :0]), "must be"),
    "metrics that are NaN": (change_tensor("metrics", put(float("nan"), 0, 0, 0)), "not finite"),
    "metrics without end": (change_tensor("metrics", put(float("inf"), 1, 5, 1)), "not finite"),
    "negative metrics": (change_tensor("metrics", put(-1, 1, 5, 1)), "negative"),
    "metrics of another type": (change_tensor("metrics", lambda t: t.double()), "must be"),
    "a tensor more": (lambda tensors: tensors.update({"../../x": torch.zeros(1)}), "must have 6 tensors, got 7"),
    "another name": (
        lambda tensors: tensors.update({"transformer.01.axes": tensors.pop("transformer.1.axes")}),
        "no tensor 'transformer.1.axes'",
    ),
}


@pytest.mark.parametrize("name", HOSTILE_TENSORS)
def test_hostile_tensors_are_refused(path: Path, tmp_path: Path, name: str) -> None:
    write(path)
    change, message = HOSTILE_TENSORS[name]
    with pytest.raises(ValueError, match=message):
        forge(path, tmp_path / "forged", change_tensors=change)


@pytest.mark.parametrize("length", [2**26 + 1, 2**63, 2**64 - 1, 2**20])
def test_a_header_without_end_is_refused(path: Path, length: int) -> None:
    write(path)
    path.write_bytes(struct.pack("<Q", length) + path.read_bytes()[8:])
    with pytest.raises(ValueError, match="cannot be used"):
        PlanFile.open(path)


def test_offsets_out_of_range_are_refused(path: Path, tmp_path: Path) -> None:
    write(path)
    content = path.read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    table, data = content[8 : 8 + size].decode(), content[8 + size :]
    start = table.index("data_offsets") + len('data_offsets":[')
    end = table.index("]", start)
    for number, offsets in enumerate(["0,99999999", "-1,2", "5,1", "18446744073709551615,18446744073709551616", "0,1"]):
        changed = (table[:start] + offsets + table[end:]).encode()
        forged = tmp_path / f"forged{number}"
        forged.write_bytes(struct.pack("<Q", len(changed)) + changed + data)
        with pytest.raises(ValueError, match="cannot be used"):
            PlanFile.open(forged)


def mutated(content: bytes, random_: random.Random) -> bytes:
    """`content` cut short, with bits flipped, bytes overwritten, put in or taken out, or two stretches exchanged."""
    data = bytearray(content)
    place, length = random_.randrange(len(data)), random_.randint(1, 16)
    match random_.randrange(6):
        case 0:
            del data[place:]
        case 1:
            data[place] ^= 1 << random_.randrange(8)
        case 2:
            for _ in range(random_.randint(2, 8)):
                data[random_.randrange(len(data))] ^= 1 << random_.randrange(8)
        case 3:
            data[place : place + length] = random_.randbytes(length)
        case 4:
            data[place:place] = random_.randbytes(length)
        case 5:
            other = random_.randrange(len(data))
            data[place : place + length], data[other : other + length] = (
                data[other : other + length],
                data[place : place + length],
            )
    return bytes(data)


def test_every_one_of_3000_damaged_files_is_refused(path: Path, tmp_path: Path) -> None:
    write(path)
    content, random_ = path.read_bytes(), random.Random(0)
    tried = 0
    while tried < 3000:
        data = mutated(content, random_)
        if data == content:
            continue
        tried += 1
        damaged = tmp_path / str(tried)  # a name of its own: what was read before is remembered by path
        damaged.write_bytes(data)
        with pytest.raises(ValueError, match=r"^plan_file .* cannot be used: .*; calibrate again$"):
            PlanFile.open(damaged).verify()
        damaged.unlink()


def test_damage_to_version_1_does_no_harm(tmp_path: Path) -> None:
    """It has no checksums: what still has the right form is read, and everything else is refused."""
    content, random_ = VERSION_1.read_bytes(), random.Random(1)
    refused = 0
    for number in range(500):
        damaged = tmp_path / str(number)
        damaged.write_bytes(mutated(content, random_))
        try:
            PlanFile.open(damaged).verify()
        except ValueError:
            refused += 1
    assert refused > 300
