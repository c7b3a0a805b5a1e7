"""Calls over Ray actors: each item once, work stealing, lost workers."""

import os
import signal
import time
from pathlib import Path

import pytest

from dit_sparse.cluster import ActorPool, NoWorkers, WorkerLost, connect, map_over_actors, portable
from dit_sparse.cluster.connection import _reach
from dit_sparse.cluster.pool import _enter

GONE = "its process is gone"


class _Odd(Exception):
    """Pickles and cannot be read again."""

    def __init__(self, a, b):
        super().__init__(f"{a} {b}")


class Task:
    """What the workers of these tests hold."""

    def __init__(self, device):
        self.device = device

    def whoami(self):
        return self.device, os.getpid(), os.getcwd()

    def double(self, number):
        return 2 * number

    def patient(self, number, folder):
        """The first item ends when all others have."""
        (folder / str(number)).touch()
        deadline = time.monotonic() + 200
        while number == 0 and len(list(folder.iterdir())) < 6 and time.monotonic() < deadline:
            time.sleep(0.01)
        return len(list(folder.iterdir()))

    def fail(self, kind):
        raise {"value": ValueError("no such luck"), "odd": _Odd(1, 2)}[kind]

    def die(self, often, folder):
        """Half of the deaths are told of, as by an object that has lost a process of its own."""
        died = len(list(folder.iterdir()))
        if died < often:
            (folder / str(died)).touch()
            if died % 2:
                raise WorkerLost(f"death {died}")
            os.kill(os.getpid(), signal.SIGKILL)
        return died


def _refuse(device):
    raise OSError("no model here")


def _die(device):
    os.kill(os.getpid(), signal.SIGKILL)


def _lose(device):
    raise WorkerLost("a process of its own is gone")


def _double(number):
    return 2 * number


@pytest.fixture
def pool(ray_cluster):
    with ActorPool(Task, workers=2) as pool:
        yield pool


def test_each_item_once(pool):
    assert (pool.device, pool.workers) == ("cpu", 2)
    assert sorted(pool.map("double", [(n,) for n in range(20)])) == [(n, 2 * n) for n in range(20)]
    assert list(pool.map("double", [])) == []


def test_a_busy_worker_keeps_nothing_from_the_others(pool, tmp_path):
    results = list(pool.map("patient", [(n, tmp_path) for n in range(6)]))
    assert results.index((0, 6)) >= 4  # the last of the others may come after it
    assert {index for index, _ in results} == set(range(6))


def test_workers_stand_in_the_same_folder(ray_cluster, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with ActorPool(Task, device="cpu", workers=1) as pool:
        device, pid, folder = pool.call("whoami")
    assert (device, folder) == ("cpu", str(tmp_path))
    assert pid != os.getpid()


def test_exceptions_arrive_as_they_were_raised(pool):
    with pytest.raises(ValueError, match=r"^no such luck$"):
        pool.call("fail", "value")
    results = dict(pool.map("fail", [("odd",), ("value",)]))
    assert type(results[0]) is RuntimeError
    assert str(results[0]) == "_Odd: 1 2"
    assert type(results[1]) is ValueError
    assert pool.call("double", 4) == 8
    assert type(portable(KeyError("a"))) is KeyError


@pytest.mark.timeout(120)
def test_lost_workers_are_replaced_and_a_deadly_item_given_up(pool, tmp_path):
    for name in ("once", "always"):
        (tmp_path / name).mkdir()
    items = [(1, tmp_path / "once"), (9, tmp_path / "always"), (0, tmp_path / "once")]
    told = []
    results = dict(pool.map("die", items, lambda *told_of: told.append(told_of)))
    assert sorted(told) == [(0, 1, GONE), (1, 1, GONE), (1, 2, "death 1")]
    assert results[0] == 1
    assert isinstance(results[1], WorkerLost)
    assert str(results[1]) == f"3 workers died of it: {GONE}"
    assert results[2] in (0, 1)
    assert len(list((tmp_path / "always").iterdir())) == 3


def test_workers_that_cannot_start(ray_cluster, monkeypatch):
    with ActorPool(_refuse, workers=2) as pool, pytest.raises(OSError, match="no model here"):
        pool.call("double", 1)
    with ActorPool(_die, workers=1, retries=1) as pool, pytest.raises(NoWorkers, match="2 workers died"):
        pool.call("double", 1)
    with ActorPool(_lose, workers=1, retries=0) as pool, pytest.raises(NoWorkers, match="a process of its own is gone"):
        pool.call("double", 1)


def test_maps_a_function(ray_cluster):
    """And leaves the connection that was there."""
    import ray

    assert sorted(map_over_actors(_double, [1, 2, 3], address="local", workers=1)) == [(0, 2), (1, 4), (2, 6)]
    assert ray.is_initialized()
    assert connect() is False


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(OSError, match="must share the working directory"):
        _enter(str(Path(tmp_path, "none")))


def test_a_cluster_that_wants_its_token_says_so(ray_cluster, monkeypatch):
    import ray

    if os.environ.get("RAY_AUTH_MODE") != "token":
        pytest.skip("this Ray has no tokens")
    address = ray.get_runtime_context().gcs_address
    _reach(address)
    monkeypatch.delenv("RAY_AUTH_MODE")
    with pytest.raises(ValueError, match=f"--ray {address}: the Ray cluster there wants its token: set RAY_AUTH_MODE"):
        _reach(address)
