"""Calibrated plans on disk: safetensors with packed masks and a header that says what they are for.

Each layer has `axes` (which order each head walks), `blocks` (its masks, one bit a block) and perhaps `metrics`. A
slice is read when it is needed, and checked when it is read.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dit_sparse.methods.plan_header import VERSION, ModelPlans, PlanHeader
from dit_sparse.partials import replacing
from dit_sparse.reorder import AXIS_ORDERS, Block, axis_order
from dit_sparse.types import TokenGrid, TokenOrder

FORMAT = "dit-sparse-plan"
_MAX_HEADER = 1 << 26


@dataclass(frozen=True, eq=False)
class PlanFile:
    """One calibration: per layer the axis order of each head and the blocks it keeps.

    Args:
        path: the safetensors file.
        header: what it says of itself, checked against the tensors there are.
    """

    path: Path
    header: PlanHeader

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> PlanFile:
        """Read and check the header of `path`; one that was read before is not read again until the file changes.

        Raises:
            ValueError: no such file, no plan file, a damaged one, or one of another version.
        """
        path = Path(path)
        if not path.is_file():
            raise ValueError(f"plan_file must be an existing file, got {str(path)!r}; `dit-sparse calibrate` makes one")
        try:
            status = path.stat()
        except OSError as error:
            raise ValueError(f"plan_file {str(path)!r} cannot be read: {error.strerror}") from None
        return _open(path, (status.st_ino, status.st_mtime_ns, status.st_size))

    def check(self, grid: TokenGrid) -> None:
        """Raise ValueError unless this plan is for `grid`; the text may be of another length, as all of it is kept."""
        own = self.header.grid
        same_side = grid.text_first == own.text_first or not (grid.text_len and own.text_len)
        if grid.shape != own.shape or not same_side:
            raise ValueError(f"plan_file {str(self.path)!r} is for the grid {own}, got {grid}; calibrate for it")

    def plans_of(self, model: str) -> ModelPlans:
        """The plans of one transformer.

        Raises:
            ValueError: the file has none of it.
        """
        if model not in self.header.models:
            known = ", ".join(self.header.models)
            raise ValueError(f"plan_file {str(self.path)!r} has plans of {known}, got {model!r}; calibrate with it")
        return self.header.models[model]

    def axes(self, model: str, layer: int) -> tuple[str, ...]:
        """The order of each head of a layer.

        Raises:
            ValueError: the layer's data are damaged.
        """
        numbers = self._read(model, layer, "axes")
        self._check_sum(model, layer, 0, numbers)
        if int(numbers.max()) >= len(AXIS_ORDERS):
            raise _damaged(self.path, f"layer {layer} has order number {int(numbers.max())}")
        return tuple(AXIS_ORDERS[number] for number in numbers.tolist())

    def metrics(self, model: str, layer: int) -> Tensor | None:
        """M_sparse and M_quant of each candidate order, `[H, O, 2]` float32, where the file has them.

        Raises:
            ValueError: the layer's data are damaged.
        """
        if not self.header.metrics:
            return None
        metrics = self._read(model, layer, "metrics")
        self._check_sum(model, layer, 1, metrics)
        if not bool(metrics.isfinite().all()) or float(metrics.min()) < 0:
            raise _damaged(self.path, f"layer {layer} has metrics that are not finite or negative")
        return metrics

    def bits(self, model: str, layer: int, slot: int) -> Tensor:
        """One mask of a layer, `[H, M, ceil(M/8)]` uint8, lowest bit first, on the CPU.

        Raises:
            ValueError: the layer's data are damaged.
        """
        bits = self._read(model, layer, "blocks", slot)
        self._check_sum(model, layer, 2 + slot, bits)
        if self.header.num_blocks % 8 and int(bits[..., -1].max()) >> self.header.num_blocks % 8:
            raise _damaged(self.path, f"layer {layer} keeps blocks past the last one")
        if not bool(bits.any(-1).all()):
            raise _damaged(self.path, f"layer {layer} has a row of blocks that keeps none")
        return bits

    def verify(self) -> None:
        """Read everything once.

        Raises:
            ValueError: something is damaged.
        """
        for model, plans in self.header.models.items():
            for layer in range(plans.layers):
                self.axes(model, layer)
                self.metrics(model, layer)
                for slot in range(len(plans.starts)):
                    self.bits(model, layer, slot)

    def _read(self, model: str, layer: int, name: str, slot: int | None = None) -> Tensor:
        try:
            with safe_open(self.path, framework="pt") as file:
                part = file.get_slice(_name(self.header, model, layer, name))
                return part[:] if slot is None or self.header.version == 1 else part[slot]
        except (SafetensorError, OSError) as error:
            raise _damaged(self.path, error) from error

    def _check_sum(self, model: str, layer: int, place: int, data: Tensor) -> None:
        checks = self.header.models[model].checks
        if checks is not None and checks[layer][place] != _crc(data):
            raise _damaged(self.path, f"the checksum of layer {layer} is wrong")


def write_plans(
    path: str | os.PathLike[str],
    header: PlanHeader,
    axes: Mapping[str, Sequence[Sequence[str]]],
    bits: Mapping[str, Sequence[Tensor]],
    metrics: Mapping[str, Sequence[Tensor]] | None = None,
) -> None:
    """Write a plan file through a temporary name; tensors may lie in mapped files, and are not copied.

    Args:
        path: where to.
        header: without the checksums, which are made here.
        axes: for each transformer and layer, the order of each head.
        bits: for each transformer and layer, its masks `[S, H, M, ceil(M/8)]` uint8.
        metrics: for each transformer and layer `[H, O, 2]` float32.

    Raises:
        OSError: the file cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    models = {}
    for model, plans in header.models.items():
        checks = []
        for layer in range(plans.layers):
            numbers = [AXIS_ORDERS.index(name) for name in axes[model][layer]]
            parts = {"axes": torch.tensor(numbers, dtype=torch.uint8), "blocks": bits[model][layer]}
            if metrics is not None:
                parts["metrics"] = metrics[model][layer].float().contiguous()
            tensors |= {_name(header, model, layer, name): part for name, part in parts.items()}
            others = [_crc(parts[name]) if name in parts else 0 for name in ("axes", "metrics")]
            checks.append((*others, *map(_crc, parts["blocks"])))
        models[model] = replace(plans, checks=tuple(checks))
    text = replace(header, models=models).to_json()
    with replacing(path) as partial:
        save_file(tensors, partial, metadata={"format": FORMAT, "header": text, "crc32": _text_crc(text)})


