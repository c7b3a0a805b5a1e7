"""Files that do not bear their names until they are whole, and what becomes of those that never get there.

Folders may be shared by machines and containers, whose processes have the same numbers.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

__all__ = [
    "owner",
    "owner_of",
    "partial_path",
    "place",
    "remove",
    "remove_own_partials",
    "remove_partials",
    "replacing",
]

_PREFIX = ".partial-"
_TOKEN = secrets.token_hex(3)
_LONGEST_NAME = 180  # bytes; file systems take 255 with what stands before and behind


def owner() -> str:
    """This process, told from all others that may see the same folder: its host, its number and a random token."""
    return f"{_host()}-{os.getpid()}-{_TOKEN}"


def partial_path(path: Path, owned_by: str = "") -> Path:
    """What `path` is called until it is whole.

    Args:
        owned_by: the `owner` without whom nobody wants the file, and after a hyphen what tells several writers apart;
            this process where it is left out.
    """
    name = os.fsencode(path.name)[-_LONGEST_NAME:].decode(errors="ignore")
    return path.with_name(f"{_PREFIX}{owned_by or owner()}-{name}")


def owner_of(partial: Path) -> str:
    """The `owner` of a partial file."""
    return "-".join(_parts(partial))


def place(partial: Path, path: Path) -> None:
    """Give the file or folder `partial` its name, in place of what bears it."""
    try:
        if path.is_dir():
            # A folder cannot be replaced in one move.
            shutil.rmtree(path)
        os.replace(partial, path)
    finally:
        remove(partial)


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A name of the caller's own to write the file `path` under; it takes its place at the end, but for an error."""
    partial = partial_path(Path(path), f"{owner()}-{secrets.token_hex(4)}")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        remove(partial)


def remove(path: Path) -> None:
    """Remove the file or folder `path`, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def remove_partials(folder: Path) -> None:
    """Remove what processes of this machine or container that no longer run left unfinished in `folder`.

    Nobody here can tell whether those of others run, so what they left stays.
    """
    for path in folder.glob(f"{_PREFIX}{_host()}-*"):
        _, pid, token = _parts(path)
        # A number may be taken again: what bears ours and another token is not ours.
        if pid.isdecimal() and (not _alive(int(pid)) or (int(pid) == os.getpid() and token != _TOKEN)):
            remove(path)


def remove_own_partials(folder: Path) -> None:
    """Remove what this process, or workers that write for it, left unfinished in `folder`."""
    for path in folder.glob(f"{_PREFIX}{owner()}-*"):
        remove(path)


def _parts(partial: Path) -> tuple[str, str, str]:
    host, pid, token, *_ = (*partial.name.removeprefix(_PREFIX).split("-", 3), "", "", "")
    return host, pid, token


@cache
def _host() -> str:
    """Where a process's number means something: the machine, or the container with processes of its own."""
    try:
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:
        namespace = ""
    return hashlib.sha256(f"{socket.gethostname()} {namespace}".encode()).hexdigest()[:8]


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True
