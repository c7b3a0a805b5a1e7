"""The connection to a Ray cluster."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

__all__ = ["connect"]

_REACH_SECONDS = 30
_OBJECT_STORE_BYTES = 128 * 2**20
"""What workers return is small, and Ray's own default takes a third of the memory."""


def connect(address: str = "auto") -> bool:
    """Connect to a Ray cluster.

    Args:
        address: "host:port" of a running cluster; "local" starts one on this machine, which ends with this process;
            "auto" takes the running one (`RAY_ADDRESS`, or found on this machine) or starts one.

    Returns:
        Whether this call connected, so that `ray.shutdown()` is the caller's to do; a process that is connected
        already stays so.

    Raises:
        ValueError: no ray, or no cluster at `address`.
    """
    # Ray reads it when it starts; nothing is sent home unless somebody asked for it.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError:
        raise ValueError("--ray needs Ray: pip install 'dit-sparse[ray]'") from None
    if ray.is_initialized():
        return False
    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    if address not in ("auto", "local"):
        _reach(address)
    try:
        if address != "local":
            ray.init(address=address, **quiet)
            return True
    except ConnectionError:
        if address != "auto":
            raise ValueError(f"--ray {address}: no Ray cluster answers there") from None
    except RuntimeError as error:  # another version of Ray or Python there
        raise ValueError(f"--ray {address}: {error}") from None
    ray.init(address="local", include_dashboard=False, object_store_memory=_OBJECT_STORE_BYTES, **quiet)
    return True


def _reach(address: str) -> None:
    """Make sure that a cluster answers at `address`; by itself Ray tries for minutes.

    Raises:
        ValueError: none does, or it wants its token.
    """
    host, _, port = address.rpartition(":")
    if not host or "/" in address or not port.isdigit() or not 0 < int(port) < 2**16:
        raise ValueError(f"--ray must be auto, local or HOST:PORT of a cluster, got {address!r}")
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
        command = [sys.executable, "-m", "ray.scripts.scripts", "status", "--address", address]
        ran = subprocess.run(command, capture_output=True, text=True, timeout=_REACH_SECONDS, check=False)
        answered, wants_token = ran.returncode == 0, "AuthenticationError" in ran.stderr
    except (OSError, subprocess.TimeoutExpired):
        answered = wants_token = False
    if wants_token:
        raise ValueError(
            f"--ray {address}: the Ray cluster there wants its token: set RAY_AUTH_MODE=token, and on a machine other "
            "than its head also RAY_AUTH_TOKEN (`ray get-auth-token` prints it on the head)"
        )
    if not answered:
        raise ValueError(f"--ray {address}: no Ray cluster answers there (`ray start --head` starts one)")
