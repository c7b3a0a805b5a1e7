"""What scripts share that put several reports of theirs together in one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def merged_environment(
    reports: Sequence[Mapping[str, Any]], names: Sequence[object], fields: Sequence[str]
) -> dict[str, Any]:
    """The environment of all `reports`, with every commit that they are of.

    Args:
        reports: at least one.
        names: what messages call them.
        fields: what must be equal in all beside their environments, but for the commit.

    Raises:
        ValueError: reports of different machines, versions or `fields`.
    """
    first = reports[0]
    for report, name in zip(reports, names, strict=True):
        for field in ("environment", *fields):
            if _but_commit(report[field]) != _but_commit(first[field]):
                raise ValueError(f"--merge: the {field} of {name} is not that of {names[0]}: merge like with like")
    commits = dict.fromkeys(report["environment"]["commit"] for report in reports)
    return {**first["environment"], "commit": ", ".join(commits)}


def _but_commit(value: Any) -> Any:
    return {name: own for name, own in value.items() if name != "commit"} if isinstance(value, dict) else value
