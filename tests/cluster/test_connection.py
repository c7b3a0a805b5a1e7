"""Clusters that are not there."""

import socket
import sys

import pytest

from dit_sparse.cluster import connect, connection


def test_addresses_where_no_cluster_answers(monkeypatch):
    pytest.importorskip("ray", reason="needs Ray: pip install 'dit-sparse[ray]'")
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr(connection, "_REACH_SECONDS", 2)
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
