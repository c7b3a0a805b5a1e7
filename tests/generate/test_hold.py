"""One run at a time in a folder."""

from __future__ import annotations

import errno
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock

from dit_sparse.generate import Request, hold
from dit_sparse.generate.request import Clip

OWN = f"process {os.getpid()} on {socket.gethostname()}"


def request(folder: Path, *names: str) -> Request:
    clips = tuple(Clip(1, "a ball", 0, name=name) for name in names)
    return Request(("a ball",), {"method": "adaspa"}, folder, clips=clips)


def test_a_second_run_is_told_who_holds_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / "videos"
    with hold(request(folder)):
        assert [path.read_text() for path in folder.iterdir()] == [f"{OWN}\n"]
        with pytest.raises(ValueError, match=re.escape(f"--out {str(folder)!r} is in use by {OWN}, which")):
            hold(request(folder)).__enter__()
        assert [path.read_text() for path in folder.iterdir()] == [f"{OWN}\n"]
        with hold(request(tmp_path / "others")):
            pass
        (folder / "a.mp4").touch()
    assert [path.name for path in folder.iterdir()] == ["a.mp4"]
    with hold(request(folder)):
        pass


@pytest.mark.parametrize("where", ["", "videos", "one/two"])
def test_nothing_is_left_where_nothing_was_made(tmp_path: Path, where: str) -> None:
    with pytest.raises(KeyError), hold(request(tmp_path / where)):
        raise KeyError
    assert list(tmp_path.iterdir()) == []


def test_the_process_may_go_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "else").mkdir()
    monkeypatch.chdir(tmp_path)
    with hold(request(Path("videos"))):
        monkeypatch.chdir("else")
    assert [path.name for path in tmp_path.iterdir()] == ["else"]


def test_a_file_system_without_locks_is_left_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def acquire(lock: FileLock) -> None:
        Path(lock.lock_file).touch()
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(FileLock, "acquire", acquire)
    with pytest.raises(ValueError, match=r"cannot be locked by '\.dit-sparse\.lock': No locks available"):
        hold(request(tmp_path / "one" / "two")).__enter__()
    assert list(tmp_path.iterdir()) == []


def test_a_killed_run_holds_nothing(tmp_path: Path) -> None:
    code = "import os, signal, sys; from pathlib import Path; from dit_sparse.generate import Request, hold\n"
    code += "with hold(Request(('a ball',), {}, Path(sys.argv[1]))): os.kill(os.getpid(), signal.SIGKILL)"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    killed = subprocess.run([sys.executable, "-c", code, tmp_path], env=environment, check=False)
    assert killed.returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert left.read_text() != f"{OWN}\n"
    with hold(request(tmp_path)):
        assert left.read_text() == f"{OWN}\n"
    assert list(tmp_path.iterdir()) == []


def test_shards_share_a_folder_and_no_shard_is_made_twice(tmp_path: Path) -> None:
    with hold(request(tmp_path, "a", "b")), hold(request(tmp_path, "c")):
        assert len(list(tmp_path.iterdir())) == 2
        with pytest.raises(ValueError, match="is in use by"):
            hold(request(tmp_path, "c")).__enter__()


def test_a_folder_that_cannot_be_locked(tmp_path: Path) -> None:
    (tmp_path / ".dit-sparse.lock").mkdir()
    with pytest.raises(ValueError, match=r"cannot be locked by '\.dit-sparse\.lock': Is a directory"):
        hold(request(tmp_path)).__enter__()
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="cannot be written"):
        hold(request(tmp_path / "file")).__enter__()
