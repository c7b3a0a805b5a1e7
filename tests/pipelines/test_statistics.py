"""Statistics: times are of the device that they are asked for."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dit_sparse.pipelines.statistics import Stopwatch


def test_a_stopwatch_goes_by_the_stream_of_its_own_device(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self, stream: Any = None) -> None:
            given.append(stream)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: ("stream of", device))
    other = torch.device("cuda", 1)
    Stopwatch(other).stop()
    assert given == [("stream of", other)] * 2
