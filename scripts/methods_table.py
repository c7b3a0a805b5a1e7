"""Write the table of methods into docs/methods.md, from the classes and the measured costs of planning.

    python scripts/methods_table.py            # write it
    python scripts/methods_table.py --check    # exit with 1 if the page has another table

The costs are those of docs/planning.json, which scripts/bench_planning.py writes.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from dit_sparse.methods import METHODS
from dit_sparse.methods.description import methods_table

DOCS = Path(__file__).resolve().parent.parent / "docs"
PAGE, COSTS = DOCS / "methods.md", DOCS / "planning.json"
START, END = "<!-- made by scripts/methods_table.py -->\n", "<!-- end -->\n"


def with_table(page: str) -> str:
    """`page` with the table between its two marks replaced.

    Raises:
        ValueError: a mark is missing.
    """
    before, start, rest = page.partition(START)
    _, end, after = rest.partition(END)
    if not start or not end:
        raise ValueError(f"{PAGE} must have the lines {START.strip()!r} and {END.strip()!r}, got a page without")
    return f"{before}{START}\n{methods_table(METHODS, planning_costs())}\n{END}{after}"


def planning_costs() -> dict[str, float]:
    """Time of one plan of each method over that of one dense attention, as measured."""
    if not COSTS.exists():
        return {}
    return {row["method"]: row["share_of_dense"] for row in json.loads(COSTS.read_text())["rows"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only compare")
    options = parser.parse_args()
    page = PAGE.read_text("utf-8")
    if options.check:
        sys.exit(0 if with_table(page) == page else f"{PAGE} has another table; run scripts/methods_table.py")
    PAGE.write_text(with_table(page), "utf-8")


if __name__ == "__main__":
    main()
