"""Ranks that do what the process that started them asks for."""

import multiprocessing
from dataclasses import replace

import pytest

from dit_sparse.cluster import WorkerLost
from dit_sparse.generate import Request, prepare
from dit_sparse.generate.group import RankGroup
from dit_sparse.partials import partial_path
from tests.generate.workers import KillingWorker, hold_sleeping_ranks, refuse
from tests.pipelines.tiny import make_tiny_wan
from tests.processes import FORKSERVER, alive, within


def test_ranks_take_calls_until_one_is_killed(tmp_path):
    size = {"height": 64, "width": 64, "frames": 9, "steps": 2, "guidance": 5.0}
    config = {"method": "adaspa", "density": 0.3, "block": 8}
    model = str(make_tiny_wan(tmp_path / "tiny"))
    alone = Request(("a red ball",), config, tmp_path / "out", model, device="cpu", format="png", **size)
    job = prepare(alone)
    sign = partial_path(tmp_path / "shared")
    sign.touch()

    group = RankGroup(replace(alone, parallel="ulysses=2,timeout=60"), KillingWorker)
    assert group.call("whoami") == {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}
    with pytest.raises(FileNotFoundError, match="no such luck"):
        group.call("refuse")
    rendered, _ = group.call("render", job.settings, job.todo[0], sign)
    assert (rendered.line["parallel"], rendered.line["key"]) == ("ulysses=2,timeout=60", job.settings.key(job.todo[0]))
    assert len(list(rendered.partial.iterdir())) == 9

    first, second = group._processes
    with pytest.raises(WorkerLost, match=r"^rank 1 was killed by SIGKILL$"):
        group.call("render_and_kill", second.pid, job.settings, job.todo[0], sign)
    assert not first.is_alive()
    with pytest.raises(WorkerLost, match=r"^rank [01] was killed by SIGKILL$"):
        group.call("whoami")


def test_what_a_rank_cannot_start_with_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(multiprocessing, "get_context", lambda _: FORKSERVER)
    request = Request(("a",), {"method": "dense"}, tmp_path / "out", device="cpu", parallel="ulysses=2")
    with pytest.raises(OSError, match="no model here"):
        RankGroup(request, refuse)


def test_busy_ranks_end_when_the_process_that_started_them_is_killed(tmp_path):
    request = Request(("a",), {"method": "dense"}, tmp_path / "out", device="cpu", parallel="ulysses=2")
    parent = FORKSERVER.Process(target=hold_sleeping_ranks, args=(request, tmp_path))
    parent.start()
    try:
        assert within(200, lambda: len(list(tmp_path.iterdir())) >= 2 or not parent.is_alive())
        ranks = [int(path.name) for path in tmp_path.iterdir()]
        assert len(list(filter(alive, ranks))) >= 2
    finally:
        parent.kill()
    assert within(20, lambda: not any(map(alive, ranks))), "ranks outlive their parent"
