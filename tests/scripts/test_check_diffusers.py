"""Which releases are checked, as pyproject says; the guard tests themselves are in tests/pipelines."""

from __future__ import annotations

import check_diffusers
from packaging.requirements import Requirement


def test_the_oldest_and_the_newest_admitted_release_are_checked() -> None:
    requirements = [Requirement("torch>=2"), Requirement("diffusers<0.43,>=0.41")]
    assert check_diffusers.admitted(requirements) == ["diffusers==0.41", "diffusers<0.43,>=0.41"]
    own = [Requirement(text) for text in check_diffusers.project()["dependencies"]]
    assert check_diffusers.admitted(own)[0].startswith("diffusers==")


def test_fingerprints_are_printed_as_the_table_has_them(capsys) -> None:
    from dit_sparse.pipelines.upstream import WRITTEN_FOR

    check_diffusers.print_fingerprints()
    printed = eval("{" + capsys.readouterr().out + "}")
    assert printed.keys() == WRITTEN_FOR.keys()
    assert all(set(found) <= set(WRITTEN_FOR[path]) for path, found in printed.items())
