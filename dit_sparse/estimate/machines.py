"""Devices and what connects them; attention's own coefficients are those of the cost model."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from dit_sparse.cost import DeviceCosts, read_table
from dit_sparse.cost.table import OWN_TABLE
from dit_sparse.methods import nearest

__all__ = ["MACHINES", "Machine", "find_machine"]


@dataclass(frozen=True)
class Machine:
    """Coefficients of one device beside attention's.

    Args:
        source: where they come from, for people.
        costs: name of its entry in the cost model's table.
        backend: the sparse kernel that runs there.
        itemsize: bytes an element.
        linear: operations a second of the linear layers.
        stream: seconds a byte of the hidden state and layer, for all that is neither attention nor a linear layer;
            where that runs in one pass each ("fused"), and where not ("plain").
        memory: bytes of one device.
        node: devices of one host.
        link, network: bytes a second that a device sends to those of its host, and to those of others.
        latency: seconds of one exchange, whatever its size.
        merge: seconds a byte of a device's share of the hidden state, for each part of a ring that is merged into it.
    """

    source: str
    costs: str
    backend: str
    itemsize: int
    linear: float
    stream: dict[str, float]
    memory: float
    node: int
    link: float
    network: float
    latency: float
    merge: float

    @property
    def attention(self) -> DeviceCosts:
        """The cost model's coefficients."""
        return read_table(OWN_TABLE)[self.costs]


MACHINES = {
    name: Machine(**entry)
    for name, entry in json.loads(Path(__file__).with_name("machines.json").read_text("utf-8")).items()
}


def find_machine(name: str) -> Machine:
    """The device called `name`, such as "h100".

    Raises:
        ValueError: an unknown name; all known ones are named.
    """
    if name.lower() not in MACHINES:
        raise ValueError(f"unknown device {name!r}; {nearest(name.lower(), MACHINES)}")
    return MACHINES[name.lower()]
