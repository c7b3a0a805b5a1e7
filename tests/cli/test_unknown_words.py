"""Words that the demo model does not know are named before anything is made, and are not those of the documentation."""

import importlib
import re
import shlex
from pathlib import Path

import pytest

from dit_sparse.demo import unknown_words
from tests.cli.command import SMALL, exit_code

README = Path(__file__).resolve().parents[2] / "README.md"
WARNING = "warning: the demo model ignores words that it does not know: cat, walks\n"
COMMANDS = {
    "generate": ["generate"],
    "analyze": ["analyze", "--methods", "adaspa"],
    "calibrate": ["calibrate"],
    "calibrate for a quality": ["calibrate", "--method", "lea", "--error", "0.5"],
    "compare": ["compare", "--methods", "adaspa"],
}


class Stopped(Exception):
    pass


def _stop(*_, **__):
    raise Stopped


@pytest.fixture(autouse=True)
def _stops_before_the_first_step(monkeypatch):
    monkeypatch.setattr(importlib.import_module("dit_sparse.generate.run"), "run", _stop)
    monkeypatch.setattr("dit_sparse.calibrate.command.prepare", _stop)
    monkeypatch.setattr("dit_sparse.analyze.command.prepare", _stop)
    monkeypatch.setattr("dit_sparse.compare.prepare", _stop)


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_a_warning_names_them(capsys, command):
    with pytest.raises(Stopped):
        exit_code(*command, *SMALL, "--prompt", "A cat walks.", "--prompt", "a red cat")
    assert capsys.readouterr().err.count(WARNING) == 1


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_no_warning_where_all_are_known_or_another_model_is_meant(model, capsys, command):
    for prompt, own in (("A red ball.", []), ("A cat walks.", ["--model", model])):
        with pytest.raises(Stopped):
            exit_code(*command, *SMALL, *own, "--prompt", prompt)
        assert "warning" not in capsys.readouterr().err


def test_the_commands_of_the_readme_use_words_that_it_knows():
    lines = re.findall(r"^dit-sparse .*--prompt .*$", README.read_text("utf-8"), re.MULTILINE)
    words = [shlex.split(line, comments=True) for line in lines if "--model" not in line]
    assert len(words) >= 2
    assert [unknown_words(line[line.index("--prompt") + 1]) for line in words] == [[]] * len(words)
