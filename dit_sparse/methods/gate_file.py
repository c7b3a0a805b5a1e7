"""Gates of SeerAttention on disk: two projections a layer, as safetensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dit_sparse.partials import replacing

FORMAT = "dit-sparse gate 1"


@dataclass(frozen=True, eq=False)
class Gate:
    """The projections of one layer.

    Args:
        q: `[H, D, G]` of mean queries.
        k: `[H, 3 D, G]` of mean, largest and smallest keys, in this order.
    """

    q: Tensor
    k: Tensor

    def to(self, device: torch.device) -> Gate:
        """The same gate on another device."""
        return Gate(self.q.to(device), self.k.to(device))


@dataclass(frozen=True, eq=False)
class GateFile:
    """All gates of a pipeline.

    Args:
        path: where they lie.
        block: tokens of a block that they were trained for.
        gates: by transformer and layer.
    """

    path: str
    block: int
    gates: Mapping[tuple[str, int], Gate]

    @classmethod
    def open(cls, path: str) -> GateFile:
        """Read a file once; it is read again when it has changed.

        Raises:
            ValueError: there is no such file, or it is not one of gates.
        """
        try:
            changed = Path(path).stat().st_mtime_ns
        except OSError as error:
            raise ValueError(f"weights must be a file of gates, got {path!r}: {error.strerror}") from None
        return _read(path, changed)

    def gate(self, model: str, layer: int, heads: int, dim: int, device: torch.device) -> Gate:
        """The gate of one layer with `heads` heads of `dim` channels, on `device`.

        Raises:
            ValueError: the file has none for it, or one of another shape.
        """
        found = self.gates.get((model, layer))
        if found is None:
            known = ", ".join(f"{name} {number}" for name, number in sorted(self.gates))
            raise ValueError(f"weights {self.path!r} have no gate for {model} layer {layer}; they have {known}")
        if found.q.shape[:2] != (heads, dim):
            raise ValueError(
                f"weights {self.path!r} are for {found.q.shape[0]} heads of {found.q.shape[1]} channels, got {heads} "
                f"of {dim}; train gates with this model"
            )
        return _on(self, model, layer, device)


def write_gates(path: str | Path, gates: Mapping[tuple[str, int], Gate], block: int) -> None:
    """Write `gates` by transformer and layer, trained for blocks of `block` tokens; an error leaves what was there.

    Raises:
        OSError: the file cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    for (model, layer), gate in gates.items():
        tensors |= {f"{model}.{layer}.q": gate.q.contiguous(), f"{model}.{layer}.k": gate.k.contiguous()}
    with replacing(path) as partial:
        save_file(tensors, partial, metadata={"format": FORMAT, "block": str(block)})


@lru_cache(maxsize=4)
def _read(path: str, changed: int) -> GateFile:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"weights {path!r} cannot be read: {error}") from None
    if metadata.get("format") != FORMAT or not metadata.get("block", "").isdecimal():
        raise ValueError(f"weights {path!r} must be of format {FORMAT!r}, got {metadata.get('format')!r}")
    gates = {}
    for name, q in tensors.items():
        model, layer, part = name.rsplit(".", 2)
        if part == "q":
            gates[model, int(layer)] = _checked(path, name, Gate(q, tensors.get(f"{model}.{layer}.k", q)))
    return GateFile(path, int(metadata["block"]), gates)


def _checked(path: str, name: str, gate: Gate) -> Gate:
    heads, dim, size = gate.q.shape
    if gate.k.shape != (heads, 3 * dim, size):
        raise ValueError(
            f"weights {path!r} must have {(heads, 3 * dim, size)} beside {name}, got {tuple(gate.k.shape)}"
        )
    return gate


@lru_cache(maxsize=512)
def _on(file: GateFile, model: str, layer: int, device: torch.device) -> Gate:
    return file.gates[model, layer].to(device)
