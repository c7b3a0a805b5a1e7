"""The header of a plan file: what its plans are for, how they were made, and what the rest of the file must look like.

Everything here is checked before it is believed: the file may be damaged, or made to do harm.
"""

from __future__ import annotations

import json
import math
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any, TypeVar

import torch
from torch import Tensor

from dit_sparse.reorder import Block, block_tokens, distinct_axis_orders
from dit_sparse.types import TokenGrid

VERSION = 2
# More than any model has, and little enough to be held in memory.
_MAX_COUNT = 1 << 20
_MAX_LENGTH = 1 << 31
_MAX_TEXT = 1 << 16

T = TypeVar("T")


@dataclass(frozen=True)
class ModelPlans:
    """The plans of one transformer of a pipeline.

    Args:
        layers, heads: how many it has.
        starts: shares of the run at which the masks change, rising, the first of them 0.
        checks: for each layer the CRC-32 of its axes, of its metrics and of each of its masks; `None` in version 1.
    """

    layers: int
    heads: int
    starts: tuple[float, ...] = (0.0,)
    checks: tuple[tuple[int, ...], ...] | None = None

    def slot(self, step: int, num_steps: int) -> int:
        """Which of the masks serves `step` of a run of `num_steps`."""
        # Rounded as the schedule rounds a method's refresh shares, so that both mean the same step.
        return bisect_right([round(start * num_steps) for start in self.starts], step) - 1


