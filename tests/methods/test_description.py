"""The table of methods in the docs is the one that the code makes."""

from __future__ import annotations

import re

import pytest
from methods_table import PAGE, with_table

from dit_sparse.methods import METHODS, AdaSpa, Dense
from dit_sparse.methods.description import Description, methods_table, planned


def test_the_page_has_the_table_of_the_code() -> None:
    page = PAGE.read_text("utf-8")
    assert with_table(page) == page, "run scripts/methods_table.py"


def test_every_method_describes_itself() -> None:
    for name, cls in METHODS.items():
        words = cls.described
        assert isinstance(words, Description), name
        assert all((words.order, words.score, words.selection)), name
        # A paper is cited once, by its id, and what differs is in the docstring too.
        assert re.search(r"arXiv \d{4}\.\d{5}", cls.paper), name
        assert not words.differs or "Differs from the paper" in (cls.__doc__ or ""), name


def test_when_a_method_plans() -> None:
    assert planned(Dense()) == "static: once a grid"
    assert planned(AdaSpa()) == "dynamic: after the warm-up and at 60% of the steps"


def test_a_cost_stands_in_its_row_and_pipes_are_escaped() -> None:
    class Piped(Dense):
        described = Description("a|b", "c", "d")

    row = methods_table({"piped": Piped}, {"piped": 0.123}).splitlines()[-1]
    assert "a\\|b" in row
    assert "| 12.3% |" in row


def test_a_method_without_words_is_named() -> None:
    class Silent(Dense):
        described = None

    with pytest.raises(ValueError, match="method 'silent' must have a class attribute described"):
        methods_table({"silent": Silent})
