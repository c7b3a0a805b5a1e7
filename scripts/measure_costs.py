"""Measure the coefficients of the cost model, and write them into a table of devices.

    python scripts/measure_costs.py --device cpu --name cpu      # into the package's own table
    python scripts/measure_costs.py --device cuda --name H200
    python scripts/measure_costs.py --device cpu --out costs.json

A name is a part of what torch calls the device. `dit-sparse doctor --measure` does the same for this machine alone, and
changes nothing of the package.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from dit_sparse.bench.costs import measure_costs
from dit_sparse.bench.report import write_report
from dit_sparse.cost import device_name, read_table
from dit_sparse.cost.table import OWN_TABLE


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--name", help="by which the device is found; by default cpu, or the GPU's whole name")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=OWN_TABLE)
    options = parser.parse_args()
    device = torch.device(options.device)
    name = options.name or device_name(device)
    table = json.loads(options.out.read_text("utf-8")) if options.out.exists() else {}
    table[name] = measure_costs(device, rounds=options.rounds)
    write_report(table, options.out)
    read_table(options.out)
    print(json.dumps(table[name], indent=1))


if __name__ == "__main__":
    main()