def axes_of(order: TokenOrder, grid: TokenGrid, block: Block) -> list[str]:
    """Which of the six axis orders each head of `order` is.

    Raises:
        ValueError: a head with another order.
    """
    known = torch.cat([axis_order(grid, axes, block, device=order.index.device).index[0] for axes in AXIS_ORDERS])
    same = (order.index[0, :, None] == known[None]).all(-1)
    if not bool(same.any(1).all()):
        raise ValueError("plans must be on axis orders, got a head with another order")
    return [AXIS_ORDERS[number] for number in same.int().argmax(1).tolist()]


@lru_cache(maxsize=8)
def _open(path: Path, identity: tuple[int, ...]) -> PlanFile:
    """`identity` is there for the cache alone: another one is another file."""
    try:
        with path.open("rb") as start:
            if int.from_bytes(start.read(8), "little") > _MAX_HEADER:
                raise ValueError("its header is longer than any plan's")
        with safe_open(path, framework="pt") as file:
            header = _checked_header(file.metadata() or {})
            return PlanFile(path, _checked_tensors(header, file))
    except (SafetensorError, OSError, ValueError) as error:
        raise _damaged(path, error) from error


def _checked_header(metadata: dict[str, str]) -> PlanHeader:
    if metadata.get("format") != FORMAT:
        raise ValueError(f"it is not in the format {FORMAT!r}")
    text = metadata.get("header", "")
    header = PlanHeader.from_json(text)
    if header.version == VERSION and metadata.get("crc32") != _text_crc(text):
        raise ValueError("the checksum of its header is wrong")
    return header


def _checked_tensors(header: PlanHeader, file: Any) -> PlanHeader:
    """The header, if the file has just the tensors that it calls for; with the number of heads where it lacks it."""
    names = set(file.keys())
    if header.version == 1 and "layer.0.axes" in names:
        shape = file.get_slice("layer.0.axes").get_shape()
        heads = shape[0] if len(shape) == 1 else 0
        header = replace(header, models={name: replace(m, heads=heads) for name, m in header.models.items()})
    count = sum(plans.layers * len(header.shapes(plans)) for plans in header.models.values())
    if len(names) != count:
        raise ValueError(f"it must have {count} tensors, got {len(names)}")
    for model, plans in header.models.items():
        for layer in range(plans.layers):
            for part, want in header.shapes(plans).items():
                name = _name(header, model, layer, part)
                if name not in names:
                    raise ValueError(f"it has no tensor {name!r}")
                got = file.get_slice(name)
                if (got.get_dtype(), got.get_shape()) != want or 0 in got.get_shape():
                    raise ValueError(f"{name!r} must be {want}, got {got.get_dtype()} {got.get_shape()}")
    return header


def _name(header: PlanHeader, model: str, layer: int, part: str) -> str:
    return f"layer.{layer}.{part}" if header.version == 1 else f"{model}.{layer}.{part}"


def _crc(data: Tensor) -> int:
    return zlib.crc32(np.ascontiguousarray(data.numpy()).data)


def _text_crc(text: str) -> str:
    return f"{zlib.crc32(text.encode()):08x}"


def _damaged(path: Path, error: object) -> ValueError:
    reason = " ".join(str(error).split())[:400]
    return ValueError(f"plan_file {str(path)!r} cannot be used: {reason}; calibrate again")
