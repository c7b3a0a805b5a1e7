"""Files that are whole or do not bear their names, in folders that processes of other machines share."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dit_sparse.partials import (
    owner,
    owner_of,
    partial_path,
    place,
    remove_own_partials,
    remove_partials,
    replacing,
)
from tests.processes import left_by

PRINT = (
    "from pathlib import Path; from dit_sparse.partials import partial_path; print(partial_path(Path('a.mp4')).name)"
)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_removes_only_what_dead_processes_of_this_machine_left(tmp_path: Path) -> None:
    dead = subprocess.run([sys.executable, "-c", PRINT], capture_output=True, text=True, check=True).stdout.strip()
    elsewhere = dead.replace(owner().split("-")[0], "0a1b2c3d")
    mine = partial_path(tmp_path / "c.mp4")
    for name in (dead, elsewhere, left_by(os.getppid(), "b.mp4"), "d.mp4"):
        (tmp_path / name).write_text("half")
    mine.write_text("in work")
    (tmp_path / left_by(999999999, "folder")).mkdir()
    remove_partials(tmp_path)
    assert names(tmp_path) == {elsewhere, left_by(os.getppid(), "b.mp4"), mine.name, "d.mp4"}


def test_what_an_earlier_process_of_the_same_number_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / left_by(os.getpid(), "a.mp4")).write_text("half")
    remove_partials(tmp_path)
    assert not names(tmp_path)


def test_two_containers_do_not_share_a_partial_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their processes have equal numbers, and with the host's network equal names too."""
    import dit_sparse.partials as module

    monkeypatch.setattr(os, "readlink", lambda path: "pid:[1]")
    monkeypatch.setattr(module, "_host", module._host.__wrapped__)
    here = owner()
    monkeypatch.setattr(os, "readlink", lambda path: "pid:[2]")
    assert owner() != here
    assert owner().split("-")[1:] == here.split("-")[1:]


def test_a_run_that_ends_removes_its_own_and_its_workers(tmp_path: Path) -> None:
    own = partial_path(tmp_path / "a.mp4")
    workers = partial_path(tmp_path / "b-c.mp4", f"{owner_of(own)}-0a1b2c3d")
    others = (left_by(999999999, "c.mp4"), left_by(os.getpid(), "d.mp4"), own.name.replace(owner(), f"x{owner()}"))
    for path in (own, workers, *(tmp_path / name for name in others)):
        path.write_text("half")
    assert owner_of(own) == owner_of(workers) == owner()
    remove_own_partials(tmp_path)
    assert names(tmp_path) == set(others)


def test_the_longest_names_have_partial_ones(tmp_path: Path) -> None:
    for name in ("a" * 251 + ".mp4", "ü" * 125 + ".mp4"):
        with replacing(tmp_path / name) as partial:
            assert partial.suffix == ".mp4"
            partial.write_text("whole")
        longest = partial_path(tmp_path / name, f"{owner()}-0a1b2c3d").name + ".dense.mp4"
        assert len(longest.encode()) <= 255
    assert len(names(tmp_path)) == 2


def test_a_file_is_replaced_at_the_end_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("old")

    def interrupted() -> None:
        with replacing(path) as partial:
            partial.write_text("new")
            assert path.read_text() == "old"
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert (names(tmp_path), path.read_text()) == ({"a.json"}, "old")
    with replacing(str(path)) as partial, replacing(path) as other:
        assert partial != other
        other.write_text("other")
        partial.write_text("new")
    assert (names(tmp_path), path.read_text()) == ({"a.json"}, "new")


def test_a_folder_takes_the_place_of_a_folder(tmp_path: Path) -> None:
    path, partial = tmp_path / "a", partial_path(tmp_path / "a")
    for folder, name in ((path, "old"), (partial, "new")):
        folder.mkdir()
        (folder / name).touch()
    place(partial, path)
    assert names(path) == {"new"}
    assert names(tmp_path) == {"a"}
