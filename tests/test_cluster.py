"""Calls over Ray actors: each item once, work stealing, lost workers, and what is refused."""

import os
import signal
import socket
import sys
import time
from pathlib import Path

import pytest

from dit_sparse import cluster
from dit_sparse.cluster import ActorPool, NoWorkers, WorkerLost, connect, map_over_actors, portable


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
        died = len(list(folder.iterdir()))
        if died < often:
            (folder / str(died)).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return died


def _refuse(device):
    raise OSError("no model here")


def _die(device):
    os.kill(os.getpid(), signal.SIGKILL)


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
    assert results[-1] == (0, 6)
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
    assert sorted(told) == [(0, 1), (1, 1), (1, 2)]
    assert results[0] == 1
    assert isinstance(results[1], WorkerLost)
    assert "3 workers died" in str(results[1])
    assert results[2] in (0, 1)
    assert len(list((tmp_path / "always").iterdir())) == 3


def test_workers_that_cannot_start(ray_cluster, monkeypatch):
    with ActorPool(_refuse, workers=2) as pool, pytest.raises(OSError, match="no model here"):
        pool.call("double", 1)
    with ActorPool(_die, workers=1, retries=1) as pool, pytest.raises(NoWorkers, match="2 workers died"):
        pool.call("double", 1)


def test_maps_a_function(ray_cluster):
    """And leaves the connection that was there."""
    import ray

    assert sorted(map_over_actors(_double, [1, 2, 3], address="local", workers=1)) == [(0, 2), (1, 4), (2, 6)]
    assert ray.is_initialized()
    assert connect() is False


@pytest.mark.parametrize(
    ("device", "workers", "have", "expected"),
    [
        ("cuda", None, {"CPU": 32, "GPU": 8}, (8, {"num_gpus": 1, "num_cpus": 1})),
        ("cuda", 2, {"CPU": 4, "GPU": 8}, (2, {"num_gpus": 1, "num_cpus": 0.5})),
        ("cpu", None, {"CPU": 64}, (16, {"num_cpus": 4})),
        ("cpu", None, {"CPU": 2}, (1, {"num_cpus": 2})),
        ("cpu", 3, {"CPU": 2}, (3, {"num_cpus": 0.666})),
    ],
)
def test_shares_of_a_cluster(device, workers, have, expected):
    assert cluster._shares(device, workers, have) == expected


@pytest.mark.parametrize(
    ("device", "workers", "have", "message"),
    [
        ("cuda", None, {"CPU": 4}, "has no GPU"),
        ("cuda:1", None, {"CPU": 4, "GPU": 2}, "chooses the GPU"),
        ("auto", 3, {"CPU": 4, "GPU": 2}, "at most 2"),
        ("cpu", 0, {"CPU": 4}, "at least 1"),
    ],
)
def test_refuses_what_the_cluster_does_not_have(device, workers, have, message):
    with pytest.raises(ValueError, match=message):
        cluster._shares(cluster._device(device, have), workers, have)


def test_auto_takes_the_gpus_there_are():
    assert cluster._device("auto", {"GPU": 1}) == "cuda"
    assert cluster._device("auto", {"CPU": 8}) == "cpu"


def test_addresses_where_no_cluster_answers(monkeypatch):
    pytest.importorskip("ray", reason="needs Ray: pip install 'dit-sparse[ray]'")
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr(cluster, "_REACH_SECONDS", 2)
    for address in ("", "cluster", "host:port", "ray://host:10001", "host:99999"):
        with pytest.raises(ValueError, match="auto, local or HOST:PORT"):
            connect(address)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(ValueError, match="no Ray cluster answers"):
            connect(address)
    with pytest.raises(ValueError, match="no Ray cluster answers"):
        connect(address)


def test_without_ray_it_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=r"pip install 'dit-sparse\[ray\]'"):
        connect()


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(OSError, match="must share the working directory"):
        cluster._enter(str(Path(tmp_path, "none")))
