"""Scores videos with VBench and prints the leaderboard's table: `dit-sparse vbench score`, then `vbench table`.

    python scripts/vbench_score.py VIDEOS --out SCORES [options of `dit-sparse vbench score`]

Leaves with the exit code of whatever failed.
"""

from __future__ import annotations

import argparse
import sys

from dit_sparse import cli


def main(arguments: list[str] | None = None) -> int:
    """Score, and print the table if everything was scored."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="vbench-scores", help="folder of the scores")
    parser.add_argument("--allow-partial", action="store_true", help="take what is there; gives no totals")
    options, rest = parser.parse_known_args(arguments)
    partial = ["--allow-partial"] if options.allow_partial else []
    for command in (["score", *rest, "--out", options.out, *partial], ["table", options.out, *partial]):
        try:
            cli.main(["vbench", *command])
        except SystemExit as stopped:
            if stopped.code:
                return int(stopped.code)
    return 0


if __name__ == "__main__":
    sys.exit(main())
