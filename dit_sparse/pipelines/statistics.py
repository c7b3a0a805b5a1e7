"""What a run did: densities, dense calls and why, time of planning and of attention."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

_LISTS = ("layer", "calls", "density", "predicted", "skipped")

CHANGED = "changed by diffusers"
"""The reason of the dense calls of a family whose upstream code has changed."""

EVERY_BLOCK = "every block kept"
"""The reason of the calls whose plan leaves nothing out."""


class Stopwatch:
    """Seconds between construction and `stop`; on a GPU by events, so that nothing waits until they are read.

    Args:
        device: whose current stream the events are of; it need not be the current device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._events: tuple[torch.cuda.Event, torch.cuda.Event] | None = None
        self._seconds = 0.0
        if device.type == "cuda":
            self._events = (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
            self._events[0].record(torch.cuda.current_stream(device))
        self._start = time.perf_counter()

    def stop(self) -> Stopwatch:
        if self._events is not None:
            self._events[1].record(torch.cuda.current_stream(self._device))
        else:
            self._seconds = time.perf_counter() - self._start
        return self

    @property
    def seconds(self) -> float:
        if self._events is not None:
            self._events[1].synchronize()
            self._seconds = self._events[0].elapsed_time(self._events[1]) / 1e3
            self._events = None
        return self._seconds


@dataclass(frozen=True, eq=False)
class CallRecord:
    """One self-attention call.

    Args:
        layer, step, branch, model: where it was.
        density: `[B|1, H|1]` float64 share of query-key pairs computed, those that were skipped counted as half, or
            `None` for a dense call.
        reason: why it was dense; empty for a sparse one.
        backend: which backend ran.
        attention, planning: their stopwatches; `planning` is `None` where the plan was reused.
        predicted: time that sparse attention would have taken over dense attention's, where that is why it was dense.
        skipped: `[B, H]` float64 share of all query-key pairs that were skipped: kept by the plan and without a product
            with values. `None` where the plan skips nothing.
        all_asked: whether the method was asked for every block, so that a density of 1 is what was wanted.
    """

    layer: int
    step: int
    branch: str
    model: str
    density: Tensor | None
    reason: str
    backend: str
    attention: Stopwatch
    planning: Stopwatch | None = None
    predicted: float | None = None
    skipped: Tensor | None = None
    all_asked: bool = False


@dataclass
class RunStatistics:
    """The self-attention calls of one run of a pipeline, and their sums."""

    records: list[CallRecord] = field(default_factory=list)

    def settle(self) -> list[tuple[str, int]]:
        """Count calls whose plan turned out to keep every block, unasked, as dense ones.

        It reads densities back from the device, so it has its place after a run and not in it.

        Returns:
            Model and layer of those of which all calls that were to be sparse are such.
        """
        open_calls = [(i, r.density) for i, r in enumerate(self.records) if r.density is not None and not r.all_asked]
        least = _least([density for _, density in open_calls])
        for (i, _), density in zip(open_calls, least, strict=True):
            if density == 1:
                self.records[i] = replace(self.records[i], density=None, reason=EVERY_BLOCK)
        sparse: dict[tuple[str, int], bool] = {}
        for r in self.records:
            if not r.all_asked and (r.density is not None or r.reason == EVERY_BLOCK):
                sparse[r.model, r.layer] = sparse.get((r.model, r.layer), False) or r.density is not None
        return sorted(place for place, ran_sparse in sparse.items() if not ran_sparse)

    @property
    def calls(self) -> int:
        return len(self.records)

    @property
    def dense_calls(self) -> dict[str, int]:
        """Number of dense calls by reason: "warm-up", "layer", "search", "outside a run", ..."""
        return dict(Counter(r.reason for r in self.records if r.density is None))

    def latest_was_sparse(self, layer: int) -> bool:
        """Whether the latest call was a sparse one of `layer`."""
        return bool(self.records) and self.records[-1].layer == layer and self.records[-1].density is not None

    @property
    def was_ever_sparse(self) -> bool:
        return any(r.density is not None for r in self.records)

    @property
    def backends(self) -> dict[str, int]:
        """Number of calls by the backend that ran."""
        return dict(Counter(r.backend for r in self.records))

    @property
    def density(self) -> float | None:
        """Share of query-key pairs computed over the whole run, dense calls counted as 1; `None` before any call.

        A pair that was skipped counts as half: a score, but no product with values.
        """
        return _mean([1.0 if r.density is None else float(r.density.mean()) for r in self.records])

    @property
    def sparse_density(self) -> float | None:
        """The same over the sparse calls alone; `None` when there were none."""
        return _mean([float(r.density.mean()) for r in self.records if r.density is not None])

    @property
    def skipped(self) -> float | None:
        """Share of all query-key pairs that were skipped, over the calls whose plan skips; `None` without any."""
        return _mean([float(r.skipped.mean()) for r in self.records if r.skipped is not None])

    @property
    def attention_seconds(self) -> float:
        return sum(r.attention.seconds for r in self.records)

    @property
    def plan_seconds(self) -> float:
        return sum(r.planning.seconds for r in self.records if r.planning is not None)

    def layers(self) -> list[dict[str, Any]]:
        """Per transformer block: calls, dense calls by reason, mean density of each head over its sparse calls."""
        return [_layer_summary(model, layer, records) for (model, layer), records in self._by_layer()]

    def receipts(self) -> dict[str, Any]:
        """What every layer ran, in short, by transformer: lists with an entry a layer.

        "layer" numbers them; "calls" counts their calls; "density" is the share of query-key pairs computed, dense
        calls counted as 1 and pairs that were skipped as half; "dense" counts the dense calls by reason; "predicted" is
        there where sparse attention was not faster in some layers: its predicted time over dense attention's there, and
        `None` elsewhere; "skipped" is there where blocks are skipped: the share of all pairs in those calls.
        """
        found: dict[str, Any] = {}
        for (model, layer), records in self._by_layer():
            part = RunStatistics(records)
            own = found.setdefault(model, {name: [] for name in _LISTS} | {"dense": {}})
            own["layer"].append(layer)
            own["calls"].append(part.calls)
            own["density"].append(round(part.density or 0.0, 4))
            own["predicted"].append(next((round(r.predicted, 2) for r in records if r.predicted is not None), None))
            own["skipped"].append(None if part.skipped is None else round(part.skipped, 4))
            for reason, count in part.dense_calls.items():
                own["dense"].setdefault(reason, {})[layer] = count
        for own in found.values():
            for name in ("predicted", "skipped"):
                if all(value is None for value in own[name]):
                    del own[name]
            own["dense"] = {
                reason: [counts.get(layer, 0) for layer in own["layer"]] for reason, counts in own["dense"].items()
            }
        return found

    def _by_layer(self) -> list[tuple[tuple[str, int], list[CallRecord]]]:
        groups: dict[tuple[str, int], list[CallRecord]] = {}
        for record in self.records:
            groups.setdefault((record.model, record.layer), []).append(record)
        return sorted(groups.items())

    def to_dict(self) -> dict[str, Any]:
        """Everything above, ready for JSON."""
        return {
            "calls": self.calls,
            "density": self.density,
            "sparse_density": self.sparse_density,
            "skipped": self.skipped,
            "dense_calls": self.dense_calls,
            "backends": self.backends,
            "attention_seconds": self.attention_seconds,
            "plan_seconds": self.plan_seconds,
            "layers": self.layers(),
        }


def _layer_summary(model: str, layer: int, records: list[CallRecord]) -> dict[str, Any]:
    part = RunStatistics(records)
    heads = [r.density.mean(0) for r in records if r.density is not None]
    width = max((h.shape[0] for h in heads), default=0)
    head_density = torch.stack([h.expand(width) for h in heads]).mean(0).tolist() if heads else None
    return {
        "model": model,
        "layer": layer,
        "calls": part.calls,
        "dense_calls": part.dense_calls,
        "head_density": head_density,
        "attention_seconds": part.attention_seconds,
        "plan_seconds": part.plan_seconds,
    }


def _least(densities: list[Tensor]) -> list[float]:
    """The least of each; every device is read once."""
    found = [0.0] * len(densities)
    for device in {density.device for density in densities}:
        places = [i for i, density in enumerate(densities) if density.device == device]
        values = torch.cat([densities[i].flatten() for i in places]).cpu()
        for i, own in zip(places, values.split([densities[i].numel() for i in places]), strict=True):
            found[i] = float(own.min())
    return found


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None