@dataclass(frozen=True)
class PlanHeader:
    """What a plan file says of itself.

    Args:
        grid: what it was calibrated for.
        block: tokens a block, or the sides of a tile, as in `axis_order`.
        models: its plans, by the name of the transformer in the pipeline.
        density: wanted share of the query-key pairs.
        model: name of the model, for people.
        prompts: what was calibrated on.
        steps: denoising steps of the calibration.
        threshold: "head" for one density for each head, "global" for one threshold on all block masses.
        metrics: the parameters with which orders were compared, empty where the values are not in the file.
        made_by: the version of dit-sparse that wrote the file.
        version: of the format.
    """

    grid: TokenGrid
    block: Block
    models: Mapping[str, ModelPlans]
    density: float
    model: str = ""
    prompts: tuple[str, ...] = ()
    steps: int = 0
    threshold: str = "head"
    metrics: Mapping[str, float] = field(default_factory=dict)
    made_by: str = ""
    version: int = VERSION

    @property
    def orders(self) -> tuple[str, ...]:
        """The candidates that were compared."""
        return distinct_axis_orders(self.grid, self.block)

    @property
    def num_blocks(self) -> int:
        size = block_tokens(self.block)
        return -(-self.grid.video_len // size) + -(-self.grid.text_len // size)

    @property
    def offsets(self) -> Tensor:
        """`[1, 1, M+1]` int32 bounds of the blocks, as in every axis order."""
        sizes = [_sizes(length, block_tokens(self.block)) for length in (self.grid.video_len, self.grid.text_len)]
        joined = torch.cat(sizes[::-1] if self.grid.text_first else sizes)
        return torch.nn.functional.pad(joined.cumsum(0), (1, 0)).to(torch.int32)[None, None]

    @property
    def changes(self) -> tuple[float, ...]:
        """Shares of the run at which some transformer's masks change."""
        return tuple(sorted({start for plans in self.models.values() for start in plans.starts if start > 0}))

    def shapes(self, layer_of: ModelPlans) -> dict[str, tuple[str, list[int]]]:
        """Type and shape of each of a layer's tensors, by the last part of its name."""
        heads, blocks = layer_of.heads, self.num_blocks
        mask = [heads, blocks, -(-blocks // 8)]
        shapes = {"axes": ("U8", [heads])}
        shapes["blocks"] = ("U8", mask if self.version == 1 else [len(layer_of.starts), *mask])
        if self.metrics:
            shapes["metrics"] = ("F32", [heads, len(self.orders), 2])
        return shapes

    def to_json(self) -> str:
        content = asdict(self)
        content["metrics"], content["models"] = dict(self.metrics), {n: asdict(m) for n, m in self.models.items()}
        return json.dumps(content, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> PlanHeader:
        """The header that `to_json` wrote, or that of version 1.

        Raises:
            ValueError: another version, something missing, or a value that no plan file has.
        """
        try:
            content = json.loads(text, parse_constant=_refuse_constant)
        except (RecursionError, ValueError) as error:
            raise ValueError(f"its header is no JSON: {error}") from None
        content = _object("header", content)
        version = _whole("version", content.get("version"), 1, _MAX_LENGTH)
        if version == 1:
            return _version_1(content)
        if version != VERSION:
            raise ValueError(f"it has version {version} of the format, and this dit-sparse reads 1 and {VERSION}")
        _keys("header", content, cls)
        models = {_text("model", n): _model(n, m) for n, m in _object("models", content["models"]).items()}
        if not models:
            raise ValueError("its models must be at least one, got none")
        return cls(
            grid=_grid(content["grid"]),
            block=_block(content["block"]),
            models=models,
            density=_number("density", content["density"], 0, 1),
            model=_text("model", content["model"]),
            prompts=_sequence("prompts", content["prompts"], _text),
            steps=_whole("steps", content["steps"], 0, _MAX_COUNT),
            threshold=_one_of("threshold", content["threshold"], ("head", "global")),
            metrics={
                _text("metrics", name): _number(name, value, 0, _MAX_LENGTH)
                for name, value in _object("metrics", content["metrics"]).items()
            },
            made_by=_text("made_by", content["made_by"]),
        )


def one_line(text: str) -> str:
    """`text` as a header may hold it: printable, and not too long."""
    return "".join(c if c.isprintable() else " " for c in text)[:_MAX_TEXT]


def _version_1(content: dict[str, Any]) -> PlanHeader:
    """Version 1 had one transformer, one mask a layer and no checksums; the number of heads is in the tensors alone."""
    missing = {"grid", "block", "num_layers", "notes"} - content.keys()
    if missing:
        raise ValueError(f"its header must have {', '.join(sorted(missing))}")
    notes = _object("notes", content["notes"])
    layers = _whole("num_layers", content["num_layers"], 1, _MAX_COUNT)
    return PlanHeader(
        grid=_grid(content["grid"]),
        block=_whole("block", content["block"], 1, _MAX_LENGTH),
        models={"transformer": ModelPlans(layers, 0)},
        density=_number("density", notes.get("density", 0), 0, 1),
        model=_text("model", str(notes.get("model", ""))),
        prompts=tuple(_text("prompt", str(notes[name])) for name in ("prompt",) if name in notes),
        version=1,
    )


def _model(name: str, value: Any) -> ModelPlans:
    content = _object(name, value)
    _keys(name, content, ModelPlans)
    starts = _sequence("starts", content["starts"], lambda _, x: _number("starts", x, 0, 1))
    if not starts or starts[0] != 0 or any(a >= b for a, b in pairwise(starts)):
        raise ValueError(f"its starts must rise from 0, got {list(starts[:8])}")
    layers = _whole("layers", content["layers"], 1, _MAX_COUNT)
    checks = _sequence("checks", content["checks"], lambda _, row: _sequence("checks", row, _check))
    if len(checks) != layers or any(len(row) != len(starts) + 2 for row in checks):
        raise ValueError(f"its checks must be {layers} rows of {len(starts) + 2}")
    return ModelPlans(layers, _whole("heads", content["heads"], 1, _MAX_COUNT), starts, checks)


def _grid(value: Any) -> TokenGrid:
    content = _object("grid", value)
    _keys("grid", content, TokenGrid)
    sizes = {name: _whole(name, content[name], 1, _MAX_LENGTH) for name in ("frames", "height", "width")}
    if not isinstance(content["text_first"], bool):
        raise ValueError(f"its text_first must be true or false, got {content['text_first']!r:.40}")
    text_len = _whole("text_len", content["text_len"], 0, _MAX_LENGTH)
    grid = TokenGrid(**sizes, text_len=text_len, text_first=content["text_first"])
    if grid.num_tokens >= _MAX_LENGTH:
        raise ValueError(f"its grid must have fewer than 2**31 tokens, got {grid}")
    return grid


def _block(value: Any) -> Block:
    if not isinstance(value, list):
        return _whole("block", value, 1, _MAX_LENGTH)
    sides = _sequence("block", value, lambda name, side: _whole(name, side, 1, _MAX_COUNT))
    if len(sides) != 3 or math.prod(sides) > _MAX_LENGTH:
        raise ValueError(f"its block must be a number of tokens or three sides of a tile, got {_short(value)}")
    return sides[0], sides[1], sides[2]


def _keys(name: str, content: dict[str, Any], cls: type[Any]) -> None:
    wanted = set(cls.__dataclass_fields__)
    if content.keys() != wanted:
        odd = sorted(map(str, content.keys() ^ wanted))
        raise ValueError(f"its {name} must have {', '.join(sorted(wanted))}; wrong: {', '.join(odd)[:200]!r}")


def _object(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"its {name} must be an object, got {value!r:.40}")
    return value


def _sequence(name: str, value: Any, read: Callable[[str, Any], T]) -> tuple[T, ...]:
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) > _MAX_COUNT:
        raise ValueError(f"its {name} must be a list, got {value!r:.40}")
    return tuple(read(name, entry) for entry in value)


def _whole(name: str, value: Any, least: int, most: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise ValueError(f"its {name} must be a whole number from {least} to {most}, got {_short(value)}")
    return value


def _check(name: str, value: Any) -> int:
    return _whole(name, value, 0, (1 << 32) - 1)


def _number(name: str, value: Any, least: float, most: float) -> float:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not least <= value <= most or not math.isfinite(value):
        raise ValueError(f"its {name} must be a number from {least} to {most}, got {_short(value)}")
    return float(value)


def _text(name: str, value: Any) -> str:
    # Control characters could steer the terminal that the text is printed on.
    if not isinstance(value, str) or len(value) > _MAX_TEXT or not value.isprintable():
        raise ValueError(f"its {name} must be printable text, got {_short(value)}")
    return value


def _one_of(name: str, value: Any, allowed: Sequence[str]) -> str:
    if value not in allowed:
        raise ValueError(f"its {name} must be {' or '.join(allowed)}, got {_short(value)}")
    return value


def _short(value: Any) -> str:
    # Python refuses to print integers of many thousand digits.
    return "a huge number" if isinstance(value, int) and abs(value) >> 64 else f"{value!r:.60}"


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a number of JSON")


def _sizes(length: int, block: int) -> Tensor:
    whole, rest = divmod(length, block)
    return torch.tensor([block] * whole + [rest] * (rest > 0), dtype=torch.int64)
