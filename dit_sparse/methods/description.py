"""What a method says of itself in words, and the table of all methods made from it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from dit_sparse.methods.parameters import EVERY_STEP
from dit_sparse.types import Method

_COLUMNS = (
    "name",
    "class",
    "paper",
    "order of the tokens",
    "how blocks are scored",
    "how they are chosen",
    "planned",
    "planning",
    "what is cached",
    "differs from the paper",
)


class Description(NamedTuple):
    """A method in words, a few each; the class attribute `described` of a method.

    Args:
        order: how the tokens are ordered and cut into blocks.
        score: what a block is worth.
        selection: which blocks are kept.
        cached: what is kept between calls beside the plan; empty for nothing.
        differs: where it departs from its paper; empty for nowhere.
    """

    order: str
    score: str
    selection: str
    cached: str = ""
    differs: str = ""


def planned(method: Method) -> str:
    """When `method` makes a plan: static or dynamic, and how often."""
    if method.scope == "grid":
        return "static: once a grid"
    if method.scope == "layer":
        return "static: once a layer"
    if not method.refresh:
        return "dynamic: once a run"
    if method.refresh == EVERY_STEP:
        return "dynamic: at every step"
    shares = [f"{share:.0%}" for share in method.refresh]
    last = f"{', '.join(shares[:-1])} and {shares[-1]}" if len(shares) > 1 else shares[0]
    return f"dynamic: after the warm-up and at {last} of the steps"


def methods_table(methods: Mapping[str, type[Method]], costs: Mapping[str, float] | None = None) -> str:
    """The methods as a Markdown table, one a row.

    Args:
        methods: classes by name; each has a `described`.
        costs: time of one plan by name, as a share of one dense attention.

    Raises:
        ValueError: a method without `described`.
    """
    lines = [_row(_COLUMNS), _row(("---",) * len(_COLUMNS))]
    for name, cls in methods.items():
        words = getattr(cls, "described", None)
        if not isinstance(words, Description):
            raise ValueError(f"method {name!r} must have a class attribute described, a Description, got {words!r}")
        cost = None if costs is None else costs.get(name)
        cells = (
            f"`{name}`",
            f"`{cls.__name__}`",
            cls.paper,
            words.order,
            words.score,
            words.selection,
            planned(cls()),
            "" if cost is None else f"{cost:.1%}",
            words.cached,
            words.differs,
        )
        lines.append(_row(cells))
    return "\n".join(lines) + "\n"


def _row(cells: tuple[str, ...]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"
